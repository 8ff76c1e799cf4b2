"""`ling tokenizer`: train a SentencePiece tokenizer that gives every text back exactly."""

from __future__ import annotations

import argparse
from pathlib import Path

from ling.commands import positive_int


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `ling tokenizer`."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    train = actions.add_parser("train", help="train a tokenizer on text or JSONL files")
    train.add_argument(
        "--input", nargs="+", required=True, type=Path, metavar="FILE", help="text or JSONL, plain or .gz"
    )
    train.add_argument(
        "--vocab-size", type=positive_int, required=True, help="tokens, the 256 bytes and special ones included"
    )
    train.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder to write; must not exist")
    train.add_argument("--type", choices=("bpe", "unigram"), default="bpe", help="algorithm (default: bpe)")
    train.add_argument("--field", default="text", help="field of the text in JSONL (default: text)")
    train.add_argument("--no-split-digits", action="store_true", help="let tokens have more than one digit")
    train.add_argument("--user-symbol", action="append", default=[], metavar="TEXT", help="a text that is one token")


def run(args: argparse.Namespace) -> int:
    """Run `ling tokenizer train`."""
    from ling.data.tokenizer import train_sentencepiece

    tokenizer = train_sentencepiece(
        args.input,
        args.vocab_size,
        args.output,
        args.type,
        field=args.field,
        split_digits=not args.no_split_digits,
        user_symbols=args.user_symbol,
    )
    print(f"{args.output}: {tokenizer.vocab_size} tokens, {args.type}, fingerprint {tokenizer.fingerprint[:8]}")
    return 0
