"""A SwiGLU export in inclusionAI's own modelling code, where a copy of it is at hand (LING_OFFICIAL_CODE)."""

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

CODE = os.environ.get("LING_OFFICIAL_CODE", "")
FILES = ("modeling_bailing_moe_v2.py", "configuration_bailing_moe_v2.py")

pytestmark = [
    needs_transformers,
    pytest.mark.ranks(1),
    pytest.mark.skipif(
        not all((Path(CODE) / name).is_file() for name in FILES),
        reason="LING_OFFICIAL_CODE names no folder with inclusionAI's modelling code (docs/converting.md)",
    ),
]


@pytest.mark.parametrize("mtp_layers", [0, 1])
def test_the_same_numbers(tmp_path, mtp_layers):
    model = replace(MOE, activation="swiglu", mtp_num_layers=mtp_layers, moe_shared_expert_intermediate_size=32)
    checkpoint = make_checkpoint(tmp_path / "checkpoint", model)
    export(checkpoint, tmp_path / "hf")
    for name in FILES:
        shutil.copy(Path(CODE) / name, tmp_path / "hf" / name)
    tokens = torch.randint(3, 300, (2, 24), generator=torch.Generator().manual_seed(2))
    verdict = verify(open_source(checkpoint), tmp_path / "hf", Sample(tokens, "the test"))
    assert not verdict.problems, verdict.text
    assert ("MTP logits" in verdict.text) == bool(mtp_layers)
