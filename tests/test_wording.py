"""Numbers stand beside the right form of what they count."""

import pytest

from capray.wording import counted


@pytest.mark.parametrize(
    ("number", "told"), [(0, "0 images"), (1, "1 image"), (2, "2 images"), (1234, "1,234 images"), (1.0, "1 image")]
)
def test_a_noun_follows_its_number(number, told):
    assert counted(number, "image") == told


def test_a_plural_of_its_own():
    assert [counted(n, "pass", "passes") for n in (1, 2)] == ["1 pass", "2 passes"]
