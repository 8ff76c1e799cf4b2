"""megatron-core's pipeline schedules, called one way whatever the layout."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any


def forward_backward(
    step: Callable[[Iterator[Any], Any], Any],
    batches: list[Iterator[Any]],
    chunks: list[Any],
    *,
    num_microbatches: int,
    micro_batch_size: int,
    sequence_length: int,
    forward_only: bool = False,
) -> list[dict[str, Any]]:
    """Run all micro-batches of a step through the pipeline.

    Args:
        step: `(iterator, model) -> (output, loss function)`.
        batches: one iterator per model chunk, each over the same micro-batches.
        chunks: this rank's model chunks.

    Returns:
        What the loss function reports per micro-batch, on the last stage; an empty list elsewhere.
    """
    from megatron.core.pipeline_parallel import get_forward_backward_func

    single = len(chunks) == 1
    return get_forward_backward_func()(
        forward_step_func=step,
        data_iterator=batches[0] if single else batches,
        model=chunks[0] if single else chunks,
        num_microbatches=num_microbatches,
        seq_length=sequence_length,
        micro_batch_size=micro_batch_size,
        forward_only=forward_only,
    )
