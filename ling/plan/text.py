"""A plan as text for people."""

from __future__ import annotations

from collections.abc import Sequence

from ling.plan.layout import Stage
from ling.plan.memory import CONTEXT_GIB, FRAGMENTATION, StageMemory, fullest
from ling.plan.plan import Plan, mends
from ling.plan.timing import Cost

GIB = 2**30
BAR = 48
SHOWN_STAGES = 16


def duration(seconds: float) -> str:
    """`95 ms`, `12.3 s`, `48 min`, `13.5 h`, `21.4 days`."""
    for limit, unit, name in ((1, 1e-3, "ms"), (120, 1, "s"), (7200, 60, "min"), (172800, 3600, "h")):
        if seconds < limit:
            return f"{seconds / unit:.3g} {name}"
    return f"{seconds / 86400:.1f} days" if seconds < float("inf") else "for ever"


def big(number: float) -> str:
    """`16.3B`, `47.1M`."""
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.4g}{letter}"
    return f"{number:.4g}"


def columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows under each other; the first column to the left, the others to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        ).rstrip()
        for row in rows
    ]


def render(plan: Plan) -> str:
    """The whole plan."""
    counts, gpu = plan.counts, plan.cluster.gpu
    head = [
        f"model     {big(counts.total)} parameters{_without_mtp(plan)}, {big(counts.activated)} activated; "
        f"{plan.config.precision.recipe}, sequences of {plan.config.data.sequence_length}",
        f"layout    {plan.layout.world} x {gpu.name} ({plan.cluster.name}): {plan.layout.describe()}",
        f"batch     {plan.config.train.global_batch_size} sequences, {big(plan.tokens_per_step)} tokens; "
        f"{plan.microbatches} micro-batches of {plan.config.train.micro_batch_size}{_ramp(plan)}",
    ]
    sections = [head, _memory(plan), _time(plan), _run(plan)]
    if plan.notes:
        sections.append([f"note      {note}" for note in plan.notes])
    return "\n\n".join("\n".join(lines) for lines in sections)


def _ramp(plan: Plan) -> str:
    """How the batch grows before it is the one that the plan is of, where it does."""
    ramp = plan.config.train.rampup_batch_size
    return f"; from {ramp[0]} sequences by {ramp[1]} over the first {big(ramp[2])}" if ramp else ""


def _without_mtp(plan: Plan) -> str:
    """The total that model cards print, where it is another one."""
    counts = plan.counts
    return f" ({big(counts.total_without_mtp)} without MTP)" if counts.components.mtp else ""


def _memory(plan: Plan) -> list[str]:
    rows: list[Sequence[str]] = [
        ("stage", "layers", "parameters", "weights", "gradients", "optimizer", "activations", "transient", "needs")
    ]
    worst, _ = fullest(plan.memory)
    stages = list(zip(plan.layout.stages, plan.parameters, plan.memory, strict=True))
    shown = stages if len(stages) <= SHOWN_STAGES else [*stages[:4], stages[worst], stages[-1]]
    for stage, parameters, memory in dict.fromkeys(shown):
        sizes = (memory.weights, memory.gradients, memory.optimizer, memory.activations, memory.transient)
        name = f"{stage.index}{' *' if stage.index == worst else ''}"
        cells = [f"{size / GIB:.2f}" for size in (*sizes, memory.needed)]
        rows.append((name, _layers(stage), big(parameters), *cells))
    lines = [f"Memory of the fullest rank of each stage, in GiB (of {plan.cluster.gpu.memory_gib:g})", *columns(rows)]
    if len(shown) < len(stages):
        lines.append(f"({len(stages)} stages; --json has them all)")
    lines += ["", *_bar(plan, plan.memory[worst])]
    return lines


def _layers(stage: Stage) -> str:
    parts = [str(stage.num_layers)]
    parts += ["embedding"] if any(chunk.embedding for chunk in stage.chunks) else []
    parts += ["MTP"] if any(chunk.mtp for chunk in stage.chunks) else []
    parts += ["head"] if any(chunk.head for chunk in stage.chunks) else []
    return " + ".join(parts)


def _bar(plan: Plan, memory: StageMemory) -> list[str]:
    """The memory of the fullest rank as a bar: each letter is a part, the bar ends where the GPU does."""
    total = plan.cluster.gpu.memory_gib
    dynamic = memory.activations + memory.transient
    other = dynamic * (FRAGMENTATION - 1) / GIB + CONTEXT_GIB
    parts = (
        ("w", "weights", memory.weights / GIB),
        ("g", "gradients", memory.gradients / GIB),
        ("o", "optimizer", memory.optimizer / GIB),
        ("a", "activations", memory.activations / GIB),
        ("t", "transient", memory.transient / GIB),
        ("x", "context and fragmentation", other),
    )
    scale = BAR / max(total, memory.needed / GIB)
    bar, end = "", 0.0
    for letter, _, size in parts:
        end += size
        bar += letter * (round(end * scale) - len(bar))
    limit = round(total * scale)
    bar = bar.ljust(limit, ".")
    bar = bar[:limit] + "|" + bar[limit:]
    largest = max(parts[:-1], key=lambda part: part[2])
    legend = ", ".join(f"{letter} {name}" for letter, name, _ in parts)
    verdict = (
        f"fits: {-plan.over_gib:.1f} GiB to spare"
        if plan.fits
        else f"does NOT fit: {plan.over_gib:.1f} GiB too much; the largest part is {largest[1]}"
    )
    lines = [f"[{bar}]  {verdict}", f" {legend}; | the end of the GPU's memory"]
    if not plan.fits:
        lines += ["what would help:", *(f"  {mend}" for mend in mends(plan) or ["another layout: try --search"])]
    return lines


def _time(plan: Plan) -> list[str]:
    step = plan.step
    kinds = {
        "dense products": step.kinds.gemm,
        "expert products": step.kinds.grouped,
        "attention": step.kinds.attention,
        "output layer": step.kinds.head,
        "memory traffic": step.kinds.memory,
        "tensor-parallel": step.kinds.tensor_comm,
        "all-to-all": step.kinds.expert_comm,
        "host": step.kinds.host,
        "pipeline bubble": step.bubble,
        "pipeline sends": step.pipeline,
        "data-parallel": step.data,
        "optimizer": step.optimizer,
    }
    shares = sorted(((value, name) for name, value in kinds.items() if value / step.total > 0.005), reverse=True)
    per_device = plan.tokens_per_s / plan.layout.world
    return [
        f"Time of a step: {duration(step.total)}, {big(plan.tokens_per_s)} tokens/s, {per_device:,.0f} per GPU, "
        f"MFU {plan.mfu:.1%} (of the dense bf16 peak)",
        "  " + ", ".join(f"{name} {value / step.total:.0%}" for value, name in shares),
        f"  limited by: {_limit(step.kinds, shares[0][1])}; slowest stage {step.slowest_stage}"
        + (f"; imbalance of the experts {plan.imbalance:g}" if plan.config.model.num_moe_experts else ""),
    ]


def _limit(kinds: Cost, largest: str) -> str:
    advice = {
        "memory traffic": "memory bandwidth (fused kernels help)",
        "all-to-all": "the all-to-all of the experts (smaller EP, or EP within a node)",
        "tensor-parallel": "tensor-parallel traffic (smaller TP)",
        "pipeline bubble": "the pipeline bubble (more micro-batches, virtual stages, or fewer stages)",
        "data-parallel": "data-parallel traffic (overlap_grad_reduce, overlap_param_gather, a larger batch)",
        "host": "the host (larger micro-batches)",
    }
    return advice.get(largest, largest)


def _run(plan: Plan) -> list[str]:
    held, train = plan.reliability, plan.config.train
    interval = plan.config.checkpoint.save_interval or train.train_iters
    return [
        f"Run: {train.train_iters:,} steps, {big(plan.tokens)} tokens: {duration(plan.run_s)}, "
        f"{big(plan.gpu_hours)} GPU-hours, failures and saves included",
        f"  checkpoint: {held.checkpoint_bytes / 1e9:,.1f} GB, {duration(held.save_s)} to write; a failure every "
        f"{duration(held.mtbf_s)} (the cluster file's rate)",
        f"  save every {held.best_save_interval} steps ({duration(held.best_interval_s)}, Young/Daly): goodput "
        f"{held.best_goodput:.1%}; with checkpoint.save_interval={interval}: {held.goodput:.1%}",
    ]
