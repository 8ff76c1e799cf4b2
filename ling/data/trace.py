"""Which samples a rank takes in a step, and where their tokens come from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from ling.config.derived import consumed_samples_after, data_parallel_size, global_batch_size_at
from ling.config.errors import UserError
from ling.config.schema import Config
from ling.data.datasets import SampleStream


class StepOfRank(NamedTuple):
    """The samples of one rank in one step."""

    first: int  # of the global batch
    global_batch_size: int
    dp_rank: int
    dp_size: int
    micro_batches: list[list[int]]


def step_of_rank(config: Config, step: int, rank: int, world_size: int, run_dir: Path | None = None) -> StepOfRank:
    """The numbers of the samples that a rank takes in a step, counted from 1.

    run_dir: folder of a run, whose metrics.jsonl says what the steps before have consumed; without it they have taken
    what train.global_batch_size and train.rampup_batch_size say. Raises UserError for steps and ranks that the run does
    not have.
    """
    parallel, micro = config.parallel, config.train.micro_batch_size
    if not 0 <= rank < world_size:
        raise UserError(f"--rank {rank}: the ranks of {world_size} are 0 to {world_size - 1}; see --world")
    if step < 1:
        raise UserError(f"--step {step}: steps are counted from 1")
    before = consumed_samples_after(config, step - 1)
    batch = global_batch_size_at(config, before)
    noted = _noted(run_dir, step) if run_dir else None
    if noted is not None:
        batch = noted["global_batch_size"]
        before = noted["consumed_samples"] - batch
    dp_size = data_parallel_size(parallel, world_size)
    ranks_of_model = parallel.tensor_model_parallel_size * parallel.context_parallel_size
    if not dp_size or batch % (micro * dp_size):
        raise UserError(f"--world {world_size}: the layout and the global batch of {batch} do not fit this many ranks")
    dp_rank = rank // ranks_of_model % dp_size  # megatron-core's order: tensor, context, data, pipeline
    starts = range(before + dp_rank * micro, before + batch, micro * dp_size)
    return StepOfRank(before, batch, dp_rank, dp_size, [list(range(start, start + micro)) for start in starts])


def describe_sample(stream: SampleStream, number: int) -> dict[str, Any]:
    """Source, epoch, documents and token offsets `[begin, end)` of a sample, for JSON."""
    origin = stream.origin(number)
    return {
        "sample": number,
        "source": origin.source.name,
        "path": origin.source.path,
        "epoch": origin.epoch,
        "documents": [
            {"document": piece.document, "begin": piece.offset, "end": piece.offset + piece.tokens}
            for piece in origin.pieces
        ],
    }


def _noted(run_dir: Path, step: int) -> dict[str, Any] | None:
    path = run_dir / "metrics.jsonl"
    if not path.exists():
        return None
    with open(path, "rb") as lines:
        for line in lines:
            try:
                record = json.loads(line)
            except ValueError:  # the last line of a killed process
                continue
            if record.get("step") == step and "consumed_samples" in record:
                return record
    return None
