"""A signal is heard wherever the job is: at once in long stretches of planning, at the next look elsewhere."""

import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress

import pytest

from capray.captioning.signals import Signals
from capray.errors import Interrupted


def after(seconds: float, number: int = signal.SIGTERM) -> None:
    threading.Timer(seconds, os.kill, (os.getpid(), number)).start()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_long_stretch_is_interrupted(number):
    with Signals() as signals:
        after(0.3, number)
        started = time.monotonic()
        with pytest.raises(Interrupted) as stopped, signals.interrupting():
            time.sleep(60)
        assert time.monotonic() - started < 10
        assert stopped.value.exit_code == 128 + number


def test_elsewhere_it_waits_until_somebody_looks():
    with Signals() as signals:
        after(0.05)
        time.sleep(0.3)
        assert signals.received == signal.SIGTERM
        with pytest.raises(Interrupted):
            signals.check()
        with pytest.raises(Interrupted), signals.interrupting():
            raise AssertionError("the block was entered")


def test_errors_that_are_no_answer_to_a_signal_pass():
    with Signals() as signals, pytest.raises(ValueError, match="mine"), signals.interrupting():
        raise ValueError("mine")


def test_what_a_query_raises_for_a_signal_is_the_signals():
    """DuckDB answers with an error of its own."""

    def query() -> None:
        with suppress(Interrupted):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(10)
        raise RuntimeError("Query interrupted")

    with Signals() as signals, pytest.raises(Interrupted), signals.interrupting():
        query()


def test_handlers_are_put_back():
    before = signal.getsignal(signal.SIGTERM)
    with Signals():
        assert signal.getsignal(signal.SIGTERM) != before
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_second_signal_ends_the_process():
    code = (
        "import time; from capray.captioning.signals import Signals\n"
        "with Signals():\n    print('ready', flush=True); time.sleep(60)\n    time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        process.terminate()
        time.sleep(0.3)
        assert process.poll() is None
        process.terminate()
        assert process.wait(10) == 128 + signal.SIGTERM
