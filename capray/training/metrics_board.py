"""The board: an actor through which workers report metrics, lines and faults to the driver, and reading tasks learn the
epoch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # The actor's process imports nothing of capray's before it is told something.
    from capray.errors import CaprayError
    from capray.tracking.runs import Item


def board_class():
    """The actor's class; it is made late, as Ray takes long to import."""
    import ray

    @ray.remote(num_cpus=0)
    class Board:
        """Where rank 0 leaves its progress, and the driver and the tasks that read find it."""

        def __init__(self) -> None:
            self.state: dict[str, Any] = {}
            self.lines: list[str] = []
            self.items: list[Item] = []
            self.error: CaprayError | None = None
            self.num_epochs = 0

        def begin(self, epoch: int) -> None:
            self.num_epochs = epoch

        def epoch(self) -> int:
            return self.num_epochs

        def post(self, state: dict[str, Any]) -> None:
            self.state |= state

        def say(self, line: str) -> None:
            self.lines.append(line)

        def fail(self, error: CaprayError) -> None:
            self.error = error

        def failure(self) -> CaprayError | None:
            return self.error

        def track(self, item: Item) -> None:
            self.items.append(item)

        def read(self) -> tuple[dict[str, Any], list[str], list[Item]]:
            lines, self.lines = self.lines, []
            items, self.items = self.items, []
            return self.state, lines, items

    return Board
