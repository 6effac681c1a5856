"""Which version of a container was listed, and whether an answer is of that version.

The version is what ``storage`` makes of an object's ETag and size, or a file's size and time of change. A single image needs
none: it is read in one request, and its SHA-256 says which bytes those were.
"""

from __future__ import annotations

from dataclasses import replace

from capray.errors import DataError
from capray.storage import Entry, Location, entry_of, locate, path_of, storage_errors


class VersionChanged(Exception):
    """An answer is of another version than was wanted, or other bytes lie where an image was listed."""


def entry_at(place: Location) -> Entry:
    """The file or object at ``place`` as it is now.

    Raises:
        DataError: it is gone.
        StorageError: it cannot be asked for.
    """
    with storage_errors(f"looking at {place.uri}"):
        try:
            return entry_of(place, place.path, place.fs.info(place.path))
        except FileNotFoundError as error:
            raise DataError(f"{place.uri!r} is gone") from error


def container_at(uri: str) -> Entry:
    """The container that was listed under ``uri``, as it is now; raises as ``entry_at`` does."""
    place = locate(uri)
    return entry_at(replace(place, path=path_of(place.path)) if place.is_local else place)


def check_version(wanted: str | None, found: str) -> None:
    """Raise VersionChanged when ``found`` is not the ``wanted`` version, where one is wanted."""
    if wanted and found != wanted:
        raise VersionChanged(f"version {found}, not {wanted}")


def if_match(wanted: str | None) -> dict[str, str]:
    """What makes S3 refuse to answer from another version than ``wanted``."""
    etag = (wanted or "").rpartition("-")[0].replace("%2B", "+")
    return {"IfMatch": f'"{etag}"'} if etag else {}
