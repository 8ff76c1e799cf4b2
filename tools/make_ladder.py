"""Write configs/ladder/: small runs of the Ling family, by rule, for comparing activations at growing size.

The PowLU paper (arXiv 2605.25704) compares at 26M, 47M, 92M, 199M and 368M activated parameters, with 10 to 24 layers,
hidden sizes of 512 to 1280 and sequences of 4096. Shapes, schedules and most token budgets were not disclosed; here is
the rule that stands in for them:

- activated parameters are counted without embedding and output layer (with a vocabulary of 157,184 these alone would
  be more than the smallest sizes), and the family's rule gives the shapes of a width: heads of 128 channels, four
  query heads for each key/value head, experts a quarter of the hidden size wide, 256 of them, 8 chosen, 1 shared
- of all widths (multiples of 128) and depths in the paper's ranges whose activated parameters are within 3 % of the
  target, the one whose width over depth is nearest to 52, the paper's at both ends (512/10, 1280/24)
- tokens: 634 per activated parameter, which is the one budget that was disclosed (29.8B for 47M)
- learning rate and batch: power laws of training compute through Ling 2.0's three published pairs

Usage: python tools/make_ladder.py [--output configs/ladder]
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

from ling.config.schema import ModelConfig
from ling.model.counts import count_parameters, flops_per_token

TARGETS = (26, 47, 92, 199, 368)
WIDTHS, DEPTHS = range(512, 1281, 128), range(10, 25)
ASPECT, TOLERANCE = 52, 0.03
TOKENS_PER_PARAMETER = 29.8e9 / 47e6
SEQUENCE = 4096
BATCH_MULTIPLE = 32

# Ling 2.0: (hidden, layers, dense layers, key/value heads, dense FFN), peak learning rate, sequences of 4096 per batch,
# after 20 trillion tokens (arXiv 2510.22115).
PUBLISHED = (
    ((2048, 20, 1, 4, 5120), 3.36e-4, 4400),
    ((4096, 32, 1, 4, 9216), 2.61e-4, 8352),
    ((8192, 80, 4, 8, 18432), 1.86e-4, 18144),
)
PUBLISHED_TOKENS = 20e12


TEMPLATE = """\
# {head}
#
# Activated parameters are counted without embedding and output layer.
# Made by tools/make_ladder.py, which has the rule; change it there. model.activation=swiglu gives the baseline.
run:
  name: ladder_{millions}m

model:
  num_layers: {model.num_layers}
  hidden_size: {model.hidden_size}
  num_attention_heads: {model.num_attention_heads}
  num_query_groups: {model.num_query_groups}
  kv_channels: 128
  ffn_hidden_size: {model.ffn_hidden_size}
  vocab_size: {model.vocab_size}
  max_position_embeddings: {sequence}
  activation: {{name: powlu, m: 3.0}}

  num_moe_experts: 256
  first_k_dense_replace: 1
  moe_ffn_hidden_size: {model.moe_ffn_hidden_size}
  moe_shared_expert_intermediate_size: {model.moe_shared_expert_intermediate_size}
  moe_router_topk: 8
  moe_router_num_groups: 8
  moe_router_group_topk: 4
  moe_router_topk_scaling_factor: 2.5
  moe_z_loss_coeff: 3.5e-6

data:
  train: [PATH/TO/TRAIN]        # placeholder
  tokenizer: PATH/TO/TOKENIZER  # placeholder
  sequence_length: {sequence}

parallel:
  expert_model_parallel_size: 8
  overlap_grad_reduce: true
  overlap_param_gather: true

optim:
  lr: {rate:.1e}
  min_lr: {final_rate:.1e}
  lr_decay_style: cosine
  lr_warmup_iters: {warmup}

train:
  train_iters: {steps}
  micro_batch_size: 4
  global_batch_size: {batch}

checkpoint:
  save_interval: 1000
"""


def family(hidden: int, layers: int, dense: int, groups: int, ffn: int) -> ModelConfig:
    """A model by the rule of the Ling 2.0 family."""
    return ModelConfig(
        num_layers=layers,
        hidden_size=hidden,
        num_attention_heads=hidden // 128,
        num_query_groups=groups,
        kv_channels=128,
        ffn_hidden_size=ffn,
        vocab_size=157184,
        num_moe_experts=256,
        first_k_dense_replace=dense,
        moe_ffn_hidden_size=hidden // 4,
        moe_shared_expert_intermediate_size=hidden // 4,
        moe_router_topk=8,
        moe_router_num_groups=8,
        moe_router_group_topk=4,
        moe_router_topk_scaling_factor=2.5,
        moe_z_loss_coeff=3.5e-6,
    )


def rung(hidden: int, layers: int) -> ModelConfig:
    """A model of the ladder: one dense layer, its FFN 2.5 times as wide; four query heads for each key/value head."""
    heads = hidden // 128
    groups = max(size for size in range(1, max(1, heads // 4) + 1) if heads % size == 0)
    return family(hidden, layers, 1, groups, hidden * 5 // 2)


def activated(model: ModelConfig) -> int:
    """Parameters that one token uses, without embedding and output layer."""
    count = count_parameters(model)
    return count.activated - count.embedding


def compute(model: ModelConfig, tokens: float) -> float:
    """Training FLOPs, without the output layer and multi-token prediction."""
    flops = flops_per_token(model, SEQUENCE)
    return (flops.matmul + flops.attention) * tokens


def power_law(points: list[tuple[float, float]]) -> tuple[float, float]:
    """Factor and exponent of the least-squares line through the logarithms."""
    logs = [(math.log(x), math.log(y)) for x, y in points]
    mean_x, mean_y = (sum(column) / len(logs) for column in zip(*logs, strict=True))
    exponent = sum((x - mean_x) * (y - mean_y) for x, y in logs) / sum((x - mean_x) ** 2 for x, _ in logs)
    return math.exp(mean_y - exponent * mean_x), exponent


def hyperparameters(model: ModelConfig, tokens: float) -> tuple[float, float]:
    """Peak learning rate and sequences of 4096 per batch, from the published pairs."""
    amounts = [compute(family(*sizes), PUBLISHED_TOKENS) for sizes, _, _ in PUBLISHED]
    own = compute(model, tokens)
    rates = [(amount, row[1]) for amount, row in zip(amounts, PUBLISHED, strict=True)]
    batches = [(amount, float(row[2])) for amount, row in zip(amounts, PUBLISHED, strict=True)]
    (rate, rate_power), (batch, batch_power) = power_law(rates), power_law(batches)
    return rate * own**rate_power, batch * own**batch_power


def choose(target: float) -> ModelConfig:
    """The model of so many activated parameters."""
    near = [
        (abs(width / depth - ASPECT), width, depth)
        for width in WIDTHS
        for depth in DEPTHS
        if abs(activated(rung(width, depth)) / target - 1) <= TOLERANCE
    ]
    if not near:
        raise ValueError(f"no model of the family has {target:.3g} activated parameters within {TOLERANCE:.0%}")
    _, width, depth = min(near)
    return rung(width, depth)


def round_to(value: float, digits: int) -> float:
    """The value with so many significant digits."""
    return float(f"{value:.{digits}g}")


def render(millions: int) -> str:
    """The YAML of one rung."""
    model = choose(millions * 1e6)
    tokens = TOKENS_PER_PARAMETER * millions * 1e6
    rate, batch = hyperparameters(model, tokens)
    rate, batch = round_to(rate, 2), max(1, round(batch / BATCH_MULTIPLE)) * BATCH_MULTIPLE
    steps = math.ceil(tokens / (batch * SEQUENCE))
    sizes = f"{activated(model) / 1e6:.1f}M activated parameters, {count_parameters(model).total / 1e6:,.0f}M in all"
    head = f"{millions}M of the ladder: {sizes}; {tokens / 1e9:.1f}B tokens."
    return TEMPLATE.format(
        head=head,
        millions=millions,
        model=model,
        sequence=SEQUENCE,
        rate=rate,
        final_rate=rate / 10,
        warmup=max(100, steps // 50),
        steps=steps,
        batch=batch,
    )


def main() -> None:
    """Write the files."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--output", type=Path, default=Path(__file__).parents[1] / "configs" / "ladder")
    output = parser.parse_args().output
    output.mkdir(parents=True, exist_ok=True)
    for millions in TARGETS:
        path = output / f"ladder_{millions}m.yaml"
        path.write_text(render(millions), encoding="utf-8")
        print(path)


if __name__ == "__main__":
    main()
