"""The device a captioner runs on: which errors are the device's own, and not an image's."""

from __future__ import annotations

import torch

_OUT_OF_MEMORY = ("out of memory", "alloc_failed", "unable to find an engine", "unable to find a valid cudnn algorithm")
"""The last two are cuDNN's: none of its ways fits into what memory is left."""
_ARGUMENTS = ("not_supported", "bad_param", "invalid_value")
"""What a library answers to arguments it cannot take: the image's fault."""
_DEVICE = (
    "cuda error",
    "cuda driver error",
    "cuda unknown error",
    "cuda initialization",
    "cudagetdevicecount",
    "not compiled with cuda",
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
