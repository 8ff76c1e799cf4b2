"""A trained run through the front door: export, comparison, import, and evaluation by lm-evaluation-harness."""

import json
import os
import shutil
import subprocess
import sys

import pytest

from tests.e2e.cli import ling
from tests.hf.directories import edit_config, read_all, rewrite


@pytest.fixture(scope="module")
def exported(finished, place):
    run, _ = finished
    done = ling("export", str(run), "exported", "--verify", cwd=place)
    assert done.code == 0, done
    assert "validation data 'held_out'" in done.out
    assert "verified" in done.out
    return place / "exported"


def loss(checkpoint, place) -> float:
    done = ling("eval", str(checkpoint), "--data", "valid", "--json", cwd=place)
    assert done.code == 0, done
    return json.loads(done.out)["results"]["valid"]["loss"]


def test_export_import_and_evaluate(exported, finished, place):
    run, _ = finished
    done = ling("import", str(exported), "imported", "--config", "run.yaml", cwd=place)
    assert done.code == 0, done
    assert loss("imported", place) == loss(run, place)
    card = (exported / "README.md").read_text()
    assert "| trained on | 768 tokens (6 steps, 24 sequences of 32) |" in card


def test_verification_without_transformers(finished, place):
    """Where the package cannot be imported: one line, before anything is written."""
    run, _ = finished
    hidden = place / "hidden"
    hidden.mkdir(exist_ok=True)
    (hidden / "transformers.py").write_text("raise ImportError('hidden by the test')\n")
    done = subprocess.run(
        [sys.executable, "-m", "ling", "export", str(run), "unwanted", "--verify"],
        cwd=place,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(hidden), *sys.path])},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert "verification needs transformers" in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (place / "unwanted").exists()
    assert not (place / ".unwanted.partial").exists()


def cut(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


UP = "model.layers.1.mlp.experts.2.up_proj.weight"
WRONG = {
    "weights cut short": (cut, 2),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), 2),
    "no config": (lambda folder: (folder / "config.json").unlink(), 2),
    "another architecture": (lambda folder: edit_config(folder, architectures=["Qwen3MoeForCausalLM"]), 2),
    "missing tensor": (lambda folder: rewrite(folder, {UP: None}), 2),
    "unknown hidden_act": (lambda folder: edit_config(folder, hidden_act="swish9"), 2),
    "nan": (lambda folder: rewrite(folder, {UP: read_all(folder)[UP] * float("nan")}), 1),
}


@pytest.mark.parametrize("how", WRONG)
def test_comparison_with_a_wrong_directory(exported, finished, tmp_path, how):
    """One line and code 2 where nothing can be compared, the verdict and code 1 where the numbers are wrong."""
    change, code = WRONG[how]
    shutil.copytree(exported, tmp_path / "hf")
    change(tmp_path / "hf")
    done = ling("export", str(finished[0]), "hf", "--verify-only", cwd=tmp_path)
    assert done.code == code, done
    if code == 2:
        assert done.err.startswith("ling: error: "), done
        assert done.err.count("\n") == 1, done
        assert done.out == ""
    else:
        assert "logits differ by nan" in done.out
        assert done.out.endswith("NOT the same model\n")


TASK = """
task: local_words
dataset_path: json
dataset_kwargs: {{data_files: {{validation: {file}}}}}
validation_split: validation
output_type: multiple_choice
doc_to_text: "{{{{text}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
metric_list: [{{metric: acc}}]
"""


def test_lm_evaluation_harness_offline(exported, place):
    tasks = place / "tasks"
    tasks.mkdir()
    rows = [{"text": "the quick brown", "choices": [" fox", " 42"], "answer": 0}] * 8
    (tasks / "words.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tasks / "words.yaml").write_text(TASK.format(file=tasks / "words.jsonl"))
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(place / "hf_home")}
    arguments = ["--model", "hf", "--model_args", f"pretrained={exported},trust_remote_code=True", "--device", "cpu"]
    arguments += ["--tasks", "local_words", "--include_path", str(tasks), "--output_path", str(place / "results")]
    done = subprocess.run(
        [sys.executable, "-m", "lm_eval", *arguments],
        cwd=place,
        env=os.environ | offline,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (results,) = (place / "results").rglob("results_*.json")
    assert "acc,none" in json.loads(results.read_text())["results"]["local_words"]
