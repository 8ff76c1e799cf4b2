"""Stop signals are noted, and the handlers of before come back; a second Ctrl-C ends a process at once."""

import os
import signal
import subprocess
import sys
import time

from ling.job.local_ranks import _takes_stop_signals
from ling.job.signals import STOP_SIGNALS, StopSignals


def test_signals_are_noted_once_each_and_the_handlers_come_back(capfd):
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    with StopSignals(speak=True) as signals:
        for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGUSR1, signal.SIGTERM):
            os.kill(os.getpid(), number)
        assert signals.received == ["SIGUSR1", "SIGTERM"]
    assert {number: signal.getsignal(number) for number in STOP_SIGNALS} == before
    assert capfd.readouterr().err == (
        "ling: SIGUSR1: finishing the step, then saving and stopping\n"
        "ling: SIGTERM: finishing the step, then saving and stopping\n"
    )


def test_a_second_interrupt_ends_the_process_wherever_it_is():
    program = (
        "import time\nfrom ling.job.signals import StopSignals\n"
        "with StopSignals() as signals:\n    print('ready', flush=True)\n"
        "    while not signals.received: time.sleep(0.01)\n    print('noted', flush=True)\n    time.sleep(600)"
    )
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    for word in ("ready", "noted"):
        assert process.stdout.readline() == f"{word}\n"
        process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == -signal.SIGINT
    process.stdout.close()


def test_a_process_takes_stop_signals_once_it_has_the_handlers():
    assert not _takes_stop_signals(os.getpid())
    with StopSignals():
        assert _takes_stop_signals(os.getpid())
    assert not _takes_stop_signals(os.getpid())
    gone = subprocess.Popen(["true"])
    gone.wait()
    time.sleep(0.01)
    assert not _takes_stop_signals(gone.pid)
