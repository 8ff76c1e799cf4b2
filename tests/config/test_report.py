"""Reports: the tree as YAML and back, differences from the defaults and from another config, the list of keys."""

from pathlib import Path

import pytest

from ling.config import Config, UserError, diff, load_config, non_default_values, save_config, to_yaml
from ling.config.keys import all_keys
from ling.config.report import describe_keys

RUN = Path(__file__).parents[2] / "configs" / "runs" / "tiny_moe.yaml"


@pytest.mark.parametrize("name", ["tiny", "007", "1e3", "on", "null", "ünïcode", "a: b", "1_000"])
def test_the_saved_tree_loads_to_an_equal_config(tmp_path, name):
    config = load_config(RUN, ["model.mcore={a: [1, 2.0]}", "optim.adam_eps=1e-12"])
    config.run.name = name
    save_config(config, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == config


def test_the_order_is_the_schemas():
    lines = [line for line in to_yaml(load_config(RUN)).splitlines() if not line.startswith(" ")]
    assert lines == [f"{branch}:" for branch in vars(Config())]


def test_non_default_values(tmp_path):
    names = [name for name, _, _ in non_default_values(load_config(RUN, ["model.activation=powlu"]))]
    assert "model.activation" not in names
    assert "optim.lr" in names  # it has no default
    changed = {name: (value, default) for name, value, default in non_default_values(load_config(RUN))}
    assert changed["model.activation"] == ({"name": "powlu", "m": 3.0}, {"name": "powlu"})
    assert changed["train.global_batch_size"] == (16, "???")


def test_diff_names_what_two_configs_differ_in():
    a, b = load_config(RUN), load_config(RUN, ["model.activation.m=2", "run.seed=5"])
    assert diff(a, a) == []
    assert diff(a, b) == [
        ("run.seed", 1234, 5),
        ("model.activation", {"name": "powlu", "m": 3.0}, {"name": "powlu", "m": 2}),
    ]


def test_every_key_is_described():
    text = describe_keys()
    assert all(f"{name}  (" in text for name in all_keys())
    assert describe_keys("optim.lr").startswith("optim.lr  (float; required; > 0)\n")
    assert "model." not in describe_keys("optim")
    with pytest.raises(UserError, match="did you mean optim"):
        describe_keys("optimm")
