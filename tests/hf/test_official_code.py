"""A SwiGLU export in inclusionAI's own modelling code, where a copy of it is at hand (LING_OFFICIAL_CODE).

That code imports on transformers 4 alone: test_transformers_4.py runs this file there.
"""

import importlib.metadata
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ling.hf.export import export, open_source
from ling.hf.samples import Sample
from ling.hf.verify import verify
from tests.hf.directories import MOE, make_checkpoint, needs_transformers
from tests.hf.test_modeling import TOLERANCE, load, reference, some_tokens

CODE = os.environ.get("LING_OFFICIAL_CODE", "")
FILES = ("modeling_bailing_moe_v2.py", "configuration_bailing_moe_v2.py")


def on_transformers_4() -> bool:
    try:
        return importlib.metadata.version("transformers").startswith("4.")
    except importlib.metadata.PackageNotFoundError:
        return False


pytestmark = [
    needs_transformers,
    pytest.mark.skipif(
        not all((Path(CODE) / name).is_file() for name in FILES),
        reason="LING_OFFICIAL_CODE names no folder with inclusionAI's modelling code (docs/converting.md)",
    ),
    pytest.mark.skipif(not on_transformers_4(), reason="inclusionAI's modelling code is for transformers 4"),
]


def official(folder: Path, mtp_layers: int):
    """A checkpoint, and its export with the code in it replaced."""
    model = replace(MOE, activation="swiglu", mtp_num_layers=mtp_layers, moe_shared_expert_intermediate_size=64)
    checkpoint = make_checkpoint(folder / "checkpoint", model)
    export(checkpoint, folder / "official")
    for path in (folder / "official").glob("*.py"):
        path.unlink()
    for name in FILES:
        shutil.copy(Path(CODE) / name, folder / "official" / name)
    return model, checkpoint


@pytest.mark.ranks(1)
@pytest.mark.parametrize("mtp_layers", [0, 1])
def test_compared_by_verify(tmp_path, mtp_layers):
    _, checkpoint = official(tmp_path, mtp_layers)
    verdict = verify(open_source(checkpoint), tmp_path / "official", Sample(some_tokens(), "the test"))
    assert not verdict.problems, verdict.text
    assert ("MTP logits" in verdict.text) == bool(mtp_layers)


@pytest.mark.parametrize("mtp_layers", [0, 1])
@torch.no_grad()
def test_loaded_by_transformers(tmp_path, mtp_layers, monkeypatch):
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    model, _ = official(tmp_path, mtp_layers)
    output, truth = load(tmp_path / "official")(some_tokens()), reference(model, some_tokens())
    differences = [(output.logits - truth.logits).abs().max()]
    if mtp_layers:
        differences.append((output.mtp_logits[0] - truth.mtp_logits).abs().max())
    print(f"largest differences of logits (and MTP logits): {[f'{float(x):.1e}' for x in differences]}")
    assert max(differences) < TOLERANCE
