"""Each fault that needs no Ray once, and three that do in one run; `make chaos` plays all of them again and again."""

import subprocess
import sys
from pathlib import Path

import pytest


def chaos(*arguments: str) -> str:
    command = [sys.executable, "-m", "tests.chaos", *arguments]
    result = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.mark.timeout(600)
def test_every_fault_without_ray():
    assert "1 of 1: every id once" in chaos("--kinds", "local")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_actor_node_and_driver_killed():
    table = chaos("--kinds", "actor+node+driver")
    assert "-9 0" in table, "the driver was killed, and the next one ended well"
