"""`ling tokenizer`: train a SentencePiece tokenizer that gives every text back exactly."""

from __future__ import annotations

import argparse
from pathlib import Path

from ling.commands import positive_int


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `ling tokenizer`."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    train = actions.add_parser("train", help="train a tokenizer on text, JSONL or Parquet")
    train.add_argument(
        "--input",
        nargs="+",
        required=True,
        metavar="PATH",
        help="text or JSONL (also .gz, .zst), Parquet, folders or 'globs' of them; - for standard input",
    )
    train.add_argument(
        "--vocab-size", type=positive_int, required=True, help="tokens, the 256 bytes and special ones included"
    )
    train.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder to write; must not exist")
    train.add_argument("--type", choices=("bpe", "unigram"), default="bpe", help="algorithm (default: bpe)")
    train.add_argument("--field", default="text", help="field or column of the text (default: text)")
    train.add_argument("--no-split-digits", action="store_true", help="let tokens have more than one digit")
    train.add_argument(
        "--no-byte-fallback", action="store_true", help="turn characters without a token into <unk>; texts are lost"
    )
    train.add_argument(
        "--normalization",
        choices=("identity", "nfkc", "nfkc_cf", "nmt_nfkc", "nmt_nfkc_cf"),
        default="identity",
        help="SentencePiece's rule; any but identity changes texts (default: identity)",
    )
    train.add_argument("--user-symbol", action="append", default=[], metavar="TEXT", help="a text that is one token")
    train.add_argument(
        "--vocab-multiple",
        type=positive_int,
        default=1,
        metavar="M",
        help="add reserved tokens up to a multiple of M (default: 1)",
    )


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
        byte_fallback=not args.no_byte_fallback,
        normalization=args.normalization,
        user_symbols=args.user_symbol,
        vocab_multiple=args.vocab_multiple,
    )
    print(f"{args.output}: {tokenizer.vocab_size} tokens, {args.type}, fingerprint {tokenizer.fingerprint[:8]}")
    return 0
