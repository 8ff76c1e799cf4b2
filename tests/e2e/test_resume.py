"""A job from the outside: stopped, killed, hung and failed runs, what they say, and that they go on as if nothing had
happened."""

import json
import os
import random
import re
import shutil
import signal
import time
from pathlib import Path

import pytest

from ling.checkpoint.folder import checkpoints, newest
from ling.job.attempts import read_attempts
from ling.job.lease import holder
from ling.job.local_ranks import children_of
from ling.job.proof import compare_exactly
from ling.observe.metrics import read_metrics
from tests.e2e.cli import FAULTS, Done, Forked, complete, kill, ling, start

STEPS = 9
RUN = ["train", "run.yaml", f"train.train_iters={STEPS}", "checkpoint.save_interval=2", "optim.lr_decay_iters=20"]
WAIT_S = 120.0


def outcome_of(folder: Path) -> dict:
    return json.loads((folder / "job" / "outcome.json").read_text())


def faulty(place: Path, fault: str, *argv: str) -> Done:
    """Run `ling ARGV` to its end with a fault: `RANK STEP ACTION`, see faults/sitecustomize.py."""
    return complete(start(*argv, cwd=place, PYTHONPATH=str(FAULTS), LING_TEST_FAULT=fault))


def wait_until(condition, process) -> None:
    deadline = time.monotonic() + WAIT_S
    while not condition() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    assert condition(), process.communicate()


def last_step(folder: Path) -> int:
    return max((record["step"] for record in read_metrics(folder)), default=0)


@pytest.fixture(scope="session")
def whole(place) -> Path:
    """The folder of a run of STEPS steps that nothing has interrupted."""
    done = ling(*RUN, "run.dir=whole", cwd=place)
    assert done.code == 0, done
    return place / "whole"


@pytest.fixture(scope="session")
def whole_of_two(place) -> Path:
    """The same on two ranks with expert parallelism."""
    done = complete(start(*RUN, *TWO, "run.dir=whole_of_two", cwd=place))
    assert done.code == 0, done
    return place / "whole_of_two"


TWO = ["--nproc", "2", "parallel.expert_model_parallel_size=2"]


def test_a_run_that_is_stopped_again_and_again_equals_one_that_is_not(place, whole):
    run, folder = [*RUN, "run.dir=stopped"], place / "stopped"
    for number, (step, name) in enumerate([(2, "SIGTERM"), (3, "SIGUSR1"), (6, "SIGINT")], start=1):
        done = ling(*run, cwd=place, fault=f"0 {step} {name}")
        assert done.code == 75, done
        saved = f"stopped/checkpoints/step_{step:08d}"
        assert done.out.splitlines()[-1] == (
            f"ling: stopped at step {step} ({name}), saved {saved}; the same command resumes"
        )
        assert done.err.startswith(f"ling: {name}: finishing the step, then saving and stopping")
        expected = {"reason": "stopped", "step": step, "signal": name, "cause": name, "checkpoint": saved}
        assert outcome_of(folder) == expected
        assert str(newest(folder)).endswith(saved)
        assert read_attempts(folder)[-1]["attempt"] == number
        assert holder(folder) is None
    done = ling(*run, cwd=place)
    assert done.code == 0, done
    told = r"^ling: attempt 4; attempt 3 stopped at step 6 \(SIGINT\), \d+s before; continuing from stopped/checkpoi"
    assert re.search(told, done.out, re.MULTILINE)
    assert outcome_of(folder) == {"reason": "done", "step": STEPS}
    verdict = compare_exactly(whole, folder)
    assert verdict.difference is None
    assert verdict.compared["records"] == STEPS + 3, "the evaluation at step 6, cut off by the signal, was made up for"
    attempts = [record["attempt"] for record in read_metrics(folder)]
    assert attempts == sorted(attempts)
    ended = [(a["first_step"], a["last_step"], a["reason"], a["resumed_from"]) for a in read_attempts(folder)]
    assert ended == [(1, 2, "stopped", 0), (3, 3, "stopped", 2), (4, 6, "stopped", 3), (7, STEPS, "done", 6)]
    assert all(0 < a["startup_s"] < a["seconds"] for a in read_attempts(folder))


def test_two_ranks_that_are_stopped_fail_hang_and_are_killed(place, whole_of_two):
    run, folder = [*RUN, *TWO, "run.dir=two_ranks", "train.hang_timeout=2"], place / "two_ranks"

    done = faulty(place, "1 2 parent-SIGUSR1", *run)
    assert done.code == 75, done
    assert outcome_of(folder)["reason"] == "stopped"
    assert outcome_of(folder)["signal"] == "SIGUSR1"
    step = outcome_of(folder)["step"]
    assert 2 <= step <= 4
    assert f"ling: stopped at step {step} (SIGUSR1), saved two_ranks/checkpoints/step_{step:08d}; the" in done.out

    done = faulty(place, "1 6 raise", *run)
    check_failure(done, folder, "failed", 6, r"failed at step 6: ValueError: boom; see .*error_rank_00001.txt")
    assert done.err.count("ValueError: boom") == 2, "the traceback of the cause, and the last line"
    assert "closed by peer" not in done.err
    assert 'raise ValueError("boom")' in (folder / "logs" / "error_rank_00001.txt").read_text()

    done = faulty(place, "1 7 hang", *run)
    hang = r"hung at step 7: no progress for 2 s in forward and backward: .*customize.py:\d+ act; see .*logs/hang.txt"
    check_failure(done, folder, "hung", 7, hang)
    assert "attempt 3; attempt 2 rank 1" in done.out
    told = (folder / "logs" / "hang.txt").read_text().splitlines()
    assert len(told) == 3
    assert all(re.match(r"rank [01] \(.*\): step 7, ", line) for line in told[1:])
    assert "sleep" in (folder / "logs" / "stacks_rank_00001.txt").read_text()

    done = faulty(place, "1 8 SIGKILL", *run)
    check_failure(done, folder, "failed", 8, "failed at step 8: the process was killed by .*memory runs out")

    done = complete(start(*run, cwd=place))
    assert done.code == 0, done
    assert "failed at step 8: the process was killed" in done.out
    assert compare_exactly(whole_of_two, folder).difference is None
    reasons = [attempt["reason"] for attempt in read_attempts(folder)]
    assert reasons == ["stopped", "failed", "hung", "failed", "done"]
    assert [record["step"] for record in read_metrics(folder) if "loss" in record] == list(range(1, STEPS + 1))


def check_failure(done: Done, folder: Path, reason: str, step: int, words: str) -> None:
    """The job has ended with rank 1 named as the cause, in the outcome and in the last line on the console."""
    assert done.code == 1, done
    outcome = outcome_of(folder)
    assert (outcome["reason"], outcome["rank"], outcome["step"]) == (reason, 1, step)
    last = done.err.splitlines()[-1]
    assert re.match(rf"ling: error: rank 1 \({outcome['node']}\) {words}; the same command continues from ", last), last
    assert last.endswith(str(newest(folder)).removeprefix(f"{folder.parent}/"))
    assert holder(folder) is None


def test_a_second_job_is_refused_while_the_first_one_lives(place):
    run, folder = [*RUN, "run.dir=twice"], place / "twice"
    first = start(*run, cwd=place, PYTHONPATH=str(FAULTS), LING_TEST_FAULT="0 3 hang")
    wait_until(lambda: last_step(folder) == 2, first)
    before = (folder / "metrics.jsonl").read_bytes()
    second = ling(*run, cwd=place)
    kill(first)
    assert (second.code, second.err.count("\n")) == (2, 1)
    assert f"ling: error: twice is in use by process {first.pid} on " in second.err
    assert f"stop it (kill {first.pid} on that machine: it saves and ends), or give another run.dir" in second.err
    assert (folder / "metrics.jsonl").read_bytes() == before
    third = ling(*run, "train.train_iters=3", cwd=place)
    assert third.code == 0, third
    assert "attempt 2; attempt 1 was killed, or its machine failed, " in third.out
    assert "continuing from twice/checkpoints/step_00000002" in third.out


def test_a_time_limit_stops_the_run_in_time(place):
    limit = ["train.train_iters=1000000", "train.time_limit=00:00:06", "checkpoint.save_interval=0"]
    done = ling(*RUN, "run.dir=limited", *limit, "train.eval_interval=0", "observe.log_interval=1000", cwd=place)
    assert done.code == 75, done
    outcome = outcome_of(place / "limited")
    assert (outcome["signal"], outcome["cause"]) == (None, "time limit: train.time_limit 00:00:06")
    assert f"ling: stopped at step {outcome['step']} (time limit: train.time_limit 00:00:06), saved " in done.out
    assert newest(place / "limited").name == f"step_{outcome['step']:08d}"


def test_a_wrong_time_limit(place):
    done = ling(*RUN, "run.dir=never", "train.time_limit=tomorrow", cwd=place)
    assert (done.code, done.out) == (2, "")
    assert "ling: error: train.time_limit: 'tomorrow' is no length of time; write 23:50:00" in done.err


def kill_at_random(place: Path, name: str, rounds: int, *settings: str, ranks: int = 1, most: int = 1) -> None:
    """Kill a run that saves at every step, again and again; then let it end, and compare it with one left alone.

    `most`: so many intervals may be lost.
    """
    folder, draw = place / name, random.Random(rounds)
    run = ["train", "run.yaml", "checkpoint.save_interval=1", "train.eval_interval=0", *settings]
    for _ in range(rounds):
        begin = Forked if ranks == 1 else start
        process = begin(*run, f"run.dir={name}", "train.train_iters=100000", "--nproc", str(ranks), cwd=place)
        begun = last_step(folder)
        wait_until(lambda begun=begun: last_step(folder) != begun, process)
        time.sleep(draw.random() * 0.3)
        victims = children_of(process.pid) if ranks > 1 else []
        os.kill(draw.choice([process.pid, *victims]), signal.SIGKILL)
        process.communicate(timeout=WAIT_S)
        assert process.returncode == (-signal.SIGKILL if not victims else process.returncode)
        assert process.returncode in (-signal.SIGKILL, 1)
        last = newest(folder)
        assert last is not None or last_step(folder) <= 1
        saved = int(last.name.removeprefix("step_")) if last is not None else 0
        assert last_step(folder) - saved <= most, f"no more than {most} intervals are lost"
    steps = f"train.train_iters={last_step(folder) + 2}"
    for where in (name, f"{name}_left_alone"):
        argv = [*run, f"run.dir={where}", steps]
        done = ling(*argv, cwd=place) if ranks == 1 else complete(start(*argv, "--nproc", str(ranks), cwd=place))
        assert done.code == 0, done
    verdict = compare_exactly(place / f"{name}_left_alone", folder)
    assert verdict.difference is None
    steps_done = [record["step"] for record in read_metrics(folder) if "loss" in record]
    assert steps_done == list(range(1, last_step(folder) + 1))
    assert not [path for path in (folder / "checkpoints").iterdir() if path.name.startswith(".")]
    assert len(read_attempts(folder)) == rounds + 1
    shutil.rmtree(folder)


def test_killed_at_random_moments(place):
    kill_at_random(place, "killed_at_random", rounds=5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "most"),
    [
        ([], 1),
        (["checkpoint.async_save=true", "checkpoint.keep_last=2"], 2),  # that of a save under way, too
        (["checkpoint.async_save=true", "checkpoint.keep_last=2", "checkpoint.max_lost_steps=1"], 1),
    ],
    ids=["", "async", "async, bounded"],
)
def test_killed_at_many_random_moments(place, settings, most):
    kill_at_random(place, f"killed_often_{len(settings)}", 30, *settings, most=most)


@pytest.mark.slow
def test_ranks_killed_at_random_moments(place):
    kill_at_random(place, "ranks_killed", 10, "parallel.expert_model_parallel_size=2", ranks=2)


@pytest.mark.slow
def test_two_interrupts_end_all_ranks_at_once(place):
    run = [*RUN, *TWO, "run.dir=interrupted"]
    process = start(*run, cwd=place, PYTHONPATH=str(FAULTS), LING_TEST_FAULT="1 3 hang")
    wait_until(lambda: newest(place / "interrupted") is not None, process)
    ranks = children_of(process.pid)
    assert len(ranks) == 2
    process.send_signal(signal.SIGINT)
    assert "again: stop at once" in process.stderr.readline()
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=WAIT_S)
    assert process.returncode == 130
    assert "ling: error: interrupted at once, nothing was saved; the same command continues from interru" in err
    assert not any(Path(f"/proc/{pid}/cmdline").exists() for pid in ranks)


def test_prove_resume(place):
    argv = ["prove-resume", "run.yaml", "--steps", "8", "--stop-at", "3", "--kill", "--json"]
    long_run = ["train.train_iters=300", "optim.lr_decay_style=cosine", "optim.lr_warmup_iters=20"]
    done = ling(*argv, *long_run, "train.eval_interval=2", cwd=place)
    assert done.code == 0, done
    verdict = json.loads(done.out)
    assert (verdict["proved"], verdict["difference"], verdict["folder"]) == (True, None, None)
    assert verdict["compared"]["records"] == 12
    assert verdict["compared"]["tensors"] > 50


@pytest.mark.slow
def test_prove_resume_on_another_layout(place):
    argv = ["prove-resume", "run.yaml", "--steps", "8", "--stop-at", "3", "precision.recipe=fp32", "--workdir", "proof"]
    then = ["--nproc", "2", "parallel.expert_model_parallel_size=2", "--then", "parallel.expert_model_parallel_size=1"]
    then += ["parallel.use_distributed_optimizer=false"]
    done = ling(*argv, *then, "--then-nproc", "1", cwd=place)
    assert done.code == 0, done
    assert "proved: resumed on another layout, every loss is that of the uninterrupted run within 1e-05" in done.out
    assert [step for step, _ in checkpoints(place / "proof" / "uninterrupted")] == [3, 6, 8]
    done = ling(*argv, cwd=place)
    assert (done.code, "--workdir: proof is not an empty folder" in done.err) == (2, True)
