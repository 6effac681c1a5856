from tests.rooms import BLOCK, PAGE, drawn


def test_the_map_shows_the_imports_as_they_are():
    (shown,) = BLOCK.findall(PAGE.read_text("utf-8"))
    assert shown == drawn(), "write it anew: uv run python -m tests.rooms"
