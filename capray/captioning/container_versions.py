"""Which version of each table, tar and manifest the runs on an output have read: what has failed is attempted again when its
container is another one since, whatever clocks and file times say.

Each run adds a file, ``_capray/versions/<number>-<run id>.parquet``, of the containers that are new or changed since the
files before it, and others of those that change while it runs. Knows nothing of images and failures.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import pyarrow as pa

from capray.errors import StorageError
from capray.inputs import Source
from capray.output import Output
from capray.storage import Location, Write, list_names, read_ahead, read_bytes
from capray.tables import decode_parquet, encode_parquet

_NUM_READERS = 16
_FILE = re.compile(r"(\d{6})-(.+)\.parquet")
_SCHEMA = pa.schema([pa.field("container", pa.string()), pa.field("version", pa.string())])


class ContainerVersions:
    """The versions of the containers of ``sources``, as they are and as earlier runs have read them.

    Attributes:
        runs: the number of the first file of each run that is known; of two runs the later has the higher one. What a run
            says of a container that has changed since then may be about either version.
        same_since: by a container's URI the number of the run since which it is as it is now.
    """

    def __init__(self, output: Output, sources: list[Source]):
        self.folder = output.versions
        self._now = {uri: version for source in sources for uri, version in source.versions().items()}
        names = _files_in(self.folder)
        self.runs: dict[str, int] = {}
        for match in names:
            self.runs.setdefault(match[2], int(match[1]))
        self._next = 1 + max((int(match[1]) for match in names), default=0)
        self.same_since = dict.fromkeys(self._now, self._next)
        for match, table in zip(names, _read_all(self.folder, names), strict=True):
            for uri, version in zip(table["container"].to_pylist(), table["version"].to_pylist(), strict=True):
                if uri in self._now:
                    self.same_since[uri] = int(match[1]) if version == self._now[uri] else self._next

    def record(self, run_id: str, write: Write) -> None:
        """Add this run's first file, if there are containers."""
        if self._now:
            self._add([uri for uri, since in self.same_since.items() if since == self._next], run_id, write)

    def record_changed(self, versions: dict[str, str], run_id: str, write: Write) -> None:
        """Add a file of those of ``versions``, as they are now, that are others than this run knew; none when all are."""
        if changed := {uri: version for uri, version in versions.items() if self._now.get(uri) != version}:
            self._now |= changed
            self.same_since |= dict.fromkeys(changed, self._next)
            self._add(list(changed), run_id, write)

    def _add(self, containers: list[str], run_id: str, write: Write) -> None:
        table = pa.table([containers, [self._now[uri] for uri in containers]], schema=_SCHEMA)
        write(self.folder.join(f"{self._next:06d}-{run_id}.parquet"), encode_parquet(table))
        self.runs.setdefault(run_id, self._next)
        self._next += 1


def containers_read(output: Output) -> set[str]:
    """The containers that any run on ``output`` has read."""
    folder = output.versions
    return {uri for table in _read_all(folder, _files_in(folder)) for uri in table["container"].to_pylist()}


def _files_in(folder: Location) -> list[re.Match[str]]:
    return [match for name in list_names(folder, ".parquet") if (match := _FILE.fullmatch(name))]


def _read_all(folder: Location, names: list[re.Match[str]]) -> Iterator[pa.Table]:
    return read_ahead(_read, (folder.join(match[0]) for match in names), _NUM_READERS)


def _read(file: Location) -> pa.Table:
    try:
        return decode_parquet(read_bytes(file)).read()
    except (pa.ArrowException, OSError) as error:
        raise StorageError(f"{file.uri!r} is damaged ({error}): delete it; what has failed may be tried again") from error
