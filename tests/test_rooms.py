"""What CONTRIBUTING.md says of where things are is so."""

import re

import pytest

from tests.rooms import BLOCK, PAGE, drawn

PAGE_TEXT = PAGE.read_text("utf-8")
NAMED = re.findall(r"`([a-z_/]+\.py): ([A-Za-z_.]+)`", PAGE_TEXT.replace("\n", " "))


def test_the_map_shows_the_imports_as_they_are():
    (shown,) = BLOCK.findall(PAGE_TEXT)
    assert shown == drawn(), "write it anew: uv run python -m tests.rooms"


@pytest.mark.parametrize(("file", "name"), NAMED)
def test_what_the_walks_name_is_there(file, name):
    text = (PAGE.parent / "capray" / file).read_text("utf-8")
    for part in name.split("."):
        assert re.search(rf"^ *(def|class) {part}\b|^ *{part}\b *[:=]", text, re.MULTILINE), part
