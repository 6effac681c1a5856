"""What a captioning output holds, read with pyarrow alone: nothing of capray takes part."""

from __future__ import annotations

import hashlib
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq


def read_parts(output: str, table: str) -> list[dict]:
    """Every row of every part of ``captions`` or ``failures`` in a local output."""
    files = sorted((Path(output) / table).glob("*.parquet"))
    return pa.concat_tables([pq.read_table(file) for file in files]).to_pylist() if files else []


def check_exactly_once(output: str, wanted: set[str], undisturbed: dict[str, str] | None = None) -> dict[str, str]:
    """Assert that every wanted id is captioned once or has failed, and no other id is there; the captions by id.

    Each caption must be that of the same id in the ``undisturbed`` run, and each SHA-256 that of the file it names.
    """
    captions = read_parts(output, "captions")
    failures = read_parts(output, "failures")
    doubled = [image_id for image_id, count in Counter(row["image_id"] for row in captions).items() if count > 1]
    assert not doubled, f"captioned more than once: {doubled[:5]}"
    captioned = {row["image_id"] for row in captions}
    failed = {row["image_id"] for row in failures} - captioned
    lost, strange = wanted - captioned - failed, (captioned | failed) - wanted
    assert not lost, f"neither captioned nor failed: {sorted(lost)[:5]}"
    assert not strange, f"never asked for: {sorted(strange)[:5]}"
    for row in captions:
        if row["uri"] is not None and not row["uri"].startswith("s3://"):
            assert row["sha256"] == hashlib.sha256(Path(row["uri"]).read_bytes()).digest(), row["image_id"]
    found = {row["image_id"]: row["caption"] for row in captions}
    if undisturbed is not None:
        other = [image_id for image_id in wanted if found.get(image_id) != undisturbed.get(image_id)]
        assert not other, f"captioned otherwise than in an undisturbed run: {sorted(other)[:5]}"
    return found
