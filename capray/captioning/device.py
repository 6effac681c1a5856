"""The device a captioner runs on: which errors are the device's own, and the canary, an image that tells when it computes
wrongly.

Knows nothing of Ray, rows or jobs.
"""

from __future__ import annotations

import numpy as np
import torch

from capray.config import Decoding
from capray.model.captioner import Captioner, autocast

_DECODING = Decoding(beam_size=5)
_OUT_OF_MEMORY = ("out of memory", "alloc_failed")
_ARGUMENTS = ("not_supported", "bad_param", "invalid_value")
"""What a library answers to arguments it cannot take: the image's fault."""
_DEVICE = (
    "cuda error",
    "cuda driver error",
    "cudnn_status",
    "cublas_status",
    "cusolver_status",
    "device-side assert",
    "ecc error",
    "nccl",
    "no cuda gpus",
    "nvidia driver",
)


class DeviceError(Exception):
    """The device failed, not an image."""


def is_out_of_memory(error: Exception) -> bool:
    """Whether the device had no memory left; fewer images may fit."""
    return isinstance(error, torch.OutOfMemoryError) or any(sign in str(error).lower() for sign in _OUT_OF_MEMORY)


def is_device_error(error: Exception) -> bool:
    """Whether ``error`` is the device's. What is not recognised here is taken for an image's: the canary tells then."""
    if is_out_of_memory(error):
        return False
    text = str(error).lower()
    if any(sign in text for sign in _ARGUMENTS):
        return False
    accelerator_error = getattr(torch, "AcceleratorError", ())  # Not in torch 2.6.
    return isinstance(error, accelerator_error) or any(sign in text for sign in _DEVICE)


@torch.inference_mode()
def canary_score(captioner: Captioner, precision: str = "fp32") -> float:
    """The score of the best caption of the canary image; NaN where there is none.

    It is the score, not the log-probability, and of a beam search, whatever a job does: where two captions are nearly as
    good, another precision may choose the other one, whose score is close, while length and log-probability need not be.
    """
    with autocast(captioner.device, precision):
        memory = captioner.encode_all([_canary_image(captioner.architecture.size)])
        (hypotheses,) = captioner.caption(memory, _DECODING)
    return hypotheses[0].score if hypotheses else float("nan")


def _canary_image(size: int) -> np.ndarray:
    """Two ramps and a chequerboard."""
    y, x = np.mgrid[:size, :size]
    chequers = (x * 8 // size + y * 8 // size) % 2 * 255
    return np.stack([x * 255 // size, y * 255 // size, chequers], -1).astype(np.uint8)


def is_near(score: float, expected: float) -> bool:
    """Whether the canary's score is that of the same captioner on another device or in another precision."""
    return abs(score - expected) <= 0.2 + 0.1 * abs(expected)


def is_same(score: float, expected: float) -> bool:
    """Whether the canary's score is that of the same captioner in the same process, a little while ago."""
    return abs(score - expected) <= 0.01 + 0.005 * abs(expected)
