"""Wrong input of a person: exit code 2, one line that says what and how to mend it, no traceback, nothing written.

A row of a table is (name, files to write, arguments of `ling`, expected in the message). `run.yaml` is there in every
case, unless the row writes its own.
"""

import dataclasses
from pathlib import Path

import pytest

from ling.cli import main

MODELS = Path(__file__).parents[1] / "configs" / "models"
TRAINING = """
data: {train: data/train, valid: data/valid, tokenizer: data/tokenizer, sequence_length: 256}
optim: {lr: 2e-3}
train: {train_iters: 10, micro_batch_size: 2, global_batch_size: 8}
"""
RUN = f"base: {MODELS}/tiny_moe.yaml\n{TRAINING}"
DENSE = f"base: {MODELS}/tiny_dense.yaml\n{TRAINING}"


@dataclasses.dataclass(frozen=True)
class Case:
    name: str
    argv: list[str]
    expected: str
    files: dict[str, str] = dataclasses.field(default_factory=dict)


def check(name: str, overrides: str, expected: str, **files: str) -> Case:
    """A case of `ling config check run.yaml OVERRIDES`."""
    named = {f"{stem}.yaml": text for stem, text in files.items()}
    return Case(name, ["config", "check", "run.yaml", *overrides.split()], expected, named)


USAGE = [
    Case("unknown command", ["trian"], "did you mean train?"),
    Case("unknown action", ["config", "shwo"], "invalid choice: 'shwo'"),
    Case("no config", ["config", "check"], "required: CONFIG"),
    Case("unknown option", ["config", "show", "run.yaml", "--jsn"], "unknown argument '--jsn'"),
    Case("world is no number", ["config", "check", "run.yaml", "--world", "two"], "at least 1, got 'two'"),
    Case("world is 0", ["config", "check", "run.yaml", "--world", "0"], "at least 1, got '0'"),
    Case("unknown prefix", ["config", "keys", "optimizer"], "no key starts with optimizer; did you mean optim?"),
]

FILES = [
    Case("missing file", ["config", "show", "none.yaml"], "none.yaml: no such config file; check the path"),
    Case("a folder", ["config", "show", "."], "cannot be read"),
    check(
        "missing base", "", "nowhere.yaml: no such config file (named by base in run.yaml)", run="base: nowhere.yaml"
    ),
    check("circle", "", "circle: run.yaml -> a.yaml -> run.yaml", run="base: a.yaml", a="base: run.yaml"),
    check("broken YAML", "", "run.yaml, line 2: not valid YAML", run="model:\n\tnum_layers: 2"),
    check("duplicate key", "", "the key 'lr' is given twice", run="optim: {lr: 1, lr: 2}"),
    check("root is a list", "", "run.yaml: holds list", run="- model"),
    check("empty file", "", "run.yaml: is empty", run=""),
    check("a branch without settings", "", "model: expected a mapping of settings, got null", run="model:"),
    check(
        "missing keys", "", "not given and without default: data.train, data.tok", run=f"base: {MODELS}/tiny_moe.yaml"
    ),
]

KEYS = [
    check("unknown key", "model.num_layer=4", "did you mean model.num_layers?"),
    check("unknown branch", "modle.num_layers=4", "did you mean model?"),
    check("branch forgotten", "lr=1", "unknown key lr; did you mean optim.lr?"),
    check("wrong branch", "train.lr=1", "unknown key train.lr; did you mean optim.lr?"),
    check("override without =", "optim.lr", "not of the form a.b=c"),
    check("override without value", "optim.lr=", "not of the form a.b=c"),
    check("override of a branch", "model=big", "model: expected a mapping of settings, got 'big'"),
    check("wrong type", "model.num_layers=four", "model.num_layers: expected int, got 'four' (str)"),
    check("fraction", "train.train_iters=1.5", "expected int, got 1.5 (float)"),
    check("no boolean", "parallel.sequence_parallel=perhaps", "expected true or false, got 'perhaps'"),
    check(
        "out of range", "optim.adam_beta2=1", "optim.adam_beta2 (override 'optim.adam_beta2=1'): must be less than 1"
    ),
    check("not a number", "optim.lr=.nan", "must be a finite number"),
    check("unknown choice", "precision.recipe=bf61", "did you mean bf16?"),
]

MODEL = [
    check("unknown activation", "model.activation=powlo", "unknown activation 'powlo'; did you mean 'powlu'?"),
    check("activation parameter out of range", "model.activation.m=10", "model.activation.m: must be > 0 and < 10"),
    check("parameter of another activation", "model.activation={name:swiglu,m:3}", "model.activation"),
    check("heads", "model.kv_channels=null model.num_attention_heads=3", "128 is not a multiple of 3 heads"),
    check("groups of heads", "model.num_query_groups=3", "4 heads are not a multiple of 3 groups"),
    check("too many chosen experts", "model.moe_router_topk=5", "5 experts cannot be chosen from 2 groups of 2"),
    check("groups of experts", "model.moe_router_num_groups=3", "8 experts do not divide into 3 groups"),
    check("no width of experts", "model.moe_ffn_hidden_size=null", "model.moe_ffn_hidden_size: not given"),
    check("experts of a dense model", "model.moe_ffn_hidden_size=96", "has no meaning without experts", run=DENSE),
    check("too many dense layers", "model.first_k_dense_replace=9", "9 is more than num_layers (4)"),
    check("named field in mcore", "model.mcore.hidden_size=256", "set model.hidden_size instead"),
    check("unknown field in mcore", "model.mcore.no_such_field=1", "model.mcore.no_such_field: megatron-core's"),
    check("sequence too long", "data.sequence_length=1024", "more than model.max_position_embeddings (512)"),
]

LAYOUT = [
    check(
        "too few ranks",
        "parallel.expert_model_parallel_size=4 --world 2",
        "at least 4 ranks, got 2: start with --nproc 4",
    ),
    check("ranks do not divide", "parallel.expert_model_parallel_size=2 --world 3", "3 ranks are not a multiple of 2"),
    check(
        "batch does not divide", "--world 3", "8 is not a multiple of micro_batch_size (2) x data-parallel ranks (3)"
    ),
    check("context parallel", "parallel.context_parallel_size=2", "context parallelism is not built and proved yet"),
    check(
        "experts without sequence parallel",
        "parallel.tensor_model_parallel_size=2",
        "set parallel.sequence_parallel=true",
    ),
    check("experts do not divide", "parallel.expert_model_parallel_size=3", "8 is not a multiple of"),
    check("more TP than groups", "parallel.tensor_model_parallel_size=4", "more than the 2 key/value heads", run=DENSE),
    check("layers do not divide", "parallel.pipeline_model_parallel_size=3", "4 layers do not divide into 3 pipeline"),
    check("experts of a dense layout", "parallel.expert_model_parallel_size=2", "the model has no experts", run=DENSE),
]

SCHEDULE_AND_DATA = [
    check("long warm-up", "optim.lr_warmup_iters=11", "11 is more than train.train_iters (10)"),
    check("WSD without decay", "optim.lr_decay_style=WSD", "optim.lr_wsd_decay_iters: not given"),
    check("min_lr", "optim.min_lr=1", "optim.min_lr: 1.0 is more than optim.lr"),
    check("fp8", "precision.recipe=fp8", "fp8 is not built and proved yet"),
    check("nothing to evaluate", "data.valid=null train.eval_interval=5", "give data.valid"),
    check("weight of a source", "data.train=[{path:a,weight:-1}]", "data.train"),
    check("train as a mapping", "data.train.a=b", "data.train: expected a prefix or a list"),
    check("run name is a path", "run.name=a/b", "run.name: 'a/b' is not a plain name"),
]

CASES = [*USAGE, *FILES, *KEYS, *MODEL, *LAYOUT, *SCHEDULE_AND_DATA]


def everything_in(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_wrong_input(case, tmp_path, monkeypatch, capsys):
    for name, text in {"run.yaml": RUN, **case.files}.items():
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    before = everything_in(tmp_path)

    assert main(case.argv) == 2

    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("ling: error: ")
    assert err.count("\n") == 1
    assert err.endswith("\n")
    assert case.expected in err
    assert everything_in(tmp_path) == before
