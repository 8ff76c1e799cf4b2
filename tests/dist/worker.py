"""One process of the pool in `ranks.py`: takes jobs from its pipe, is a rank of some world for each, and answers."""

from __future__ import annotations

import datetime
import functools
import gc
import importlib
import os
import pickle
import sys
import traceback
from multiprocessing.connection import Connection
from typing import Any

import torch.distributed as dist

from ling.parallel import groups
from ling.platform import get_platform
from tests.dist.ranks import Answer, Job

COLLECTIVE_TIMEOUT = datetime.timedelta(seconds=60)


def main(descriptor: int) -> None:
    """Serve until the other end of the pipe is closed."""
    channel = Connection(descriptor)
    get_platform("cpu").start(local_rank=0, num_threads=1)
    while True:
        try:
            job = channel.recv_bytes()
        except EOFError:
            return
        channel.send_bytes(answer(job))


def answer(pickled: bytes) -> bytes:
    """Do a job; whatever goes wrong is part of the answer."""
    try:
        return pickle.dumps(Answer(work(pickle.loads(pickled)), None))
    except BaseException:  # pytest's own failures are no Exception
        return pickle.dumps(Answer(None, traceback.format_exc()))


def work(job: Job) -> Any:
    """Join the world, call the function, leave the world."""
    function = functools.reduce(getattr, job.function.split("."), importlib.import_module(job.module))
    numbers = {"RANK": job.rank, "WORLD_SIZE": job.size, "LOCAL_RANK": job.rank, "LOCAL_WORLD_SIZE": job.size}
    os.environ.update({name: str(number) for name, number in numbers.items()})
    store = dist.FileStore(job.store, job.size)
    dist.init_process_group("gloo", store=store, rank=job.rank, world_size=job.size, timeout=COLLECTIVE_TIMEOUT)
    try:
        result = function(*job.args, **job.kwargs)
        dist.barrier()  # nobody leaves while another is still talking to it
        return result
    finally:
        groups.disconnect()
        forget_the_run()


def forget_the_run() -> None:
    """What a run leaves behind in its process: megatron-core's tally of the MTP loss, the garbage collector's state, and
    the whole model with its process groups and their threads.

    The wrapper of the model hooks itself to the gradient accumulators of the parameters, a cycle through C++ that the
    garbage collector does not see; it ends where the wrapper's attributes are taken away. Rotary embeddings remember
    what they returned, and themselves with it.
    """
    from megatron.core.distributed import DistributedDataParallel
    from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
    from megatron.core.transformer.multi_token_prediction import MTPLossLoggingHelper

    MTPLossLoggingHelper.tracker.clear()
    for left in [item for item in gc.get_objects() if type(item) is DistributedDataParallel]:
        vars(left).clear()
    for method in vars(RotaryEmbedding).values():
        if hasattr(method, "cache_clear"):
            method.cache_clear()
    gc.enable()
    gc.collect()


if __name__ == "__main__":
    main(int(sys.argv[1]))
