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


COMPILED = {
    "_additive_scores": (
        {"keys": "*bf16", "query": "*bf16", "weight": "*bf16", "scores": "*fp32"},
        {"SCALE": 2, "IS_RELU": False, "POSITIONS": 16, "DIM": 512},
    ),
    "_norms_and_maxima": (
        {"scores": "*bf16", "norms": "*fp32", "maxima": "*fp32"},
        {"BANNED": 11, "GROUP": 64, "GROUPS": 32},
    ),
    "_best_of_groups": (
        {"scores": "*bf16", "norms": "*fp32", "maxima": "*fp32", "log_probs": "*fp32", "tokens": "*i64"},
        {"BANNED": 11, "END": 2, "COUNT": 5, "SLOTS": 8, "GROUP": 64, "GROUPS": 256},
    ),
}
"""The types of each kernel's tensors, and its constants; everything else is an int."""


@pytest.mark.parametrize("name", COMPILED)
def test_they_compile_for_a_gpu(name):
    """For an H100; that takes no GPU."""
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from capray.model import gpu_kernels

    kernel, (pointers, constants) = getattr(gpu_kernels, name), COMPILED[name]
    types = {n: pointers.get(n, "constexpr" if n in constants else "i32") for n in kernel.arg_names}
    places = {(kernel.arg_names.index(n),): value for n, value in constants.items()}
    compiled = triton.compile(ASTSource(kernel, types, places), target=GPUTarget("cuda", 90, 32))
    assert f".visible .entry {name}" in compiled.asm["ptx"]
