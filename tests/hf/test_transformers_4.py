"""What runs in transformers is tested on the newest by the other files, here on the last release of version 4."""

import os
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

VERSION = "4.57.6"  # of scripts/environment.sh
FOLDER = Path(sys.prefix) / f"transformers-{VERSION}"
TESTS = Path(__file__).parent
# file -> which of its tests (pytest -k); those left out take the same ways through transformers
FILES = {"test_modeling.py": "", "test_verify.py": "faithful_export or missing_or_unused or polynorm or topk_relu"}
if os.environ.get("LING_OFFICIAL_CODE"):
    FILES["test_official_code.py"] = ""
PROGRAM = f"""
import sys, pytest, transformers
assert transformers.__version__ == "{VERSION}", transformers.__file__
sys.exit(pytest.main(sys.argv[1:]))
"""


@pytest.mark.parametrize("file", FILES)
def test_file(file, tmp_path):
    assert FOLDER.is_dir(), f"{FOLDER} does not exist; ./scripts/test.sh makes it"
    report = tmp_path / "report.xml"
    options = ["-q", "-p", "no:cacheprovider", f"--junitxml={report}", "-k", FILES[file]]
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *options, str(TESTS / file)],
        cwd=TESTS.parents[1],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [str(FOLDER), os.environ.get("PYTHONPATH")]))},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-6000:]
    counts = ElementTree.parse(report).getroot()[0].attrib
    assert int(counts["tests"]) > 0
    assert int(counts["skipped"]) == 0, done.stdout[-6000:]
