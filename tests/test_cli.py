"""The `ling` command: cheap help, lazy subcommands, one line and code 2 for wrong input."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from ling import __version__, cli
from ling.config import UserError
from ling.config.yaml_io import parse_yaml

ROOT = Path(__file__).parents[1]
RUN = str(ROOT / "configs" / "runs" / "tiny_moe.yaml")
HEAVY = ("torch", "megatron", "numpy", "transformers")


def ling(*argv: str, module: str = "ling") -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", module, *argv], cwd=ROOT, capture_output=True, text=True, check=False)


def imported_by(*argv: str) -> list[str]:
    """The heavy packages that are loaded after `ling ARGV`."""
    program = f"import sys; from ling.cli import main; main({list(argv)!r}); print('loaded', *sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    loaded = done.stdout.rsplit("loaded ", 1)[1].split()
    return [name for name in (*HEAVY, "omegaconf", "ling.commands") if name in loaded]


def test_help_lists_every_command_and_imports_nothing():
    done = ling("--help")
    assert done.returncode == 0
    assert all(f"  {name} " in done.stdout for name in cli.COMMANDS)
    assert imported_by("--help") == []
    assert imported_by() == []
    assert ling().stdout == done.stdout


def test_version():
    assert ling("--version").stdout == f"ling {__version__}\n"


def test_configs_are_shown_without_torch():
    assert imported_by("config", "show", RUN) == ["omegaconf", "ling.commands"]
    assert imported_by("config", "keys", "model") == ["omegaconf", "ling.commands"]


def test_wrong_input_as_a_process():
    for argv, expected in [
        (["trian"], "unknown command 'trian'; did you mean train?"),
        (["xyzzy"], "the commands are train, launch"),
        (["config", "show"], "the following arguments are required: CONFIG; see `ling config show --help`"),
        (["config", "show", RUN, "modl.x=1"], "unknown key modl; did you mean model?"),
        (["config", "check", RUN, "model.mcore.no_such_field=1"], "has no such field"),
    ]:
        done = ling(*argv)
        assert (done.returncode, done.stdout) == (2, ""), argv
        assert done.stderr.startswith("ling: error: ")
        assert expected in done.stderr
        assert done.stderr.count("\n") == 1


def test_show_prints_yaml_that_loads(capsys):
    assert cli.main(["config", "show", RUN, "optim.lr=1e-3"]) == 0
    out = capsys.readouterr().out
    assert parse_yaml(out, "stdout")["optim"]["lr"] == 1e-3
    assert "#   optim.lr " in out
    assert "(default fp32)" not in out


def test_show_as_json(capsys):
    assert cli.main(["config", "show", RUN, "--json", "model.activation=swiglu"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["config"]["model"]["activation"] == {"name": "swiglu"}
    assert shown["non_default"]["model.activation"] == {"value": {"name": "swiglu"}, "default": {"name": "powlu"}}


def test_overrides_may_follow_options(capsys):
    assert cli.main(["config", "show", RUN, "run.seed=1", "--json", "run.name=x", "run.seed=2"]) == 0
    run = json.loads(capsys.readouterr().out)["config"]["run"]
    assert (run["name"], run["seed"]) == ("x", 2)
    assert cli.main(["config", "show", RUN, "--jsno"]) == 2
    assert "unknown argument '--jsno'" in capsys.readouterr().err


def test_check_tells_the_size_and_the_layout(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "ling.model.build", type(sys)("ling.model.build"))
    checked = []
    sys.modules["ling.model.build"].check_model_config = checked.append
    assert cli.main(["config", "check", RUN, "--world", "2"]) == 0
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    assert "tiny_moe.yaml: ok, " in out
    assert "parameters (" in out
    assert "2 ranks: 2 data-parallel, 1 microbatches per step" in out
    assert len(checked) == 1


def test_keys(capsys):
    assert cli.main(["config", "keys", "optim.lr"]) == 0
    assert capsys.readouterr().out == "optim.lr  (float; required; > 0)\n    peak learning rate\n"
    assert cli.main(["config", "keys", "optm"]) == 2


@pytest.fixture
def command(monkeypatch):
    """Makes `ling config` do what a test says."""

    def make(run):
        module = type(sys)("fake")
        module.add_arguments, module.run = (lambda parser: None), run
        monkeypatch.setitem(sys.modules, "fake", module)
        monkeypatch.setitem(cli.COMMANDS, "config", ("fake", "a test's"))

    return make


def raising(error: BaseException):
    def run(args):
        raise error

    return run


def test_exit_codes(command, capsys):
    command(raising(UserError("two\nlines")))
    assert cli.main(["config"]) == 2
    assert capsys.readouterr().err == "ling: error: two lines\n"
    command(raising(KeyboardInterrupt()))
    assert cli.main(["config"]) == 130
    assert capsys.readouterr() == ("", "")
    command(lambda args: 75)
    assert cli.main(["config"]) == 75
    command(raising(ZeroDivisionError("a bug")))
    with pytest.raises(ZeroDivisionError):
        cli.main(["config"])


def test_a_reader_that_leaves_is_no_error():
    shell = f"{sys.executable} -m ling config keys | head -n 1"
    done = subprocess.run(["bash", "-c", shell], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("run.name")
    assert done.stderr == ""
