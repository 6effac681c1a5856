"""When failures stop the job: rules over kinds of results, without anything that fails."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from capray.captioning.failure_limits import HOPELESS_AFTER, RATE_WINDOW, SUDDEN_WINDOW, FailureLimits
from capray.errors import CaprayError

KINDS = st.sampled_from([None, None, None, "denied", "missing", "truncated", "captioning_error"])


def after(*results: tuple[int, str | None], rate: float | None = None, bad: float | None = None) -> FailureLimits:
    """The limits after so many results of each kind, one behind the other."""
    limits = FailureLimits(rate, bad)
    for count, kind in results:
        limits.add([kind] * count, f"it was {kind}" if kind else "")
    return limits


class TestStops:
    def test_when_the_first_results_all_fail(self):
        after((HOPELESS_AFTER - 1, "denied")).check()
        with pytest.raises(CaprayError, match=r"first 200 images all failed, 200 of them as denied: it was denied"):
            after((HOPELESS_AFTER, "denied")).check()
        after((1, None), (HOPELESS_AFTER, "denied")).check()

    @pytest.mark.parametrize(("limit", "kind"), [({"rate": 0.1}, "denied"), ({"bad": 0.1}, "truncated")])
    def test_when_a_share_of_the_last_results_is_too_large(self, limit, kind):
        after((900, None), (100, kind), **limit).check()
        with pytest.raises(CaprayError, match=r"101 of the last 1,001 images failed, above --max.* 0\.1: it was"):
            after((900, None), (101, kind), **limit).check()

    def test_each_limit_counts_its_own_kinds(self):
        after((300, None), (300, "truncated"), rate=0.1).check()
        after((300, None), (300, "denied"), bad=0.1).check()

    def test_shares_are_of_the_last_results_only(self):
        """A good start does not hide that all fails now, and a bad one is forgiven."""
        with pytest.raises(CaprayError, match="of the last 2,000"):
            after((100_000, None), (RATE_WINDOW // 5, "denied"), rate=0.1).check()
        after((150, "denied"), (RATE_WINDOW, None), rate=0.1).check()

    def test_at_the_end_when_nothing_but_faults_came(self):
        with pytest.raises(CaprayError, match="no image could be captioned in 3 attempts"):
            after((3, "denied")).check_any()
        after((3, "denied"), (1, "truncated")).check_any()
        after().check_any()


class TestBreaker:
    def test_trips_on_sudden_failure(self):
        assert after((60, None), (41, "missing")).has_tripped

    def test_not_below_its_share(self):
        assert not after((60, None), (40, "missing")).has_tripped

    def test_not_when_the_images_were_bad_from_the_start(self):
        assert not after((500, "not_an_image")).has_tripped

    def test_not_for_faults_that_record_nothing_final(self):
        assert not after((60, None), (500, "denied")).has_tripped

    def test_once_for_a_stretch_of_bad_images(self):
        limits = after((60, None), (60, "missing"))
        limits.reset()
        limits.add(["missing"] * 500)
        assert not limits.has_tripped, "the witnesses said that the images are bad"
        limits.add([None] * SUDDEN_WINDOW)
        limits.add(["missing"] * SUDDEN_WINDOW)
        assert limits.has_tripped, "but that was another stretch"

    def test_whatever_the_blocks(self):
        """A block larger than the window trips it as its rows one by one would."""
        whole, single = after((60, None)), after((60, None))
        whole.add(["missing"] * 70)
        for _ in range(70):
            single.add(["missing"])
        assert whole.has_tripped and single.has_tripped


@given(blocks=st.lists(st.lists(KINDS, max_size=30), max_size=30))
def test_text_counts_every_failure(blocks):
    limits = FailureLimits(None, None)
    for kinds in blocks:
        limits.add(kinds)
    failed = [kind for kinds in blocks for kind in kinds if kind]
    shown = {} if limits.text() == "none" else dict(reversed(item.split()) for item in limits.text().split(", "))
    assert {kind: int(count) for kind, count in shown.items()} == {kind: failed.count(kind) for kind in failed}
