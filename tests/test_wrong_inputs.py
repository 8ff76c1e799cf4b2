"""Wrong input of a person: exit code 2, one line that says what and how to mend it, no traceback, nothing written.

A row of a table is (name, arguments of `ling`, expected in the message, files to write, how else to spoil the folder).
`run.yaml` is there in every case, unless the row writes its own; `data/` where a row may come as far as looking for it.
"""

import dataclasses
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

import ling.platform
from ling.cli import main
from ling.data.prepare import prepare
from ling.data.tokenizer import train_sentencepiece
from ling.platform import optional

ROOT = Path(__file__).parents[1]
MODELS = ROOT / "configs" / "models"
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
    spoil: Callable[[Path], object] = lambda folder: None


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
    check("ramp of two numbers", "train.rampup_batch_size=[2,2]", "expected [start, increment, samples]"),
    check("ramp of text", "train.rampup_batch_size=fast", "expected list of int or null, got 'fast'"),
    check("ramp that misses the batch", "train.rampup_batch_size=[2,4,100]", "use an increment that divides 6"),
    check("ramp of odd batches", "train.rampup_batch_size=[2,2,100] --world 2", "start 2 is not a multiple of"),
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
    check(
        "fp8 without TE", "precision.recipe=fp8 runtime.backend=torch", "fp8 needs Transformer Engine's linear layers"
    ),
    check("emulated fp8", "precision.recipe=fp8_emulated", "fp8_emulated is not built and proved yet"),
    check("nothing to evaluate", "data.valid=null train.eval_interval=5", "give data.valid"),
    check("weight of a source", "data.train=[{path:a,weight:-1}]", "data.train"),
    check("train as a mapping", "data.train.a=b", "data.train: expected a prefix or a list"),
    check("run name is a path", "run.name=a/b", "run.name: 'a/b' is not a plain name"),
]

CASES = [*USAGE, *FILES, *KEYS, *MODEL, *LAYOUT, *SCHEDULE_AND_DATA]


def train(name: str, overrides: str, expected: str, spoil: Callable[[Path], object] = lambda folder: None) -> Case:
    """A case of `ling train run.yaml OVERRIDES`, with data and tokenizer in place before `spoil`."""
    return Case(f"train: {name}", ["train", "run.yaml", *overrides.split()], expected, spoil=spoil)


def prepare_case(name: str, options: str, expected: str, **files: str) -> Case:
    """A case of `ling data prepare`, with tokenizers in place; `files` are JSONL, besides text.txt."""
    named = {"text.txt": "text\n", **{f"{stem}.jsonl": text for stem, text in files.items()}}
    argv = ["data", "prepare", "--input", "text.txt", "--tokenizer", "data/tokenizer", "--output", "out"]
    return Case(f"data: {name}", [*argv, *options.split()], expected, named)


def tokenizer_case(name: str, options: str, expected: str) -> Case:
    """A case of `ling tokenizer train`."""
    argv = ["tokenizer", "train", "--input", "text.txt", "--vocab-size", "300", "--output", "out"]
    return Case(f"tokenizer: {name}", [*argv, *options.split()], expected, {"text.txt": "one two three\n"})


def cut(name: str) -> Callable[[Path], object]:
    """Take the last byte of a file away."""
    return lambda folder: os.truncate(folder / name, (folder / name).stat().st_size - 1)


def put(name: str, text: str = "") -> Callable[[Path], object]:
    """Write a file."""
    return lambda folder: ((folder / name).parent.mkdir(parents=True, exist_ok=True), (folder / name).write_text(text))


def remove(name: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).unlink()


def swap_tokenizers(folder: Path) -> None:
    shutil.copy(folder / "data/other_tokenizer/tokenizer.model", folder / "data/tokenizer/tokenizer.model")


TRAIN_DATA = [
    train("missing data", "data.train=data/none", "data data/none: data/none.idx is missing; make it with `ling data"),
    train("missing .bin", "", "data/train.bin is missing", remove("data/train.bin")),
    train("suffix in the prefix", "data.train=data/train.bin", "data/train.bin.idx is missing (give the prefix"),
    train("missing held-out data", "data.valid=data/none", "data/none.idx is missing"),
    train("truncated .bin", "", "data/train.bin is truncated: ", cut("data/train.bin")),
    train("truncated .idx", "", "data/train.idx is truncated: ", cut("data/train.idx")),
    train("no index", "", "data/train.idx is no Megatron index", put("data/train.idx", "tokens")),
    train("damaged side file", "", "data/train.json is no side file", put("data/train.json", "{}")),
    train("missing tokenizer", "data.tokenizer=data/none", "tokenizer data/none: no such file or folder; make one"),
    train("folder without tokenizer", "data.tokenizer=data", "tokenizer data: the folder has neither tokenizer.model"),
    train("no tokenizer", "data.tokenizer=run.yaml", "run.yaml is no SentencePiece model"),
    train("damaged tokenizer", "", "is no SentencePiece model", cut("data/tokenizer/tokenizer.model")),
    train("model of another tokenizer", "", "is not the model that ling_tokenizer.json beside it", swap_tokenizers),
    train("foreign tokenizer", "data.tokenizer=data/other_tokenizer", "prepared with another tokenizer (fingerprint"),
    train("small vocabulary", "model.vocab_size=300", "has 320 tokens, the model knows 300: set model.vocab_size to"),
    train("little data", "data.train=data/little", "too few for one sample of 256 + 1"),
    train("little held-out data", "data.valid=data/some", "less than one global batch of 8: hold out more text"),
    train("eval without held-out data", "data.valid=null train.eval_interval=5", "give data.valid, or set"),
]

TRAIN_START = [
    train("too few ranks", "parallel.expert_model_parallel_size=2", "at least 2 ranks, got 1: start with --nproc 2"),
    train("indivisible batch", "--nproc 3", "not a multiple of micro_batch_size (2) x data-parallel ranks (3)"),
    train("no ranks", "--nproc 0", "argument --nproc: expected a whole number of at least 1, got '0'"),
    train("ranks in words", "--nproc two", "at least 1, got 'two'"),
    train("context parallel", "parallel.context_parallel_size=2", "context parallelism is not built and proved yet"),
    train(
        "fp8 without TE", "precision.recipe=fp8 runtime.backend=torch", "fp8 needs Transformer Engine's linear layers"
    ),
    train("fp8 on the CPU", "precision.recipe=fp8", "precision.recipe=fp8 needs Transformer Engine's layers"),
    train("emulated fp8", "precision.recipe=fp8_emulated", "fp8_emulated is not built and proved yet"),
    train("unknown field in mcore", "model.mcore.no_such_field=1", "TransformerConfig has no such field"),
    train("field that ling sets", "model.mcore.normalization=LayerNorm", "follows from the architecture; remove it"),
    train(
        "refused by megatron-core",
        "model.mcore.cpu_offloading=true model.mcore.cpu_offloading_num_layers=9",
        "megatron-core refuses",
    ),
    train("foreign folder", "run.dir=data", "data is not empty and no run of ling: give another run.name or run.dir"),
    train("foreign folder of ranks", "--nproc 2 run.dir=data", "data is not empty and no run of ling"),
    train("a file as folder", "run.dir=run.yaml", "run.yaml is not empty and no run of ling"),
    train("folder below a file", "run.dir=run.yaml/x", "run.yaml/x cannot be written (Not a directory): give another"),
    train("damaged run folder", "run.dir=old", "config.yaml: is empty", put("old/config.yaml")),
    train("flash-attn", "runtime.attention=flash", "runtime.attention=flash: flash_attn: not installed; set runtime"),
    train("Transformer Engine", "runtime.attention=te", "runtime.attention=te: transformer_engine: not installed; set"),
    train("TensorBoard", "observe.tensorboard=true", "tensorboard: not installed; pip install tensorboard, or set"),
    train("wandb", "observe.wandb=offline", "wandb: not installed; pip install wandb, or set observe.wandb=disabled"),
]

DATA = [
    Case("data: unknown action", ["data", "prepar"], "invalid choice: 'prepar'"),
    prepare_case("missing input", "--input none.txt", "none.txt: no such file; check the path given with --input"),
    prepare_case("folder as input", "--input data/tokenizer", "data/tokenizer is a folder: name its files"),
    prepare_case("missing tokenizer", "--tokenizer data/none", "tokenizer data/none: no such file or folder"),
    prepare_case("output is there", "--output data/train", "data/train.bin exists already: choose another --output"),
    prepare_case("no workers", "--workers 0", "--workers 0: give 1 or more"),
    prepare_case("workers in words", "--workers two", "argument --workers: invalid int value: 'two'"),
    prepare_case("no text", "--input a.jsonl", "no document with text (1 empty, 0 bad)", a='{"text": " "}\n'),
    prepare_case("separator", "--document-separator (", "--document-separator"),
    prepare_case("bad line", "--input a.jsonl", "a.jsonl:2: ", a='{"text": "good"}\n{"text": \n'),
    prepare_case("bad field", "--input a.jsonl --field body", "a.jsonl:1: ", a='{"text": "good"}\n'),
    Case("data: inspect nothing", ["data", "inspect", "data/none"], "data/none.idx is missing"),
    Case("data: truncated", ["data", "inspect", "data/train"], "train.bin is truncated: ", spoil=cut("data/train.bin")),
    Case("data: foreign", ["data", "inspect", "data/train", "--tokenizer", "data/other_tokenizer"], "another tok"),
    Case("data: documents", ["data", "inspect", "data/train", "--documents", "1"], "name the tokenizer with"),
]

TOKENIZER = [
    Case("tokenizer: no input", ["tokenizer", "train", "--vocab-size", "300", "--output", "out"], "required: --input"),
    tokenizer_case("missing input", "--input none.txt", "none.txt: no such file; check the path given with --input"),
    tokenizer_case("vocabulary in words", "--vocab-size big", "a whole number of at least 1"),
    tokenizer_case("small vocabulary", "--vocab-size 100", "cannot train 100 tokens on this input"),
    tokenizer_case("large vocabulary", "--vocab-size 9000", "cannot train 9000 tokens on this input"),
    tokenizer_case("negative vocabulary", "--vocab-size -5", "a whole number of at least 1"),
    tokenizer_case("output is there", "--output data", "data exists already: choose another --output"),
    tokenizer_case("output below a file", "--vocab-size 270 --output run.yaml/out", "run.yaml/out cannot be written"),
    tokenizer_case("type", "--type word", "invalid choice: 'word'"),
]

ALL_CASES = [*CASES, *TRAIN_DATA, *TRAIN_START, *DATA, *TOKENIZER]


@pytest.fixture(scope="session")
def prepared(tmp_path_factory) -> Path:
    """A folder with two tokenizers and data: enough for a run, for less than a batch, for less than a sample."""
    folder = tmp_path_factory.mktemp("prepared")
    text, some, little = folder / "text.txt", folder / "some.txt", folder / "little.txt"
    text.write_text("".join(f"The {n}th line tells of {n * n} quick brown foxes.\n" for n in range(900)))
    some.write_text(text.read_text()[:4000])
    little.write_text(text.read_text()[:200])
    train_sentencepiece([text], 320, folder / "tokenizer")
    train_sentencepiece([text], 300, folder / "other_tokenizer")
    for name, source in {"train": text, "valid": text, "some": some, "little": little}.items():
        prepare([source], folder / "tokenizer", folder / name)
    return folder


@pytest.fixture
def bare_machine(monkeypatch):
    """A CPU without optional packages, which is left as it is: ranks are never started here."""

    class Machine:
        name = "cpu"

        def start(self, local_rank, num_threads=None):
            pass

        def bf16_is_fast(self):
            return False

    # the run's folder is looked at once the ranks have met; a world of one has nobody to meet
    monkeypatch.setattr("ling.parallel.groups.connect", lambda platform, world: None)
    find = optional.find
    monkeypatch.setattr(ling.platform, "get_platform", lambda name="auto": Machine())
    monkeypatch.setattr(optional, "find", lambda name: dataclasses.replace(find(name), problem=optional.ABSENT))


def everything_in(folder: Path) -> dict[str, bytes | None]:
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def check_message(err: str, expected: str) -> None:
    assert err.startswith("ling: error: ")
    assert err.count("\n") == 1
    assert err.endswith("\n")
    assert expected in err


@pytest.mark.usefixtures("bare_machine")
@pytest.mark.parametrize("case", ALL_CASES, ids=lambda case: case.name)
def test_wrong_input(case, prepared, tmp_path, monkeypatch, capsys):
    if case not in CASES:
        shutil.copytree(prepared, tmp_path / "data")
    for name, text in {"run.yaml": RUN, **case.files}.items():
        (tmp_path / name).write_text(text)
    case.spoil(tmp_path)
    monkeypatch.chdir(tmp_path)
    before = everything_in(tmp_path)

    assert main(case.argv) == 2

    out, err = capsys.readouterr()
    assert out == ""
    check_message(err, case.expected)
    assert everything_in(tmp_path) == before
