"""Weighted averages of checkpoints, in place of a learning-rate decay.

A run at a constant learning rate makes updates u_1, u_2, …; with the rate decayed by factors f_i it would end near
theta_0 + sum_i f_i u_i, if the updates were the same. Checkpoints theta_0 … theta_(k-1) hold the sums of updates, so

    theta_0 + sum_j f_j (theta_j - theta_(j-1))  =  sum_j c_j theta_j,    c_j = f_j - f_(j+1),  f_0 = 1, f_k = 0:

the weight of a checkpoint is what the decay loses between it and the next. This is the schedule "warm-up, stable,
merge" of Ling 2.0 (arXiv 2510.22115; WSM, arXiv 2507.17634). Only the weights are merged: there is no optimizer state
to go on with. The routers' expert biases are averaged like weights.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from ling.checkpoint.boxes import Box
from ling.checkpoint.folder import TOKENIZER, Manifest, partial_folder, read_manifest
from ling.checkpoint.names import STATE, state_key
from ling.checkpoint.parts import Part
from ling.checkpoint.publish import publish
from ling.checkpoint.torch_dist import Item, Reader, TensorInfo, write_file, write_index
from ling.checkpoint.versions import git_commit, versions
from ling.config.errors import UserError

FACTORS: dict[str, Callable[[float], float]] = {
    "linear": lambda progress: 1.0 - progress,
    "cosine": lambda progress: 0.5 * (1.0 + math.cos(math.pi * progress)),
    "1-sqrt": lambda progress: 1.0 - math.sqrt(progress),
}
"""Learning-rate factor, 1 to 0, as a function of the progress of a decay, 0 to 1."""

SCHEDULES = (*FACTORS, "mean")


def weights_of_schedule(steps: Sequence[int], schedule: str) -> list[float]:
    """What checkpoints weigh in the merge that stands for a decay from the first of them on.

    Args:
        steps: of the checkpoints, ascending. The decay ends one mean interval after the last: of k checkpoints at equal
            intervals the j-th has the progress j / k; updates after the last have the factor 0, for they are missing.
        schedule: a name of `FACTORS`, or `mean`: 1/k each, whatever the steps are (at equal intervals, as `linear`).

    Returns:
        A weight for each, not negative; their sum is 1.

    Raises:
        UserError: fewer than two checkpoints, or steps that do not ascend.
    """
    count = len(steps)
    if count < 2 or any(later <= earlier for earlier, later in zip(steps, steps[1:], strict=False)):
        raise UserError("a schedule needs two checkpoints or more, of different steps")
    if schedule == "mean":
        return [1.0 / count] * count
    length = (steps[-1] - steps[0]) * count / (count - 1)
    factors = [FACTORS[schedule]((step - steps[0]) / length) for step in steps] + [0.0]
    return [now - then for now, then in zip(factors, factors[1:], strict=False)]


def merge(
    sources: Sequence[Path], weights: Sequence[float], output: Path, progress: Callable[[int, int], None]
) -> Manifest:
    """Write the weighted average of checkpoints' models as a checkpoint without optimizer, in fp32.

    Master weights are averaged where the checkpoints have them. It goes box by box as the last of the checkpoints is
    stored, so a few of those boxes are in memory at any time; each box is read once if all have the same layout.

    Args:
        sources: checkpoints; the last gives step, config and tokenizer.
        weights: of the checkpoints; they must sum to 1.
        output: folder of the new checkpoint; must not exist.
        progress: called with the bytes done and the bytes in all.

    Raises:
        UserError: weights do not sum to 1, checkpoints are damaged or of different models, or the output exists.
    """
    if len(weights) != len(sources):
        raise UserError(f"{len(weights)} weights for {len(sources)} checkpoints; give one for each")
    if not math.isclose(sum(weights), 1.0, abs_tol=1e-6):
        raise UserError(f"the weights sum to {sum(weights):g}; they must sum to 1")
    if output.exists():
        raise UserError(f"{output} exists already; name another folder")
    manifests = [read_manifest(source, "always") for source in sources]
    readers = [Reader(source) for source in sources]
    _check_same_model(readers)
    partial = partial_folder(output)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    last = manifests[-1]
    try:
        _write_average(partial, readers, weights, progress)
        if (sources[-1] / TOKENIZER).is_dir():
            shutil.copytree(sources[-1] / TOKENIZER, partial / TOKENIZER)
        manifest = Manifest(
            step=last.step,
            consumed_samples=last.consumed_samples,
            config=last.config,
            world_size=1,
            versions=versions(),
            git_commit=git_commit(),
            merged=[
                {"checkpoint": str(source), "step": each.step, "weight": weight}
                for source, each, weight in zip(sources, manifests, weights, strict=True)
            ],
        )
        publish(partial, output, manifest, {})
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return manifest


def average(readers: Sequence[Reader], weights: Sequence[float], key: str, box: Box) -> torch.Tensor:
    """The weighted average of a box of a model tensor in fp32, summed in fp64; integers are those of the last."""
    shape = readers[-1].tensors[key].shape
    if not readers[-1].tensors[key].dtype.is_floating_point:
        target = torch.empty(box.size, dtype=readers[-1].tensors[key].dtype)
        readers[-1].load([Part(key, shape, box.start, target, (key,))])
        return target
    total = torch.zeros(box.size, dtype=torch.float64)
    one = torch.empty(box.size, dtype=torch.float32)
    for reader, weight in zip(readers, weights, strict=True):
        reader.load([Part(key, shape, box.start, one, (state_key("param", key), key))])
        total.add_(one, alpha=weight)
    return total.float()


def average_parts(
    parts: Sequence[Part], folders: Sequence[Path], weights: Sequence[float], threads: int
) -> list[torch.Tensor]:
    """The weighted average of checkpoints for parts of the model, in fp32, on the CPU."""
    sums = [torch.zeros(part.box.size) for part in parts]
    ones = [torch.empty(part.box.size) for part in parts]
    sources = [(state_key("param", part.key), part.key) for part in parts]
    wanted = [replace(part, tensor=one, sources=source) for part, one, source in zip(parts, ones, sources, strict=True)]
    for folder, weight in zip(folders, weights, strict=True):
        Reader(folder, threads).load(wanted)
        torch._foreach_add_(sums, ones, alpha=weight)
    return sums


def model_keys(reader: Reader) -> list[str]:
    """Names of the model's tensors in a checkpoint."""
    return [key for key in reader.tensors if not key.startswith(STATE)]


def _check_same_model(readers: Sequence[Reader]) -> None:
    last = readers[-1]
    for reader in readers[:-1]:
        ours, theirs = model_keys(last), model_keys(reader)
        different = sorted(set(ours) ^ set(theirs)) or [
            key for key in ours if last.tensors[key].shape != reader.tensors[key].shape
        ]
        if different:
            raise UserError(f"{reader.folder} and {last.folder} are of different models: they differ in {different[0]}")


def _write_average(
    partial: Path, readers: Sequence[Reader], weights: Sequence[float], progress: Callable[[int, int], None]
) -> None:
    last = readers[-1]
    by_file: dict[str, list[tuple[str, Box]]] = {}
    for key in model_keys(last):
        for box, stored in last.tensors[key].chunks:
            by_file.setdefault(stored.file, []).append((key, box))
    total = sum(box.numel for boxes in by_file.values() for _, box in boxes) * 4
    done = 0
    tensors: dict[str, TensorInfo] = {}

    def items(boxes: list[tuple[str, Box]]) -> Iterator[Item]:
        nonlocal done
        for key, box in boxes:
            merged = average(readers, weights, key, box)
            tensors.setdefault(key, TensorInfo(merged.dtype, last.tensors[key].shape, []))
            yield Item(key, box.start, merged)
            done += box.numel * 4
            progress(done, total)

    for number, boxes in enumerate(by_file.values()):
        _, written = write_file(partial / f"__0_{number}.distcp", items(boxes))
        for (key, box), where in zip(boxes, written, strict=True):
            tensors[key].chunks.append((box, where))
    write_index(partial, tensors, [])
