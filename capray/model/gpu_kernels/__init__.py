"""What captioning spends most of its time on, as kernels for NVIDIA GPUs, in Triton. Each does in one pass over its input
what torch does in several, so that few launches are left. ``fusing``, ``attention``, ``prepared`` and ``beam`` have the same
in torch, for every device.
"""

from capray.model.gpu_kernels.encoder import biased, max_pooled, patches_of
from capray.model.gpu_kernels.search import best_words, next_beams, selected
from capray.model.gpu_kernels.step import additive_scores, gated_context, lstm

__all__ = [
    "additive_scores",
    "best_words",
    "biased",
    "gated_context",
    "lstm",
    "max_pooled",
    "next_beams",
    "patches_of",
    "selected",
]
