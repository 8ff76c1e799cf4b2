"""Continue a text with a checkpoint, on one rank."""

from __future__ import annotations

import argparse
from pathlib import Path

from ling.commands import positive_int
from ling.config import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `ling generate`."""
    parser.add_argument("checkpoint", metavar="CKPT", type=Path, help="a checkpoint, or a run's folder (its newest)")
    parser.add_argument("--prompt", required=True, metavar="TEXT", help="text to continue")
    parser.add_argument("--max-tokens", type=positive_int, default=64, metavar="N", help="most new tokens (default 64)")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 takes the likeliest token (default 0.8)")
    parser.add_argument("--top-p", type=float, default=0.95, help="draw from this much probability (default 0.95)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the draws (default 0)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to run (default auto)")


def run(args: argparse.Namespace) -> int:
    """Print the prompt and its continuation as it comes."""
    if not args.prompt:
        raise UserError("--prompt: is empty; give at least one character to continue")
    if args.temperature < 0:
        raise UserError(f"--temperature {args.temperature}: must be 0 or more")
    if not 0 < args.top_p <= 1:
        raise UserError(f"--top-p {args.top_p}: must be greater than 0 and at most 1")
    from ling.data.tokenizer import load_tokenizer
    from ling.platform import get_platform

    platform = get_platform(args.device)
    platform.start(0)
    from ling.checkpoint.restore import restore_model, saved_config
    from ling.model.inference import generate

    folder, _, config = saved_config(args.checkpoint, args.device)
    tokenizer = load_tokenizer(folder / "tokenizer")
    model = restore_model(folder, config, platform)
    prompt, new = tokenizer.encode(args.prompt), []
    shown = tokenizer.decode(prompt)
    print(shown, end="", flush=True)
    for token in generate(
        model,
        prompt,
        max_tokens=args.max_tokens,
        context=config.model.max_position_embeddings,
        eos_id=tokenizer.eos_id,
        vocab_size=tokenizer.vocab_size,
        temperature=args.temperature,
        top_p=args.top_p,
        seed=args.seed,
    ):
        new.append(token)
        text = tokenizer.decode([*prompt, *new])
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):  # else a character whose last bytes are still to come
            print(text[len(shown) :], end="", flush=True)
            shown = text
    print()
    return 0
