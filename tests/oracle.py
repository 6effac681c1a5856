"""What a captioning output holds and what its images' bytes are, read with pyarrow, tarfile and s3fs alone: nothing of
capray takes part."""

from __future__ import annotations

import hashlib
import io
import os
import tarfile
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

Digests = dict[str, set[bytes]]
"""By image id, the SHA-256s of the bytes it had: more than one where it was rewritten."""


def check_exactly_once(
    output: str,
    wanted: Collection[str] | Mapping[str, set[bytes]],
    undisturbed: Mapping[bytes, str] | None = None,
    failed: Mapping[str, str] | None = None,
    endpoint: str | None = None,
) -> dict[str, str]:
    """Assert that every wanted id is captioned once, but for those that failed as they should; the captions by id.

    Args:
        output: a folder, or an S3 prefix, which is read at ``endpoint``.
        wanted: the ids, or the digests of their bytes, one of which each caption must have been made of. With ids alone,
            the bytes of files are looked up.
        undisturbed: by SHA-256, the caption of the same bytes in an undisturbed run.
        failed: the images that cannot be captioned, with the current kind of failure each must have.
    """
    failed = failed or {}
    captions = read_parts(output, "captions", endpoint)
    doubled = [image_id for image_id, count in Counter(row["image_id"] for row in captions).items() if count > 1]
    assert not doubled, f"captioned more than once: {doubled[:5]}"
    found = {row["image_id"]: row["caption"] for row in captions}
    failures = current_failures(output, endpoint)
    lost, strange = set(wanted) - found.keys() - failures.keys(), (found.keys() | failures.keys()) - set(wanted)
    assert not lost, f"neither captioned nor failed: {sorted(lost)[:5]}"
    assert not strange, f"never asked for: {sorted(strange)[:5]}"
    unexpected = {image_id: kind for image_id, kind in failures.items() if failed.get(image_id) != kind}
    assert not unexpected, f"failed, but not as expected: {sorted(unexpected.items())[:5]}"
    for row in captions:
        image_id, digest = row["image_id"], row["sha256"]
        assert image_id not in failed, f"captioned, but should have failed as {failed[image_id]}: {image_id}"
        if isinstance(wanted, Mapping):
            assert digest in wanted[image_id], f"captioned from bytes it never had: {image_id}"
        elif row["uri"] is not None and os.path.isfile(row["uri"]):
            assert digest == _digest(Path(row["uri"]).read_bytes()), f"captioned from bytes it does not have: {image_id}"
        if undisturbed is not None:
            assert row["caption"] == undisturbed.get(digest), f"captioned otherwise than in an undisturbed run: {image_id}"
    return found


def read_parts(output: str, table: str, endpoint: str | None = None) -> list[dict]:
    """Every row of every part of ``captions`` or ``failures``."""
    tables = [pq.read_table(io.BytesIO(data)) for _, data in _files(f"{output}/{table}", endpoint)]
    return pa.concat_tables(tables).to_pylist() if tables else []


def current_failures(output: str, endpoint: str | None = None) -> dict[str, str]:
    """By id, the kind of the latest failure of each image that has no caption."""
    captioned = {row["image_id"] for row in read_parts(output, "captions", endpoint)}
    rows = sorted(read_parts(output, "failures", endpoint), key=lambda row: row["failed_at"])
    return {row["image_id"]: row["error_type"] for row in rows if row["image_id"] not in captioned}


def captions_by_bytes(*outputs: str, endpoint: str | None = None) -> dict[bytes, str]:
    """By SHA-256, the captions of outputs whose runs nothing disturbed."""
    return {row["sha256"]: row["caption"] for output in outputs for row in read_parts(output, "captions", endpoint)}


def digests(*inputs: str, endpoint: str | None = None) -> Digests:
    """The digests of the images in folders, prefixes and files: images themselves, tar shards, Parquet tables of images, and
    manifests (text, or a table with the column ``uri``) of files."""
    found: Digests = defaultdict(set)
    for place in inputs:
        for name, data in _files(place, endpoint):
            for image_id, image in _images(name, data, endpoint):
                found[image_id].add(_digest(image))
    return found


def merged(*many: Digests) -> Digests:
    """The digests of images that were rewritten: all they ever had."""
    ids = set().union(*many)
    return {image_id: set().union(*(each.get(image_id, set()) for each in many)) for image_id in ids}


def _images(name: str, data: bytes, endpoint: str | None) -> Iterator[tuple[str, bytes]]:
    if name.endswith(".tar"):
        with tarfile.open(fileobj=io.BytesIO(data)) as tar:
            for member in tar:
                file = tar.extractfile(member)
                if file is not None and member.name.endswith((".jpg", ".png")):
                    yield f"{name}#{member.name}", file.read()
    elif name.endswith(".parquet"):
        table = pq.read_table(io.BytesIO(data))
        column = "image" if "image" in table.column_names else "uri"
        for row in table.to_pylist():
            value = row[column]
            yield row.get("image_id", value), value if column == "image" else _read(value, endpoint)
    elif name.endswith(".txt"):
        for uri in data.decode().split():
            yield uri, _read(uri, endpoint)
    else:
        yield name, data


def _files(place: str, endpoint: str | None) -> Iterator[tuple[str, bytes]]:
    """A file, or all below a folder or prefix, by the name an image id has."""
    if not place.startswith("s3://"):
        root = Path(place)
        for path in [root] if root.is_file() else sorted(root.rglob("*")):
            if path.is_file():
                yield str(path), path.read_bytes()
        return
    fs = _s3(endpoint)
    for key in sorted(fs.find(place)):
        yield f"s3://{key}", fs.cat_file(key)


def _read(uri: str, endpoint: str | None) -> bytes:
    return _s3(endpoint).cat_file(uri) if uri.startswith("s3://") else Path(uri).read_bytes()


def _s3(endpoint: str | None):
    import s3fs

    return s3fs.S3FileSystem(endpoint_url=endpoint, use_listings_cache=False)


def _digest(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()
