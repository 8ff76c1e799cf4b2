"""`ling activations`: the list and the texts without torch, plots, and wrong input with code 2."""

import json
import re
import subprocess
import sys
from dataclasses import replace

import pytest

from ling.activations.table import ACTIVATIONS
from ling.cli import main
from ling.platform import optional
from tests.activations.specs import NAMES


def lines(capsys, *argv):
    assert main(["activations", *argv]) == 0
    return capsys.readouterr().out.splitlines()


def test_the_list_has_a_line_for_each(capsys):
    header, *rows = lines(capsys)
    assert header.split() == ["name", "gated", "parameters", "learnable", "hidden_act", "summary"]
    assert [row.split()[0] for row in rows] == list(ACTIVATIONS)
    for line, row in zip(rows, ACTIVATIONS.values(), strict=True):
        assert line.split()[1] == ("yes" if row.gated else "no")
        assert line.endswith(row.summary)
    assert "limit=7 alpha=1 beta=0" in rows[list(ACTIVATIONS).index("swiglu_clip")]
    assert "k=?" in rows[list(ACTIVATIONS).index("topk_relu")]


def test_json(capsys):
    main(["activations", "--json"])
    rows = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in rows] == list(ACTIVATIONS)
    main(["activations", "polynorm", "--json"])
    (row,) = json.loads(capsys.readouterr().out)
    assert row["parameters"] == [
        {"name": "eps", "default": 1e-6, "allowed": "> 0", "doc": ACTIVATIONS["polynorm"].parameters[0].doc}
    ]
    assert [scalar["name"] for scalar in row["learnable"]] == ["a3", "a2", "a1", "a0"]
    assert (row["rowwise"], row["gated"], row["learn"]) == (True, False, "per_layer")


@pytest.mark.parametrize("name", NAMES)
def test_everything_about_one(capsys, name):
    row = ACTIVATIONS[name]
    text = "\n".join(lines(capsys, name))
    assert text.startswith(f"{name}: {row.summary}\n")
    for part in (row.source, row.hidden_act, f"{row.flops_per_element} FLOPs", f"def {name}("):
        assert part in text
    for entry in (*row.parameters, *row.learnable):
        assert re.search(rf"^    {entry.name} .*{re.escape(entry.doc)}$", text, re.MULTILINE)


def test_settings_are_shown_beside_the_defaults(capsys):
    text = "\n".join(lines(capsys, "powlu", "m=2.5", "polyrelu", "a3=0", "learn=global"))
    assert re.search(r"m +2.5 \(default 3\) +> 0 and < 10", text)
    assert re.search(r"a3 +0 \(default 0.333333\)", text)
    assert "learn: global" in text


def test_no_torch_is_imported():
    code = "import sys; from ling.cli import main; main(['activations', 'polynorm']); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], stdout=subprocess.DEVNULL, check=False).returncode == 0


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["powlo"], "unknown activation 'powlo'; did you mean 'powlu'?"),
        (["m=2"], "m=2: a setting of which activation?"),
        (["powlu", "n=2"], "powlu: powlu has no parameter 'n'"),
        (["powlu", "m=20"], "powlu.m: must be > 0 and < 10, not 20"),
        (["powlu", "m={"], "m={"),
        (["--plot", "x.png"], "--plot: name what to draw"),
        (["topk_relu", "--plot", "x.png"], "topk_relu.k: not given"),
        (["powlu", "--plugin", "none.py"], "none.py: no such file"),
        (["powlu", "--plto", "x.png"], "unknown argument '--plto'"),
    ],
)
def test_wrong_input(capsys, argv, expected):
    assert main(["activations", *argv]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("ling: error: ")
    assert err.count("\n") == 1
    assert expected in err


def test_without_matplotlib_the_command_to_install_it_is_named(capsys, tmp_path, monkeypatch):
    absent = replace(optional.find("triton"), name="matplotlib", module=None, problem=optional.ABSENT)
    monkeypatch.setattr(optional, "find", lambda name: absent)
    assert main(["activations", "powlu", "--plot", str(tmp_path / "x.png")]) == 2
    assert "matplotlib: not installed; pip install matplotlib" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_plots(capsys, tmp_path):
    pytest.importorskip("matplotlib")
    for names in (["powlu", "m=2", "powlu", "swiglu_clip"], ["polynorm", "topk_relu", "k=100"], ["swiglu"]):
        path = tmp_path / f"{names[0]}.svg"
        assert lines(capsys, *names, "--plot", str(path)) == [f"wrote {path}"]
        assert path.read_text().startswith("<?xml")
    before = path.read_bytes()
    assert main(["activations", "powlu", "--plot", str(path)]) == 2
    assert "is there already" in capsys.readouterr().err
    assert path.read_bytes() == before
    for wrong, expected in (("x.doc", "must end in one of"), ("no/x.png", "cannot be written")):
        assert main(["activations", "powlu", "--plot", str(tmp_path / wrong)]) == 2
        assert expected in capsys.readouterr().err


def test_a_plots_curves_are_the_values_and_their_slopes():
    from ling.activations.table import resolve
    from ling.commands.activations import _curve

    for spec, one_input in (("powlu", False), ("powlu", True), ("polynorm", False), ("gelu", False)):
        x, y, slope = _curve(resolve(spec), one_input)
        middle = [(b - a) / (d - c) for a, b, c, d in zip(y, y[2:], x, x[2:], strict=False)]
        away = [i for i, at in enumerate(x[1:-1]) if abs(at) > 0.1]
        assert max(abs(middle[i] - slope[i + 1]) for i in away) < 5e-3
        assert (x[0], x[-1]) == (-10.0, 20.0)
