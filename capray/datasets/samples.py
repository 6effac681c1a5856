"""Writing the Samples table, what every data set has in common, and reading a split of it.

A data set yields samples split by split; they land in ``<split>-<n>.parquet`` shards, and ``_dataset.json``, written
last, says that the table is whole and what is in it.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import count, groupby, islice
from typing import NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from capray.errors import DataError
from capray.storage import check_empty, find_parquet, locate, storage_errors, write_atomic
from capray.tables import SAMPLES, encode_parquet

IMAGES_PER_SHARD = 500
IMAGES_PER_ROW_GROUP = 125
RECORD = "_dataset.json"


def names_and_sizes(samples: str) -> str:
    """The names and sizes of the table's files, one a line: what changes with a table that is edited."""
    return "".join(f"{entry.path.rsplit('/', 1)[-1]} {entry.size}\n" for entry in find_parquet(samples))


class Sample(NamedTuple):
    """An image with its reference captions."""

    image_id: str
    image: bytes
    captions: list[str]
    split: str


@dataclass
class Counts:
    """What went into one split."""

    images: int = 0
    captions: int = 0


@dataclass
class Prepared:
    """What a preparation wrote, and what it could not use."""

    output: str
    splits: dict[str, Counts]
    notes: list[str] = field(default_factory=list)
    digest: str = ""


def write_samples(samples: Iterable[Sample], output: str, dataset: str, notes: list[str]) -> Prepared:
    """Write ``samples``, grouped by split, as the Samples table in ``output``.

    Args:
        samples: all samples of a split together.
        output: an empty or new folder or URI.
        dataset: the data set's name, for the record.
        notes: what the user should know of the data, kept in the record; read after the last sample.

    Raises:
        ConfigError: ``output`` is not empty.
        DataError: there are no samples.
    """
    folder = locate(output)
    check_empty(output)
    prepared = Prepared(output, {}, notes)
    digest = hashlib.sha256()
    for split, of_split in groupby(samples, key=lambda sample: sample.split):
        counts = prepared.splits[split] = Counts()
        for shard in count():
            rows = list(islice(of_split, IMAGES_PER_SHARD))  # noqa: B031 (read on, not read again)
            if not rows:
                break
            columns = dict(zip(Sample._fields, zip(*rows, strict=True), strict=True))
            data = encode_parquet(pa.table(columns, schema=SAMPLES), IMAGES_PER_ROW_GROUP)
            digest.update(hashlib.sha256(data).digest())
            write_atomic(folder.join(f"{split}-{shard:05d}.parquet"), data)
            counts.images += len(rows)
            counts.captions += sum(len(row.captions) for row in rows)
    if not prepared.splits:
        raise DataError(f"no images for {output!r}")
    prepared.digest = digest.hexdigest()
    record = {
        "dataset": dataset,
        "splits": {split: vars(counts) for split, counts in prepared.splits.items()},
        "notes": prepared.notes,
        "digest": prepared.digest,
    }
    write_atomic(folder.join(RECORD), json.dumps(record, indent=2).encode())
    return prepared


class SplitText(NamedTuple):
    """The captions of a split, without its images, and the (file, row group) units that hold it."""

    num_images: int
    captions: list[list[str]]
    units: list[tuple[str, int]]


def read_captions(samples: str, split: str) -> SplitText:
    """The captions of every image of ``split``.

    Raises:
        DataError: the table has other columns, or the split has no images.
        StorageError: a file cannot be read.
    """
    captions: list[list[str]] = []
    units: list[tuple[str, int]] = []
    splits: Counter[str] = Counter()
    for path, group, file in _row_groups(samples):
        table = file.read_row_group(group, columns=["captions", "split"])
        splits.update(table["split"].to_pylist())
        found = table.filter(pc.field("split") == split)["captions"].to_pylist()
        if found:
            captions += found
            units.append((path, group))
    if not captions:
        known = ", ".join(f"{name} ({count})" for name, count in sorted(splits.items())) or "none"
        raise DataError(f"no images in split {split!r} of {samples!r}; its splits: {known}")
    return SplitText(len(captions), captions, units)


def read_unit(samples: str, unit: tuple[str, int], split: str, columns: list[str] = SAMPLES.names) -> pa.Table:
    """``columns`` (`split` among them) of the rows of ``split`` in one row group of the table."""
    path, group = unit
    with storage_errors(f"reading {path}"):
        table = pq.ParquetFile(path, filesystem=locate(samples).fs).read_row_group(group, columns=columns)
    return table.filter(pc.field("split") == split)


def read_samples(samples: str, split: str, batch_size: int) -> Iterator[list[Sample]]:
    """The samples of ``split``, at most ``batch_size`` at once; other splits' images are not read.

    Raises:
        DataError: the table has other columns.
        StorageError: a file cannot be read.
    """
    for _, group, file in _row_groups(samples):
        if split not in file.read_row_group(group, columns=["split"])["split"].unique().to_pylist():
            continue
        for batch in file.iter_batches(batch_size, row_groups=[group], columns=SAMPLES.names):
            rows = batch.filter(pc.field("split") == split).select(SAMPLES.names).to_pylist()
            if rows:
                yield [Sample(**row) for row in rows]


def _row_groups(samples: str) -> Iterator[tuple[str, int, pq.ParquetFile]]:
    """The row groups of the table: path, number, and the file they are in."""
    fs = locate(samples).fs
    for entry in find_parquet(samples):
        with storage_errors(f"reading {entry.uri}"):
            try:
                file = pq.ParquetFile(entry.path, filesystem=fs)
            except pa.ArrowInvalid as error:
                raise DataError(f"{entry.uri!r} is not Parquet: {error}") from error
            missing = [name for name in SAMPLES.names if name not in file.schema_arrow.names]
            if missing:
                raise DataError(f"{entry.uri!r} is not part of a Samples table: it has no column {missing[0]!r}")
            for group in range(file.num_row_groups):
                yield entry.path, group, file
