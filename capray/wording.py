"""How numbers are put into words in messages."""

from __future__ import annotations


def counted(number: float, one: str, many: str | None = None) -> str:
    """``number`` with what it counts: ``1 image``, ``1,234 images``; ``many`` where the plural is not ``one`` and an s."""
    return f"{number:,.0f} {one if number == 1 else many or one + 's'}"
