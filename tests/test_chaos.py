"""One round each of three faults; `make chaos ROUNDS=30` runs as many of all kinds as you like."""

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_driver_actor_and_node_killed():
    command = [sys.executable, "-m", "tests.chaos", "--photos", "60", "--kinds", "driver", "actor", "node"]
    result = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.count("every id once") == 3
