"""Where images come from: folders and prefixes, Parquet, tar shards, manifests, S3 inventories."""

from __future__ import annotations

import itertools
import posixpath
import re
from collections.abc import Iterable, Iterator

from capray.config import SourceSettings
from capray.errors import ConfigError, StorageError
from capray.images import ends_like_image
from capray.inputs.base import Containers, Selection, Source, is_hidden, root_of
from capray.inputs.files import CONTAINERS, Images
from capray.inputs.parquet import MANIFESTS, Inventory, Manifest, Parquet
from capray.inputs.tars import Tars
from capray.inputs.versions import entry_at
from capray.inputs.witnesses import mount_points, opens
from capray.storage import (
    PRIVATE,
    Entry,
    Location,
    glob_files,
    is_file,
    is_glob,
    is_there,
    iter_files,
    leads_nowhere,
    locate,
    uri_of,
)

_SAMPLE = 1000
_ENDINGS = {"manifest": MANIFESTS, "parquet": (".parquet",), "tar": (".tar",)}
_BESIDE = {"manifest": (), "parquet": (".json", ".md"), "tar": (".parquet", ".json", ".txt", ".csv", ".md", ".idx")}
"""What lies beside the files of a kind."""
_NUM_WITNESSES = 4
_COMPRESSED = re.compile(r"\.tgz$|\.tar\.[^/]*$")

__all__ = ["NothingThere", "Source", "are_containers", "open_sources"]


def open_sources(inputs: tuple[str, ...], settings: SourceSettings, keep: tuple[str, ...] = ()) -> list[Source]:
    """The inputs, opened.

    Raises:
        ConfigError: nothing there or empty (NothingThere), of no known kind or of several, or settings that do not fit it.
        DataError: a file that is not what its name says.
        StorageError: the store cannot be reached; StorageUnavailable, for now, or its mount went away meanwhile.
    """
    sources = [_open(uri, settings, tuple(dict.fromkeys(keep))) for uri in inputs]
    _name_once(sources)
    types = {str(source.source_type): source for source in sources}
    if len(types) > 1:
        first, second, *_ = types.values()
        raise ConfigError(
            f"the columns to keep have other types in {first.place.uri!r} ({first.source_type}) than in "
            f"{second.place.uri!r} ({second.source_type}): caption them into two outputs"
        )
    return sources


def are_containers(uri: str) -> bool:
    """Whether the name is one of tables, tars or lists of images, and not an image's."""
    return uri.lower().endswith((*itertools.chain(*_ENDINGS.values()), "manifest.json"))


def _name_once(sources: list[Source]) -> None:
    """Drop containers that an earlier input already names."""
    seen: set[str] = set()
    for source in sources:
        if isinstance(source, Containers):
            source.files = [entry for entry in source.files if entry.uri not in seen]
            seen |= {entry.uri for entry in source.files}


def _open(uri: str, settings: SourceSettings, keep: tuple[str, ...]) -> Source:
    scheme = uri.split("://", 1)[0].lower() if "://" in uri else ""
    if scheme in ("http", "https"):
        raise ConfigError(f"{uri!r}: http(s) URIs are not read; fetch them into tar shards or a bucket first (img2dataset)")
    place = locate(uri)
    if place.is_local and place.path.encode(errors="ignore").decode() != place.path:
        raise ConfigError(
            f"{uri!a}: the name of this input is no UTF-8, which ids and tables need: rename it, or link to it"
        )
    denied: list[str] = []
    selection = Selection.of(settings, root_of(place))
    points = mount_points() if place.is_local else set()
    files = _files(place, denied, PRIVATE, selection)
    sample = list(itertools.islice(files, _SAMPLE))
    if not sample:  # Hidden for tables and tars, not for images.
        files = _files(place, denied, Images.hidden_prefixes, selection)
        sample = list(itertools.islice(files, _SAMPLE))
    while sample and not _shown(place, sample[-_SAMPLE:], selection):
        if not (more := list(itertools.islice(files, _SAMPLE))):
            break
        sample += more
    if not sample and (closed := _wanted(place, denied, selection)):
        raise StorageError(f"nothing can be read at {uri!r}: {closed[0]!r} cannot be listed, or does not answer")
    if not sample:
        what = "no file matches" if is_glob(place) else "there are no images at"
        but = ", or all of it is excluded" if settings.exclude else ""
        raise NothingThere(f"{what} {uri!r}" + ("" if is_glob(place) else f": it is empty, or does not exist{but}"))
    kind = settings.input_kind if settings.input_kind != "auto" else _kind_of(place, sample, selection)
    source = _source_of(kind, place, settings, keep, itertools.chain(sample, files), selection, denied)
    if kind != "images" and (closed := _wanted(place, denied, selection)):
        raise StorageError(
            f"{closed[0]!r} cannot be listed, or links to nowhere, and may hold files of this input: let it be read, or "
            "--exclude it"
        )
    if place.is_local:
        source.note_folders((), points)
    source.check_mounts()
    if place.is_local and (kind in ("images", "tar") or source.image_column):
        source.witnesses = tuple(itertools.islice((entry.path for entry in sample if opens(entry.path)), _NUM_WITNESSES))
    return source


def _wanted(place: Location, denied: list[str], selection: Selection) -> list[str]:
    """Those of ``denied`` that are neither hidden nor excluded."""
    root = selection.root.rstrip("/")
    return [
        path
        for path in denied
        if not selection.excludes_folder(uri_of(place, path)) and not is_hidden(path.removeprefix(root), PRIVATE)
    ]


def _source_of(
    kind: str,
    place: Location,
    settings: SourceSettings,
    keep: tuple[str, ...],
    files: Iterable[Entry],
    selection: Selection,
    denied: list[str],
) -> Source:
    """The input as ``kind``; links to nowhere among its files, which may be to folders of them, are added to ``denied``."""
    uri = place.uri
    if kind == "images":
        if is_glob(place):
            raise ConfigError(f"{uri!r}: a glob names tables or tars; for images give the folder and --include")
        return Images(place, settings, keep)
    if kind == "inventory":
        return Inventory(place, settings, keep)
    endings = _ENDINGS[kind]
    shown: list[Entry] = []
    hidden = 0
    for entry in files:
        if _is_hidden(place, entry):
            hidden += ends_like_image(entry.path) or entry.path.lower().endswith((*endings, *CONTAINERS))
        else:
            shown.append(entry)
    there = [entry for entry in shown if entry.path.lower().endswith(endings)]
    # What the input itself names is asked for.
    found = [entry for entry in there if entry.path == place.path or not selection.excludes(entry.uri)]
    if not found:
        raise NothingThere(f"no files ending in {' or '.join(endings)} at {uri!r}")
    is_auto = settings.input_kind == "auto"
    others, away = _others(place, kind, shown)
    denied += [entry.path for entry in away]
    if is_auto and (others := [entry for entry in others if selection.has(entry.uri)]):
        raise _mixed(place, kind, found, others)
    if kind == "manifest":
        return Manifest(place, settings, keep, found, hidden)
    if kind == "parquet":
        return Parquet(place, settings, keep, found, hidden)
    assert kind == "tar", kind
    beside = {posixpath.splitext(entry.uri)[0]: entry for entry in shown if entry.uri.lower().endswith(".parquet")}
    sidecars = {tar.uri: beside.pop(stem) for tar in there if (stem := posixpath.splitext(tar.uri)[0]) in beside}
    return Tars(place, settings, keep, found, sidecars, hidden, list(beside.values()) if is_auto else [])


class NothingThere(ConfigError):
    """No file of what is to be captioned; what was there before may be away."""


def _mixed(place: Location, kind: str, found: list[Entry], others: list[Entry]) -> ConfigError:
    return ConfigError(
        f"{place.uri!r} holds {kind} files ({found[0].uri!r} …) and files of other kinds ({others[0].uri!r} …): say "
        f"--input-kind {kind} to leave those out, --input-kind images to take every file for an image, or move some away "
        "(--exclude leaves them out too)"
    )


def _others(place: Location, kind: str, files: list[Entry]) -> tuple[list[Entry], list[Entry]]:
    """Those of ``files`` that have no place among files of ``kind``, and apart from them links to nowhere."""
    others: list[Entry] = []
    away: list[Entry] = []
    for entry in files:
        if not entry.path.lower().endswith((*_ENDINGS[kind], *_BESIDE[kind])):
            (away if place.is_local and leads_nowhere(entry.path) else others).append(entry)
    return others, away


def _files(place: Location, denied: list[str], prefixes: tuple[str, ...], selection: Selection) -> Iterator[Entry]:
    """The files the input names: itself, the matches of its glob, or all below it but for what is in folders ``denied`` or
    excluded."""

    def excludes(path: str) -> bool:
        return selection.excludes_folder(uri_of(place, path))

    if is_glob(place):
        yield from glob_files(place, denied, excludes)
    elif place.is_local and not is_there(place):
        raise NothingThere(f"there is nothing at {place.uri!r}")
    elif is_file(place):
        yield entry_at(place)
    else:
        yield from iter_files(place, denied, prefixes, excludes)


def _below(place: Location, entry: Entry) -> str:
    """The part of ``entry``'s path below the input; of a glob's match, below the folders before the first wildcard."""
    root = place.path
    if not entry.path.startswith(root):
        root = re.split(r"[*?\[]", root, maxsplit=1)[0].rpartition("/")[0]
    return entry.path[len(root) :]


def _is_hidden(place: Location, entry: Entry) -> bool:
    """Whether ``entry`` is no file of the input for its name, or one on the way to it. Among tables "_" begins the names of
    files and folders that those who write them lay beside them; an image's own is as good as any (``_MG_0001.JPG``)."""
    folder, _, name = _below(place, entry).rpartition("/")
    return is_hidden(folder, PRIVATE) or is_hidden(name, Images.hidden_prefixes if ends_like_image(name) else PRIVATE)


def _shown(place: Location, files: list[Entry], selection: Selection) -> list[Entry]:
    """Those of ``files`` that are neither hidden nor excluded; of them those that --include names, if it names files."""
    shown = [entry for entry in files if not _is_hidden(place, entry)]
    shown = [entry for entry in shown if not selection.excludes(entry.uri)]
    return [entry for entry in shown if selection.has(entry.uri)] or shown


def _kind_of(place: Location, sample: list[Entry], selection: Selection) -> str:
    """The kind of input, from the names of its first files."""
    shown = _shown(place, sample, selection)
    if len(sample) == 1 and sample[0].path == place.path:
        shown = sample
        if place.path.lower().endswith(MANIFESTS):
            return "manifest"
        if place.path.lower().endswith("manifest.json"):
            return "inventory"
    names = [entry.path.lower() for entry in shown]
    for name in names:
        if _COMPRESSED.search(name) and not (ends_like_image(name) or name.endswith(_BESIDE["tar"])):
            raise ConfigError(f"{name!r} is a compressed tar, which is not read: unpack the compression (gunzip) first")
    for kind in ("tar", "parquet"):
        if found := [entry for entry in shown if entry.path.lower().endswith(_ENDINGS[kind])]:
            if others := _others(place, kind, shown)[0]:
                raise _mixed(place, kind, found, others)
            return kind
    # In a folder, text may be what somebody has written about its images.
    lists = MANIFESTS if is_glob(place) else tuple(ending for ending in MANIFESTS if ".txt" not in ending)
    if names and all(name.endswith(lists) for name in names):
        return "manifest"
    return "images"
