"""Writing the Samples table, what every data set has in common, and reading one split of it as a stream.

A data set yields samples split by split; they land in ``<split>-<n>.parquet`` shards, and ``_dataset.json``, written
last, says that the table is whole and what is in it.
"""

from __future__ import annotations

import hashlib
import json
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


def read_samples(samples: str, split: str, batch_size: int) -> Iterator[list[Sample]]:
    """The samples of ``split``, at most ``batch_size`` at once; other splits' images are not read.

    Raises:
        StorageError: a file cannot be read.
    """
    fs = locate(samples).fs
    for entry in find_parquet(samples):
        with storage_errors(f"reading {entry.uri}"):
            file = pq.ParquetFile(entry.path, filesystem=fs)
            for group in range(file.num_row_groups):
                if split not in file.read_row_group(group, columns=["split"])["split"].unique().to_pylist():
                    continue
                for batch in file.iter_batches(batch_size, row_groups=[group], columns=SAMPLES.names):
                    rows = batch.filter(pc.field("split") == split).select(SAMPLES.names).to_pylist()
                    if rows:
                        yield [Sample(**row) for row in rows]
