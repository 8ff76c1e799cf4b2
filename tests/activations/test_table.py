"""The registry: defaults, per-layer values, and one clear error line for every wrong input."""

import math
import subprocess
import sys

import pytest

from ling.activations import table
from ling.activations.table import ACTIVATIONS, LEARN, Activation, Learnable, Parameter, register, resolve
from ling.config.errors import UserError
from tests.activations.specs import NAMES, resolved


@pytest.mark.parametrize("name", NAMES)
def test_every_row_is_complete(name):
    row = ACTIVATIONS[name]
    assert row.name == name == row.math.__name__
    assert row.summary
    assert row.source
    assert row.flops_per_element > 0
    assert row.learn in LEARN
    assert all(entry.doc for entry in (*row.parameters, *row.learnable))
    for entry in row.parameters:
        if isinstance(entry.default, (int, float)):
            assert entry.admits(entry.default)
        elif isinstance(entry.default, str):
            assert entry.default in entry.choices
    names = [entry.name for entry in (*row.parameters, *row.learnable)]
    assert len({*names, "name", "learn"}) == len(names) + 2
    found = resolved(name)
    assert found.activation is row
    assert found.learn == (row.learn if row.learnable else "fixed")
    assert found.warnings() == []


def test_hidden_act_and_gatedness_mean_one_activation():
    assert len({(row.hidden_act, row.gated) for row in ACTIVATIONS.values()}) == len(ACTIVATIONS)
    assert ACTIVATIONS["swiglu"].hidden_act == "silu"


def test_the_rows():
    gated = {name for name, row in ACTIVATIONS.items() if row.gated}
    assert gated == {
        "powlu", "swiglu", "geglu", "geglu_tanh", "quick_geglu", "reglu", "swiglu_clip", "swiglu_clip_post", "situ_glu",
        "fatreglu",
    }  # fmt: skip
    assert set(ACTIVATIONS) - gated == {
        "relu", "relu2", "gelu", "silu", "elu", "selu", "leaky_relu", "polyrelu", "polynorm", "crrelu", "series",
        "topk_relu",
    }  # fmt: skip
    assert {name for name, row in ACTIVATIONS.items() if row.rowwise} == {"polynorm", "topk_relu"}


@pytest.mark.parametrize(
    ("spec", "kernel_params", "scalars"),
    [
        ("powlu", [3.0], []),
        ({"name": "swiglu_clip", "limit": 0, "beta": 1}, [math.inf, 1.0, 1.0], []),
        ({"name": "swiglu_clip_post", "limit": [4, 5]}, [5.0], []),
        ("situ_glu", [4.0, 25.0], []),
        ("fatreglu", [0.01], []),
        ("swiglu", [], []),
        ("leaky_relu", [], [0.01]),
        ({"name": "polyrelu", "a3": 0.5, "a0": -1}, [], [0.5, 1 / 3, 1 / 3, -1.0]),
        ({"name": "polynorm", "eps": 1e-5}, [1e-5], [1 / 3, 1 / 3, 1 / 3, 0.0]),
        ("crrelu", [], [0.01]),
        ("series", [0.0], [1.0, 0.0, 0.0, 0.0]),
        ({"name": "series", "n": 3, "rho": "tanh", "b": [3, 2, 1]}, [3.0], [1.0, 0.0, 0.0, 3.0, 2.0, 1.0]),
        ({"name": "topk_relu", "k": 7}, [7.0], []),
    ],
)
def test_what_kernels_get(spec, kernel_params, scalars):
    found = resolve(spec, num_layers=2)
    assert found.kernel_params(1) == kernel_params
    assert found.initial_scalars() == scalars
    assert all(isinstance(number, float) for number in [*kernel_params, *found.initial_scalars()])


def test_who_learns():
    assert resolve("leaky_relu").learn == "fixed"
    assert resolve("polyrelu").learn == "per_layer"
    assert resolve({"name": "leaky_relu", "learn": "global", "s": 0.2}).learn == "global"
    assert resolve("powlu").learn == "fixed"


def test_cost_per_element():
    assert (ACTIVATIONS["powlu"].forward_bytes(2), ACTIVATIONS["powlu"].backward_bytes(2)) == (6, 10)
    assert (ACTIVATIONS["relu2"].forward_bytes(4), ACTIVATIONS["relu2"].backward_bytes(4)) == (8, 12)


def test_documented_defaults():
    assert resolve("powlu").params == {"m": 3.0}
    assert resolve("swiglu_clip").params == {"limit": 7.0, "alpha": 1.0, "beta": 0.0}
    assert resolve({"name": "topk_relu", "k": 4}).for_layer(0) == {"k": 4}
    assert resolve("series").params == {"n": 2, "rho": "gelu"}
    assert resolve("series").for_layer(0) == {"rho": "gelu"}


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
        ({"name": "powlu", "learn": "global"}, ["powlu has no parameter 'learn'"]),
        ({"name": "polyrelu", "learn": "all"}, ["here.learn", "per_layer, global, fixed", "'all'"]),
        ({"name": "polyrelu", "a4": 1}, ["polyrelu has no parameter 'a4'", "a3, a2, a1, a0, learn"]),
        ({"name": "polyrelu", "a3": "x"}, ["here.a3", "expected a number", "'x'"]),
        ({"name": "polyrelu", "a3": [1, 2]}, ["here.a3", "expected a number"]),
        ({"name": "crrelu", "epsilon": math.nan}, ["here.epsilon", "expected a number"]),
        ({"name": "polynorm", "eps": 0}, ["here.eps", "> 0"]),
        ({"name": "series", "n": 2.5}, ["here.n", "a whole number", "2.5"]),
        ({"name": "series", "n": 9}, ["here.n", ">= 1 and <= 8"]),
        ({"name": "series", "rho": "sin"}, ["here.rho", "one of gelu, relu, silu, tanh", "'sin'"]),
        ({"name": "series", "a": [1, 2, 3]}, ["here.a", "a list of n = 2 numbers"]),
        ({"name": "series", "n": 3, "a": 1}, ["here.a", "a list of n = 3 numbers"]),
        ({"name": "series", "b": [1, None]}, ["here.b", "a list of n = 2 numbers"]),
        ("topk_relu", ["here.k", "not given", "no default"]),
        ({"name": "topk_relu", "k": 0}, ["here.k", ">= 1"]),
        ({"name": "topk_relu", "k": [3, 3, 3]}, ["here.k", "not a list"]),
        ({"name": "fatreglu", "t": -0.1}, ["here.t", ">= 0"]),
        ({"name": "situ_glu", "beta1": 0}, ["here.beta1", "> 0"]),
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
    (line,) = resolve({"name": "powlu", "m": 0.5}).warnings()
    assert "powlu.m = 0.5" in line
    assert "infinite" in line
    (line,) = resolve({"name": "series", "rho": "relu"}).warnings()
    assert "never learns" in line
    for fine in ({"a": [1, 1]}, {"b": [0, 0.1]}, {"learn": "fixed"}, {"n": 1}):
        assert resolve({"name": "series", "rho": "relu", **fine}).warnings() == []


def test_a_limit_of_the_ffns_width():
    found = resolve({"name": "topk_relu", "k": 8})
    found.check_width(8, "here")
    with pytest.raises(UserError, match=r"here.k: 8 is more than the FFN's width \(7\); lower it"):
        found.check_width(7, "here")
    resolve("powlu").check_width(1, "here")


@pytest.fixture
def registry(monkeypatch):
    """The registry, put back as it was afterwards."""
    monkeypatch.setattr(table, "ACTIVATIONS", dict(ACTIVATIONS))
    return table.ACTIVATIONS


def row(name, gated=False, **fields):
    return Activation(name, gated, "a formula", "a paper", name, 1, **fields)


def test_register_keeps_the_function(registry):
    @register(row("cube", parameters=(Parameter("power", 3.0, "of x"),), learnable=(Learnable("s", 1, "scale"),)))
    def cube(x, *, power, scalars):
        return x**power

    assert registry["cube"].math is cube
    assert registry["cube"].math_source().startswith("def cube(x, *, power, scalars):\n    return")
    assert resolve("cube").initial_scalars() == [1.0]


@pytest.mark.parametrize(
    ("new", "function", "message"),
    [
        (row("powlu"), lambda x: x, "'powlu' is registered already"),
        (row("new", gated=True), lambda x: x, r"'new': its function must take \(g, u\)"),
        (row("new"), lambda g, u: g, r"its function must take \(x\)"),
        (row("new", rowwise=True), lambda x: x, r"must take \(x, \*, rows\)"),
        (row("new", parameters=(Parameter("m", 1.0, ""),)), lambda x, m: x, r"must take \(x, \*, m\)"),
        (row("new", learnable=(Learnable("s", 1.0, ""),)), lambda x, *, s: x, r"must take \(x, \*, scalars\)"),
    ],
)
def test_a_wrong_registration_is_refused(registry, new, function, message):
    before = dict(registry)
    with pytest.raises(UserError, match=message):
        register(new)(function)
    assert registry == before


def test_the_registry_needs_no_torch():
    code = (
        "import sys, ling.activations; assert 'torch' not in sys.modules; assert len(ling.activations.ACTIVATIONS) > 20"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
