"""A folder or prefix of image files: every file is an image until its content says otherwise.

A prefix is listed level by level until there are prefixes enough to list side by side, then each to its depth.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from typing import Any, ClassVar

from capray.errors import DataError
from capray.inputs.base import ROWS_PER_PAGE, Page, Source, is_hidden, rows_of
from capray.inputs.witnesses import mount_points
from capray.storage import Location, is_file, is_unanswered, s3_pages, stat_of, storage_errors, uri_of, walk, was_removed

MAX_LEVELS = 3
"""Levels below the input that are looked into for prefixes to list side by side."""

_LAST = "\U0010ffff"


CONTAINERS = (".tar", ".parquet")
"""Endings of files that hold images, and are none."""


class Images(Source):
    kind = "images"
    hidden_prefixes: ClassVar[tuple[str, ...]] = (".",)

    def __init__(self, place: Location, settings, keep=()):
        super().__init__(place, settings, keep)
        self.refuse("split", "id_column", "image_column", "uri_column", "keep")

    def units(self) -> list[str]:
        return [f"0:{self.place.path}"]

    def name_of(self, unit: str) -> str:
        return self._uri(unit.split(":", 1)[1])

    def pages(self, unit: str, after: Any = None) -> Iterator[Page]:
        level, path = unit.split(":", 1)
        if level == "container":
            with storage_errors(f"looking for {self._uri(path)}"):
                if not self.place.fs.exists(path):  # Moved away, as it was asked for.
                    return
            raise DataError(
                f"{self._uri(path)!r} lies among images: caption it as another input, and leave it out here with --exclude; "
                "--input-kind images takes every file for an image"
            )
        with storage_errors(f"listing {self.place.uri}"):
            if level == "0" and is_file(self.place):
                if after is None:
                    info = self.place.fs.info(self.place.path)
                    yield self._page([(self.place.path, info["size"])], True)
            elif self.place.is_local:
                if level != "0" and was_removed(path, self.place.path):
                    self.check_mounts()
                else:
                    yield from self._list_folder(path, after)
            elif hasattr(self.place.fs, "call_s3"):
                yield from self._list_prefix(path, int(level), after)
            elif after is None:
                found = self.place.fs.find(path, detail=True)
                yield self._page([(name, info["size"]) for name, info in found.items()], True)

    def _page(self, files: list[tuple[str, int]], after: Any = None, found: tuple[str, ...] = ()) -> Page:
        root = self.place.path
        shown = [(path, size) for path, size in files if not is_hidden(path[len(root) :], self.hidden_prefixes)]
        num_hidden = len(files) - len(shown)
        if self.settings.input_kind == "auto":
            held = [path for path, _ in shown if path.lower().endswith(CONTAINERS)]
            shown = [(path, size) for path, size in shown if not path.lower().endswith(CONTAINERS)]
            found += tuple(f"container:{path}" for path in held if self.selection.has(self._uri(path)))
        uris = [self._uri(path) for path, _ in shown]
        rows = rows_of("object", {"image_id": uris, "uri": uris, "size": [size for _, size in shown]})
        return Page(rows, after, found, num_hidden)

    def _uri(self, path: str) -> str:
        return uri_of(self.place, path)

    def _list_folder(self, root: str, after: list[str] | None) -> Iterator[Page]:
        """Every regular file below ``root`` in the order of its folders' names. A folder that cannot be listed is a unit of
        its own, so that the rest is listed all the same."""
        folders: set[str] = set()
        files: list[tuple[str, int]] = []
        mounts = mount_points()  # To note those too that go away meanwhile.
        last = after
        denied: list[str] = []
        for folder, names in walk(
            root, denied, self.hidden_prefixes, lambda path: self.selection.leaves_out(self._uri(path))
        ):
            for name in names:
                path = os.path.join(folder, name)
                # By order, not by finding it again: what the last page ended with may be gone.
                if after is not None and (_parts(folder), name) <= (_parts(after[0]), after[1]):
                    continue
                try:
                    info = stat_of(path)
                except OSError as error:
                    if not self.selection.has(self._uri(path)):
                        continue
                    if is_unanswered(error):
                        raise
                    info = None  # Whoever reads it says what is wrong with it.
                if info is None or stat.S_ISREG(info.st_mode):
                    folders.add(folder)
                    files.append((path, info.st_size if info else 0))
                    last = [folder, name]
                if len(files) == ROWS_PER_PAGE:
                    self.note_folders(folders, mounts | mount_points())
                    yield self._page(files, last)
                    files, folders = [], set()
        wanted = [
            path
            for path in denied
            if not self.selection.leaves_out(self._uri(path))
            and not is_hidden(path.removeprefix(self.place.path), self.hidden_prefixes)
        ]
        self.note_folders(folders, mounts | mount_points())
        self.check_mounts()
        yield self._page(files, last, tuple(f"1:{path}" for path in wanted))

    def _list_prefix(self, prefix: str, level: int, after: str | None) -> Iterator[Page]:
        bucket, _, key = prefix.partition("/")
        arguments = {"Bucket": bucket, "Prefix": f"{key.rstrip('/')}/" if key and not level else key}
        if level < MAX_LEVELS:
            arguments["Delimiter"] = "/"
        if after is not None:
            arguments["StartAfter"] = after
        for objects, prefixes in s3_pages(self.place.fs, **arguments):
            # Behind a common prefix means behind every key that begins with it.
            last = max([*(entry["Key"] for entry in objects), *(name + _LAST for name in prefixes)], default=after)
            yield self._page(
                [(f"{bucket}/{entry['Key']}", entry["Size"]) for entry in objects],
                last,
                tuple(f"{level + 1}:{bucket}/{name}" for name in prefixes),
            )


def _parts(folder: str) -> list[str]:
    """What folders sort by in the order ``walk`` comes to them."""
    return folder.split(os.sep)
