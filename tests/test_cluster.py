"""What Ray's processes owe the machine."""

import os
import signal
import subprocess
import sys
import time

import pytest

from capray import cluster

HUNG = """
import os, signal, sys, time
from capray.cluster import end_with_raylet
os.environ["RAY_RAYLET_PID"] = sys.argv[1]
end_with_raylet()
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
    signal.signal(number, signal.SIG_IGN)
print(os.getpid(), flush=True)
time.sleep(600)
"""
PARENT = """
import os, subprocess, sys, time
named = str(os.getpid()) if sys.argv[1] == "raylet" else "1"
subprocess.Popen([sys.executable, "-c", sys.argv[2], named])
time.sleep(600)
"""


def child_of(kind: str) -> tuple[subprocess.Popen, int]:
    """A process that ends for nobody, started by one that is its raylet, or not."""
    parent = subprocess.Popen([sys.executable, "-c", PARENT, kind, HUNG], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    return parent, int(parent.stdout.readline())


def is_alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_worker_that_hangs_ends_with_its_raylet():
    raylet, worker = child_of("raylet")
    raylet.kill()
    raylet.wait()
    until = time.monotonic() + 10
    while is_alive(worker) and time.monotonic() < until:
        time.sleep(0.05)
    assert not is_alive(worker)


def test_a_process_that_no_raylet_started_is_left_alone():
    """A training in the driver's own process must not end with the shell that started it."""
    other, child = child_of("other")
    other.kill()
    other.wait()
    time.sleep(0.5)
    assert is_alive(child)
    os.kill(child, signal.SIGKILL)


def test_a_signal_waits_until_ray_has_started():
    done = []

    def start():
        with cluster._signals_wait():
            signal.raise_signal(signal.SIGINT)
            done.append("started")

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            start()
    finally:
        signal.signal(signal.SIGINT, before)
    assert done == ["started"]
