"""Triton's kernels: as its interpreter runs them, and where they are not to be had."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from capray.model.gpu import kernels_of

CHECKS = Path(__file__).parent / "interpreted_gpu_kernels.py"


def test_they_give_what_torch_gives():
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "pytest", "-q", "-n0", "-p", "no:cacheprovider", str(CHECKS)]
    environment = os.environ | {"TRITON_INTERPRET": "1"}  # Triton looks when it is imported.
    done = subprocess.run(command, env=environment, timeout=170, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]


def test_a_cpu_has_torchs_ways():
    assert kernels_of(torch.device("cpu")) is None
