"""Published training speeds: what the planner's predictions are held against, and the tables of docs/planning.md.

Figures are the publishers' own. A row's layout is the published one; what was not published is said in `assumed`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from tests.plan.published_row import (
    GPT_OSS_20B,
    GPT_OSS_120B,
    H200,
    H800,
    LING_MINI,
    LING_STORAGE,
    LLAMA_8B,
    LLAMA_70B,
    QWEN_30B,
    QWEN_235B,
    Row,
)


def _pipeline(tp: int, pp: int, vpp: int | None, ep: int = 1, layers: list[int] | None = None) -> dict[str, Any]:
    return {
        "tensor_model_parallel_size": tp,
        "sequence_parallel": tp > 1,
        "pipeline_model_parallel_size": pp,
        "virtual_pipeline_model_parallel_size": vpp,
        "expert_model_parallel_size": ep,
        "num_layers_per_stage": layers,
    }


LING_RECIPE: dict[str, Any] = {"storage": LING_STORAGE, "deepep": True, "fp8_recipe": "blockwise", "cluster": H800}
EP8 = {"expert_model_parallel_size": 8}
FULL = {"recompute_granularity": "full"}
MOE = {"recompute_granularity": "selective", "recompute_modules": ["moe"]}
NO_MTP = replace(LING_MINI, mtp_num_layers=0)
BRIDGE, AUTOMODEL, TITAN, LING = "Megatron-Bridge", "NeMo Automodel", "torchtitan", "Ling-V2 README"
FSDP = "FSDP as data parallelism with the distributed optimizer"
TITAN_8B = f"{FSDP}; 2 sequences at a time, norms and activations recomputed"
OPS = {"recompute_granularity": "selective", "recompute_modules": ["layernorm", "activation"]}
DEMO = "the layout of the 4K demonstration script"
_235B = [3] * 30 + [2] * 2

ROWS: tuple[Row, ...] = (
    Row(
        "Ling-mini-2.0, 8K log",
        "Ling-V2 log",
        LING_MINI,
        8,
        8192,
        2,
        128,
        128 * 8192 / 10.7206 / 8,
        "fp8",
        parallel=EP8,
        runtime=FULL,
        **LING_RECIPE,
        memory_gib=63359.77 / 1024,
        static_gib=26222.72 / 1024,
        assumed="H800",
    ),
    *(
        Row(
            f"Ling-mini-2.0, MTP {name}",
            LING,
            model,
            gpus,
            4096,
            1,
            16 * gpus,
            rate / gpus,
            "fp8",
            parallel=EP8,
            runtime=MOE,
            **LING_RECIPE,
            assumed=f"H800; {DEMO}",
        )
        for name, model, rates in (
            ("on", LING_MINI, (109532, 221585, 448726)),
            ("off", NO_MTP, (128298, 307264, 611466)),
        )
        for gpus, rate in zip((8, 16, 32), rates, strict=True)
    ),
    Row("Llama3-8B", BRIDGE, LLAMA_8B, 8, 8192, 1, 128, 14451, "fp8", assumed=FSDP),
    Row("Llama3-70B", BRIDGE, LLAMA_70B, 64, 8192, 1, 128, 1664, "fp8", parallel=_pipeline(4, 8, 5)),
    Row(
        "Qwen3-30B-A3B",
        BRIDGE,
        QWEN_30B,
        16,
        4096,
        2,
        512,
        8960,
        "fp8",
        parallel={"expert_model_parallel_size": 16},
        runtime=MOE,
        deepep=True,
        assumed="micro-batch 2, batch 512, experts recomputed",
    ),
    Row(
        "Qwen3-235B-A22B",
        BRIDGE,
        QWEN_235B,
        256,
        4096,
        1,
        2048,
        1712,
        "fp8",
        parallel=_pipeline(2, 8, 4, 32, _235B),
        deepep=True,
        assumed="batch 2048",
    ),
    Row(
        "GPT-OSS-120B",
        BRIDGE,
        GPT_OSS_120B,
        64,
        4096,
        4,
        512,
        5824,
        "bf16",
        parallel=_pipeline(1, 4, None, 8),
        runtime=MOE,
        deepep=True,
        assumed="experts recomputed",
    ),
    Row(
        "Qwen3-30B-A3B",
        AUTOMODEL,
        QWEN_30B,
        8,
        4096,
        4,
        512,
        12040,
        "bf16",
        parallel=EP8,
        runtime=MOE,
        deepep=True,
        assumed=f"{FSDP}; experts recomputed",
    ),
    Row(
        "GPT-OSS-20B",
        AUTOMODEL,
        GPT_OSS_20B,
        8,
        4096,
        2,
        256,
        13058,
        "bf16",
        parallel=EP8,
        deepep=True,
        assumed=f"{FSDP}; EP 8",
    ),
    Row(
        "GPT-OSS-120B",
        AUTOMODEL,
        GPT_OSS_120B,
        64,
        4096,
        2,
        512,
        7626,
        "bf16",
        parallel={"expert_model_parallel_size": 64},
        deepep=True,
        assumed=f"{FSDP}; EP 64",
    ),
    Row("Llama3.1-8B", TITAN, LLAMA_8B, 8, 8192, 2, 16, 6667, "bf16", runtime=OPS, assumed=TITAN_8B),
    Row("Llama3.1-8B", TITAN, LLAMA_8B, 8, 8192, 2, 16, 8532, "fp8", runtime=OPS, assumed=TITAN_8B),
    Row("Llama3.1-8B", TITAN, LLAMA_8B, 128, 8192, 2, 256, 8380, "fp8", runtime=OPS, assumed=TITAN_8B),
    Row(
        "Llama3.1-8B",
        TITAN,
        LLAMA_8B,
        32,
        8192,
        2,
        64,
        10938,
        "fp8",
        runtime=OPS,
        cluster=H200,
        assumed=TITAN_8B,
    ),
    Row(
        "Llama3.1-70B",
        TITAN,
        LLAMA_70B,
        256,
        8192,
        16,
        512,
        597,
        "bf16",
        parallel=_pipeline(8, 1, None),
        runtime=FULL,
        assumed=f"{FSDP}; 16 sequences at a time, layers recomputed",
    ),
    Row(
        "Llama3.1-70B",
        TITAN,
        LLAMA_70B,
        256,
        8192,
        16,
        512,
        829,
        "fp8",
        parallel=_pipeline(8, 1, None),
        runtime=FULL,
        assumed=f"{FSDP}; 16 sequences at a time, layers recomputed",
    ),
    Row(
        "LLaMA 3.1 8B",
        LING,
        LLAMA_8B,
        8,
        8192,
        1,
        128,
        81222 / 8,
        "fp8",
        runtime=FULL,
        cluster=H800,
        assumed="H800; FP8, sequence 8192, data parallelism, layers recomputed",
    ),
)

NOT_PREDICTED: dict[str, str] = {
    "Qwen3 8B (Ling-V2 README)": "layout and precision not published",
    "Ling-1T (Ling 2.0 report)": "no step time published",
    "Llama3.1-405B (Megatron-Bridge)": "context parallelism, which ling refuses",
    "DeepSeek-V3 (Megatron-Bridge, Automodel, torchtitan)": "multi-head latent attention, which ling does not have",
    "Nemotron3 Nano and Super": "Mamba layers, which ling does not have",
    "rows on B200, GB200, GB300": "another generation of GPUs",
    "Llama3-70B (Automodel)": "layout not published",
    "Llama3.1-405B (torchtitan)": "layers in unequal stages that were not published",
    "OLMo-2 32B": "layout not published",
}
"""Rows of the same tables that the model is not held against, and why."""

TIME_TOLERANCE, MEMORY_TOLERANCE = 1.3, 1.15
LOG = ROWS[0]
FITTED = next(row for row in ROWS if row.cluster is H200)
"""The row that `Efficiency.scale` is fitted on; all others are held out."""


def within(ratio: float, tolerance: float) -> bool:
    """Whether predicted over published is within a factor."""
    return 1 / tolerance <= ratio <= tolerance


def time_table() -> str:
    """The rows as the table of docs/planning.md."""
    lines = ["| row | source | GPUs | published s | predicted s | ratio | |", "|---|---|---|---|---|---|---|"]
    for row in ROWS:
        ratio = row.predicted_seconds() / row.step_seconds
        verdict = "fitted" if row is FITTED else "" if within(ratio, TIME_TOLERANCE) else "miss"
        gpus = f"{row.gpus} {row.cluster.gpu.name if row.cluster is not H800 else 'H800'}"
        seconds = f"{row.step_seconds:.2f} | {row.predicted_seconds():.2f} | {ratio:.2f}"
        lines.append(f"| {row.name}, {row.recipe} | {row.source} | {gpus} | {seconds} | {verdict} |")
    return "\n".join(lines)


def memory_table() -> str:
    """The published memory beside the predicted one, as the table of docs/planning.md."""
    memory = LOG.predicted_memory()
    pairs = (
        ("between steps", LOG.static_gib, memory.static / 2**30),
        ("at the peak", LOG.memory_gib, memory.allocated / 2**30),
    )
    lines = ["| Ling-mini-2.0, 8K log | published GiB | predicted GiB | ratio |", "|---|---|---|---|"]
    for name, published, predicted in pairs:
        assert published is not None
        lines.append(f"| {name} | {published:.2f} | {predicted:.2f} | {predicted / published:.2f} |")
    return "\n".join(lines)


def assumptions() -> str:
    """What was not published of each row, as the list of docs/planning.md."""
    texts: dict[str, list[str]] = {}
    for row in ROWS:
        if row.assumed:
            name = f"{row.name} ({row.source})"
            texts.setdefault(row.assumed, [])
            if name not in texts[row.assumed]:
                texts[row.assumed].append(name)
    lines = [f"- {'; '.join(names)}: {text}" for text, names in texts.items()]
    return "\n".join([*lines, *(f"- {name}: not predicted, {why}" for name, why in NOT_PREDICTED.items())])
