"""Exports while a run trains: which and when, their failures, and what stays for them. The processes are made up."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ling.checkpoint import exports as module
from ling.checkpoint.exports import OF_RUN, Exports, export_folder, half_exported, is_wanted
from ling.checkpoint.folder import checkpoints, step_folder
from ling.checkpoint.retention import retire
from ling.cli import main
from tests.checkpoint.files import make_run
from tests.dist.training import tiny_config

ROOT = Path(__file__).parents[2]
WAIT_S = 60.0
MAKE = "import pathlib, sys; pathlib.Path(sys.argv[2]).mkdir(parents=True)"
SLEEP = "import time; time.sleep(3600)"
FAIL = "import sys; print('a line'); sys.exit('ling: error: no room here')"
CRASH = "raise RuntimeError('boom')"
KILLED = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"


class Told:
    """What exports have said and logged."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.records: list[dict] = []


def config_of(**settings):
    return tiny_config(train={"train_iters": 50}, checkpoint={"save_interval": 10, "export_every": 20} | settings)


@pytest.fixture
def program(monkeypatch):
    """Sets the Python program that runs in place of `ling export`, with the same arguments."""

    def use(text: str) -> None:
        monkeypatch.setattr(module, "_COMMAND", (sys.executable, "-c", text))

    return use


@pytest.fixture
def made(tmp_path):
    """Exports of a run in `tmp_path`, and what they told."""
    found: list[Exports] = []

    def make(**settings) -> tuple[Exports, Told]:
        told = Told()
        found.append(Exports(config_of(**settings), tmp_path, True, told.lines.append, told.records.append))
        return found[-1], told

    yield make
    for exports in found:
        exports.stop()


def finish(exports: Exports) -> None:
    deadline = time.monotonic() + WAIT_S
    while not exports.wait(1.0):
        assert time.monotonic() < deadline


@pytest.mark.parametrize(
    ("settings", "steps"),
    [
        ({}, [20, 40]),
        ({"export_at_end": True}, [20, 40, 50]),
        ({"export_every": None, "export_at_end": True}, [50]),
        ({"export_every": 50, "export_at_end": True}, [50]),
        ({"export_every": None}, []),
    ],
)
def test_which_steps(settings, steps):
    assert [step for step in range(10, 60, 10) if is_wanted(config_of(**settings), step)] == steps


def test_one_after_the_other(made, program, tmp_path):
    program(MAKE)
    exports, told = made()
    folders = make_run(tmp_path, [10, 20, 40])
    for step, folder in folders.items():
        exports.completed(step, folder)
    assert exports.pending == {20, 40}
    assert told.lines == ["the export of step 40 waits for that of step 20"]
    finish(exports)
    assert not exports.pending
    assert {path.name for path in (tmp_path / "exports").iterdir()} == {"step_00000020", "step_00000040"}
    assert [line.split(" in the background")[0] for line in told.lines[1:]] == [
        f"exported {export_folder(tmp_path, step)}" for step in (20, 40)
    ]
    assert [record["export"]["step"] for record in told.records] == [20, 40]


@pytest.mark.parametrize(
    ("text", "reason"),
    [(FAIL, "no room here"), (CRASH, "RuntimeError: boom"), (KILLED, "it was ended by SIGKILL")],
    ids=["refused", "crashed", "killed"],
)
def test_a_failure_is_told_and_the_next_goes_on(made, program, tmp_path, text, reason):
    program(text)
    exports, told = made()
    exports.completed(20, step_folder(tmp_path, 20))
    program(MAKE)
    exports.completed(40, step_folder(tmp_path, 40))
    finish(exports)
    log = tmp_path / "logs" / "export_step_00000020.txt"
    assert told.lines[1] == f"warning: step 20 could not be exported: {reason} (see {log}); training goes on"
    assert told.records[0] == {"export": {"step": 20, "error": f"{reason} (see {log})"}}
    assert told.lines[2].startswith(f"exported {export_folder(tmp_path, 40)}")


def test_a_process_that_cannot_be_started(made, monkeypatch, tmp_path):
    monkeypatch.setattr(module, "_COMMAND", (str(tmp_path / "nothing"),))
    exports, told = made()
    exports.completed(20, step_folder(tmp_path, 20))
    assert "step 20 could not be exported: it could not be started" in told.lines[0]
    assert not exports.pending


def test_a_checkpoint_stays_while_it_is_exported(made, program, tmp_path):
    folders = make_run(tmp_path, [20, 30, 40, 50])
    program(SLEEP)
    exports, _ = made()
    exports.completed(20, folders[20])
    exports.completed(40, folders[40])
    retire(tmp_path, 1, None, exports.pending)
    assert [step for step, _ in checkpoints(tmp_path)] == [20, 40, 50]
    exports.stop()
    retire(tmp_path, 1, None, exports.pending)
    assert [step for step, _ in checkpoints(tmp_path)] == [50]


def test_prune_leaves_what_is_half_exported(tmp_path, capsys):
    make_run(tmp_path, [20, 30, 40])
    (tmp_path / "exports" / ".step_00000020.partial").mkdir(parents=True)
    (tmp_path / "exports" / "step_00000030").mkdir()
    assert half_exported(tmp_path) == {20}
    assert main(["checkpoint", "prune", str(tmp_path), "--keep-last", "1"]) == 0
    assert [step for step, _ in checkpoints(tmp_path)] == [20, 40]


def test_a_stop_leaves_it_to_the_next_start(made, program, tmp_path):
    folders = make_run(tmp_path, [20, 40])
    program(SLEEP)
    exports, told = made()
    for step, folder in folders.items():
        exports.completed(step, folder)
    process = exports._running.process
    exports.stop()
    assert process.returncode == -signal.SIGTERM
    assert told.lines[-1] == "not exported yet: step 20, 40; the next start of the run does it"
    assert exports.wait(0.0)

    export_folder(tmp_path, 20).mkdir(parents=True)
    program(MAKE)
    later, _ = made()
    later.resume(40)
    assert later.pending == {40}, "20 is there already"
    finish(later)
    assert export_folder(tmp_path, 40).is_dir()


def test_exports_of_steps_that_are_done_again(made, program, tmp_path):
    folders = make_run(tmp_path, [20, 40])
    shutil.rmtree(folders[40])  # damaged, say
    for name in ("step_00000020", "step_00000040", ".step_00000040.partial", "mine"):
        (tmp_path / "exports" / name).mkdir(parents=True)
    program(MAKE)
    exports, told = made()
    exports.resume(20)
    assert not exports.pending
    assert {path.name for path in (tmp_path / "exports").iterdir()} == {
        "step_00000020",
        "step_00000040.superseded",
        "mine",
    }
    assert told.lines == [
        f"{export_folder(tmp_path, 40)} is of steps that are done again; kept as step_00000040.superseded"
    ]


def test_only_rank_0_has_exports(tmp_path):
    make_run(tmp_path, [20])
    exports = Exports(config_of(), tmp_path, False, pytest.fail, pytest.fail)
    exports.resume(20)
    exports.completed(20, step_folder(tmp_path, 20))
    assert not exports.pending
    assert exports.wait(0.0)


GIVE_WAY = """
import os, time
from ling.checkpoint.exports import give_way
give_way()
print(os.nice(0), open("/proc/self/oom_score_adj").read().strip(), flush=True)
time.sleep(3600)
"""
RUN = f"""
import os, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", {GIVE_WAY!r}], env=os.environ | {{"{OF_RUN}": str(os.getpid())}})
print(child.pid, flush=True)
time.sleep(3600)
"""


def test_an_export_gives_way_and_ends_with_its_run():
    run = subprocess.Popen([sys.executable, "-c", RUN], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    child = int(run.stdout.readline())
    try:
        assert run.stdout.readline().split() == ["19", "900"]
    finally:
        run.kill()
        run.wait()
    deadline = time.monotonic() + WAIT_S
    while _is_alive(child) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not _is_alive(child)


def _is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def test_the_environment_is_no_ranks(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    found = module._environment(os.environ)
    assert "RANK" not in found
    assert "TORCHELASTIC_RUN_ID" not in found
    assert found["PYTHONPATH"].split(os.pathsep)[0] == str(ROOT)
    assert found[OF_RUN] == str(os.getpid())
