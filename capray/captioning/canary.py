"""The canary: a drawn image whose score has to be the driver's, else the device computes wrongly. Knows nothing of Ray, rows
or jobs.
"""

from __future__ import annotations

import numpy as np

from capray.config import Decoding
from capray.inference import Inference

_DECODING = Decoding(beam_size=5)


def canary_score(inference: Inference) -> float:
    """The score of the best caption of the canary image; NaN where there is none.

    It is the score, not the log-probability, and of a beam search, whatever a job does: where two captions are nearly as
    good, another precision may choose the other one, whose score is close, while length and log-probability need not be.
    """
    ((hypotheses, _, _),) = inference([_canary_image(inference.captioner.architecture.size)], _DECODING)
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
