"""Second looks: a failure that a fault of a disk, node or device could have caused is final only when the very same is seen
again, later and, where it can be, on another node.

Says which images are due and what a look means; knows nothing of how one is taken.
"""

from __future__ import annotations

import time
from collections import defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass

from capray.captioning.fetching import Look
from capray.inputs.places import Row
from capray.tables import FINAL_FAILURES

AS_TRANSIENT = {
    "missing": "unreadable_storage",
    "truncated": "unreadable_storage",
    "decode_error": "unreadable_storage",
    "crashed": "captioning_error",
}
"""What an uncertain failure is called in the log until it was seen again."""
MAX_WAITING = 100_000
"""Places held in memory; what fails beyond them is left to the next pass."""
LOOKS_PER_TASK = 64
MAX_TASKS = 8


@dataclass(frozen=True)
class LookGroup:
    """Places to look at together, on another node than ``node``."""

    places: list[Row]
    node: str


@dataclass(frozen=True)
class _Waiting:
    due: float
    place: Row
    node: str
    kind: str
    sha256: bytes | None


class SecondLooks:
    """The images that wait for a second look, ``seconds`` after the first."""

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic):
        self.seconds, self._clock = seconds, clock
        self.num_taken = 0
        self._waiting: deque[_Waiting] = deque()
        self._in_flight: dict[str, _Waiting] = {}

    @property
    def num_open(self) -> int:
        """Looks that wait or are under way."""
        return len(self._waiting) + len(self._in_flight)

    def add(self, place: Row, node: str, kind: str, sha256: bytes | None = None) -> None:
        """Look at ``place`` again, where ``node`` has met with a failure of ``kind``, in bytes of ``sha256`` if in any."""
        if len(self._waiting) < MAX_WAITING:
            self._waiting.append(_Waiting(self._clock() + self.seconds, place, node, kind, sha256))

    def due(self) -> list[LookGroup]:
        """What is to be looked at now."""
        room = LOOKS_PER_TASK * (MAX_TASKS - -(-len(self._in_flight) // LOOKS_PER_TASK))
        by_node: dict[str, list[Row]] = defaultdict(list)
        while room > 0 and self._waiting and self._waiting[0].due <= self._clock():
            item = self._waiting.popleft()
            if item.place["image_id"] not in self._in_flight:
                self._in_flight[item.place["image_id"]] = item
                by_node[item.node].append(item.place)
                room -= 1
        return [
            LookGroup(places[i : i + LOOKS_PER_TASK], node)
            for node, places in by_node.items()
            for i in range(0, len(places), LOOKS_PER_TASK)
        ]

    def is_asked(self, look: Look) -> bool:
        """Whether ``look`` is one of these."""
        return look.image_id in self._in_flight

    def take(self, look: Look) -> Row | None:
        """What ``look`` has decided: the row of a final failure; None when the image is to be attempted again, also since
        another failure or other bytes are seen now (it is just being written)."""
        first = self._in_flight.pop(look.image_id, None)
        self.num_taken += 1
        if first is None or not look.certain or look.kind not in FINAL_FAILURES:
            return None
        if look.kind in AS_TRANSIENT and (look.kind, look.sha256) != (first.kind, first.sha256):
            return None
        return {"image_id": look.image_id, "uri": first.place["uri"], "error_type": look.kind, "message": look.message}
