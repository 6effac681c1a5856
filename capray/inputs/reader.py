"""Reading the images that places name: the bytes of what was listed, or why there are none.

What stands under an id is read under that id: a row of a table is read with its id, a member of a tar with its header, and
each answer of a container is of the version that was listed. Knows nothing of decoding, units of work or outputs.
"""

from __future__ import annotations

import hashlib
import os
import posixpath
import tarfile
from collections import defaultdict, deque
from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby

import pyarrow as pa

from capray.config import ImageLimits
from capray.errors import CaprayError, DataError, StorageError
from capray.images import ImageError
from capray.inputs.base import Changed, Event, Failed, Found, InputReading, LeftOut, Source, TarMembers, TarUnreadable
from capray.inputs.byte_reader import Patience, Stream, ignore, read_image, read_range
from capray.inputs.parquet import opened_parquet
from capray.inputs.places import MEMBERS, Row
from capray.inputs.tars import HEADER_BYTES, dots, images_of, member_in, name_of, opened, versions_in
from capray.inputs.versions import VersionChanged
from capray.inputs.witnesses import witnesses
from capray.storage import locate, read_ahead

_BATCH_ROWS = 256
_HELD_BYTES = 64 * 2**20
"""Of the members of a tar with a sidecar, how many are handed on together."""
FetchOutcome = Found | Failed


@dataclass(frozen=True)
class Reader:
    """Reads images by their places. It travels with every task, and holds nothing that grows with the plan.

    Attributes:
        inputs: by the number of the input.
        concurrency: requests for objects and members under way at once.
        patience_seconds: how long to wait for a mount that is away, or a store that asks to slow down.
    """

    inputs: tuple[InputReading, ...]
    limits: ImageLimits
    concurrency: int
    patience_seconds: float

    @classmethod
    def of(cls, sources: list[Source], limits: ImageLimits, concurrency: int, patience_seconds: float) -> Reader:
        """What reads the images of ``sources``."""
        return cls(tuple(source.reading for source in sources), limits, concurrency, patience_seconds)

    def read(
        self, rows: list[Row], skipped: Container[bytes] = (), notify: Callable[[str], None] = ignore
    ) -> Iterator[FetchOutcome | Event]:
        """What is at each of ``rows``: every one gives a Found or a Failed, or its container a Changed, after which none of
        that container's rows gives anything. A ``tar`` gives them for each of its wanted images, and then its TarMembers or
        a TarUnreadable. Of what else is in a tar that was read to its end a LeftOut tells.

        Args:
            skipped: the MD5 digests of the ids of images to leave out of tars.
            notify: called with a line about what is waited for.

        Raises:
            TryAgain: a mount is away for longer than ``patience_seconds``, or credentials have expired.
            StorageError: a bucket is gone.
        """
        for (kind, *_), group in groupby(rows, _place_key):
            among = list(group)
            patience = self._patience(among[0], notify)
            if kind == "object":
                for outcome in read_ahead(partial(self._object, patience=patience), among, self.concurrency):
                    yield _with_witness(outcome, patience)
            else:
                yield from self._of_container(kind, among, skipped, patience)

    def _patience(self, row: Row, notify: Callable[[str], None]) -> Patience:
        carried, reading = row.get("witness"), self.inputs[row["input"]]
        known = replace(reading.known, files=(carried, *reading.known.files)) if carried else reading.known
        return Patience(self.patience_seconds, known, notify)

    def _object(self, row: Row, patience: Patience) -> FetchOutcome:
        uri, size = row["uri"], row["size"]
        if uri is None:
            return Failed(row, ImageError("missing", "the row has no URI", certain=True))
        try:
            # It may have been replaced since it was listed.
            if size is not None and size > self.limits.max_image_bytes:
                size = Stream(uri, patience=patience).seek(0, os.SEEK_END)
                if size > self.limits.max_image_bytes:
                    return Failed(row, self._too_large(size))
            return Found(row, read_image(uri, self.limits.max_image_bytes, patience))
        except ImageError as error:
            return Failed(row, error)
        except StorageError as error:
            if row["container"] is None:
                raise
            return Failed(row, ImageError("unreadable_storage", str(error)))
        except (CaprayError, MemoryError):
            raise
        except Exception as error:
            return Failed(row, ImageError("unreadable_storage", f"{uri}: {type(error).__name__}: {error}"))

    def _too_large(self, size: int) -> ImageError:
        return ImageError("too_large", f"{size:,} bytes, over the limit of {self.limits.max_image_bytes:,}")

    def _of_container(
        self, kind: str, rows: list[Row], skipped: Container[bytes], patience: Patience
    ) -> Iterator[FetchOutcome | Event]:
        number, container = rows[0]["input"], rows[0]["container"]
        left = {row["image_id"]: row for row in rows}
        of_tar = partial(self._tar, skipped=skipped)
        read = {"row": self._table_rows, "member": self._members, "name": self._named, "tar": of_tar}[kind]
        try:
            for outcome in read(rows, patience):
                yield outcome
                if isinstance(outcome, (Found, Failed)):
                    left.pop(outcome.row["image_id"], None)
            return
        except VersionChanged:
            yield Changed(number, container)
            return
        except ImageError as error:
            if error.kind == "missing" and error.certain:
                yield Changed(number, container)
                return
            problem = error.message
        except DataError as error:
            problem = str(error)
        except CaprayError:
            raise
        except Exception as error:
            problem = f"{container}: {type(error).__name__}: {error}"
        if kind == "tar":
            yield TarUnreadable(number, container, problem)
            return
        for row in left.values():
            yield Failed(row, ImageError("unreadable_storage", problem))

    def _table_rows(self, rows: list[Row], patience: Patience) -> Iterator[FetchOutcome]:
        reading = self.inputs[rows[0]["input"]]
        assert reading.id_column is not None and reading.image_column is not None
        rows = sorted(rows, key=lambda row: (row["row_group"], row["row"]))
        file = opened_parquet(_stream(rows[0], patience))
        for group, of_group in groupby(rows, lambda row: row["row_group"]):
            if group >= file.num_row_groups:
                raise VersionChanged(f"only {file.num_row_groups} row groups")
            waiting, first = deque(of_group), 0
            columns = [reading.id_column, reading.image_column]
            batches = file.iter_batches(_BATCH_ROWS, row_groups=[group], columns=columns)
            while waiting:
                try:
                    batch = next(batches, None)
                except (pa.ArrowException, OSError) as error:
                    # A page of this row group is spoilt, which says nothing of the others.
                    message = f"{rows[0]['container']}, row group {group}: {error}"
                    yield from (Failed(row, ImageError("unreadable_storage", message)) for row in waiting)
                    break
                if batch is None:
                    raise VersionChanged(f"only {first} rows in row group {group}")
                while waiting and waiting[0]["row"] < first + batch.num_rows:
                    row = waiting.popleft()
                    at = row["row"] - first
                    if batch[reading.id_column].slice(at, 1).cast(pa.string())[0].as_py() != row["image_id"]:
                        raise VersionChanged(f"another id in row {row['row']} of row group {group}")
                    data = batch[reading.image_column][at].as_py()
                    if data is None:
                        yield Failed(row, ImageError("missing", "the row has no image bytes", certain=True))
                    else:
                        yield Found(row, data)
                first += batch.num_rows

    def _members(self, rows: list[Row], patience: Patience) -> Iterator[FetchOutcome]:
        yield from read_ahead(partial(self._member, patience=patience), rows, self.concurrency)

    def _member(self, row: Row, patience: Patience) -> FetchOutcome:
        """A member at a known place, read with its header."""
        offset, size, limit = row["offset"], row["size"], self.limits.max_image_bytes
        # Of what is certainly too large the header alone.
        length = size if size <= limit + HEADER_BYTES else HEADER_BYTES
        try:
            data = read_range(row["container"], offset, offset + length, row["version"] or "", patience)
        except ImageError as error:
            if error.kind == "missing" and error.certain:
                raise  # The whole tar is gone.
            return Failed(row, error)
        found = member_in(data)
        if found is None or name_of(found[0]) != row["member"]:
            raise VersionChanged(f"no member {row['member']} at byte {offset}")
        member, content = found
        return self._of_member(row, member, content, len(content) == member.size)

    def _of_member(self, row: Row, member: tarfile.TarInfo, data: bytes, whole: bool) -> FetchOutcome:
        if not member.isreg():
            message = f"a link to {member.linkname!r}: write the tar with --dereference --hard-dereference"
            return Failed(row, ImageError("unsupported_format", message))
        if member.size > self.limits.max_image_bytes:
            return Failed(row, self._too_large(member.size))
        if not whole:
            message = f"the tar ends within this member: {len(data)} of {member.size} bytes"
            return Failed(row, ImageError("unreadable_storage", message))
        return Found(row, data)

    def _named(self, rows: list[Row], patience: Patience) -> Iterator[FetchOutcome | Event]:
        """Members of which the name is known, from a sidecar. Of a shard that is written anew tar and sidecar do not come at
        once: the sidecar has to be what was listed still when what was read of the tar is handed on."""
        tar_version, uri, version = versions_in(rows[0]["container"], rows[0]["version"] or "")

        def checked(held: list[FetchOutcome | Event]) -> list[FetchOutcome | Event]:
            if uri is not None:
                Stream(uri, version=version, patience=patience).seek(0, os.SEEK_END)
            return held

        held: list[FetchOutcome | Event] = []
        num_bytes = 0
        try:
            for outcome in self._by_name(rows, tar_version, patience):
                held.append(outcome)
                num_bytes += len(outcome.data) if isinstance(outcome, Found) else 0
                if len(held) >= _BATCH_ROWS or num_bytes >= _HELD_BYTES:
                    yield from checked(held)
                    held, num_bytes = [], 0
        except DataError:  # Of the tar, behind what is held.
            yield from checked(held)
            raise
        yield from checked(held)

    def _by_name(self, rows: list[Row], version: str, patience: Patience) -> Iterator[FetchOutcome | Event]:
        """Members of the ``version`` of a tar, in one reading of it. The first under a name with another extension is taken
        for one when none in all of the tar has the very name; of a tar that ends early or is damaged that is not known. When
        all that the sidecar names are asked for, images that it does not name are counted."""
        wanted: dict[str, dict[str, list[Row]]] = defaultdict(lambda: defaultdict(list))
        for row in rows:
            wanted[_stem(row["member"])][row["member"]].append(row)
        container, row_input = rows[0]["container"], rows[0]["input"]
        stream = Stream(container, version=version, patience=patience)
        stems, is_cut = set(wanted), False
        with_other_extension: dict[str, Row] = {}
        counts = rows[0].get("row") == sum(map(len, wanted.values()))
        others: list[str] = []
        unnamed: list[str] = []
        with opened(container, stream) as tar:
            images = images_of(tar, self.limits.max_image_bytes, others.append)
            for stem, of_stem in groupby(images, lambda image: _stem(image[0].name)):
                names = wanted.get(stem, {})
                is_named = any(stem[:dot] in stems for dot in dots(f"{stem}."))
                for member, data, whole in of_stem:
                    is_cut = is_cut or (not whole and member.size <= self.limits.max_image_bytes)
                    is_known = whole or member.size > self.limits.max_image_bytes
                    if is_known and stem not in with_other_extension and names and member.name not in names:
                        with_other_extension[stem] = _as_member({}, member, stream.version)
                    if not is_named and self.inputs[row_input].selection.has(f"{container}#{name_of(member)}"):
                        unnamed.append(name_of(member))
                    for row in names.pop(member.name, ()):
                        yield self._of_member(_as_member(row, member, stream.version), member, data, whole)
                if not names:
                    wanted.pop(stem, None)
                    with_other_extension.pop(stem, None)
                if not wanted and not counts:
                    return
        others_of = [
            row | with_other_extension[stem]
            for stem in (() if is_cut else with_other_extension)
            for of_name in wanted.pop(stem).values()
            for row in of_name
        ]
        yield from self._members(sorted(others_of, key=lambda row: row["offset"]), patience)
        if counts:
            yield from _left_out(rows[0], "unnamed", unnamed)
        yield from _left_out(rows[0], "no_image", others)
        error = ImageError("missing", f"{container} has no such member", certain=True)
        if is_cut:
            error = ImageError("unreadable_storage", f"{container} ends before this member")
        for row in (row for names in wanted.values() for of_name in names.values() for row in of_name):
            yield Failed(row, error)

    def _tar(self, rows: list[Row], patience: Patience, skipped: Container[bytes]) -> Iterator[FetchOutcome | Event]:
        """A tar whose members are not known: each that is wanted and not ``skipped``; all that are wanted are told."""
        (tar_row,) = rows
        uri, selection = tar_row["container"], self.inputs[tar_row["input"]].selection
        stream = _stream(tar_row, patience)
        members: list[Row] = []
        others: list[str] = []
        seen: set[str] = set()
        with opened(uri, stream) as tar:
            for member, data, whole in images_of(tar, self.limits.max_image_bytes, others.append):
                image_id = f"{uri}#{name_of(member)}"
                if not whole and member.size <= self.limits.max_image_bytes:
                    raise DataError(f"{uri!r} is cut off within {name_of(member)}")
                if not selection.has(image_id):
                    continue
                row = _as_member(tar_row | {"image_id": image_id, "uri": image_id}, member, stream.version)
                members.append({name: row[name] for name in MEMBERS.names})
                if image_id not in seen and hashlib.md5(image_id.encode(), usedforsecurity=False).digest() not in skipped:
                    yield self._of_member(row, member, data, whole)
                seen.add(image_id)
        yield from _left_out(tar_row, "no_image", [name for name in others if selection.has(f"{uri}#{name}")])
        yield TarMembers(tar_row["input"], uri, stream.version, pa.Table.from_pylist(members, MEMBERS))


def _stem(member: str) -> str:
    """A member's name without its extension."""
    return posixpath.splitext(member)[0]


def _left_out(row: Row, reason: str, names: list[str]) -> Iterator[Event]:
    if names:
        yield LeftOut(row["input"], row["container"], reason, len(names), names[0])


def _with_witness(outcome: FetchOutcome, patience: Patience) -> FetchOutcome:
    """``outcome``; of a file that is missing with what proves that its file system is there as ``witness`` in its row:
    whoever looks again has to find that too. Without one where nothing proves it now."""
    if isinstance(outcome, Found) or outcome.error.kind != "missing" or outcome.error.certain:
        return outcome
    place = locate(outcome.row["uri"])
    if not place.is_local:
        return outcome
    row = {name: value for name, value in outcome.row.items() if name != "witness"}
    if witness := witnesses.of(place.path, patience.known):
        row["witness"] = witness
    return Failed(row, outcome.error)


def _place_key(row: Row) -> tuple:
    """What rows that are read together have in common."""
    kind = row["kind"]
    return kind, row["input"], None if kind == "object" else (row["container"], row["version"])


def _stream(row: Row, patience: Patience) -> Stream:
    return Stream(row["container"], version=row["version"] or "", patience=patience)


def _as_member(row: Row, member: tarfile.TarInfo, version: str) -> Row:
    """``row`` with the place of ``member``, by which it can be read again."""
    size = member.offset_data + member.size - member.offset
    place = {"kind": "member", "member": name_of(member), "offset": member.offset, "size": size}
    return row | place | {"version": version}
