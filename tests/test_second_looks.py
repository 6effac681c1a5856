"""What a fault could have caused is looked at again: later, on another node, and the second look decides."""

import pytest

from capray.captioning.fetching import Look
from capray.captioning.second_looks import AS_TRANSIENT, LOOKS_PER_TASK, MAX_TASKS, MAX_WAITING, SecondLooks
from capray.images import UNCERTAIN
from capray.tables import FINAL_FAILURES, TRANSIENT_FAILURES


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def looks(clock) -> SecondLooks:
    return SecondLooks(30, clock)


def place(name: object) -> dict:
    return {"image_id": str(name), "uri": f"file:{name}", "kind": "object"}


def missing(name: object, certain: bool = True) -> Look:
    return Look(str(name), "missing", "not there", certain)


def ids(batches: list) -> list[list[str]]:
    return [[row["image_id"] for row in batch.places] for batch in batches]


def test_uncertain_kinds_are_called_by_a_transient_one():
    assert set(AS_TRANSIENT) == set(UNCERTAIN) <= set(FINAL_FAILURES)
    assert set(AS_TRANSIENT.values()) <= set(TRANSIENT_FAILURES)


class TestWhen:
    def test_not_before_its_time_and_once(self, looks, clock):
        looks.add(place("a"), "node-1", "missing")
        clock.now = 10
        looks.add(place("b"), "node-1", "missing")
        clock.now = 29.9
        assert not looks.due()
        clock.now = 30
        assert ids(looks.due()) == [["a"]] and not looks.due()
        clock.now = 40
        assert ids(looks.due()) == [["b"]]
        assert looks.num_open == 2

    def test_by_the_node_that_failed(self, looks, clock):
        for number in range(4):
            looks.add(place(number), f"node-{number % 2}", "missing")
        clock.now = 30
        assert {batch.node: [row["image_id"] for row in batch.places] for batch in looks.due()} == {
            "node-0": ["0", "2"],
            "node-1": ["1", "3"],
        }

    def test_many_take_turns(self, looks, clock):
        """A mount that fails for all does not flood the cluster with tasks, and none is forgotten."""
        number = 3 * LOOKS_PER_TASK * MAX_TASKS
        for name in range(number):
            looks.add(place(name), "", "missing")
        clock.now, seen = 30, []
        while batches := ids(looks.due()):
            assert len(batches) <= MAX_TASKS and max(map(len, batches)) <= LOOKS_PER_TASK
            for name in [name for batch in batches for name in batch]:
                looks.take(missing(name))
                seen.append(name)
        assert seen == [str(name) for name in range(number)]
        assert (looks.num_open, looks.num_taken) == (0, number)

    def test_memory_is_bounded(self, looks):
        for name in range(MAX_WAITING + 10):
            looks.add({"image_id": str(name)}, "", "missing")
        assert looks.num_open == MAX_WAITING

    def test_the_same_image_is_not_looked_at_twice_at_once(self, looks, clock):
        looks.add(place("a"), "", "missing")
        looks.add(place("a"), "", "missing")
        clock.now = 30
        assert ids(looks.due()) == [["a"]]
        looks.take(missing("a"))
        assert looks.num_open == 0


class TestWhatItDecides:
    @pytest.fixture
    def asked(self, looks, clock) -> SecondLooks:
        looks.add(place("a"), "", "missing")
        clock.now = 30
        looks.due()
        return looks

    def test_seen_again_it_is_final(self, asked):
        expected = {"image_id": "a", "uri": "file:a", "error_type": "missing", "message": "not there"}
        assert asked.take(missing("a")) == expected
        assert asked.num_open == 0

    def test_read_this_time_it_is_attempted_again(self, asked):
        assert asked.take(Look("a", None)) is None and asked.num_open == 0

    @pytest.mark.parametrize("kind", TRANSIENT_FAILURES)
    def test_a_fault_is_no_verdict(self, asked, kind):
        assert asked.take(Look("a", kind, "no answer")) is None

    def test_nor_is_what_stays_uncertain(self, asked):
        assert asked.take(missing("a", certain=False)) is None

    @pytest.mark.parametrize("first", [("truncated", b"1"), ("missing", b"1")])
    def test_nor_are_two_that_differ(self, looks, clock, first):
        """Such an image is being written."""
        looks.add(place("a"), "", *first)
        clock.now = 30
        looks.due()
        assert looks.take(missing("a")) is None and looks.num_open == 0

    def test_another_kind_may_be_what_it_is(self, asked):
        row = asked.take(Look("a", "not_an_image", "no image", certain=True))
        assert row is not None and row["error_type"] == "not_an_image"

    def test_looks_of_others_are_told_apart(self, asked):
        """Witnesses are looked at by the same tasks."""
        assert asked.is_asked(Look("a", None)) and not asked.is_asked(Look("witness", None))
