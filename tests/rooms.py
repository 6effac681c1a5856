"""The map in CONTRIBUTING.md: capray's rooms, and which imports which, as they are.

    uv run python -m tests.rooms    # writes it anew

An arrow is left out where a longer way leads to the same room.
"""

from __future__ import annotations

import re
from itertools import permutations
from pathlib import Path

import grimp

PAGE = Path(__file__).parents[1] / "CONTRIBUTING.md"
BLOCK = re.compile(r"(?<=<!-- rooms -->\n).*?(?=<!-- /rooms -->)", re.DOTALL)


def imports() -> dict[str, set[str]]:
    """The rooms (modules and packages below capray) that each imports."""
    graph = grimp.build_graph("capray", cache_dir=None)
    # MLflow loads old models by this module's name; what it does is of the room above.
    graph.remove_import(importer="capray.model.pyfunc", imported="capray.inference")
    rooms = sorted(room for room in graph.find_children("capray") if room != "capray.__main__")
    for room in rooms:
        if graph.find_children(room):
            graph.squash_module(room)
    found: dict[str, set[str]] = {room.removeprefix("capray."): set() for room in rooms}
    for one, other in permutations(rooms, 2):
        if graph.direct_import_exists(importer=one, imported=other):
            found[one.removeprefix("capray.")].add(other.removeprefix("capray."))
    return found


def reached(found: dict[str, set[str]], room: str) -> set[str]:
    return set().union(*({other} | reached(found, other) for other in found[room]))


def drawn() -> str:
    """A Mermaid diagram."""
    found = imports()
    below = {room: reached(found, room) for room in found}
    lines = ["```mermaid", "graph TD"]
    for room, others in found.items():
        shown = sorted(other for other in others if not any(other in below[third] for third in others))
        if shown:
            lines.append(f"    {room} --> {' & '.join(shown)}")
    return "\n".join([*lines, "```", ""])


if __name__ == "__main__":
    PAGE.write_text(BLOCK.sub(lambda _: drawn(), PAGE.read_text("utf-8")))
