"""The registry: defaults, per-layer values, and one clear error line for every wrong input."""

import math
import subprocess
import sys

import pytest

from ling.activations.table import ACTIVATIONS, resolve
from ling.config.errors import UserError


def test_names_alone_take_the_defaults():
    assert set(ACTIVATIONS) >= {"powlu", "swiglu", "swiglu_clip", "gelu", "relu2"}
    for name, row in ACTIVATIONS.items():
        resolved = resolve(name)
        assert resolved.activation is row
        assert row.name == name
        assert resolved.params == {parameter.name: parameter.default for parameter in row.parameters}
        assert row.summary
        assert row.source
        assert row.hidden_act
        assert row.flops_per_element > 0


def test_documented_defaults():
    assert resolve("powlu").params == {"m": 3.0}
    assert resolve("swiglu_clip").params == {"limit": 7.0, "alpha": 1.0, "beta": 0.0}
    assert {name: row.gated for name, row in ACTIVATIONS.items() if name in ("powlu", "swiglu", "gelu", "relu2")} == {
        "powlu": True,
        "swiglu": True,
        "gelu": False,
        "relu2": False,
    }


def test_given_values_become_floats():
    resolved = resolve({"name": "powlu", "m": 4})
    assert resolved.params == {"m": 4.0}
    assert isinstance(resolved.params["m"], float)


def test_omegaconf_containers_are_accepted():
    omegaconf = pytest.importorskip("omegaconf")
    spec = omegaconf.OmegaConf.create({"name": "swiglu_clip", "limit": [4, None, 0], "alpha": 1.702})
    resolved = resolve(spec, num_layers=3)
    assert resolved.params == {"limit": [4.0, None, None], "alpha": 1.702, "beta": 0.0}


def test_per_layer_limits_and_off():
    resolved = resolve({"name": "swiglu_clip", "limit": [0, 5, None]}, num_layers=3)
    assert resolved.varies_by_layer
    assert [resolved.for_layer(layer)["limit"] for layer in range(3)] == [math.inf, 5.0, math.inf]
    assert resolved.for_layer(1) == {"limit": 5.0, "alpha": 1.0, "beta": 0.0}
    for off in (0, None):
        assert resolve({"name": "swiglu_clip", "limit": off}).for_layer(0)["limit"] == math.inf
    assert not resolve("swiglu_clip").varies_by_layer


@pytest.mark.parametrize(
    ("spec", "parts"),
    [
        ("powlo", ["unknown activation 'powlo'", "did you mean 'powlu'?", "swiglu_clip"]),
        ("zzz", ["unknown activation 'zzz'", "powlu, swiglu"]),
        ({"name": "powlu", "n": 3}, ["powlu has no parameter 'n'", "There is: m"]),
        ({"name": "swiglu", "m": 3}, ["swiglu has no parameter 'm'", "none"]),
        ({"m": 3}, ["expected a name"]),
        (None, ["expected a name"]),
        (["powlu"], ["expected a name"]),
        ({"name": "powlu", "m": "3"}, ["here.m", "expected a number", "'3'"]),
        ({"name": "powlu", "m": True}, ["here.m", "expected a number"]),
        ({"name": "powlu", "m": None}, ["here.m", "expected a number"]),
        ({"name": "powlu", "m": math.nan}, ["here.m", "expected a number"]),
        ({"name": "powlu", "m": math.inf}, ["here.m", "expected a number"]),
        ({"name": "powlu", "m": 0}, ["here.m", "> 0 and < 10", "0"]),
        ({"name": "powlu", "m": 10}, ["here.m", "> 0 and < 10"]),
        ({"name": "powlu", "m": [3, 3]}, ["here.m", "not a list"]),
        ({"name": "swiglu_clip", "limit": -1}, ["here.limit", ">= 0", "off"]),
        ({"name": "swiglu_clip", "limit": [7, -1, 7]}, ["here.limit[1]", ">= 0"]),
        ({"name": "swiglu_clip", "limit": [7, "x", 7]}, ["here.limit[1]", "'x'"]),
        ({"name": "swiglu_clip", "limit": [7, 7]}, ["here.limit", "2 entries for 3 layers"]),
    ],
)
def test_wrong_input_is_one_line_that_says_what_and_where(spec, parts):
    with pytest.raises(UserError) as caught:
        resolve(spec, where="here", num_layers=3)
    message = str(caught.value)
    assert message.startswith("here")
    assert "\n" not in message
    for part in parts:
        assert part in message


def test_doubtful_values_are_allowed_with_a_warning():
    assert resolve("powlu").warnings() == []
    (line,) = resolve({"name": "powlu", "m": 0.5}).warnings()
    assert "powlu.m = 0.5" in line
    assert "infinite" in line


def test_the_registry_needs_no_torch():
    code = "import sys, ling.activations.table; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
