"""When failures stop the job: everything fails, too large a share fails, or nearly everything fails all of a sudden.

Pure rules over the kinds of results as they come; knows nothing of Ray, outputs or how an image is looked at again.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable

from capray.errors import CaprayError
from capray.tables import FINAL_FAILURES, TRANSIENT_FAILURES
from capray.wording import counted

HOPELESS_AFTER = 200
"""When this many first results are all failures, the fault is not the images'. Rates are judged from here on."""
RATE_WINDOW = 2000
"""Results over which shares are judged."""
SUDDEN_WINDOW = 50
"""Results over which a sudden failure shows."""
SUDDEN_SHARE = 0.8
"""The breaker trips when more than this share of the window are bad images, and fewer were in the window before it."""

CAPTIONED = "captioned"


class FailureLimits:
    """Counts results and says when to stop.

    Args:
        max_failure_rate: share of failures that may pass.
        max_bad_images: share of images that cannot be read; None for any.

    Attributes:
        has_captions: whether the output has captions of earlier runs, so that all that is left may well be bad.
    """

    def __init__(self, max_failure_rate: float | None, max_bad_images: float | None):
        self.has_captions = False
        self.results: Counter[str] = Counter()
        self.example = ""
        self._shares = (
            ("--max-failure-rate", max_failure_rate, TRANSIENT_FAILURES),
            ("--max-bad-images", max_bad_images, FINAL_FAILURES),
        )
        self._recent: deque[str] = deque(maxlen=RATE_WINDOW)
        self._window: deque[bool] = deque(maxlen=SUDDEN_WINDOW)
        self._was_healthy = False

    def add(self, kinds: Iterable[str | None], example: str = "") -> None:
        """Count results: the kind of failure of each, None for a caption; ``example`` is a failure's message."""
        named = [CAPTIONED if kind is None else kind for kind in kinds]
        self.results.update(named)
        self._recent.extend(named)
        self._window.extend(kind in FINAL_FAILURES for kind in named)
        self.example = example or self.example
        if len(self._window) == SUDDEN_WINDOW and self.is_healthy:
            self._was_healthy = True

    @property
    def is_healthy(self) -> bool:
        """Whether most of the last results are not bad images."""
        return sum(self._window) < SUDDEN_WINDOW / 2

    @property
    def has_tripped(self) -> bool:
        """Whether images that could be read all of a sudden cannot: what could be read before must be looked at again."""
        return self._was_healthy and sum(self._window) > SUDDEN_SHARE * SUDDEN_WINDOW

    def reset(self) -> None:
        """The images are bad indeed: the breaker waits until most of a window is good again."""
        self._was_healthy = False

    def check(self) -> None:
        """Raise CaprayError when the failures tell of a fault that is not the images'."""
        total = self.results.total()
        if total < HOPELESS_AFTER:
            return
        if not self.results[CAPTIONED] and not self.has_captions:
            raise CaprayError(f"the first {total:,} images all failed, {self.most_common()}: {self.example}")
        recent = Counter(self._recent)
        for flag, limit, kinds in self._shares:
            failed = sum(recent[kind] for kind in kinds)
            if limit is not None and failed > limit * recent.total():
                raise CaprayError(
                    f"{failed:,} of the last {recent.total():,} images failed, above {flag} {limit:g}: {self.example}; what "
                    "was done is kept, and the same command goes on"
                )

    def check_any(self) -> None:
        """Raise CaprayError when there is no caption and every result is a failure that may pass."""
        if self.results and not self.has_captions and all(kind in TRANSIENT_FAILURES for kind in self.results):
            raise CaprayError(
                f"no image could be captioned in {counted(self.results.total(), 'attempt')}, {self.most_common()}: "
                f"{self.example}"
            )

    def most_common(self) -> str:
        failed = Counter({kind: count for kind, count in self.results.items() if kind != CAPTIONED})
        ((kind, count),) = failed.most_common(1)
        return f"{count:,} of them as {kind}"

    def text(self) -> str:
        """The failures by kind."""
        failed = [f"{count:,} {kind}" for kind, count in sorted(self.results.items()) if kind != CAPTIONED]
        return ", ".join(failed) or "none"
