"""A page about millions of captions, and a search in them: seconds and memory.

    uv run python benchmarks/analysis.py [--ids 2000000]

The reference: reading the output's captions and nothing else.
"""

from __future__ import annotations

import argparse
import io
import os
import resource
import tempfile
import time
from collections.abc import Callable

from verification import write

from capray.config import QueryConfig, ReportConfig
from capray.output import Output, first_row
from capray.query.answers import run_query
from capray.report.output_report import report_output


def timed(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def read_captions(folder: str) -> None:
    with Output(f"{folder}/out").connect() as connection:
        first_row(connection, "SELECT count(DISTINCT caption) FROM captions")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ids", type=int, default=2_000_000)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        write(folder, arguments.ids)
        reference = timed(lambda: read_captions(folder))
        page = f"{folder}/report.html"
        seconds = timed(lambda: report_output(ReportConfig(output=f"{folder}/out", html=page, pictures=0)))
        size = os.path.getsize(page) / 2**20
        print(f"report: {arguments.ids:,} captions in {seconds:.1f} s ({seconds / reference:.0f} times), {size:.1f} MiB")
        question = QueryConfig(output=f"{folder}/out", search="photo of thing 123")
        seconds = timed(lambda: run_query(question, io.StringIO()))
        print(f"search: {arguments.ids:,} captions in {seconds:.1f} s ({seconds / reference:.0f} times)")
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        print(f"reading the captions alone: {reference:.1f} s; peak memory in all {memory:.2f} GiB")


if __name__ == "__main__":
    main()
