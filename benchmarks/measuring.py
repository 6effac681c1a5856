"""How the benchmarks measure and what they leave behind. Needs torch alone.

Ways to do the same work are timed in turn, round after round, and the median of each counts. On a CPU the time is that of
the thread's CPU, which other load on the machine disturbs less than the clock on the wall; the work runs on one thread.
"""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median

import torch

RESULTS = Path(__file__).parent / "results.json"


def interleaved(ways: Mapping[str, Callable[[], object]], rounds: int = 5) -> dict[str, float]:
    """The median CPU seconds of each way, after a round that is not counted."""
    assert torch.get_num_threads() == 1, "CPU seconds of a thread are those of the work only when there is one thread"
    times: dict[str, list[float]] = {name: [] for name in ways}
    for work in ways.values():
        work()
    for _ in range(rounds):
        for name, work in ways.items():
            started = time.thread_time()
            work()
            times[name].append(time.thread_time() - started)
    return {name: median(values) for name, values in times.items()}


def machine() -> str:
    """The CPU, what torch uses of it, and how busy the machine is."""
    model = platform.processor()
    if os.path.exists("/proc/cpuinfo"):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), model)
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else float("nan")
    return f"{model}, {torch.backends.cpu.get_cpu_capability()}, load {load:.1f}"


def record(
    name: str, value: float, unit: str, reference: float, bar: float | None, *, quotient: float, **more: object
) -> None:
    """Print a row and put it in the place of the one of that name in results.json.

    Args:
        reference: what ``value`` is compared with, in the same unit.
        bar: what the ratio ``quotient`` should reach; None where there is no bar.
    """
    row = {"name": name, "value": value, "unit": unit, "reference": reference, "ratio": quotient, "bar": bar}
    row |= {"machine": machine(), **more}
    rows = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
    rows = sorted([*(other for other in rows if other["name"] != name), row], key=lambda row: row["name"])
    RESULTS.write_text(json.dumps(rows, indent=1) + "\n")
    verdict = "" if bar is None else f"; bar {bar:g}: {'met' if quotient >= bar else 'NOT met'}"
    print(f"{name}: {value:.2f} {unit} beside {reference:.2f}, ratio {quotient:.2f}{verdict} ({row['machine']})", flush=True)
