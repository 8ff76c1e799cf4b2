"""`ling data`: turn text into training data, and look into it."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ling.data.inspect import Statistics


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `ling data`."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")

    prepare = actions.add_parser("prepare", help="tokenize text or JSONL files into PREFIX.bin/.idx")
    prepare.add_argument("--input", nargs="+", required=True, type=Path, metavar="FILE", help="text or JSONL, or .gz")
    prepare.add_argument("--tokenizer", required=True, metavar="T", help="folder or model of the tokenizer")
    prepare.add_argument("--output", required=True, metavar="PREFIX", help="write PREFIX.bin, PREFIX.idx, PREFIX.json")
    prepare.add_argument("--workers", type=int, default=1, metavar="N", help="processes that tokenize (default: 1)")
    prepare.add_argument("--field", default="text", help="field of the text in JSONL (default: text)")
    prepare.add_argument(
        "--document-separator",
        metavar="REGEX",
        help="a line of a text file that matches ends a document; '' for blank lines (default: a file is a document)",
    )
    prepare.add_argument(
        "--on-error", choices=("stop", "skip"), default="stop", help="what a bad JSONL line does (default: stop)"
    )

    inspect = actions.add_parser("inspect", help="check prepared data and show its statistics")
    inspect.add_argument("prefix", nargs="+", metavar="PREFIX", help="prefix of .bin/.idx")
    inspect.add_argument("--tokenizer", metavar="T", help="tokenizer that the data must have been prepared with")
    inspect.add_argument("--documents", type=int, default=0, metavar="N", help="print the first N; needs --tokenizer")
    inspect.add_argument("--json", action="store_true", help="one JSON object per prefix")


def run(args: argparse.Namespace) -> int:
    """Run `ling data prepare` or `ling data inspect`."""
    return _prepare(args) if args.action == "prepare" else _inspect(args)


def _prepare(args: argparse.Namespace) -> int:
    import time

    from ling.data.prepare import prepare

    start = time.monotonic()
    counts = prepare(
        args.input,
        args.tokenizer,
        args.output,
        field=args.field,
        separator=args.document_separator,
        on_error=args.on_error,
        workers=args.workers,
        progress=sys.stderr,
    )
    seconds = time.monotonic() - start
    for bad in counts.bad:
        print(f"skipped {bad}", file=sys.stderr)
    if counts.bad_records > len(counts.bad):
        print(f"skipped {counts.bad_records - len(counts.bad)} more bad lines", file=sys.stderr)
    left_out = f"{counts.empty_documents} empty and {counts.bad_records} bad left out"
    mended = f", {counts.mended_documents} with bytes that are not UTF-8 mended" if counts.mended_documents else ""
    print(f"{args.output}: {counts.documents} documents, {counts.tokens} tokens, {seconds:.1f} s; {left_out}{mended}")
    return 0


def _inspect(args: argparse.Namespace) -> int:
    import json

    from ling.config.errors import UserError
    from ling.data.inspect import first_documents, statistics
    from ling.data.tokenizer import load_tokenizer

    if args.documents and not args.tokenizer:
        raise UserError("--documents prints text: name the tokenizer with --tokenizer")
    tokenizer = load_tokenizer(args.tokenizer) if args.tokenizer else None
    for prefix in args.prefix:
        found = statistics(prefix, tokenizer)
        texts = first_documents(prefix, tokenizer, args.documents) if tokenizer else []
        if args.json:
            print(json.dumps({**found.as_dict(), **({"first_documents": texts} if texts else {})}))
            continue
        print("\n".join(_lines(found)))
        for number, text in enumerate(texts):
            print(f"--- document {number}\n{text}")
    return 0


def _lines(found: Statistics) -> list[str]:
    vocabulary = f" of {found.vocab_size}" if found.vocab_size is not None else ""
    made = f"{found.side['tokenizer']['path']}, " if found.side else "unknown (no side file), "
    fingerprint = f"fingerprint {found.side['tokenizer']['fingerprint'][:8]}" if found.side else "not checked"
    return [
        f"{found.prefix}: whole",
        f"  documents        {found.documents}",
        f"  tokens           {found.tokens} ({found.dtype})",
        f"  tokenizer        {made}{fingerprint}",
        f"  token ids used   {found.ids_used}{vocabulary}, the largest {found.largest_id}",
        f"  unigram entropy  {found.unigram_entropy:.4f} nats per token",
        f"  document length  {found.shortest} to {found.longest} tokens, median {found.median}",
        *(f"    {name:>15}  {count}" for name, count in found.length_histogram.items()),
    ]
