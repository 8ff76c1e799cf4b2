"""Throughput of preparation and loading, start-up time, memory: `python tools/bench_data.py`.

One table of figures from one run on this machine, each with its target:

prepare   `ling data prepare` against the loop of Megatron-LM's tools/preprocess_data.py, on the same JSONL and
          SentencePiece model. The loop is an equivalent written here: a pool of processes that each take lines in
          chunks of 32, parse, encode, and send lists of token ids back to one writer, megatron-core's
          IndexedDatasetBuilder. Each runs with 1, 2 and 4 processes; the best count is compared, and the files must
          be equal byte for byte, unless the corpus has the character U+2581, which only `ling` keeps apart from a
          space. For scale: the tokenizer alone, without reading and writing.
memory    the largest resident set of `ling data prepare` with de-duplication and a split, on a tenth and on all of
          the input, over all of its processes.
loader    tokens per second of one BatchIterator without workers, against what the tiny model of configs/runs takes.
start     from the start of a process to its first batch, with 1,000 sources of 1,000 documents and the index built.

Without --input the corpus is the Python sources of this environment, repeated to 100 MB.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import psutil

from ling.config.derived import Source
from ling.data.assemble import write_index
from ling.data.build_index import build_index
from ling.data.datasets import BatchIterator, SampleStream
from ling.data.prepare import prepare
from ling.data.tokenizer import Tokenizer, load_tokenizer, train_sentencepiece
from ling.data.words import SPACE_MARK

CORPUS_BYTES = 100_000_000
TRAINING_BYTES = 10_000_000
CHUNK_LINES = 32
WORKERS = (1, 2, 4)
LEAST_SPEEDUP, LEAST_LOADER, MOST_START_S = 1.5, 20.0, 10.0
SOURCES, DOCUMENTS, DOCUMENT_TOKENS = 1000, 1000, 200
FIRST_BATCH = """
import sys, time
from pathlib import Path
from ling.config.derived import Source
from ling.data.datasets import BatchIterator, SampleStream
folder = Path(sys.argv[1])
sources = [Source(str(folder / f"s{i}"), 1.0, str(i)) for i in range(int(sys.argv[2]))]
stream = SampleStream(sources, 2, 256, 1, vocab_size=1000, cache=folder / "cache")
next(BatchIterator(stream, 512, 512, 0, 1))
"""


class Figure(NamedTuple):
    """A line of the table."""

    what: str
    measured: str
    target: str
    met: bool | None


def main(argv: list[str] | None = None) -> int:
    """Measure what is asked for and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", type=Path, metavar="FILE", help="JSONL with the field text, 100 MB or more")
    parser.add_argument(
        "--tokenizer", metavar="T", help="SentencePiece tokenizer (default: 32,000 tokens, trained here)"
    )
    parser.add_argument(
        "--model-rate", type=float, default=10_500, metavar="N", help="tokens/s of the tiny model (default: 10500)"
    )
    parser.add_argument("--only", choices=("prepare", "memory", "loader", "start"), action="append")
    args = parser.parse_args(argv)
    warnings.simplefilter("ignore")
    wanted = args.only or ["prepare", "memory", "loader", "start"]
    figures: list[Figure] = []
    with tempfile.TemporaryDirectory(prefix="ling-bench-") as name:
        folder = Path(name)
        if {"prepare", "memory", "loader"} & set(wanted):
            corpus = args.input or python_corpus(folder / "corpus.jsonl")
            tokenizer = args.tokenizer or str(trained(corpus, folder))
        if "prepare" in wanted:
            figures += bench_prepare(corpus, tokenizer, folder)
        if "memory" in wanted:
            figures.append(bench_memory(corpus, tokenizer, folder))
        if "loader" in wanted:
            figures.append(bench_loader(corpus, tokenizer, folder, args.model_rate))
        if "start" in wanted:
            figures.append(bench_start(folder))
    for row in [Figure("", "measured", "target", None), *figures]:
        verdict = "" if row.met is None else "met" if row.met else "missed"
        print(f"{row.what:<44} {row.measured:<34} {row.target:<8} {verdict}".rstrip())
    return 0


def python_corpus(path: Path) -> Path:
    """The *.py files of this environment, one a line, in an order that does not depend on the machine."""
    files = sorted(Path(sys.prefix).rglob("*.py"), key=lambda file: hash_of(file.name + str(file.stat().st_size)))
    with open(path, "w") as out:
        while out.tell() < CORPUS_BYTES:
            for file in files:
                text = file.read_text(encoding="utf-8", errors="replace")
                if SPACE_MARK in text:
                    continue
                out.write(json.dumps({"text": text}) + "\n")
                if out.tell() >= CORPUS_BYTES:
                    break
    return path


def hash_of(text: str) -> int:
    """A number that shuffles file names."""
    return int.from_bytes(text.encode()[-16:], "big") * 0x9E3779B97F4A7C15 % 2**64


def trained(corpus: Path, folder: Path) -> Path:
    """A tokenizer of 32,000 tokens, trained on the first part of the corpus."""
    part = folder / "training.jsonl"
    with open(corpus, "rb") as lines, open(part, "wb") as out:
        for line in lines:
            out.write(line)
            if out.tell() > TRAINING_BYTES:
                break
    train_sentencepiece([part], 32_000, folder / "tokenizer")
    return folder / "tokenizer"


class Encoder:
    """A worker of the yardstick's pool."""

    tokenizer: Any = None

    @classmethod
    def start(cls, model: str) -> None:
        """Load the SentencePiece model in this process."""
        from sentencepiece import SentencePieceProcessor

        cls.tokenizer = SentencePieceProcessor(model_file=model)

    @classmethod
    def encode(cls, line: str) -> tuple[list[int], list[int], int]:
        """Token ids of a line's text and its end token, their number, and the line's length."""
        ids = cls.tokenizer.encode(json.loads(line)["text"])
        ids.append(cls.tokenizer.eos_id())
        return ids, [len(ids)], len(line)


def yardstick(corpus: Path, tokenizer: Tokenizer, output: Path, workers: int) -> None:
    """The loop of Megatron-LM's preprocessing tool."""
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(f"{output}.bin", dtype=DType.optimal_dtype(tokenizer.vocab_size))
    context = multiprocessing.get_context("fork")
    with open(corpus, encoding="utf-8") as lines, context.Pool(workers, Encoder.start, (str(tokenizer.path),)) as pool:
        for ids, lengths, _ in pool.imap(Encoder.encode, lines, CHUNK_LINES):
            builder.add_document(ids, lengths)
    builder.finalize(f"{output}.idx")


def bench_prepare(corpus: Path, tokenizer_path: str, folder: Path) -> list[Figure]:
    """Tokens per second of both, at every number of workers."""
    from megatron.core.datasets import indexed_dataset  # noqa: F401 (imported before the clock starts)

    tokenizer = load_tokenizer(tokenizer_path)
    raw = corpus.read_bytes()
    exact = SPACE_MARK.encode() not in raw and json.dumps(SPACE_MARK).strip('"').encode() not in raw
    rates: dict[str, dict[int, float]] = {"theirs": {}, "ours": {}}
    for workers in WORKERS:
        for name in rates:
            output = folder / f"{name}{workers}"
            start = time.perf_counter()
            if name == "ours":
                prepare([corpus], tokenizer_path, output, workers=workers)
            else:
                yardstick(corpus, tokenizer, output, workers)
            seconds = time.perf_counter() - start
            tokens = output.with_suffix(".bin").stat().st_size // 2
            rates[name][workers] = tokens / seconds
            for suffix in (".bin", ".idx"):
                same = output.with_suffix(suffix).read_bytes() == (folder / f"theirs1{suffix}").read_bytes()
                assert same or not exact, f"{output}{suffix} differs from the yardstick's"
    with open(corpus) as lines:
        texts = [json.loads(line)["text"] for _, line in zip(range(2000), lines, strict=False)]
    Encoder.start(str(tokenizer.path))
    alone = rate_of(Encoder.tokenizer.encode, texts)
    cached = rate_of(lambda text: tokenizer.encode_batch([text])[0], texts)
    best = {name: max(found.values()) for name, found in rates.items()}
    size = corpus.stat().st_size
    rows = [
        Figure(f"{name}, {workers} workers, {size / 1e6:.0f} MB", f"{rate:,.0f} tokens/s", "", None)
        for name, found in rates.items()
        for workers, rate in found.items()
    ]
    ratio = best["ours"] / best["theirs"]
    return [
        *rows,
        Figure("tokenizer alone, 1 process: SentencePiece", f"{alone:,.0f} tokens/s", "", None),
        Figure("tokenizer alone, 1 process: by words", f"{cached:,.0f} tokens/s", "", None),
        Figure("prepare, best against best", f"{ratio:.2f}x", f">= {LEAST_SPEEDUP}x", ratio >= LEAST_SPEEDUP),
    ]


def rate_of(encode: Any, texts: list[str]) -> float:
    """Tokens per second of a function that encodes a text."""
    start = time.perf_counter()
    tokens = sum(len(encode(text)) for text in texts)
    return tokens / (time.perf_counter() - start)


def bench_memory(corpus: Path, tokenizer: str, folder: Path) -> Figure:
    """Resident memory on a tenth of the input and on all of it."""
    part, size = folder / "tenth.jsonl", corpus.stat().st_size // 10
    with open(corpus, "rb") as source:
        content = source.read(size)
    part.write_bytes(content[: content.rfind(b"\n") + 1])
    small, large = (peak_mib(path, tokenizer, folder / f"memory{i}") for i, path in enumerate((part, corpus)))
    return Figure("memory, a tenth and all of the input", f"{small:.0f} and {large:.0f} MiB", "", None)


def peak_mib(corpus: Path, tokenizer: str, output: Path) -> float:
    """The largest memory that all processes of a preparation hold together, looked at every 50 ms."""
    words = ["data", "prepare", "--input", str(corpus), "--tokenizer", tokenizer, "--output", str(output)]
    words += ["--workers", "2", "--deduplicate", "--split", "valid=0.05"]
    peak = 0
    with subprocess.Popen([sys.executable, "-m", "ling", *words], stdout=subprocess.DEVNULL) as process:
        whole = psutil.Process(process.pid)
        while process.poll() is None:
            held = 0
            for one in [whole, *whole.children(recursive=True)]:
                with contextlib.suppress(psutil.Error):  # it has just ended
                    held += one.memory_info().rss
            peak = max(peak, held)
            time.sleep(0.05)
    assert process.returncode == 0
    return peak / 2**20


def bench_loader(corpus: Path, tokenizer_path: str, folder: Path, model_rate: float) -> Figure:
    """Tokens per second that one process loads."""
    tokenizer = load_tokenizer(tokenizer_path)
    prefix = folder / "ours1"
    if not prefix.with_suffix(".idx").exists():
        prepare([corpus], tokenizer_path, prefix, workers=2)
    stream = SampleStream(
        [Source(str(prefix), 1.0, "corpus")], tokenizer.eos_id, 256, 1, vocab_size=tokenizer.vocab_size
    )
    batches = BatchIterator(stream, 8, 8, 0, 1)
    next(batches)
    start, tokens = time.perf_counter(), 0
    while time.perf_counter() - start < 3:
        tokens += next(batches)["tokens"].numel()
    rate = tokens / (time.perf_counter() - start)
    return Figure(
        "loader, samples of 256 tokens, no workers",
        f"{rate:,.0f} tokens/s, {rate / model_rate:.0f}x",
        f">= {LEAST_LOADER:.0f}x",
        rate >= LEAST_LOADER * model_rate,
    )


def bench_start(folder: Path) -> Figure:
    """Seconds to the first batch with many sources."""
    draw = np.random.default_rng(0)
    tokens = draw.integers(3, 1000, DOCUMENTS * DOCUMENT_TOKENS).astype(np.uint16)
    lengths = np.full(DOCUMENTS, DOCUMENT_TOKENS, dtype=np.int32)
    for number in range(SOURCES):
        tokens.tofile(folder / f"s{number}.bin")
        write_index(folder / f"s{number}.idx", lengths, tokens.dtype)
    sources = [Source(str(folder / f"s{number}"), 1.0, str(number)) for number in range(SOURCES)]
    stream = SampleStream(sources, 2, 256, 1, vocab_size=1000, cache=folder / "cache")
    built = build_index(stream, SOURCES * 2, workers=len(os.sched_getaffinity(0)))
    start = time.perf_counter()
    subprocess.run([sys.executable, "-W", "ignore", "-c", FIRST_BATCH, str(folder), str(SOURCES)], check=True)
    seconds = time.perf_counter() - start
    return Figure(
        f"start, {SOURCES} sources, {built.made} epochs built ahead",
        f"{seconds:.1f} s",
        f"<= {MOST_START_S:.0f} s",
        seconds <= MOST_START_S,
    )


if __name__ == "__main__":
    sys.exit(main())
