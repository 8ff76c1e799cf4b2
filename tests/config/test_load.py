"""Loading: bases, overrides, the activation's replace rule, types, and what is refused."""

from pathlib import Path
from textwrap import dedent

import pytest

from ling.config import Config, UserError, load_config

BASE = """
model: {num_layers: 4, hidden_size: 128, num_attention_heads: 4, ffn_hidden_size: 384, vocab_size: 4096}
data: {train: data/train, tokenizer: data/tokenizer, sequence_length: 256}
optim: {lr: 2e-3}
train: {train_iters: 10, global_batch_size: 16}
"""


@pytest.fixture
def write(tmp_path: Path):
    def write(name: str, text: str) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(dedent(text))
        return path

    write("base.yaml", BASE)
    return write


def refusal(*args) -> str:
    with pytest.raises(UserError) as caught:
        load_config(*args)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_a_file_gives_a_typed_tree_with_defaults(write, tmp_path):
    config = load_config(tmp_path / "base.yaml")
    assert isinstance(config, Config)
    assert config.optim.lr == 2e-3
    assert config.model.num_layers == 4
    assert config.optim.adam_beta2 == 0.95
    assert config.model.activation == {"name": "powlu"}


def test_later_bases_and_the_file_itself_and_overrides_win(write):
    write("sub/other.yaml", "base: ../base.yaml\nmodel: {num_layers: 6, num_query_groups: 2}\noptim: {lr: 1e-3}")
    path = write("run.yaml", "base: [base.yaml, sub/other.yaml]\noptim: {lr: 5e-4}")
    config = load_config(path, ["model.num_query_groups=4", "run.name=x"])
    assert (config.model.num_layers, config.model.num_query_groups, config.optim.lr) == (6, 4, 5e-4)
    assert config.run.name == "x"


def test_bases_resolve_against_the_file_that_names_them(write, monkeypatch, tmp_path):
    write("a/b.yaml", "base: c.yaml")
    write("a/c.yaml", BASE)
    path = write("run.yaml", "base: a/b.yaml")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert load_config(path).model.num_layers == 4


def test_a_circle_of_bases_is_named(write):
    write("a.yaml", "base: b.yaml")
    path = write("b.yaml", "base: [a.yaml]")
    assert "circle: b.yaml -> a.yaml -> b.yaml" in refusal(path)


def test_two_ways_to_the_same_base_are_no_circle(write):
    write("a.yaml", "base: base.yaml")
    write("b.yaml", "base: base.yaml")
    assert load_config(write("c.yaml", "base: [a.yaml, b.yaml]")).model.num_layers == 4


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ([], {"name": "powlu", "m": 2.5}),
        (["model.activation.m=2"], {"name": "powlu", "m": 2}),
        (["model.activation.name=swiglu"], {"name": "swiglu"}),
        (["model.activation.name=powlu"], {"name": "powlu", "m": 2.5}),
        (["model.activation=swiglu"], {"name": "swiglu"}),
        (["model.activation=powlu"], {"name": "powlu"}),
        (["model.activation={name: swiglu_clip, limit: 7}"], {"name": "swiglu_clip", "limit": 7}),
        (["model.activation.name=swiglu_clip", "model.activation.limit=5"], {"name": "swiglu_clip", "limit": 5}),
        (["model.activation={m: 4}"], {"name": "powlu", "m": 4}),
    ],
)
def test_another_activation_replaces_the_earlier_one_whole(write, overrides, expected):
    path = write("run.yaml", "base: base.yaml\nmodel: {activation: {name: powlu, m: 2.5}}")
    assert load_config(path, overrides).model.activation == expected


def test_the_activations_of_each_kind_are_normalised(write, tmp_path):
    config = load_config(tmp_path / "base.yaml", ["model.dense_activation=gelu", "model.routed_activation.name=relu2"])
    assert config.model.dense_activation == {"name": "gelu"}
    assert config.model.routed_activation == {"name": "relu2"}
    assert config.model.shared_activation is None


def test_parameters_of_the_default_activation_need_no_name(write, tmp_path):
    assert load_config(tmp_path / "base.yaml", ["model.activation.m=2"]).model.activation == {"name": "powlu", "m": 2}


def test_data_and_mcore_take_free_keys(write, tmp_path):
    config = load_config(
        tmp_path / "base.yaml", ["data.valid.wiki=data/wiki", "model.mcore.recompute_granularity=full"]
    )
    assert config.data.valid == {"wiki": "data/wiki"}
    assert config.model.mcore == {"recompute_granularity": "full"}


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("optim.lr=2e-3", "lr", 0.002),
        ("optim.lr=1", "lr", 1.0),
        ("optim.lr=1.5E-3", "lr", 0.0015),
        ("optim.no_weight_decay=[bias, norm]", "no_weight_decay", ["bias", "norm"]),
        ("optim.lr_decay_iters=null", "lr_decay_iters", None),
        ("optim.lr_decay_iters=1_000", "lr_decay_iters", 1000),
    ],
)
def test_values_are_yaml(write, tmp_path, override, key, value):
    found = getattr(load_config(tmp_path / "base.yaml", [override]).optim, key)
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize("name", ["007", "1e3", "on", "no", "true", "2024-01-01", "1:30", "a=b"])
def test_a_name_stays_the_text_that_was_typed(write, tmp_path, name):
    assert load_config(tmp_path / "base.yaml", [f"run.name={name}"]).run.name == name


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("model.num_layer=4", "unknown key model.num_layer; did you mean model.num_layers?"),
        ("modle.num_layers=4", "unknown key modle; did you mean model?"),
        ("num_layers=4", "unknown key num_layers; did you mean model.num_layers?"),
        ("data.lr=1", "unknown key data.lr; did you mean optim.lr?"),
        ("optim.wieght_decay=0", "did you mean optim.weight_decay?"),
        ("data.xyzzy=1", "see `ling config keys data`"),
        ("xyzzy=1", "the branches are run, model,"),
        ("base=a.yaml", "unknown key base"),
        ("model.num_layers=four", "model.num_layers: expected int, got 'four' (str)"),
        ("model.num_layers=4.5", "expected int, got 4.5 (float)"),
        ("model.num_layers=true", "expected int, got True (bool)"),
        ("model.num_layers=null", "expected int, got null"),
        ("model.num_layers=[4]", "expected int, got [4] (list)"),
        ("model.num_layers.x=4", "expected int, got {'x': 4} (dict)"),
        ("optim.lr=fast", "expected float, got 'fast'"),
        ("model.qk_layernorm=maybe", "expected true or false, got 'maybe'"),
        ("optim.no_weight_decay=bias", "expected list of text, got 'bias'"),
        ("model.mcore=5", "expected mapping, got 5"),
        ("model=5", "model: expected a mapping of settings, got 5 (int)"),
        ("run.name=[a]", "expected text, got ['a']"),
        ("optim.lr", "not of the form a.b=c"),
        ("optim.lr=", "not of the form a.b=c"),
        ("", "not of the form a.b=c"),
        ("=4", "not of the form a.b=c"),
        ("optim..lr=4", "not of the form a.b=c"),
        ("data.train=[a", "not valid YAML"),
        ("optim.lr=-1", "optim.lr (override 'optim.lr=-1'): must be greater than 0, got -1.0"),
        ("train.train_iters=99999999999999", "is larger than 2147483647"),
        ("optim.lr=.nan", "must be a finite number, got nan"),
        ("optim.adam_beta1=1.0", "must be less than 1"),
        ("model.rotary_percent=1.5", "must be at most 1"),
        ("model.mtp_num_layers=2", "must be at most 1"),
        ("precision.recipe=bf61", "'bf61' is not one of auto, fp32, bf16, fp8, fp8_emulated; did you mean bf16?"),
        ("run.name=${no.such.key}", "run.name"),
        ("run.name=${broken", "run.name"),
    ],
)
def test_wrong_overrides(write, tmp_path, override, expected):
    assert expected in refusal(tmp_path / "base.yaml", [override])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("base: base.yaml\nmodel:\n  num_layer: 4", "run.yaml: unknown key model.num_layer; did you mean"),
        ("base: base.yaml\noptim: {lr: -2}", "run.yaml): must be greater than 0, got -2"),
        ("base: base.yaml\noptim: {lr: x}", "run.yaml: optim.lr: expected float, got 'x' (str)"),
        ("base: base.yaml\noptim: {lr: 1\n", "run.yaml, line 3: not valid YAML"),
        ("base: base.yaml\noptim:\n\tlr: 1", "run.yaml, line 3: not valid YAML"),
        ("base: base.yaml\nrun: {name: a, name: b}", "line 2: not valid YAML: the key 'name' is given twice"),
        ("run: {}\noptim: {}\nrun: {}", "line 3: not valid YAML: the key 'run' is given twice (first in line 1)"),
        ("base: base.yaml\ndata: {valid: {1: a}}", "line 2: not valid YAML: the key 1 is not text"),
        ("run: !!python/object:os.system {}", "line 1: not valid YAML"),
        ("base: base.yaml\nmodel:", "model: expected a mapping of settings, got null"),
        ("- a\n- b", "run.yaml: holds list ['a', 'b'] at its root"),
        ("just text", "run.yaml: holds str 'just text' at its root"),
        ("", "run.yaml: is empty"),
        ("base: 5", "base: expected a file or a list of files, got 5"),
        ("base: [nowhere.yaml]", "nowhere.yaml: no such config file (named by base in"),
        ("base: .", "cannot be read"),
        (
            "model: {num_layers: 2}\ndata: {train: '???'}",
            "not given and without default: model.hidden_size, model.num_attention_heads, model.ffn_hidden_size, "
            "model.vocab_size, data.train, data.tokenizer, data.sequence_length, optim.lr, train.train_iters, "
            "train.global_batch_size",
        ),
    ],
)
def test_wrong_files(write, text, expected):
    assert expected in refusal(write("run.yaml", text))


def test_a_missing_and_a_binary_file(tmp_path):
    assert "none.yaml: no such config file; check the path" in refusal(tmp_path / "none.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00\x01")
    assert "not a text file in UTF-8" in refusal(tmp_path / "binary.yaml")
    (tmp_path / "control.yaml").write_bytes(b"run: {name: \x01}")
    assert "not valid YAML" in refusal(tmp_path / "control.yaml")


def test_several_wrong_limits_are_counted(write, tmp_path):
    assert "(and 1 more)" in refusal(tmp_path / "base.yaml", ["optim.lr=-1", "train.train_iters=0"])
