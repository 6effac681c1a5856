"""Downloading the zip archives of a data set and unpacking them: checked, resumed, never over other files.

Unfinished downloads are kept in the folder's ``.capray-fetch``; an archive leaves it when all of it is unpacked. Knows
nothing of captions.
"""

from __future__ import annotations

import fnmatch
import hashlib
import os
import shutil
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from requests import RequestException
from rich.filesize import decimal

from capray.datasets.download import download, innermost
from capray.errors import ConfigError, DataError, StorageError
from capray.progress import ProgressDisplay
from capray.storage import locate, storage_errors

_WORK = ".capray-fetch"
_JUNK = {"__MACOSX", ".DS_Store"}


@dataclass(frozen=True)
class Archive:
    """A zip archive on the web and what it unpacks to.

    Attributes:
        unpacks_to: paths below the folder; one of them being there shows that the archive is not needed.
        only: glob of the members that are wanted.
        size: in bytes, where it is known for certain.
        checksum: ``algorithm:hexdigest``, where it is known for certain; members are held to their CRCs in any case.
    """

    url: str
    unpacks_to: tuple[str, ...]
    only: str = "*"
    size: int | None = None
    checksum: str | None = None

    @property
    def name(self) -> str:
        return self.url.rsplit("/", 1)[-1]


def fetch(archives: Iterable[Archive], folder: str) -> None:
    """Download and unpack into ``folder`` what of ``archives`` is not there; the same call goes on after an interruption.

    An archive that lies in ``folder`` under its own name is unpacked in place of a download, and kept.

    Raises:
        ConfigError: the folder is not local.
        StorageError: an archive cannot be had (the message says where to put it by hand), the disk is full, or another file
            is in the way.
        DataError: an archive is not what it should be.
    """
    place = locate(folder)
    if not place.is_local:
        raise ConfigError(f"archives can only be fetched into a local folder, not {folder!r}")
    root = Path(place.path)
    for archive in archives:
        given, work = root / archive.name, root / _WORK / archive.name
        with ProgressDisplay(archive.name) as display, storage_errors(f"fetching {archive.url}"):
            if given.is_file():
                unpack(given, archive, root, display)
                continue
            there = next((path for path in archive.unpacks_to if (root / path).exists()), None)
            if there and not work.exists():
                display.say(f"{archive.name}: not needed, {root / there} is there")
                continue
            work.parent.mkdir(parents=True, exist_ok=True)
            try:
                if not work.exists():
                    download(archive.url, work, archive.size, display)
                unpack(work, archive, root, display)
            except RequestException as error:
                raise StorageError(
                    f"cannot download {archive.url}: {innermost(error)}; where it cannot be had from here, put a copy into "
                    f"{root} and run the same command again"
                ) from error
            except DataError as error:
                work.unlink(missing_ok=True)
                raise DataError(f"{error}; it was removed: run the same command again") from error
            work.unlink()
            if not any(work.parent.iterdir()):
                work.parent.rmdir()


def unpack(path: Path, archive: Archive, root: Path, display: ProgressDisplay) -> None:
    """Unpack what is wanted of the archive at ``path`` into ``root``; what is there at its full size is not written again.

    Each file appears whole, once its CRC is right, and below ``root`` (``ZipFile.extract`` sees to it).

    Raises:
        DataError: it is not the archive that is meant, damaged or encrypted.
        StorageError: the disk is too small, or another file is in the way.
    """
    _check(path, archive, display)
    scratch = root / _WORK / "unpacking"
    try:
        with zipfile.ZipFile(path) as file:
            members = [member for member in file.infolist() if _is_wanted(member, archive.only)]
            needed = sum(member.file_size for member in members if not (root / member.filename).exists())
            if needed > (free := shutil.disk_usage(root).free):
                raise StorageError(f"unpacking {path} needs {decimal(needed)}, and {root} has {decimal(free)} free")
            for done, member in enumerate(members):
                display.update(done, f"unpacking {done:,} of {len(members):,} files", total=len(members))
                if (root / member.filename).is_file() and (root / member.filename).stat().st_size == member.file_size:
                    continue
                whole = Path(file.extract(member, scratch))
                target = root / whole.relative_to(scratch)
                if target.exists():
                    raise StorageError(f"{target} is there and is not the archive's {member.filename!r}: move it away")
                target.parent.mkdir(parents=True, exist_ok=True)
                os.replace(whole, target)
    except (zipfile.BadZipFile, EOFError, NotImplementedError, RuntimeError) as error:
        raise DataError(f"{path} is damaged, or encrypted ({error})") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _check(path: Path, archive: Archive, display: ProgressDisplay) -> None:
    """Raise DataError unless the file is the archive that is meant, as far as that is known."""
    size = path.stat().st_size
    if archive.size not in (None, size):
        raise DataError(f"{path} has {size:,} bytes, not the {archive.size:,} of the archive that is meant")
    with open(path, "rb") as file:
        if archive.checksum is not None:
            display.update(size, "checking", total=size)
            algorithm, _, expected = archive.checksum.partition(":")
            found = hashlib.file_digest(file, lambda: hashlib.new(algorithm, usedforsecurity=False)).hexdigest()
            if found != expected:
                raise DataError(f"{path} has the {algorithm} {found}, not {expected}: it is damaged or another archive")
        if not zipfile.is_zipfile(file):
            file.seek(0)
            raise DataError(f"{path} is no zip archive: it begins with {file.read(40)!r}")


def _is_wanted(member: zipfile.ZipInfo, only: str) -> bool:
    is_junk = _JUNK.intersection(PurePosixPath(member.filename).parts)
    return not member.is_dir() and not is_junk and fnmatch.fnmatchcase(member.filename, only)
