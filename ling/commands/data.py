"""`ling data`: turn text into training data, look into it, build its order ahead, and trace batches back to it."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ling.commands import add_config_arguments, positive_int

if TYPE_CHECKING:
    from ling.config import Config
    from ling.data.checks import Share
    from ling.data.inspect import Statistics
    from ling.data.spool import Counts

CONFIG_SUFFIXES = (".yaml", ".yml")
BYTES_PER_WORKER = 4 << 20  # of input; less is not worth a process
FIRST_SAMPLES = 16


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `ling data`."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    _add_prepare(actions.add_parser("prepare", help="tokenize text, JSONL or Parquet into PREFIX.bin/.idx"))

    inspect = actions.add_parser("inspect", help="check prepared data and show its statistics, or preview a blend")
    inspect.add_argument(
        "prefix", nargs="+", metavar="PREFIX", help="prefix of .bin/.idx; or CONFIG.yaml [a.b=c ...] for its blend"
    )
    inspect.add_argument("--tokenizer", metavar="T", help="tokenizer that the data must have been prepared with")
    inspect.add_argument("--documents", type=int, default=0, metavar="N", help="print the first N; needs --tokenizer")
    inspect.add_argument("--json", action="store_true", help="one JSON object per prefix")

    index = actions.add_parser("index", help="build the order of a run's data ahead, for many ranks to map")
    add_config_arguments(index)
    index.add_argument("--workers", type=positive_int, metavar="N", help="processes (default: one per CPU)")

    trace = actions.add_parser("trace", help="print the documents and offsets that made up a rank's batch")
    trace.add_argument("config", metavar="CONFIG|RUN_DIR", help="YAML file, or the folder of a run")
    trace.add_argument("overrides", nargs="*", default=[], metavar="a.b=c", help="settings in place of the file's")
    trace.add_argument("--step", type=positive_int, required=True, metavar="S", help="step, from 1")
    trace.add_argument("--rank", type=int, default=0, metavar="R", help="rank (default: 0)")
    trace.add_argument(
        "--world",
        type=positive_int,
        metavar="N",
        help="ranks of the run (default: as its newest checkpoint says, or 1)",
    )
    trace.add_argument("--text", action="store_true", help="print the text of each document's part, too")
    trace.add_argument("--json", action="store_true", help="print JSON")


def _add_prepare(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--input",
        nargs="+",
        required=True,
        metavar="PATH",
        help="JSONL, text (both also .gz, .zst), Parquet, folders or 'globs' of them; - for standard input",
    )
    parser.add_argument("--tokenizer", required=True, metavar="T", help="folder or model of the tokenizer")
    parser.add_argument("--output", required=True, metavar="PREFIX", help="write PREFIX.bin, PREFIX.idx, PREFIX.json")
    parser.add_argument(
        "--workers", type=int, metavar="N", help="processes that tokenize (default: one per CPU, for large input)"
    )
    parser.add_argument("--field", default="text", help="field or column of the text (default: text)")
    parser.add_argument(
        "--format",
        default="auto",
        choices=("auto", "jsonl", "text", "parquet"),
        help="of all inputs (default: by the name; standard input: jsonl)",
    )
    parser.add_argument(
        "--document-separator",
        metavar="REGEX",
        help="a line of a text file that matches ends a document; '' for blank lines (default: a file is a document)",
    )
    parser.add_argument(
        "--on-error", choices=("stop", "skip"), default="stop", help="what a bad record does (default: stop)"
    )
    parser.add_argument("--deduplicate", action="store_true", help="keep the first of documents with the same text")
    parser.add_argument(
        "--split",
        metavar="NAME=SHARE,...",
        help="by a hash of the text, put such shares of the documents into PREFIX_NAME and the rest into PREFIX_train",
    )
    parser.add_argument("--split-seed", type=int, default=0, metavar="N", help="another split (default: 0)")


def run(args: argparse.Namespace) -> int:
    """Run an action of `ling data`."""
    return {"prepare": _prepare, "inspect": _inspect, "index": _index, "trace": _trace}[args.action](args)


def _prepare(args: argparse.Namespace) -> int:
    import time

    from ling.data.inputs import find_inputs
    from ling.data.prepare import prepare

    start = time.monotonic()
    workers = args.workers
    if workers is None:
        sources = find_inputs(args.input, args.format)
        size = sum(BYTES_PER_WORKER * 64 if source.is_stdin else source.path.stat().st_size for source in sources)
        workers = max(1, min(len(os.sched_getaffinity(0)), size // BYTES_PER_WORKER))
    counts = prepare(
        args.input,
        args.tokenizer,
        args.output,
        field=args.field,
        separator=args.document_separator,
        input_format=args.format,
        on_error=args.on_error,
        deduplicate=args.deduplicate,
        split=_shares_of(args.split),
        split_seed=args.split_seed,
        workers=workers,
        progress=sys.stderr,
    )
    _report_prepared(args, counts, time.monotonic() - start)
    return 0


def _shares_of(text: str | None) -> dict[str, float]:
    """`valid=0.01,test=0.01` as shares by name."""
    from ling.config.errors import UserError

    shares: dict[str, float] = {}
    for part in text.split(",") if text else []:
        name, _, share = part.partition("=")
        try:
            number = float(share)
        except ValueError:
            raise UserError(f"--split {part}: write NAME=SHARE, such as valid=0.01") from None
        if name in shares:
            raise UserError(f"--split: {name} is given twice")
        shares[name] = number
    return shares


def _report_prepared(args: argparse.Namespace, counts: Counts, seconds: float) -> None:
    for bad in counts.bad:
        print(f"skipped {bad}", file=sys.stderr)
    if counts.bad_records > len(counts.bad):
        more = counts.bad_records - len(counts.bad)
        print(f"skipped {more} more bad records, all of them in {args.output}.skipped.txt", file=sys.stderr)
    left_out = f"{counts.empty_documents} empty and {counts.bad_records} bad left out"
    if args.deduplicate:
        left_out = f"{counts.duplicate_documents} duplicate, {left_out}"
    mended = f", {counts.mended_documents} with bytes that are not UTF-8 mended" if counts.mended_documents else ""
    print(f"{args.output}: {counts.documents} documents, {counts.tokens} tokens, {seconds:.1f} s; {left_out}{mended}")


def _inspect(args: argparse.Namespace) -> int:
    from ling.config.errors import UserError
    from ling.data.inspect import first_documents, statistics
    from ling.data.tokenizer import load_tokenizer

    if args.prefix[0].endswith(CONFIG_SUFFIXES):
        return _preview(_checked_config(args.prefix[0], args.prefix[1:]), args.json)
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


def _checked_config(path: str, overrides: list[str]) -> Config:
    from ling.config import check_config, load_config
    from ling.data.datasets import check_data

    config = load_config(path, overrides)
    check_config(config)
    check_data(config)
    return config


def _preview(config: Config, as_json: bool) -> int:
    """The blend of a config: what it takes of each source, and where the first samples come from."""
    from ling.config.derived import train_sources
    from ling.data.checks import shares
    from ling.data.datasets import build_test_streams, build_train_stream, build_valid_streams

    stream = build_train_stream(config)
    taken = shares(config, train_sources(config), [part.num_tokens for part in stream.parts])
    first = [stream.sources[stream.blend.locate(i)[0]].name for i in range(FIRST_SAMPLES)]
    held_out = {
        name: {source: {"samples": found.num_samples} for source, found in streams.items()}
        for name, streams in (("valid", build_valid_streams(config)), ("test", build_test_streams(config)))
    }
    if as_json:
        train = [
            {
                "name": row.source.name,
                "path": row.source.path,
                "share": row.share,
                "epoch_tokens": row.tokens,
                "epochs": row.epochs,
            }
            for row in taken
        ]
        print(json.dumps({"train": train, "first_samples": first, **held_out}))
        return 0
    print("\n".join(_blend_lines(config, taken)))
    print(f"first samples: {' '.join(first)}")
    for kind, sources in held_out.items():
        for name, found in sources.items():
            print(f"{kind} {name}: {found['samples']} samples")
    return 0


def _blend_lines(config: Config, taken: list[Share]) -> list[str]:
    from ling.config.derived import consumed_samples_after

    total = consumed_samples_after(config, config.train.train_iters) * config.data.sequence_length
    width = max(len("source"), *(len(row.source.name) for row in taken))
    lines = [
        f"{config.train.train_iters} steps take {total:,} tokens",
        f"{'source':<{width}}  {'share':>8}  {'tokens taken':>18}  {'tokens in it':>18}  {'epochs':>8}",
    ]
    for row in taken:
        numbers = f"{row.share:8.4f}  {row.share * total:>18,.0f}  {row.tokens:>18,}  {row.epochs:8.3f}"
        lines.append(f"{row.source.name:<{width}}  {numbers}")
    return lines


def _index(args: argparse.Namespace) -> int:
    from ling.config.derived import cache_dir, consumed_samples_after
    from ling.config.errors import UserError
    from ling.data.build_index import build_index
    from ling.data.datasets import build_train_stream

    config = _checked_config(args.config, args.overrides)
    stream = build_train_stream(config)
    folder = cache_dir(config)
    samples = consumed_samples_after(config, config.train.train_iters)
    try:
        built = build_index(stream, samples, args.workers or len(os.sched_getaffinity(0)), sys.stderr)
    except OSError as error:
        raise UserError(
            f"{folder} cannot be written ({error.strerror}): set data.cache_dir to another folder"
        ) from error
    if not built.needed:
        print(f"nothing to build: {len(stream.parts)} sources are small enough to be ordered at the start of a run")
    else:
        there = built.needed - built.made
        print(f"{folder}: {built.made} epochs of {len(stream.parts)} sources built, {there} were there already")
    return 0


def _trace(args: argparse.Namespace) -> int:
    from ling.data.datasets import build_train_stream
    from ling.data.tokenizer import load_tokenizer
    from ling.data.trace import describe_sample, step_of_rank

    given = Path(args.config)
    run_dir = given if given.is_dir() else None
    config = _checked_config(str(given / "config.yaml" if run_dir else given), args.overrides)
    world = args.world or _known_world(run_dir)
    found = step_of_rank(config, args.step, args.rank, world, run_dir)
    stream = build_train_stream(config)
    samples: list[dict[str, Any]] = [
        {"micro_batch": number, **describe_sample(stream, sample)}
        for number, micro_batch in enumerate(found.micro_batches)
        for sample in micro_batch
    ]
    if args.text:
        tokenizer = load_tokenizer(config.data.tokenizer)
        for sample in samples:
            index = stream.parts[[source.path for source in stream.sources].index(sample["path"])].index
            for piece in sample["documents"]:
                start = int(index.pointers[piece["document"]]) // index.dtype.itemsize
                ids = index.tokens[start + piece["begin"] : start + piece["end"]]
                piece["text"] = tokenizer.decode(ids.tolist())
    if args.json:
        print(json.dumps({"step": args.step, "rank": args.rank, "world": world, "samples": samples}))
        return 0
    end = found.first + found.global_batch_size
    print(
        f"step {args.step}, rank {args.rank} of {world} (data-parallel rank {found.dp_rank} of {found.dp_size}): "
        f"{len(samples)} of the samples {found.first} to {end - 1}"
    )
    for sample in samples:
        print(
            f"sample {sample['sample']}, micro-batch {sample['micro_batch']}: {sample['path']}, epoch {sample['epoch']}"
        )
        for piece in sample["documents"]:
            print(f"  document {piece['document']}, tokens {piece['begin']} to {piece['end'] - 1}")
            if args.text:
                print("".join(f"    {line}\n" for line in piece["text"].splitlines()), end="")
    return 0


def _known_world(run_dir: Path | None) -> int:
    """Ranks of a run as its newest checkpoint noted them; 1 where there is none."""
    if run_dir is None:
        return 1
    from ling.checkpoint.folder import newest, read_manifest

    checkpoint = newest(run_dir)
    return 1 if checkpoint is None else read_manifest(checkpoint).world_size
