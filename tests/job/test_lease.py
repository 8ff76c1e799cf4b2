"""One job at a time: who holds a run's folder, who may take it, and that clocks do not matter."""

import json
import multiprocessing
import os
import signal
import subprocess
import threading

import pytest

from ling.config import UserError
from ling.job import lease as module
from ling.job.lease import acquire, describe, holder

FORKS = multiprocessing.get_context("fork")


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(module, "BEAT_S", 0.02)
    monkeypatch.setattr(module, "STALE_AFTER_S", 0.3)
    for name in ("SLURM_JOB_ID", "SLURM_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)


def leave(run_dir, number=1, **changes):
    """A lease as another holder has left it."""
    held = acquire(run_dir / "made")
    owner = json.loads(held.path.read_text()) | changes
    held.release()
    path = run_dir / "job" / f"lease_{number}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(owner))
    return path


def dead_process() -> dict:
    process = subprocess.Popen(["sleep", "0"])
    process.wait()
    return {"pid": process.pid, "pid_started": "1"}


def test_a_held_folder_is_refused_with_the_holder_and_the_mend(tmp_path):
    held = acquire(tmp_path)
    with pytest.raises(UserError) as raised:
        acquire(tmp_path)
    assert str(raised.value) == (
        f"{tmp_path} is in use by process {os.getpid()} on {held._owner['node']}; wait for it, stop it "
        f"(kill {os.getpid()} on that machine: it saves and ends), or give another run.dir"
    )
    assert holder(tmp_path)["pid"] == os.getpid()
    held.release()
    held.release()
    assert holder(tmp_path) is None
    assert list((tmp_path / "job").iterdir()) == []
    acquire(tmp_path).release()


def test_a_holder_under_slurm_is_named_by_its_job(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    held = acquire(tmp_path)
    assert describe(holder(tmp_path)).endswith(" (SLURM job 77)")
    with pytest.raises(UserError, match=r"stop it \(scancel 77: it saves and ends\)"):
        acquire(tmp_path)
    held.release()


def test_a_lease_counts_up_while_it_is_held(tmp_path):
    held = acquire(tmp_path)
    counters = set()
    while len(counters) < 3:
        counters.add(holder(tmp_path)["counter"])
    held.release()


def hold_for_ever(run_dir, ready):
    acquire(run_dir)
    ready.set()
    threading.Event().wait()


def test_a_killed_holder_of_this_machine_is_no_hindrance(tmp_path):
    ready = FORKS.Event()
    process = FORKS.Process(target=hold_for_ever, args=(tmp_path, ready))
    process.start()
    assert ready.wait(30)
    with pytest.raises(UserError, match=f"in use by process {process.pid}"):
        acquire(tmp_path)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    said = []
    acquire(tmp_path, say=said.append).release()
    assert said == [], "nothing to wait for: the process is gone"


def test_another_process_with_the_number_of_a_dead_holder_is_not_taken_for_it(tmp_path):
    leave(tmp_path, pid=os.getpid(), pid_started="12")
    acquire(tmp_path).release()


def test_a_silent_holder_of_another_machine_is_given_time(tmp_path):
    leave(tmp_path, machine="another", node="n2", pid=5)
    said = []
    held = acquire(tmp_path, say=said.append)
    assert said == [f"ling: {tmp_path} was left to process 5 on n2: seeing for 0.3 s whether it lives"]
    assert held.path.name == "lease_2.json"
    assert [path.name for path in (tmp_path / "job").glob("lease*")] == ["lease_2.json"]
    held.release()


def test_a_holder_of_another_machine_that_counts_is_alive_whatever_the_clocks_say(tmp_path):
    path = leave(tmp_path, machine="another", node="n2", pid=5)
    over = threading.Event()

    def count():
        owner = json.loads(path.read_text())
        while not over.wait(0.02):
            owner["counter"] += 1
            module.replace_json(path, owner)
            os.utime(path, (1, 1))  # its clock, or the file server's, stands in 1970

    beats = threading.Thread(target=count)
    beats.start()
    try:
        with pytest.raises(UserError, match="in use by process 5 on n2"):
            acquire(tmp_path, say=lambda text: None)
    finally:
        over.set()
        beats.join()


def test_a_requeued_slurm_job_takes_its_own_lease_over_at_once(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    leave(tmp_path, machine="another")
    monkeypatch.setattr(module, "STALE_AFTER_S", 3600.0)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    acquire(tmp_path).release()


def test_a_holder_that_releases_while_it_is_watched(tmp_path, monkeypatch):
    path = leave(tmp_path, machine="another")
    monkeypatch.setattr(module, "STALE_AFTER_S", 3600.0)
    monkeypatch.setattr(module.time, "sleep", lambda seconds: path.unlink())
    acquire(tmp_path, say=lambda text: None).release()


def test_a_holder_that_was_asleep_learns_that_it_has_lost_the_folder(tmp_path):
    lost = []
    sleeper = acquire(tmp_path, lost=lost.append)
    newer = sleeper.path.with_name("lease_2.json")
    newer.write_text(json.dumps({"pid": 9, "node": "n2"}))
    sleeper._thread.join(30)
    assert lost == [f"{tmp_path} has been taken over by process 9 on n2, which did not see this one alive"]
    sleeper.release()
    assert newer.exists()


def try_to_take(run_dir, start, results, over):
    start.wait()
    try:
        held = acquire(run_dir)
    except UserError as error:
        results.put(str(error))
    else:
        results.put("taken")
        over.wait()
        held.release()


@pytest.mark.parametrize("is_left", [False, True])
def test_of_several_starts_at_once_at_most_one_gets_the_folder(tmp_path, is_left):
    for number in range(3):
        folder = tmp_path / str(number)
        if is_left:
            leave(folder, **dead_process())
        start, results, over = FORKS.Event(), FORKS.Queue(), FORKS.Event()
        processes = [FORKS.Process(target=try_to_take, args=(folder, start, results, over)) for _ in range(4)]
        for process in processes:
            process.start()
        start.set()
        found = [results.get(timeout=60) for _ in processes]
        over.set()
        for process in processes:
            process.join()
        assert found.count("taken") == 1, found
        refused = [text for text in found if text != "taken"]
        assert all("is in use by" in text or "is being taken by another job" in text for text in refused)


def test_a_damaged_lease_is_replaced(tmp_path):
    (tmp_path / "job").mkdir()
    (tmp_path / "job" / "lease_4.json").write_text("{half")
    held = acquire(tmp_path)
    assert held.path.name == "lease_5.json"
    held.release()
