"""Any folder of images with a manifest: CSV, TSV, JSONL or Parquet, one row per caption or a list of captions per image.

The image id is the file's path below the folder. Hugging Face's ImageFolder with captions
(``metadata.csv`` or ``metadata.jsonl`` with ``file_name`` and ``text``) is such a folder.
"""

from __future__ import annotations

import gzip
import io
import posixpath
from collections.abc import Iterator
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from capray.config import flag_of
from capray.datasets.raw_folder import decode_text, open_folder
from capray.datasets.samples import Prepared
from capray.datasets.selection import RawDataset, prepare_dataset
from capray.datasets.settings import FolderConfig, check_split_name
from capray.errors import ConfigError, DataError
from capray.images import ends_like_image
from capray.manifests import csv_rows, json_rows
from capray.storage import Location, check_empty, is_file, iter_files, list_names, locate, read_bytes

MANIFESTS = (".csv", ".tsv", ".jsonl", ".ndjson", ".parquet")
_IMAGE_NAMES = ("file_name", "filename", "image", "file", "path")
_CAPTION_NAMES = ("caption", "captions", "text")


class _Columns(NamedTuple):
    image: str
    caption: str
    split: str | None


def prepare_folder(config: FolderConfig) -> Prepared:
    """Write the Samples table of a folder. Images without captions or a split are left out and counted.

    Raises:
        DataError: there is no manifest, it is malformed, a row names no image in the folder or no caption that is text, or
            an image is in two splits.
        ConfigError: the output is not empty; several manifests, or columns that cannot be recognised.
    """
    check_empty(config.output)
    raw = open_folder(config.raw)
    manifest = _manifest(raw, config.manifest)
    listing = RawDataset({}, {}, None)
    split_of: dict[str, str] = {}
    columns: _Columns | None = None
    for where, row in _rows(manifest):
        columns = columns or _choose_columns(row, config, manifest)
        name = _image_id(raw, row.get(columns.image), where)
        listing.captions.setdefault(name, []).extend(_captions(row.get(columns.caption), where))
        if columns.split is not None:
            _assign(split_of, name, row.get(columns.split), where)
    if columns is None:
        raise DataError(f"{manifest.uri!r} has no rows")
    if config.fractions is None:
        listing.splits = {split: [] for split in split_of.values()}
        for name, split in split_of.items():
            listing.splits[split].append(name)
    for entry in iter_files(raw):
        name = entry.path[len(raw.path.rstrip("/")) + 1 :]
        if name in listing.captions or ends_like_image(name):
            listing.images[name] = raw.join(name)
    return prepare_dataset(listing, config, "folder")


def _manifest(raw: Location, given: str | None) -> Location:
    if given is not None:
        place = locate(given)
        if not _suffix(place.path):
            raise ConfigError(f"{given!r} is no manifest: expected {', '.join(MANIFESTS)}, the text ones also .gz")
        if not is_file(place):
            raise DataError(f"no manifest at {given!r}")
        return place
    found = [name for name in list_names(raw) if _suffix(name)]
    if not found:
        raise DataError(f"{raw.uri!r} has no manifest ({', '.join(MANIFESTS)}): name it with --manifest")
    if len(found) > 1:
        raise ConfigError(f"{raw.uri!r} has several tables ({', '.join(found)}): choose with --manifest")
    return raw.join(found[0])


def _suffix(path: str) -> str | None:
    plain = path.lower().removesuffix(".gz")
    return next((suffix for suffix in MANIFESTS if plain.endswith(suffix)), None)


def _rows(manifest: Location) -> Iterator[tuple[str, dict[str, Any]]]:
    """The rows of a manifest, each with where it stands, for messages."""
    name, suffix = manifest.path.rsplit("/", 1)[-1], _suffix(manifest.path)
    data = read_bytes(manifest)
    if name.lower().endswith(".gz"):
        try:
            data = gzip.decompress(data)
        except (OSError, EOFError) as error:
            raise DataError(f"{manifest.uri!r} is not gzip: {error}") from error
    if suffix == ".parquet":
        try:
            file = pq.ParquetFile(pa.BufferReader(data))
            table = file.read([field.name for field in file.schema_arrow if not _is_no_text(field.type)])
        except pa.ArrowException as error:
            raise DataError(f"{manifest.uri!r} is not Parquet: {error}") from error
        for number, row in enumerate(table.to_pylist()):
            yield f"{name}, row {number}", row
        return
    text = decode_text(data, manifest.uri)
    if suffix in (".csv", ".tsv"):
        numbered = csv_rows(io.StringIO(text, newline=""), name, "\t" if suffix == ".tsv" else ",")
        _, header = next(numbered, (0, []))
        names = [column.strip() for column in header]
        rows = ((number, dict(zip(names, row, strict=True))) for number, row in numbered)
    else:
        rows = json_rows(io.StringIO(text, newline=None), name)
    for number, row in rows:
        yield f"{name}, line {number}", row


def _is_no_text(column_type: pa.DataType) -> bool:
    return pa.types.is_binary(column_type) or pa.types.is_large_binary(column_type) or pa.types.is_struct(column_type)


def _choose_columns(row: dict[str, Any], config: FolderConfig, manifest: Location) -> _Columns:
    image = _choose(config.image_column, _IMAGE_NAMES, list(row), "image_column", manifest)
    caption = _choose(config.caption_column, _CAPTION_NAMES, list(row), "caption_column", manifest)
    if config.fractions is not None:
        return _Columns(image, caption, None)
    if config.split_column is None and "split" not in row:
        raise ConfigError(
            f"{manifest.uri!r} has no column 'split': name it with --split-column, or divide the images with "
            "--split-fractions train=0.8,dev=0.1,test=0.1"
        )
    return _Columns(image, caption, _choose(config.split_column, ("split",), list(row), "split_column", manifest))


def _choose(given: str | None, guesses: tuple[str, ...], columns: list[str], setting: str, manifest: Location) -> str:
    """The column ``given``, or the one of ``guesses`` there is."""
    found = [name for name in ((given,) if given else guesses) if name in columns]
    if len(found) == 1:
        return found[0]
    flag = flag_of(setting)
    if found:
        raise ConfigError(f"{manifest.uri!r} has the columns {', '.join(found)}: choose with {flag}")
    wanted = repr(given) if given else f"{', '.join(guesses)}: name it with {flag}"
    raise ConfigError(f"{manifest.uri!r} has the columns {', '.join(columns)}, but no {wanted}")


def _image_id(raw: Location, value: Any, where: str) -> str:
    """The path of a row's image below ``raw``."""
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"{where}: no image file ({value!r})")
    path = value.strip()
    for root in (raw.uri, raw.path):
        path = path.removeprefix(root.rstrip("/") + "/")
    name = posixpath.normpath(path)
    if "://" in path or name.startswith(("/", "../")) or name == "..":
        raise DataError(f"{where}: {value!r} is not below {raw.uri!r}")
    return name


def _captions(value: Any, where: str) -> list[str]:
    captions = value if isinstance(value, list) else [value]
    if not all(isinstance(text, str | None) for text in captions):
        raise DataError(f"{where}: a caption must be text or a list of texts, not {str(value)[:60]!r}")
    return [(text or "").strip() for text in captions]


def _assign(split_of: dict[str, str], name: str, value: Any, where: str) -> None:
    """Note the split a row puts image ``name`` into, if it names one."""
    split = "" if value is None else str(value).strip()
    if not split:
        return
    try:
        check_split_name(split)
    except ValueError as error:
        raise DataError(f"{where}: {error}") from error
    if split_of.setdefault(name, split) != split:
        raise DataError(f"{where}: {name!r} is in the {split} split here, and in the {split_of[name]} split before")
