"""What the ranks tell each other besides training: heartbeats, failures, where they stand. Through torchrun's store, so
that it costs neither collectives nor a shared file system."""

from __future__ import annotations

import datetime
import json
import os
from dataclasses import asdict
from typing import Any

import torch.distributed as dist

from ling.job.outcome import Failure

_TIMEOUT = datetime.timedelta(seconds=20)


class Board:
    """A table of small objects that every rank can write and read. Its methods raise where the store is gone."""

    def __init__(self, store: Any) -> None:
        self._store = store

    @classmethod
    def connect(cls, world_size: int) -> Board:
        """The board of this job; with a connection of its own, since others wait on theirs. After the process group
        has been made."""
        if world_size == 1:
            return cls(dist.HashStore())
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = dist.TCPStore(address, port, is_master=False, timeout=_TIMEOUT, wait_for_workers=False)
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        return cls(dist.PrefixStore(f"ling/job/{attempt}", store))

    def put(self, key: str, value: Any) -> None:
        """Write an entry."""
        self._store.set(key, json.dumps(value))

    def get(self, key: str) -> Any:
        """Read an entry; None where there is none."""
        return json.loads(self._store.get(key)) if self._store.check([key]) else None

    def is_first(self, key: str) -> bool:
        """Whether nobody has asked this of `key` before."""
        return self._store.add(key, 1) == 1

    def post_failure(self, failure: Failure) -> None:
        """Tell the others of a failure."""
        number = self._store.add("failures", 1)
        self.put(f"failure/{number}", asdict(failure))

    def failures(self) -> list[Failure]:
        """All failures, in the order in which they were told."""
        entries = (self.get(f"failure/{number}") for number in range(1, self._store.add("failures", 0) + 1))
        return [Failure(**entry) for entry in entries if entry is not None]


def first_cause(failures: list[Failure]) -> Failure | None:
    """The failure that counts: the first that is no consequence of another, else the first."""
    causes = [failure for failure in failures if not failure.is_consequence]
    return next(iter(causes or failures), None)
