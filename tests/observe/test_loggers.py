import logging
import sys
import threading
import time
import types

import pytest

from ling.config.schema import Config
from ling.observe import loggers
from ling.observe.loggers import BackgroundLogger, JsonlLogger, build_loggers, scalars, wandb_id, without_secrets
from ling.observe.metrics import read_metrics
from ling.platform import optional


class Collector:
    def __init__(self, fail_at=None, delay=0.0):
        self.records, self.closed, self.fail_at, self.delay = [], False, fail_at, delay

    def log(self, record):
        time.sleep(self.delay)
        if record["step"] == self.fail_at:
            raise OSError("no space left\nmore")
        self.records.append(record)

    def close(self):
        self.closed = True


def warnings(caplog):
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def config(**observe):
    made = Config()
    for key, value in observe.items():
        setattr(made.observe, key, value)
    return made


def test_jsonl_always_and_only_on_the_main_rank(tmp_path):
    run_dir = tmp_path / "run"
    other = build_loggers(config(tensorboard=True, wandb="offline"), run_dir, 0, False, {})
    other.log({"step": 1})
    other.close()
    assert not run_dir.exists()
    assert other.attempt is None
    main = build_loggers(config(), run_dir, 0, True, {})
    main.log({"step": 1, "loss": 2.0})
    main.close()
    assert main.attempt == 1
    assert read_metrics(run_dir) == [{"step": 1, "loss": 2.0, "attempt": 1}]
    assert sorted(path.name for path in run_dir.iterdir()) == ["metrics.jsonl"]


def test_a_full_disk_costs_records_and_one_warning(tmp_path, caplog, monkeypatch):
    logger = JsonlLogger(tmp_path, 0)

    def full(record):
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(logger.file, "write", full)
        logger.log({"step": 1})
        logger.log({"step": 2})
    logger.log({"step": 3})
    logger.close()
    assert len(warnings(caplog)) == 1
    assert [record["step"] for record in read_metrics(tmp_path)] == [3]


def test_background_writes_everything_before_it_closes():
    collector = Collector(delay=0.001)
    background = BackgroundLogger("test", lambda: collector)
    for step in range(50):
        background.log({"step": step})
    background.close()
    assert [record["step"] for record in collector.records] == list(range(50))
    assert collector.closed
    assert not background.disabled


@pytest.mark.parametrize("fail", ["make", "log"])
def test_an_exception_disables_with_one_warning(caplog, fail):
    def make():
        if fail == "make":
            raise OSError("no space left\nmore")
        return Collector(fail_at=1)

    background = BackgroundLogger("test", make)
    for step in range(5):
        background.log({"step": step})
    background.close()
    background.log({"step": 9})
    assert background.disabled
    assert warnings(caplog) == ["test is switched off, the run goes on: OSError: no space left"]


def test_a_logger_that_hangs_holds_up_nothing(caplog, monkeypatch):
    monkeypatch.setattr(loggers, "QUEUE_RECORDS", 3)
    release = threading.Event()
    background = BackgroundLogger("test", lambda: release.wait(30), close_timeout_s=0.2)
    started = time.monotonic()
    for step in range(10):
        background.log({"step": step})
    background.close()
    assert time.monotonic() - started < 5
    assert background.disabled
    assert warnings(caplog) == ["test is switched off, the run goes on: 3 records behind"]
    release.set()


def test_closing_is_limited_in_time(caplog):
    release = threading.Event()
    background = BackgroundLogger("test", lambda: release.wait(30), close_timeout_s=0.1)
    background.close()
    assert warnings(caplog) == ["test is switched off, the run goes on: did not finish within 0.1 s"]
    release.set()


def test_scalars_of_a_record():
    record = {"step": 3, "attempt": 1, "loss": 2, "name": "x", "flag": True, "none": None, "eval": {"a": 1.5, "b": "x"}}
    assert scalars(record) == {"train/loss": 2.0, "eval/a": 1.5}


def test_tensorboard_holds_the_run_and_purges_on_resume(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for resume_step, numbers, loss in ((0, range(1, 6), 1.0), (3, range(4, 7), 2.0)):
        built = build_loggers(config(tensorboard=True), tmp_path, resume_step, True, {})
        for step in numbers:
            built.log({"step": step, "loss": loss, "name": "x"})
        built.log({"step": 6, "eval": {"valid": 4.0}})
        built.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert events.Tags()["scalars"] == ["train/loss", "eval/valid"]
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [
        (1, 1.0),
        (2, 1.0),
        (3, 1.0),
        (4, 2.0),
        (5, 2.0),
        (6, 2.0),
    ]


def test_an_absent_package_is_one_warning(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(optional, "find", lambda name: optional.Found(name, None, None, "not installed"))
    built = build_loggers(config(tensorboard=True, wandb="offline"), tmp_path, 0, True, {})
    built.log({"step": 1})
    built.close()
    assert sorted(warnings(caplog)) == [
        "TensorBoard is switched off, the run goes on: RuntimeError: not installed",
        "wandb is switched off, the run goes on: RuntimeError: not installed",
    ]
    assert len(read_metrics(tmp_path)) == 1


class FakeWandb(types.ModuleType):
    """What WandbLogger uses of wandb."""

    def __init__(self, fail=False):
        super().__init__("wandb")
        self.calls, self.logged, self.finished, self.fail = [], [], False, fail

    def Settings(self, **settings):  # noqa: N802
        return settings

    def init(self, **arguments):
        self.calls.append(arguments)
        if self.fail:
            raise RuntimeError("refused with key k3y-of-the-user")
        run = types.SimpleNamespace(log=self.logged.append, define_metric=lambda *a, **k: None)
        run.finish = lambda: setattr(self, "finished", True)
        return run


def with_wandb(monkeypatch, fake):
    monkeypatch.setattr(optional, "find", lambda name: optional.Found(name, "1", fake, None))


@pytest.mark.parametrize(("mode", "resume"), [("offline", None), ("online", "allow")])
def test_wandb_offline_unless_asked_and_resumes_its_page(tmp_path, monkeypatch, mode, resume):
    fake = FakeWandb()
    with_wandb(monkeypatch, fake)
    resolved = {"run": {"name": "x"}, "api_key": "hidden"}
    for _ in range(2):
        built = build_loggers(config(wandb=mode), tmp_path, 0, True, resolved)
        built.log({"step": 1, "loss": 2.0})
        built.close()
    first, second = fake.calls
    assert (first["mode"], first["resume"], first["dir"]) == (mode, resume, str(tmp_path))
    assert first["id"] == second["id"] == (tmp_path / "wandb" / "ling_run_id").read_text().strip()
    assert first["config"] == {"run": {"name": "x"}, "api_key": "***"}
    assert fake.logged[0] == {"train/loss": 2.0, "step": 1}
    assert fake.finished


def test_a_failing_wandb_does_not_tell_the_key(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("WANDB_API_KEY", "k3y-of-the-user")
    with_wandb(monkeypatch, FakeWandb(fail=True))
    built = build_loggers(config(wandb="online"), tmp_path, 0, True, {})
    built.close()
    assert warnings(caplog) == ["wandb is switched off, the run goes on: RuntimeError: refused with key ***"]


def test_wandb_is_not_imported_unless_asked(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    build_loggers(config(), tmp_path, 0, True, {}).close()
    assert not (tmp_path / "wandb").exists()


def test_ids_differ_between_folders(tmp_path):
    first, second = wandb_id(tmp_path / "a run"), wandb_id(tmp_path / "b")
    assert first.startswith("a-run-")
    assert first != second


def test_secrets_are_masked_and_the_rest_is_not():
    tree = {
        "data": {"tokenizer": "t.model", "hf_token": "s"},
        "list": [{"password": "s"}, 1],
        "vocab": {"tokens": 3, "eod_token_id": 1},
    }
    assert without_secrets(tree) == {
        "data": {"tokenizer": "t.model", "hf_token": "***"},
        "list": [{"password": "***"}, 1],
        "vocab": {"tokens": 3, "eod_token_id": 1},
    }
