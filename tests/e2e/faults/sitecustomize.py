"""Python imports this at its start where the folder is on its path: makes a rank of `ling train` fail as a test asks.

`LING_TEST_FAULT` is `RANK STEP ACTION`; ACTION: a signal for this process, `parent-` and a signal, `raise`, or `hang`.
"""

import importlib.abc
import os
import signal
import sys
import time


def act(action: str) -> None:
    if action == "raise":
        raise ValueError("boom")
    if action == "hang":
        time.sleep(3600)
    target = os.getppid() if action.startswith("parent-") else os.getpid()
    os.kill(target, signal.Signals[action.removeprefix("parent-")])
    time.sleep(1.0 if target != os.getpid() else 0.0)  # it takes a moment to come back


def spoil(trainer: type, step: int, action: str) -> None:
    """Have the trainer act in the midst of a step."""
    run_microbatches = trainer._run_microbatches

    def spoilt(self, batches, count, forward_only=False):
        if self.step + 1 == step and not forward_only:
            act(action)
        return run_microbatches(self, batches, count, forward_only)

    trainer._run_microbatches = spoilt


class AfterTrainer(importlib.abc.MetaPathFinder):
    """Finds `ling.trainer` as others would, and spoils it when it is loaded."""

    def __init__(self, step: int, action: str) -> None:
        self.step, self.action = step, action

    def find_spec(self, name, path, target=None):
        if name != "ling.trainer":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        load = spec.loader.exec_module

        def load_and_spoil(module):
            load(module)
            spoil(module.Trainer, self.step, self.action)

        spec.loader.exec_module = load_and_spoil
        return spec


if "LING_TEST_FAULT" in os.environ:
    import importlib.util

    rank, at_step, what = os.environ["LING_TEST_FAULT"].split()
    if os.environ.get("RANK", "0") == rank:
        sys.meta_path.insert(0, AfterTrainer(int(at_step), what))
