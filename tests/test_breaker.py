"""What is taken back when images fail all of a sudden, and what has to be looked at again first."""

import json

import pyarrow as pa

from capray.captioning.breaker import MAX_RECENT_FINALS, NUM_WITNESSES, Breaker
from capray.captioning.failure_limits import SUDDEN_WINDOW
from capray.captioning.fetching import Look
from capray.captioning.rows import results_schema


def results(*images: tuple[str, str | None], certain: bool = True) -> pa.Table:
    """Images with their kinds of failure; the bytes of one that was captioned have its id for a digest."""
    rows = [
        {
            "image_id": name,
            "uri": f"/{name}",
            "error_type": kind,
            "message": kind,
            "certain": certain,
            "place": json.dumps({"image_id": name}),
            "sha256": name.ljust(32).encode() if kind is None else None,
        }
        for name, kind in images
    ]
    return pa.Table.from_pylist(rows, results_schema())


def look(name: str, data: str | None = None) -> Look:
    return Look(name, None, "", sha256=(data or name).ljust(32).encode())


def ids(rows: list[dict]) -> list[str]:
    return [row["image_id"] for row in rows]


def test_one_witness_of_each_block_the_last_of_them():
    breaker = Breaker()
    for i in range(NUM_WITNESSES + 2):
        breaker.add(results((f"bad{i}", "truncated"), (f"good{i}", None), (f"more{i}", None)), is_healthy=True)
    assert ids(breaker.ask()) == [f"good{i}" for i in range(2, NUM_WITNESSES + 2)]


def test_all_witnesses_have_to_be_as_they_were():
    breaker = Breaker()
    for name in ("a", "b"):
        breaker.add(results((name, None)), is_healthy=True)
    breaker.ask()
    assert breaker.waits_for == "a"
    assert breaker.answer(look("stranger")) is None and breaker.waits_for == "a"
    assert breaker.answer(look("a")) is None and breaker.waits_for == "b"
    assert breaker.answer(look("b", "other")) == "b: its bytes are others"
    assert breaker.answer(Look("b", "missing", "gone")) == "b: gone" and breaker.waits_for == "b"


def test_final_failures_since_the_last_healthy_window_are_taken_back():
    breaker = Breaker()
    breaker.add(results(("old", "truncated")), is_healthy=True)
    breaker.add(results(*((str(i), None) for i in range(SUDDEN_WINDOW))), is_healthy=True)
    breaker.add(results(("new", "truncated"), ("passing", "unreadable_storage")), is_healthy=True)
    breaker.add(results(("unsure", "missing"), certain=False), is_healthy=False)
    breaker.add_finals([{"image_id": "looked", "uri": None, "error_type": "missing"}])
    assert breaker.taken_back("the disk is gone") == [
        {"image_id": "new", "uri": "/new", "error_type": "unreadable_storage", "message": "truncated, but the disk is gone"},
        {"image_id": "looked", "uri": None, "error_type": "unreadable_storage", "message": "missing, but the disk is gone"},
    ]


def test_what_is_held_is_bounded():
    breaker = Breaker()
    for start in range(0, MAX_RECENT_FINALS + 1000, 1000):
        breaker.add(results(*((str(start + i), "truncated") for i in range(1000))), is_healthy=False)
    assert len(breaker.taken_back("")) == MAX_RECENT_FINALS
