"""Stop signals are noted, and the handlers of before come back; a second Ctrl-C ends a process at once."""

import gc
import os
import signal
import subprocess
import sys
import threading
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
        "import hashlib\nfrom ling.job.signals import StopSignals\n"
        "with StopSignals():\n    print('ready', flush=True)\n"
        "    hashlib.pbkdf2_hmac('sha256', b'', b'', 2**31 - 1)"  # calls no handler before it returns, in half an hour
    )
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert process.poll() is None, "one is not enough"
    while process.poll() is None:  # two at the same moment would be one
        process.send_signal(signal.SIGINT)
        time.sleep(0.1)
    assert process.returncode == 130
    process.stdout.close()


def test_interrupts_of_forked_processes_are_not_counted():
    with StopSignals() as signals:
        for _ in range(2):
            child = os.fork()
            if not child:
                for _ in range(3):
                    os.kill(os.getpid(), signal.SIGINT)
                os._exit(7)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
        time.sleep(0.2)  # it would end this process
        assert signals.received == []


def test_nothing_is_left_of_it():
    gc.collect()  # what other tests have left would go in between
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        with StopSignals():
            os.kill(os.getpid(), signal.SIGINT)
    while any(thread.name == "ling-signals" for thread in threading.enumerate()):
        time.sleep(0.01)
    assert len(os.listdir("/proc/self/fd")) <= before
    assert signal.set_wakeup_fd(-1) == -1


def test_a_process_takes_stop_signals_once_it_has_the_handlers():
    assert not _takes_stop_signals(os.getpid())
    with StopSignals():
        assert _takes_stop_signals(os.getpid())
    assert not _takes_stop_signals(os.getpid())
    gone = subprocess.Popen(["true"])
    gone.wait()
    time.sleep(0.01)
    assert not _takes_stop_signals(gone.pid)
