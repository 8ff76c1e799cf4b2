"""`run.plugins`: imported once, before the check of the config, and every failure is one line."""

import pytest

from ling.activations import table
from ling.config import UserError, check_config, load_config
from ling.config.plugins import load_plugins
from tests.config.test_rules import dense, moe

PLUGIN = """
from ling.activations import Activation, register

@register(Activation("mine", False, "x", "nobody", "mine", 1))
def mine(x):
    return x
"""


@pytest.fixture
def registry(tmp_path, monkeypatch):
    """The registry, put back as it was afterwards; plugins are looked for in the test's folder."""
    monkeypatch.setattr(table, "ACTIVATIONS", dict(table.ACTIVATIONS))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    return table.ACTIVATIONS


def test_a_config_may_name_what_its_plugin_adds(registry, tmp_path):
    (tmp_path / "mine.py").write_text(PLUGIN)
    config = dense("run.plugins=[mine.py]", "model.activation=mine")()
    assert "mine" not in registry
    check_config(config)
    assert registry["mine"].math_source() == "def mine(x):\n    return x\n"
    check_config(config)  # imported once
    del registry["mine"]
    with pytest.raises(UserError, match="unknown activation 'mine'"):
        check_config(dense("model.activation=mine")())


def test_a_plugin_may_be_a_module(registry, tmp_path):
    (tmp_path / "plugin_as_module.py").write_text(PLUGIN)
    load_plugins(["plugin_as_module"])
    assert "mine" in registry


def test_two_files_of_one_name(registry, tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine.py").write_text(PLUGIN.replace("mine", name))
    load_plugins(["one/mine.py", "two/mine.py"])
    assert {"one", "two"} <= set(registry)


@pytest.mark.parametrize(
    ("plugin", "text", "expected"),
    [
        ("none.py", None, "none.py: no such file in"),
        ("folder/none", None, "folder/none: no such file in"),
        ("no_such_module", None, "there is no module no_such_module; install it, or give a file"),
        ("no_such.module", None, "there is no module no_such.module"),
        ("raises.py", "x = 1\n\nx / 0\n", "raises.py, line 3: ZeroDivisionError: division by zero"),
        ("broken.py", "x = 1\ndef f(:\n", "broken.py, line 2: SyntaxError"),
        ("imports.py", "import no_such_package_at_all\n", "imports.py, line 1: ModuleNotFoundError: No module named"),
        ("opens.py", "open('nothing.txt')\n", "opens.py, line 1: FileNotFoundError"),
        ("./text", "no python", "text: is no Python file"),
        ("taken.py", PLUGIN.replace("mine", "powlu"), "taken.py, line 4: activation 'powlu' is registered already"),
        ("wrong.py", PLUGIN.replace("(x)", "(x, y)"), "'mine': its function must take (x), as its row says"),
    ],
)
def test_failures_are_one_line(registry, tmp_path, plugin, text, expected):
    if text is not None:
        (tmp_path / plugin).write_text(text)
    before = dict(registry)
    with pytest.raises(UserError) as caught:
        load_plugins([plugin])
    message = str(caught.value)
    assert message.startswith("run.plugins: ")
    assert expected in message
    assert registry == before


def test_the_key_wants_a_list(registry):
    with pytest.raises(UserError, match="run.plugins: expected list of text"):
        dense("run.plugins=mine.py")()
    assert load_config(dense().args[0]).run.plugins == []


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            dense("model.activation={name: topk_relu, k: 100000}"),
            "model.activation.k: 100000 is more than the FFN's width",
        ),
        (moe("model.routed_activation={name: topk_relu, k: 100000}"), "model.routed_activation.k: 100000 is more than"),
        (
            moe("model.activation={name: topk_relu, k: 100000}", "model.dense_activation=relu"),
            "model.activation.k: 100000",
        ),
        (dense("model.activation=topk_relu"), "model.activation.k: not given"),
    ],
)
def test_the_width_limits_top_k(config, message):
    with pytest.raises(UserError, match=message):
        check_config(config())


def test_top_k_within_the_width_passes():
    check_config(dense("model.activation=topk_relu", "model.activation.k=1")())
    model = moe()().model
    wide = f"{{name: topk_relu, k: {model.ffn_hidden_size}}}"
    check_config(moe(f"model.dense_activation={wide}")())
    # there is no dense FFN whose width would matter
    check_config(moe("model.first_k_dense_replace=0", "model.dense_activation={name: topk_relu, k: 100000}")())
