"""Faults of every kind, round after round, each judged by the oracle: `make chaos ROUNDS=3`.

A round captions photos, strikes somewhere on the way, and runs the same command until it ends well; then every id must
stand once, with the caption an undisturbed run gives to the same bytes, and nothing may have failed that should not. A
round whose strike never landed is broken too. Most rounds run without Ray (`chaos_local.py`), those of processes, nodes and
devices with it (`chaos_ray.py`). Prints a table in Markdown.
"""

from __future__ import annotations

import argparse
import random
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

from tests import chaos_local, chaos_ray

ALL = {"local": list(chaos_local.KINDS), "ray": list(chaos_ray.KINDS)}
RAY_PLACES = ("folder", "bucket")


@dataclass
class Row:
    """What the rounds of a kind came to."""

    about: str
    places: list[str] = field(default_factory=list)
    codes: set[str] = field(default_factory=set)
    struck: list[int] = field(default_factory=list)
    redone: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)

    def text(self) -> str:
        number = len(self.places)
        verdict = "BROKEN" if self.broken else "every id once"
        cells = (
            self.about,
            f"{number}",
            ", ".join(dict.fromkeys(self.places)),
            "; ".join(sorted(self.codes)),
            span(self.struck),
            span(self.redone),
            f"{sum(self.seconds) / number:.1f}",
            f"{number - len(self.broken)} of {number}: {verdict}",
        )
        return f"| {' | '.join(cells)} |"


HEAD = """\
| fault | rounds | outputs | exit codes | struck at | redone | seconds | |
|---|---|---|---|---|---|---|---|"""


def span(numbers: list[int]) -> str:
    return f"{min(numbers)}–{max(numbers)}" if numbers else "-"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=1, help="how many of each kind")
    parser.add_argument("--kinds", nargs="+", default=["local", "ray"], help=f"local, ray, or of {ALL}; Ray's joined by +")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    kinds = [kind for name in arguments.kinds for kind in ALL.get(name, [name])]
    known = {*ALL["local"], *ALL["ray"]}
    for kind in kinds:
        if unknown := set(kind.split("+") if kind not in known else []) - set(ALL["ray"]):
            parser.error(f"unknown kinds: {', '.join(sorted(unknown))}")
    rows: dict[str, Row] = defaultdict(lambda: Row(""))
    for play in (play_local, play_ray):
        with tempfile.TemporaryDirectory(prefix="chaos-") as folder:
            play(kinds, arguments.rounds, arguments.seed, Path(folder), rows)
    print(HEAD, *(row.text() for row in rows.values()), sep="\n")
    broken = [reason for row in rows.values() for reason in row.broken]
    print(*broken, f"broken: {len(broken)}", sep="\n")
    sys.exit(bool(broken))


def play_local(kinds: list[str], rounds: int, seed: int, folder: Path, rows: dict[str, Row]) -> None:
    chosen = [chaos_local.KINDS[kind] for kind in kinds if kind in chaos_local.KINDS]
    if not chosen:
        return
    places = [
        (kind, kind.places[(position + position // 2 + number) % len(kind.places)], number)
        for position, kind in enumerate(chosen)
        for number in range(rounds)
    ]
    world = chaos_local.World(folder, with_store=any(place == "bucket" for _, place, _ in places))
    try:
        for kind, place, number in places:
            rng = random.Random(f"{seed} {kind.name} {number}")
            judge(chaos_local.Round(world, kind, number, place, rng), kind.name, kind.about, rows)
    finally:
        world.close()


def play_ray(kinds: list[str], rounds: int, seed: int, folder: Path, rows: dict[str, Row]) -> None:
    chosen = [kind for kind in kinds if kind not in chaos_local.KINDS]
    if not chosen:
        return
    world = chaos_ray.World(folder)
    try:
        for position, kind in enumerate(chosen):
            for number in range(rounds):
                rng = random.Random(f"{seed} {kind} {number}")
                place = RAY_PLACES[(position + number) % 2]
                about = "; ".join(chaos_ray.KINDS[part] for part in kind.split("+"))
                judge(chaos_ray.Round(world, kind, number, place, rng), kind, f"{about} (Ray)", rows)
    finally:
        world.close()


def judge(this: chaos_local.Round | chaos_ray.Round, name: str, about: str, rows: dict[str, Row]) -> None:
    """Play a round, and enter what it came to into its kind's row."""
    row, started = rows[name], time.monotonic()
    verdict = "every id once"
    try:
        this.check()
        row.redone.append(this.redone)
    except (AssertionError, subprocess.TimeoutExpired) as error:
        verdict = f"BROKEN: {str(error)[-1500:]}"
        row.broken.append(f"{name} {this.number} ({this.place}): {verdict}")
    row.about = about
    row.places.append(this.place)
    row.codes.add(" ".join(map(str, this.codes)))
    row.seconds.append(time.monotonic() - started)
    if this.struck is not None:
        row.struck.append(this.struck)
    print(f"{name} {this.number} {this.place} {row.seconds[-1]:.1f} s: {verdict}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
