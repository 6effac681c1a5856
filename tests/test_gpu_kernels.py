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
        {"SCALE": 2, "IS_RELU": False, "IS_APPROXIMATE": True, "POSITIONS": 16, "DIM": 512},
    ),
    "_gated_context": (
        {"scores": "*fp32", "grid": "*bf16", "gate": "*bf16", "context": "*bf16"},
        {"HAS_GATE": True, "ROWS": 16, "POSITIONS": 64, "CHUNKS": 1, "DIM": 64},
    ),
    "_lstm": (
        {
            "words": "*bf16",
            "last": "*i64",
            "state": "*bf16",
            "context": "*bf16",
            "cell": "*fp32",
            "new_hidden": "*bf16",
            "new_cell": "*fp32",
        },
        {"HAS_CONTEXT": True, "DIM": 512},
    ),
    "_next_beams": (
        {
            **dict.fromkeys(("tokens", "lengths", "words", "new_tokens", "new_lengths", "new_last", "parents"), "*i64"),
            **dict.fromkeys(("log_probs", "scores", "word_log_probs", "new_log_probs", "new_scores"), "*fp32"),
            **dict.fromkeys(("finished", "new_finished"), "*i1"),
            "length_power": "fp32",
        },
        {"PAD": 0, "END": 2, "BEAM_SIZE": 5, "CANDIDATES": 32, "STEPS": 32},
    ),
    "_selected": (
        {"hidden": "*bf16", "cell": "*fp32", "parents": "*i64", "new_hidden": "*bf16", "new_cell": "*fp32"},
        {"DIM": 512},
    ),
    "_patches": (
        {"pixels": "*u8", "mean": "*fp32", "std": "*fp32", "patches": "*bf16"},
        {"STRIDE": 2, "CHANNELS": 16, "PATCHES": 128},
    ),
    "_biased": (
        {"x": "*bf16", "bias": "*bf16", "added": "*bf16", "low": "fp32", "high": "fp32"},
        {"HAS_ADDED": True, "TILE": 2048},
    ),
    "_max_pooled": ({"x": "*bf16", "pooled": "*bf16"}, {"KERNEL": 3, "STRIDE": 2, "CHANNELS": 64, "PLACES": 32}),
}
"""The types of each kernel's tensors, and its constants; everything else is an int."""


@pytest.mark.parametrize("name", COMPILED)
def test_they_compile_for_a_gpu(name):
    """For an H100; that takes no GPU."""
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from capray.model.gpu_kernels import encoder, search, step

    (module,) = (each for each in (encoder, search, step) if hasattr(each, name))
    kernel, (pointers, constants) = getattr(module, name), COMPILED[name]
    types = {n: pointers.get(n, "constexpr" if n in constants else "i32") for n in kernel.arg_names}
    places = {(kernel.arg_names.index(n),): value for n, value in constants.items()}
    compiled = triton.compile(ASTSource(kernel, types, places), target=GPUTarget("cuda", 90, 32))
    assert f".visible .entry {name}" in compiled.asm["ptx"]
