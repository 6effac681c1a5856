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


class TestAutoPrecision:
    @pytest.fixture(params=["avx512_bf16", "amx_bf16", "avx512f", None])
    def flag(self, request, tmp_path, monkeypatch) -> str | None:
        file = tmp_path / "cpuinfo"
        if request.param:
            file.write_text(f"processor\t: 0\nflags\t\t: fpu {request.param} sse\n\nprocessor\t: 1\nflags\t\t: amx_bf16\n")
        monkeypatch.setattr(cluster, "CPU_FLAGS", str(file))
        return request.param

    def test_is_bf16_where_the_device_computes_in_it(self, flag):
        on_cpu = "bf16" if flag and "bf16" in flag else "fp32"
        assert cluster.resolved_precision("auto", on_gpu=False) == on_cpu
        assert cluster.resolved_precision("auto", on_gpu=True) == "bf16"
        assert cluster.resolved_precision("fp32", on_gpu=True) == "fp32"
        assert cluster.resolved_precision("bf16", on_gpu=False) == "bf16"

    @pytest.mark.parametrize("there", [True, False])
    def test_asks_the_other_nodes(self, ray_cluster, monkeypatch, there):
        monkeypatch.setattr(cluster, "node_id", lambda: "another")  # So this one is asked by a task.
        monkeypatch.setattr(cluster, "has_bf16", lambda here=os.getpid(), there=there: there or os.getpid() == here)
        assert cluster.resolved_precision("auto", on_gpu=False) == ("bf16" if there else "fp32")
