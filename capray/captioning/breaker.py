"""A circuit breaker: when many images suddenly cannot be read, it names some that could be read before, to be read again
(witnesses). If those fail too, the fault is the machine's, and it tells which of the latest failures to take back.

Pure rules; when it trips is said by ``failure_limits``, how an image is looked at by others.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterable

import pyarrow as pa

from capray.captioning.failure_limits import SUDDEN_WINDOW
from capray.captioning.fetching import Look
from capray.inputs.places import Row
from capray.tables import FINAL_FAILURES

NUM_WITNESSES = 8
MAX_RECENT_FINALS = 10_000


class Breaker:
    """Keeps the last images that could be read, as witnesses, and the final failures since they could."""

    def __init__(self) -> None:
        self._num_done = 0
        self._witnesses: deque[tuple[Row, bytes]] = deque(maxlen=NUM_WITNESSES)
        self._finals: deque[tuple[int, Row]] = deque(maxlen=MAX_RECENT_FINALS)
        self._asked: dict[str, bytes] = {}

    def add(self, results: pa.Table, is_healthy: bool) -> None:
        """Take rows of ``results_schema``. While it ``is_healthy``, failures from before the window are forgotten."""
        while is_healthy and self._finals and self._finals[0][0] <= self._num_done - SUDDEN_WINDOW:
            self._finals.popleft()
        self._num_done += results.num_rows
        names = ("image_id", "uri", "error_type", "certain")
        rows = results.select(names).to_pylist()
        self.add_finals(row for row in rows if row["error_type"] in FINAL_FAILURES and row["certain"] is not False)
        place, sha256 = results["place"], results["sha256"]
        for i, row in enumerate(rows):
            if row["error_type"] is None and place[i].is_valid:
                self._witnesses.append((json.loads(place[i].as_py()), sha256[i].as_py()))
                return

    def add_finals(self, failures: Iterable[Row]) -> None:
        """Take rows of final failures: image_id, uri, error_type."""
        self._finals.extend((self._num_done, row) for row in failures)

    def ask(self) -> list[Row]:
        """The places of the witnesses, to be looked at now."""
        self._asked = {place["image_id"]: sha256 for place, sha256 in self._witnesses}
        return [place for place, _ in self._witnesses]

    @property
    def waits_for(self) -> str | None:
        """The first witness that was asked for and has not been seen to be as it was."""
        return next(iter(self._asked), None)

    def answer(self, look: Look) -> str | None:
        """Take a look at a witness: what is wrong with it, None when it is as it was."""
        if look.image_id in self._asked and look.sha256 != self._asked[look.image_id]:
            return f"{look.image_id}: {look.message or 'its bytes are others'}"
        self._asked.pop(look.image_id, None)
        return None

    def taken_back(self, why: str) -> list[Row]:
        """Transient rows that supersede the failures of late."""
        return [
            {
                "image_id": row["image_id"],
                "uri": row["uri"],
                "error_type": "unreadable_storage",
                "message": f"{row['error_type']}, but {why}",
            }
            for _, row in self._finals
        ]
