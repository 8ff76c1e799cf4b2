"""Where a run's records go: `metrics.jsonl` always, TensorBoard and Weights & Biases where asked for.

A logger never ends a run and never holds it up: the optional ones work in a thread of their own, behind a queue, and
are switched off with one warning when they fail or fall too far behind.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import re
import secrets
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from ling.config.schema import Config
from ling.observe.metrics import MetricsFile, open_metrics
from ling.platform import optional

WARNINGS = logging.getLogger(__name__)
QUEUE_RECORDS = 10_000
CLOSE_TIMEOUT_S = 30.0
WANDB_INIT_TIMEOUT_S = 30.0
_SECRET = re.compile(r"(^|[_.-])(password|passwd|secret|token|credentials?|api_?key|access_?key|auth)$", re.IGNORECASE)


class Logger(Protocol):
    """Takes a run's records."""

    def log(self, record: Mapping[str, Any]) -> None:
        """Take one record: a step's, or an evaluation's (`{"step": n, "eval": {name: loss}}`)."""

    def close(self) -> None:
        """Write what is still to be written."""


class JsonlLogger:
    """`metrics.jsonl` in the run's folder. A full disk costs records, with one warning, not the run."""

    def __init__(self, run_dir: Path, resume_step: int) -> None:
        self.file: MetricsFile = open_metrics(run_dir, resume_step)
        self._warned = False

    def log(self, record: Mapping[str, Any]) -> None:
        """Append a record."""
        try:
            self.file.write(record)
        except OSError as error:
            if not self._warned:
                WARNINGS.warning("metrics.jsonl: records are being lost (%s)", optional.describe(error))
            self._warned = True

    def close(self) -> None:
        """Close the file."""
        self.file.close()


class TensorBoardLogger:
    """TensorBoard files in `tensorboard/`; on resume the later steps of the earlier attempt are purged."""

    def __init__(self, run_dir: Path, resume_step: int) -> None:
        found = optional.find("tensorboard")
        if found.problem is not None:
            raise RuntimeError(found.problem)
        from torch.utils.tensorboard import SummaryWriter

        purge_step = resume_step + 1 if resume_step > 0 else None
        self._writer = SummaryWriter(str(run_dir / "tensorboard"), purge_step=purge_step)  # type: ignore[no-untyped-call]

    def log(self, record: Mapping[str, Any]) -> None:
        """Add the record's numbers at its step."""
        for tag, value in scalars(record).items():
            self._writer.add_scalar(tag, value, int(record.get("step", 0)))  # type: ignore[no-untyped-call]

    def close(self) -> None:
        """Flush and close the files."""
        self._writer.close()  # type: ignore[no-untyped-call]


class WandbLogger:
    """Weights & Biases, in `wandb/`; offline unless `mode` says otherwise.

    The id of the run is kept in the folder, so that a resumed run continues its page (`wandb sync --append` offline).
    """

    def __init__(self, run_dir: Path, mode: str, project: str, name: str, resolved: Mapping[str, Any]) -> None:
        found = optional.find("wandb")
        if found.module is None:
            raise RuntimeError(found.problem)
        wandb = found.module
        settings = wandb.Settings(
            init_timeout=WANDB_INIT_TIMEOUT_S,
            finish_timeout=CLOSE_TIMEOUT_S,
            console="off",  # the run's own output stays as it is
            disable_git=True,
            disable_code=True,
            silent=True,
        )
        online = mode == "online"
        self._run = wandb.init(
            project=project,
            name=name,
            id=wandb_id(run_dir),
            dir=str(run_dir),
            mode="online" if online else "offline",
            resume="allow" if online else None,
            config=without_secrets(resolved),
            settings=settings,
        )
        # the step is a value like any other: wandb's own counter refuses to go back, which a resumed run must
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def log(self, record: Mapping[str, Any]) -> None:
        """Log the record's numbers."""
        self._run.log({**scalars(record), "step": record.get("step", 0)})

    def close(self) -> None:
        """Finish the run."""
        self._run.finish()


class BackgroundLogger:
    """Runs another logger in a thread: made there by `make`, fed there, closed there.

    After an exception, or with `QUEUE_RECORDS` records waiting, it is disabled with one warning.
    """

    def __init__(self, name: str, make: Callable[[], Logger], close_timeout_s: float = CLOSE_TIMEOUT_S) -> None:
        self.name = name
        self._close_timeout_s = close_timeout_s
        self._disabled = threading.Event()
        self._lock = threading.Lock()
        self._queue: queue.Queue[Mapping[str, Any] | None] = queue.Queue(QUEUE_RECORDS)
        self._thread = threading.Thread(target=self._work, args=(make,), name=f"ling-{name}", daemon=True)
        self._thread.start()

    @property
    def disabled(self) -> bool:
        """Whether it has failed."""
        return self._disabled.is_set()

    def log(self, record: Mapping[str, Any]) -> None:
        """Put a record in the queue; returns at once."""
        if self.disabled:
            return
        try:
            self._queue.put_nowait(dict(record))
        except queue.Full:
            self._disable(f"{QUEUE_RECORDS} records behind")

    def close(self) -> None:
        """Wait until the queue is written and the logger closed, within the time limit."""
        deadline = time.monotonic() + self._close_timeout_s
        with contextlib.suppress(queue.Full):
            self._queue.put(None, timeout=0 if self.disabled else self._close_timeout_s)
        self._thread.join(0 if self.disabled else max(0.0, deadline - time.monotonic()))
        if self._thread.is_alive():
            self._disable(f"did not finish within {self._close_timeout_s:g} s")

    def _work(self, make: Callable[[], Logger]) -> None:
        try:
            logger = make()
            while (record := self._queue.get()) is not None and not self.disabled:
                logger.log(record)
            logger.close()
        except BaseException as error:  # a thread: nothing may get out, not even a panic of compiled code
            self._disable(optional.describe(error))

    def _disable(self, reason: str) -> None:
        with self._lock:
            if not self.disabled:
                WARNINGS.warning("%s is switched off, the run goes on: %s", self.name, _without_key(reason))
                self._disabled.set()  # after the warning: who sees the flag need not wait for it


class Loggers:
    """All loggers of a rank as one."""

    def __init__(self, loggers: list[Logger], attempt: int | None = None) -> None:
        self.loggers = loggers
        self.attempt = attempt

    def log(self, record: Mapping[str, Any]) -> None:
        """Give a record to every logger."""
        for logger in self.loggers:
            logger.log(record)

    def set_attempt(self, attempt: int) -> None:
        """The number that records carry from here on."""
        self.attempt = attempt
        for logger in self.loggers:
            if isinstance(logger, JsonlLogger):
                logger.file.attempt = attempt

    def close(self) -> None:
        """Close every logger."""
        for logger in self.loggers:
            logger.close()


def build_loggers(
    config: Config, run_dir: Path, resume_step: int, is_main: bool, resolved: Mapping[str, Any]
) -> Loggers:
    """The loggers that `config.observe` asks for; on ranks that are not main none, and nothing is opened.

    Args:
        resume_step: the last step that counts; 0 for a fresh start.
        resolved: the whole config as plain dicts, shown on the run's page.
    """
    if not is_main:
        return Loggers([])
    jsonl = JsonlLogger(run_dir, resume_step)
    loggers: list[Logger] = [jsonl]
    observe = config.observe
    if observe.tensorboard:
        loggers.append(BackgroundLogger("TensorBoard", lambda: TensorBoardLogger(run_dir, resume_step)))
    if observe.wandb != "disabled":
        project, name = observe.wandb_project, config.run.name
        loggers.append(BackgroundLogger("wandb", lambda: WandbLogger(run_dir, observe.wandb, project, name, resolved)))
    return Loggers(loggers, jsonl.file.attempt)


def scalars(record: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a record by tag: `train/loss` of a step, `eval/<name>` of an evaluation; not step and attempt."""
    tags: dict[str, float] = {}
    for key, value in record.items():
        if isinstance(value, Mapping):
            tags.update({f"{key}/{name}": float(item) for name, item in value.items() if _is_number(item)})
        elif key not in ("step", "attempt") and _is_number(value):
            tags[f"train/{key}"] = float(value)
    return tags


def wandb_id(run_dir: Path) -> str:
    """The id of the run's page: the folder's name and a random part, kept in `wandb/ling_run_id`."""
    path = run_dir / "wandb" / "ling_run_id"
    if path.exists() and (kept := path.read_text().strip()):
        return kept
    path.parent.mkdir(parents=True, exist_ok=True)
    stem = re.sub(r"[^A-Za-z0-9_-]+", "-", run_dir.resolve().name)[:50]
    path.write_text(f"{stem}-{secrets.token_hex(4)}\n")
    return path.read_text().strip()


def without_secrets(tree: Any) -> Any:
    """A copy of a config without the values of keys that name a secret."""
    if isinstance(tree, Mapping):
        return {key: "***" if _SECRET.search(str(key)) else without_secrets(value) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return [without_secrets(value) for value in tree]
    return tree


def _is_number(value: Any) -> bool:
    if isinstance(value, (bool, str)) or value is None:
        return False
    return isinstance(value, (int, float)) or getattr(value, "ndim", None) == 0


def _without_key(text: str) -> str:
    key = os.environ.get("WANDB_API_KEY")
    return text.replace(key, "***") if key else text
