"""Each fault that needs no Ray once, and three that do in one run; `make chaos` plays all of them again and again."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.chaos_local import KINDS


def chaos(*kinds: str) -> str:
    command = [sys.executable, "-m", "tests.chaos", "--kinds", *kinds]
    result = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.mark.timeout(600)
def test_every_fault_without_ray():
    """In two processes, since they wait most of their time."""
    names = list(KINDS)
    with ThreadPoolExecutor(2) as pool:
        tables = list(pool.map(lambda half: chaos(*half), (names[::2], names[1::2])))
    assert sum(table.count("1 of 1: every id once") for table in tables) == len(names)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_node_killed():
    assert "1 of 1: every id once" in chaos("node")
