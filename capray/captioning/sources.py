"""Where images come from: a folder, an S3 prefix, or Parquet with a column of images or of URIs.

A source lists what it has as plan rows and knows nothing of what was already captioned. Image ids are exact: the URI
as the store has it, or the chosen column, without decoding or normalisation.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq

from capray.captioning.rows import PLAN
from capray.config import CaptionConfig
from capray.errors import CaprayError, ConfigError, DataError
from capray.storage import Location, find_parquet, is_file, is_folder, is_glob, iter_files, locate, storage_errors

_ROWS_PER_CHUNK = 100_000
_HIDDEN = (".", "_")


@dataclass(frozen=True)
class Columns:
    """Which columns of a Parquet source hold the id and the image or its URI."""

    image_id: str
    image: str | None
    uri: str | None
    split: str | None


class Source:
    """An input, opened: ``chunks`` lists it, ``columns`` is set when it is Parquet.

    Raises:
        ConfigError: there is nothing at the input, it is empty, its columns do not fit, or it holds the output.
        StorageError: the store cannot be reached.
    """

    def __init__(self, config: CaptionConfig):
        self.config = config
        scheme = config.input.split("://", 1)[0].lower() if "://" in config.input else ""
        if scheme in ("http", "https"):
            raise ConfigError(
                f"{config.input!r}: http(s) URIs are not read; fetch them into tar shards or a bucket first (img2dataset)"
            )
        self.place = locate(config.input)
        self.hidden = 0
        self.columns: Columns | None = None
        self._check_output()
        if self._is_parquet():
            self.columns = self._choose_columns()
        elif config.split or config.id_column or config.image_column or config.uri_column:
            raise ConfigError(f"{config.input!r} is no Parquet table: split and the column settings are for those")

    def _check_output(self) -> None:
        assert self.config.output is not None
        output = locate(self.config.output)
        inside = f"{output.path.rstrip('/')}/".startswith(f"{self.place.path.rstrip('/')}/")
        if inside and type(output.fs) is type(self.place.fs):
            raise ConfigError(
                f"the output {self.config.output!r} lies inside the input {self.config.input!r}, where its files would be "
                "taken for images: choose an output beside it"
            )

    def _is_parquet(self) -> bool:
        if is_glob(self.place):
            return True
        if is_file(self.place):
            return self.place.path.endswith(".parquet")
        if self.place.is_local and not is_folder(self.place):
            raise ConfigError(f"there is nothing at {self.config.input!r}")
        first = next((entry for entry in self._files()), None)
        if first is None:
            raise ConfigError(f"there are no images at {self.config.input!r}: it is empty, or does not exist")
        self.hidden = 0
        return first.path.endswith(".parquet")

    def _choose_columns(self) -> Columns:
        config = self.config
        entry = find_parquet(config.input)[0]
        with storage_errors(f"reading {entry.uri}"):
            try:
                schema = pq.read_schema(entry.path, filesystem=self.place.fs)
            except pa.ArrowInvalid as error:
                raise DataError(f"{entry.uri!r} is not Parquet: {error}") from error
        types = {field.name: field.type for field in schema}
        asked = (config.id_column, config.image_column, config.uri_column, "split" if config.split else None)
        for name in asked:
            if name is not None and name not in types:
                raise ConfigError(f"{entry.uri!r} has no column {name!r}; its columns: {', '.join(types)}")
        image = config.image_column or ("image" if "image" in types and not config.uri_column else None)
        uri = config.uri_column or next((name for name in ("uri", "url") if name in types and image is None), None)
        if image is None and uri is None:
            raise ConfigError(
                f"{entry.uri!r} has no column of images or URIs that is known: name it with image_column or uri_column; "
                f"its columns: {', '.join(types)}"
            )
        if image is not None and not _holds(types[image], pa.types.is_binary, pa.types.is_large_binary):
            raise ConfigError(f"column {image!r} of {entry.uri!r} holds {types[image]}, not encoded image bytes")
        image_id = config.id_column or ("image_id" if "image_id" in types else uri)
        if image_id is None:
            raise ConfigError(
                f"{entry.uri!r} needs a column of image ids: name it with id_column; its columns: {', '.join(types)}"
            )
        return Columns(image_id, image, uri if image is None else None, "split" if config.split else None)

    def _files(self) -> Iterator:
        for entry in iter_files(self.place):
            parts = entry.path[len(self.place.path) :].lstrip("/").split("/")
            if any(part.startswith(_HIDDEN) for part in parts):
                self.hidden += 1
            else:
                yield entry

    def chunks(self) -> Iterator[pa.Table]:
        """The source's images in the PLAN schema, chunk by chunk, in its own order.

        Raises:
            DataError: a null image id or URI, or a file whose columns differ from the first's.
        """
        position = 0
        rows: Iterator[dict[str, list]] = self._parquet_rows() if self.columns else self._object_rows()
        for columns in rows:
            count = len(columns["image_id"])
            columns["position"] = list(range(position, position + count))
            position += count
            yield pa.table({name: columns.get(name, [None] * count) for name in PLAN.names}, schema=PLAN)

    def _object_rows(self) -> Iterator[dict[str, list]]:
        if is_file(self.place):
            yield {"image_id": [self.place.uri], "uri": [self.place.uri]}
            return
        uris: list[str] = []
        for entry in self._files():
            uris.append(entry.uri)
            if len(uris) == _ROWS_PER_CHUNK:
                yield {"image_id": uris, "uri": uris}
                uris = []
        if uris:
            yield {"image_id": uris, "uri": uris}

    def _parquet_rows(self) -> Iterator[dict[str, list]]:
        columns = self.columns
        assert columns is not None
        wanted = [name for name in dict.fromkeys((columns.image_id, columns.uri, columns.split)) if name]
        for entry in find_parquet(self.config.input):
            with storage_errors(f"reading {entry.uri}"):
                file = pq.ParquetFile(entry.path, filesystem=self.place.fs)
                missing = [name for name in (*wanted, columns.image) if name and name not in file.schema_arrow.names]
                if missing:
                    raise DataError(f"{entry.uri!r} has no column {missing[0]!r}, which the first file has")
                for group in range(file.num_row_groups):
                    table = file.read_row_group(group, columns=wanted)
                    yield self._group_rows(entry.path, group, table)

    def _group_rows(self, path: str, group: int, table: pa.Table) -> dict[str, list]:
        columns = self.columns
        assert columns is not None
        rows = list(range(table.num_rows))
        if columns.split:
            splits = table[columns.split].to_pylist()
            rows = [row for row in rows if splits[row] == self.config.split]
            table = table.take(pa.array(rows, pa.int64()))
        ids = table[columns.image_id].cast(pa.string())
        if ids.null_count:
            raise DataError(f"column {columns.image_id!r} of {path!r} has {ids.null_count} rows without an image id")
        result = {"image_id": ids.to_pylist()}
        if columns.uri:
            return result | {"uri": table[columns.uri].to_pylist()}
        return result | {"container": [path] * len(rows), "row_group": [group] * len(rows), "row": rows}


def _holds(column_type: pa.DataType, *predicates) -> bool:
    return any(predicate(column_type) for predicate in predicates)


def read_rows(place: Location, container: str, row_group: int, column: str, rows: list[int]) -> list[bytes | None]:
    """The values of ``column`` at ``rows`` of a row group of the Parquet file ``container``."""
    with storage_errors(f"reading {container}"):
        try:
            file = pq.ParquetFile(container, filesystem=place.fs)
            return file.read_row_group(row_group, columns=[column])[column].take(pa.array(rows)).to_pylist()
        except pa.ArrowException as error:
            raise CaprayError(f"{container}: {error}") from error
