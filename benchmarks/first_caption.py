"""Seconds from the start of `capray caption` to its captions, Ray's start included, on an idle machine.

    uv run python benchmarks/first_caption.py [--photos 60] [--rounds 3]

So many photos with the captioner that comes with capray, in a process of its own: until all of them are captioned, which for
so few is when the first are, and until the command ends.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

from measuring import record
from photos import photos

BAR_SECONDS = 15.0


def captioned(inputs: Path, output: Path) -> tuple[float, float]:
    """Seconds until the photos are captioned, and until the command ends."""
    command = [sys.executable, "-m", "capray", "caption", str(inputs), str(output)]
    started, until_captioned = time.perf_counter(), 0.0
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if " captioned, 0 failed" in line:
                until_captioned = time.perf_counter() - started
    assert process.returncode == 0 and until_captioned, f"{command} ended with {process.returncode}"
    return until_captioned, time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        inputs = Path(folder) / "photos"
        inputs.mkdir()
        for i, photo in enumerate(photos(options.photos)):
            (inputs / f"{i}.jpg").write_bytes(photo)
        rounds = [captioned(inputs, Path(folder) / f"output-{i}") for i in range(options.rounds)]
    until_captioned, whole = (median(times) for times in zip(*rounds, strict=True))
    name, spread = f"first captions of {options.photos} photos", sorted(first for first, _ in rounds)
    quotient = BAR_SECONDS / until_captioned
    record(name, until_captioned, "s", BAR_SECONDS, 1.0, quotient=quotient, spread=spread, whole_command=whole)


if __name__ == "__main__":
    main()
