"""The job files as programs, with stand-ins for SLURM, ssh, torchrun and Python: which command follows which end."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from ling.config import load_config
from ling.launch.job import make_job
from ling.launch.render import render

ROOT = Path(__file__).parents[2]
RUN = "configs/runs/tiny_dense.yaml"
LOG = 'echo "$(basename "$0") $*" >>"$STUBS/log"\n'
STUBS = {
    # what srun and ssh run is what follows `bash`, or the words of the last argument
    "srun": LOG + 'while [ "$1" != bash ]; do shift; done; exec "$@"',
    "ssh": LOG + '[ "$1" = -n ] && [ "$2" != -o ] && shift && shift && exec bash -c "$*"; exec bash -c "${@: -1}"',
    "scontrol": LOG + 'case $* in "show hostnames"*) printf "n1\\nn2\\n" ;; esac; exit 0',
    "squeue": LOG + 'case $* in *%r*) cat "$STUBS/reason" ;; *%x*) echo "${EXCLUDED:-(null)}" ;; esac',
    "scancel": LOG + 'case $* in *USR1*) touch "$STUBS/told" ;; esac',
    "torchrun": LOG + 'case $* in *preflight*) exit "${RANKS_CODE:-0}" ;; esac; . "$STUBS/training"',
    "python": LOG
    + 'case $* in *restarts\\ begin*) exit "${BEGIN_CODE:-0}" ;; *restarts\\ end*) cat "$STUBS/answer" ;;\n'
    + '*preflight*) exit "${NODE_CODE:-0}" ;; *train*) . "$STUBS/training" ;; esac',
    "sleep": 'exec /bin/sleep "$(awk "BEGIN {print $1 / 50}")"',
}


@pytest.fixture
def stubs(tmp_path):
    """A folder with the stand-ins and their log."""
    for name, text in STUBS.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    for name, text in (("log", ""), ("reason", "None\n"), ("answer", "done: was done\n"), ("training", "exit 0")):
        (tmp_path / name).write_text(text)
    return tmp_path


def start(stubs, kind, *overrides, **environment):
    """Start the job file of a launcher with the stand-ins."""
    (stubs / "cluster.yaml").write_text("node: {gpus: 1}")
    overrides = [*overrides, "launch.hosts=[n1,n2]"] if kind == "torchrun" else overrides
    config = load_config(ROOT / RUN, [f"run.dir={stubs}/run", *overrides])
    (stubs / "job.sh").write_text(render(make_job(kind, config, RUN, cluster_path=str(stubs / "cluster.yaml"))))
    slurm = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_NNODES": "2", "SLURMD_NODENAME": "n1"}
    array = {"SLURM_ARRAY_JOB_ID": "6", "SLURM_ARRAY_TASK_ID": "2"}
    path = {"PATH": f"{stubs}:{os.environ['PATH']}", "STUBS": str(stubs)}
    variables = {**os.environ, **path, **(slurm | array if kind == "slurm" else {}), **environment}
    return subprocess.Popen(["bash", str(stubs / "job.sh")], env=variables, stdout=subprocess.PIPE, text=True)


def run(stubs, kind, *overrides, **environment):
    """The job file's exit code, output, and the commands that it has called."""
    process = start(stubs, kind, *overrides, **environment)
    out, _ = process.communicate(timeout=60)
    return process.returncode, out, calls(stubs)


def calls(stubs):
    return [line for line in (stubs / "log").read_text().splitlines() if not line.startswith("squeue")]


def after_end(found):
    """The commands after the question what to do now."""
    last = max(index for index, call in enumerate(found) if "restarts end" in call)
    return found[last + 1 :]


def wait_for(condition):
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_slurm_in_order(stubs):
    code, out, found = run(stubs, "slurm")
    assert (code, out) == (0, "done: was done\n")
    programs = [call for call in found if call.startswith(("python", "torchrun"))]
    kinds = ["restarts begin", "ling preflight", "ling preflight", "ling train", "restarts end"]
    assert len(programs) == len(kinds)
    assert all(kind in call for kind, call in zip(kinds, programs, strict=True))
    assert "--job 7 --start 0 --max-failures 3 --nodes n1 n2" in programs[0]
    assert "--rdzv-endpoint=n1:20007 --rdzv-id=7.0 " in programs[3]
    assert after_end(found) == [programs[-1]] or after_end(found) == []


@pytest.mark.parametrize(
    ("restart", "answer", "code", "expected"),
    [
        ("requeue", "again: x", 75, ["scontrol requeue 7"]),
        (
            "requeue",
            "exclude: n2: n2: bad: worse",
            75,
            ["scontrol requeuehold 7", "scontrol update jobid=7 ExcNodeList=n2", "scontrol release 7"],
        ),
        ("requeue", "stop: x", 1, []),
        ("requeue", "", 1, []),
        ("array", "done: x", 0, ["scancel --state=PENDING 6"]),
        ("array", "again: x", 75, []),
        ("array", "exclude: n1,n2: x", 75, ["scontrol update jobid=6 ExcNodeList=n1,n2"]),
        ("array", "stop: x", 1, ["scancel --state=PENDING 6"]),
        ("never", "done: x", 0, []),
        ("never", "again: x", 75, []),
        ("never", "exclude: n2: x", 1, []),
    ],
)
def test_slurm_answers(stubs, restart, answer, code, expected):
    (stubs / "answer").write_text(answer + "\n")
    got, _, found = run(stubs, "slurm", f"launch.restart={restart}")
    assert got == code
    assert [call for call in after_end(found) if call.startswith(("scontrol", "scancel"))] == expected


def test_nodes_that_were_excluded_before_stay_so(stubs):
    (stubs / "answer").write_text("exclude: n2: x\n")
    _, _, found = run(stubs, "slurm", EXCLUDED="n7,n9")
    assert "scontrol update jobid=7 ExcNodeList=n2,n7,n9" in found


@pytest.mark.parametrize(("failing", "programs"), [("BEGIN_CODE", 1), ("NODE_CODE", 3), ("RANKS_CODE", 4)])
def test_slurm_trains_only_when_all_is_well(stubs, failing, programs):
    (stubs / "answer").write_text("stop: x\n")
    code, _, found = run(stubs, "slurm", **{failing: "1"})
    assert code == 1
    assert len([call for call in found if call.startswith(("python", "torchrun"))]) == programs
    assert not any("ling train" in call for call in found)


def test_slurm_passes_on_the_signal_before_the_limit(stubs):
    (stubs / "training").write_text(
        'touch "$STUBS/training_now"; while [ ! -e "$STUBS/told" ]; do sleep 1; done; exit 0'
    )
    (stubs / "answer").write_text("again: stopped\n")
    process = start(stubs, "slurm")
    wait_for((stubs / "training_now").exists)
    process.send_signal(signal.SIGUSR1)
    process.communicate(timeout=60)
    assert process.returncode == 75
    found = calls(stubs)
    assert "scancel --signal=USR1 7" in found
    assert found[-1] == "scontrol requeue 7"


@pytest.mark.parametrize(("reason", "expected"), [("None", []), ("TimeLimit", ["scontrol requeue 7"])])
def test_slurm_comes_back_from_the_limit_but_not_from_scancel(stubs, reason, expected):
    wait = 'touch "$STUBS/training_now"; while [ ! -e "$STUBS/over" ]; do sleep 1; done; exit 1'
    (stubs / "training").write_text(wait)
    (stubs / "reason").write_text(reason + "\n")
    process = start(stubs, "slurm")
    wait_for((stubs / "training_now").exists)
    process.send_signal(signal.SIGTERM)
    (stubs / "over").touch()
    process.communicate(timeout=60)
    assert process.returncode == 143
    found = calls(stubs)
    assert not any("restarts end" in call for call in found)
    assert [call for call in found if call.startswith("scontrol requeue")] == expected


@pytest.mark.parametrize("kind", ["torchrun", "local"])
def test_without_a_scheduler_the_job_file_starts_again(stubs, kind):
    failing_once = 'if [ ! -e "$STUBS/failed" ]; then touch "$STUBS/failed"; exit 1; fi; exit 0'
    (stubs / "training").write_text(failing_once)
    text = (
        (stubs / "python")
        .read_text()
        .replace('cat "$STUBS/answer"', 'case $* in *"--start 0"*) echo "again: x" ;; *) echo "done: x" ;; esac')
    )
    (stubs / "python").write_text(text)
    code, out, found = run(stubs, kind)
    assert code == 0
    assert out.startswith("again: x\n")
    assert len([call for call in found if "restarts begin" in call]) == 2


@pytest.mark.parametrize("kind", ["torchrun", "local"])
def test_without_a_scheduler_the_job_file_ends(stubs, kind):
    (stubs / "training").write_text("exit 1")
    (stubs / "answer").write_text("stop: x\n")
    code, _, found = run(stubs, kind)
    assert code == 1
    assert len([call for call in found if "restarts begin" in call]) == 1


@pytest.mark.parametrize("kind", ["torchrun", "local"])
def test_without_a_scheduler_a_signal_reaches_the_ranks(stubs, kind):
    training = 'trap \'touch "$STUBS/saved"; exit 75\' TERM; touch "$STUBS/training_now"; while :; do sleep 1; done'
    (stubs / "training").write_text(training)
    (stubs / "answer").write_text("again: stopped\n")
    process = start(stubs, kind)
    wait_for((stubs / "training_now").exists)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 75
    assert (stubs / "saved").exists()


@pytest.mark.parametrize("code", [0, 2, 75])
def test_local_passes_on_the_code(stubs, code):
    (stubs / "training").write_text(f"exit {code}")
    got, _, found = run(stubs, "local")
    assert got == code
    assert not any("restarts end" in call for call in found)


def test_every_host_gets_the_command(stubs):
    code, _, found = run(stubs, "torchrun")
    assert code == 0
    trained = [call for call in found if call.startswith("torchrun") and "ling train" in call]
    assert len(trained) == 2
    assert all("--nnodes=2" in call and "--rdzv-endpoint=n1:29400" in call for call in trained)
    assert not list((stubs / "run" / "job").glob("pid.*"))
