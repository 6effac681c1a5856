"""Three faults in one run; `make chaos ROUNDS=30` runs as many rounds of all kinds as you like."""

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_actor_node_and_driver_killed():
    command = [sys.executable, "-m", "tests.chaos", "--photos", "84", "--kinds", "actor+node+driver"]
    result = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.count("every id once") == 1
    assert "-9 0" in result.stdout, "the driver was killed, and the next one ended well"
