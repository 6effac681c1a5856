"""Which devices run the kernels in ``gpu_kernels``. Imports Triton only where there is a GPU."""

from __future__ import annotations

import warnings
from functools import lru_cache
from types import ModuleType

import torch

GROUP = 64
"""Neighbouring words that are looked at as one first, when the best are chosen, by the kernels and in ``beam`` alike."""

LARGEST_BEAM, LARGEST_GRID = 16, 256
"""Beams and positions of an image up to which kernels that unroll loops over them are used; more take long to compile."""
LEAST_CAPABILITY = 8, 0
"""Of the GPUs that Triton supports."""


@lru_cache
def kernels_of(device: torch.device) -> ModuleType | None:
    """The kernels for ``device``, once they ran there; None on a CPU, and where Triton or the C compiler that it needs is
    missing, of which it warns."""
    if device.type != "cuda":
        return None
    try:
        if (capability := torch.cuda.get_device_capability(device)) < LEAST_CAPABILITY:
            raise RuntimeError("they need compute capability {}.{}, not {}.{}".format(*LEAST_CAPABILITY, *capability))
        from capray.model import gpu_kernels

        scores = torch.zeros(1, 1, GROUP, device=device)
        gpu_kernels.best_words(scores, 2, [0], 2)
        gpu_kernels.gated_context(gpu_kernels.additive_scores(scores, scores, scores[0, 0], 2, False), scores, None)
    except Exception as error:
        warnings.warn(f"captioning on {device} goes on slower, without Triton's kernels: {error}", stacklevel=2)
        return None
    return gpu_kernels
