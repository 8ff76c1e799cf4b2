"""Fused FFN activations against what else computes them: one table, whose ratios come from one run.

    python kernels/bench/activations.py --shape 8192x4096 --dtype bf16 --activations powlu,swiglu

Times are the best of several rounds, in each of which every candidate runs once. Eager is the registry's math in
fp32 with one rounding at the end, compiled the same under torch.compile; peers are measured where they are installed.
GB/s counts what must be read and written once; `copy` is what a copy into a new tensor reaches here.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import torch._functorch.config
from torch import Tensor

from ling.activations import ACTIVATIONS, ResolvedActivation, ops, resolve
from ling.activations.reference import phi

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
PASSES = ("forward", "backward", "forward weighted", "backward weighted")
Candidate = Callable[[Tensor, Tensor | None], Tensor]


def eager(found: ResolvedActivation, scalars: Tensor | None) -> Candidate:
    """The definition, in fp32, rounded once."""

    def function(x: Tensor, weight: Tensor | None) -> Tensor:
        y = phi(found.activation, x.float(), found.for_layer(0), scalars)
        return (y if weight is None else y * weight.unsqueeze(-1)).to(x.dtype)

    return function


def fused(found: ResolvedActivation, scalars: Tensor | None) -> Candidate:
    """The operator, as a layer calls it."""
    name, params = found.activation.name, found.kernel_params(0)
    if name == "polynorm":
        return lambda x, weight: ops.polynorm(x, weight, scalars, *params)
    if name == "topk_relu":
        return lambda x, weight: ops.topk_relu(x, weight, int(params[0]))
    return lambda x, weight: ops.ffn_activation(x, weight, scalars, name, params)


def megatron_swiglu() -> Candidate:
    """megatron-core's fused SwiGLU, and the form with router weights."""
    from megatron.core.fusions.fused_bias_swiglu import bias_swiglu_impl, weighted_bias_swiglu_impl

    def function(x: Tensor, weight: Tensor | None) -> Tensor:
        return bias_swiglu_impl(x, None) if weight is None else weighted_bias_swiglu_impl(x, None, weight.unsqueeze(-1))

    return function


def liger_swiglu() -> Candidate:
    """Liger's SwiGLU, which takes gate and up as two tensors and no weight."""
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    def function(x: Tensor, weight: Tensor | None) -> Tensor:
        if weight is not None:
            raise NotImplementedError
        return LigerSiLUMulFunction.apply(*(half.contiguous() for half in x.chunk(2, dim=-1)))

    return function


def te_swiglu() -> Candidate:
    """Transformer Engine's SwiGLU."""
    from transformer_engine.pytorch.ops import SwiGLU

    layer = SwiGLU()

    def function(x: Tensor, weight: Tensor | None) -> Tensor:
        if weight is not None:
            raise NotImplementedError
        return layer(x)

    return function


PEERS: dict[str, Callable[[], Candidate]] = {"megatron": megatron_swiglu, "liger": liger_swiglu, "te": te_swiglu}


def candidates(found: ResolvedActivation, scalars: Tensor | None, skipped: dict[str, str]) -> dict[str, Candidate]:
    """Everything that computes this activation here; what cannot, and why, goes to skipped."""
    torch._dynamo.reset()
    plain = eager(found, scalars)
    made = {"ling": fused(found, scalars), "eager": plain, "compile": torch.compile(plain, dynamic=False)}
    if found.activation.name == "swiglu":
        for name, make in PEERS.items():
            try:
                made[name] = make()
            except Exception as error:  # any way in which a package may be broken
                skipped[name] = f"{type(error).__name__}: {error}".splitlines()[0]
    return made


def runs(function: Candidate, x: Tensor, dy: Tensor, weight: Tensor) -> dict[str, Callable[[], Any]]:
    """What is timed of a candidate: the four passes. Each returns its results, so that they live while it runs."""
    leaf, leaf_weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
    made: dict[str, Callable[[], Any]] = {}
    with torch.no_grad():
        function(x, None)
    made["forward"] = torch.no_grad()(lambda: function(x, None))
    y = function(leaf, None)
    made["backward"] = lambda: torch.autograd.grad(y, leaf, dy, retain_graph=True)
    try:
        weighted = function(leaf, leaf_weight)
    except NotImplementedError:
        return made
    made["forward weighted"] = torch.no_grad()(lambda: function(x, weight))
    made["backward weighted"] = lambda: torch.autograd.grad(weighted, (leaf, leaf_weight), dy, retain_graph=True)
    return made


def seconds(function: Callable[[], Any], device: str) -> float:
    """Time of one call; on the GPU of several in a row, without the launch."""
    if device == "cpu":
        start = time.perf_counter()
        kept = function()
        elapsed = time.perf_counter() - start
        del kept
        return elapsed
    repeats = 20
    function()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(repeats):
        function()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1000 / repeats


def best_times(calls: dict[Any, Callable[[], Any]], rounds: int, device: str) -> dict[Any, float]:
    """The best time of each over rounds in which every one runs once."""
    best = dict.fromkeys(calls, float("inf"))
    for _ in range(rounds + 1):  # the first warms up, and may compile
        for key, call in calls.items():
            best[key] = min(best[key], seconds(call, device))
    return best


def errors(
    function: Candidate, found: ResolvedActivation, scalars: Tensor | None, x: Tensor, dy: Tensor
) -> list[float]:
    """Size of the errors of y and dx in relation to the size of truth, which is float64."""
    x, dy = x[:64], dy[:64]
    wide = x.double().requires_grad_()
    truth = phi(found.activation, wide, found.for_layer(0), None if scalars is None else scalars.double())
    leaf = x.detach().clone().requires_grad_()
    y = function(leaf, None)
    pairs = [
        (y.detach(), truth.detach()),
        (torch.autograd.grad(y, leaf, dy)[0], torch.autograd.grad(truth, wide, dy.double())[0]),
    ]
    return [float((ours.double() - true).norm() / true.norm()) for ours, true in pairs]


def measure(name: str, args: argparse.Namespace, skipped: dict[str, str]) -> list[dict[str, Any]]:
    """The rows of one activation."""
    tokens, width = args.shape
    found = resolve({"name": name, **({"k": width // 8} if name == "topk_relu" else {})})
    row, dtype, device = found.activation, DTYPES[args.dtype], args.device
    generator = torch.Generator(device).manual_seed(0)
    options = {"device": device, "generator": generator}
    x = torch.randn(tokens, width * (2 if row.gated else 1), **options).to(dtype)
    dy = torch.randn(tokens, width, **options).to(dtype)
    weight = torch.rand(tokens, **options)
    scalars = torch.tensor(found.initial_scalars(), device=device) if row.learnable else None
    made = candidates(found, scalars, skipped)
    calls = {
        (kind, candidate): call
        for candidate, function in made.items()
        for kind, call in runs(function, x, dy, weight).items()
    }
    calls["copy"] = lambda: dy.clone()
    best = best_times(calls, args.rounds, device)
    copy_rate = 2 * dy.nbytes / best["copy"] / 1e9
    relative = {candidate: errors(made[candidate], found, scalars, x, dy) for candidate in ("ling", "eager")}
    result = []
    for kind in PASSES:
        backward = kind.startswith("backward")
        traffic = (row.backward_bytes if backward else row.forward_bytes)(dtype.itemsize) * tokens * width
        ours = best[kind, "ling"]
        ratios = {other: best[kind, other] / ours for other in made if (kind, other) in best and other != "ling"}
        error = {candidate: relative[candidate][backward] for candidate in relative}
        rate = {"gb_per_s": traffic / ours / 1e9, "copy_gb_per_s": copy_rate}
        result.append(
            {"activation": name, "pass": kind, "ms": ours * 1e3, **rate, "times_faster": ratios, "error": error}
        )
    return result


def render(rows: list[dict[str, Any]], args: argparse.Namespace, skipped: dict[str, str]) -> str:
    """The table."""
    others = sorted({other for row in rows for other in row["times_faster"]}, key=["eager", "compile", *PEERS].index)
    backend = ops.cpu_capability() if args.device == "cpu" else torch.cuda.get_device_name()
    threads = f", {torch.get_num_threads()} threads" if args.device == "cpu" else ""
    tokens, width = args.shape
    lines = [
        f"{args.device} ({backend}{threads}), {args.dtype}, {tokens} x {width}, torch {torch.__version__}",
        "times faster than: " + ", ".join(others) + "; error: of ling and of eager, relative to float64",
        "",
        f"{'activation':17}{'pass':18}{'ms':>9}{'GB/s':>8}{'of copy':>9}"
        + "".join(f"{other:>10}" for other in others)
        + f"{'error':>10}{'eager':>10}",
    ]
    for row in rows:
        ratios = "".join(
            f"{row['times_faster'][other]:>9.2f}x" if other in row["times_faster"] else f"{'-':>10}" for other in others
        )
        share = row["gb_per_s"] / row["copy_gb_per_s"]
        lines.append(
            f"{row['activation']:17}{row['pass']:18}{row['ms']:>9.2f}{row['gb_per_s']:>8.1f}{share:>8.0%} {ratios}"
            f"{row['error']['ling']:>10.1e}{row['error']['eager']:>10.1e}"
        )
    lines += [f"not measured: {name} ({reason})" for name, reason in skipped.items()]
    return "\n".join(lines)


def shape(text: str) -> tuple[int, int]:
    """`8192x4096` as tokens and FFN width."""
    tokens, width = (int(part) for part in text.split("x"))
    return tokens, width


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--shape", type=shape, default=(8192, 4096), help="tokens x FFN width, such as 8192x4096")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="bf16")
    parser.add_argument("--activations", default="powlu,swiglu", help="names with commas, or all")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true", help="print the rows as JSON")
    args = parser.parse_args()
    problem = ops.problem(args.device)
    if problem is not None:
        parser.error(problem)
    names = sorted(name for name in ACTIVATIONS if ops.has_kernel(name)) if args.activations == "all" else None
    torch._functorch.config.donated_buffer = False  # a graph is run backward many times here
    skipped: dict[str, str] = {}
    rows = [row for name in names or args.activations.split(",") for row in measure(name, args, skipped)]
    print(json.dumps(rows, indent=2) if args.json else render(rows, args, skipped))
    return 0


if __name__ == "__main__":
    sys.exit(main())
