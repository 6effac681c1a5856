"""What every kind of input has in common: it is listed unit by unit, page by page, as plan rows.

A source knows nothing of what was already captioned. Image ids are exact: the URI as the store has it, or the chosen
column, without decoding or normalisation.
"""

from __future__ import annotations

import fnmatch
import re
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

import pyarrow as pa

from capray.config import SourceSettings
from capray.errors import ConfigError
from capray.inputs.places import PLAN
from capray.storage import Location

ROWS_PER_PAGE = 100_000


@dataclass(frozen=True)
class Page:
    """Some rows of a unit, in its order.

    Attributes:
        rows: PLAN columns, less ``position`` and ``input``; columns may be missing.
        after: what ``Source.pages`` takes to go on behind this page.
        found: further units that turned up.
        hidden: files left out because of their names.
    """

    rows: pa.Table
    after: Any = None
    found: tuple[str, ...] = ()
    hidden: int = 0


@dataclass(frozen=True)
class Selection:
    """The images of an input that are wanted: by glob, and by shard."""

    root: str
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    shard: tuple[int, int] | None = None
    _patterns: dict[str, re.Pattern[str]] = field(default_factory=dict, compare=False, repr=False)

    @classmethod
    def of(cls, settings: SourceSettings, root: str) -> Selection:
        shard = None
        if settings.shard is not None:
            part, parts = settings.shard.split("/")
            shard = int(part), int(parts)
        return cls(root.rstrip("/") + "/", settings.include, settings.exclude, shard)

    def has(self, image_id: str) -> bool:
        """Whether the globs want ``image_id``."""
        name = image_id.removeprefix(self.root)
        if self.include and not any(self._matches(glob, name) for glob in self.include):
            return False
        return not self.excludes(image_id)

    def excludes(self, name: str) -> bool:
        name = name.removeprefix(self.root)
        return any(self._matches(glob, name) for glob in self.exclude)

    def in_shard(self, key: str) -> bool:
        """Whether ``key`` falls to this shard, by CRC-32 of its UTF-8."""
        if self.shard is None:
            return True
        part, parts = self.shard
        return zlib.crc32(key.encode()) % parts == part - 1

    def filter(self, rows: pa.Table) -> pa.Table:
        """The rows that are wanted; a tar whose members are not known yet is judged by its own name."""
        if not (self.include or self.exclude or self.shard):
            return rows
        ids = rows["image_id"].to_pylist()
        members = _column(rows, "member")
        containers = _column(rows, "container")
        groups = _column(rows, "row_group")
        keep = []
        for image_id, container, member, group in zip(ids, containers, members, groups, strict=True):
            is_tar = container is not None and group is None
            globbed = not is_tar or not self.excludes(container)
            if not is_tar or member is not None:
                globbed = globbed and self.has(image_id)
            keep.append(globbed and self.in_shard(container if is_tar else image_id))
        return rows.filter(pa.array(keep, pa.bool_()))

    def _matches(self, glob: str, name: str) -> bool:
        if glob not in self._patterns:
            self._patterns[glob] = re.compile(fnmatch.translate(glob))
        return self._patterns[glob].match(name) is not None


def _column(rows: pa.Table, name: str) -> list[Any]:
    return rows[name].to_pylist() if name in rows.column_names else [None] * rows.num_rows


class Source(ABC):
    """An input, opened.

    Args:
        place: where it is.
        settings: what of it is wanted and which columns are what.
        keep: columns to carry along.
    """

    kind: ClassVar[str]
    hidden_signs: ClassVar[tuple[str, ...]] = (".", "_")
    """Files below a name that begins so are left out, and counted."""

    def __init__(self, place: Location, settings: SourceSettings, keep: tuple[str, ...] = ()):
        self.place, self.settings, self.keep = place, settings, keep
        self.selection = Selection.of(settings, place.uri)

    @property
    def source_type(self) -> pa.DataType | None:
        """The type of the carried columns."""
        return None

    @property
    def image_column(self) -> str | None:
        """The column that holds the images, of a Parquet source that does."""
        return None

    @abstractmethod
    def units(self) -> list[str]:
        """What can be listed apart from each other, to begin with."""

    @abstractmethod
    def pages(self, unit: str, after: Any = None) -> Iterator[Page]:
        """The pages of a unit, from the start or behind the page that gave ``after``.

        Raises:
            DataError: a file that cannot be read as what it is.
            StorageError: the store cannot be reached or refuses.
        """

    def refuse(self, *names: str) -> None:
        """Raise ConfigError when one of the settings ``names``, which mean nothing here, is given."""
        for name in names:
            value = self.keep if name == "keep" else getattr(self.settings, name)
            if value:
                raise ConfigError(
                    f"{name} {value!r} means nothing for {self.place.uri!r}, which is {_KINDS[self.kind]}"
                )


_KINDS = {
    "images": "a place of image files",
    "parquet": "Parquet",
    "tar": "tar shards",
    "manifest": "a manifest of URIs",
    "inventory": "an S3 Inventory",
}


def plan_rows(columns: dict[str, Any]) -> pa.Table:
    """Plan columns by name, lists or arrays, in PLAN's types; ``source`` as it is."""
    return pa.table(
        {
            name: values if isinstance(values, (pa.Array, pa.ChunkedArray)) else pa.array(values, PLAN.field(name).type)
            for name, values in columns.items()
        }
    )


def is_hidden(relative: str, signs: tuple[str, ...]) -> bool:
    return any(part.startswith(signs) for part in relative.strip("/").split("/"))
