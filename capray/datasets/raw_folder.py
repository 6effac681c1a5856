"""Finding and reading the parts of a data set's folder: images, text files, and the Flickr sets' captions.

Knows nothing of splits or of the Samples table.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Iterator
from typing import Any

from capray.errors import DataError
from capray.storage import Location, is_folder, list_names, locate, read_bytes
from capray.wording import counted

PHOTOS = (".jpg", ".jpeg")


def open_folder(uri: str, hint: str = "") -> Location:
    """The folder at ``uri``; raises DataError, with ``hint``, when there is none."""
    raw = locate(uri)
    if not is_folder(raw):
        raise DataError(f"no folder at {uri!r}{hint}")
    return raw


def find_folder(raw: Location, names: Iterable[str]) -> Location | None:
    """The first of the folders ``names`` below ``raw`` that is there."""
    return next((place for place in map(raw.join, names) if is_folder(place)), None)


def find_photos(raw: Location, names: tuple[str, ...], hint: str = "") -> dict[str, Location]:
    """The JPEGs, by name, in the first of the folders ``names`` that is there; raises DataError when none is."""
    folder = find_folder(raw, names)
    if folder is None:
        raise DataError(f"{raw.uri!r} has no folder of images: expected one of {', '.join(names)}{hint}")
    return photos_in(folder)


def photos_in(folder: Location) -> dict[str, Location]:
    return {name: folder.join(name) for name in list_names(folder) if name.lower().endswith(PHOTOS)}


def find_file(raw: Location, name: str, folders: tuple[str, ...] = ("",)) -> Location | None:
    """The file ``name`` in the first of ``folders`` below ``raw`` (``""`` is ``raw`` itself) that has it."""
    for folder in folders:
        place = raw.join(folder) if folder else raw
        if name in list_names(place):
            return place.join(name)
    return None


def read_text(place: Location) -> str:
    return decode_text(read_bytes(place), place.uri)


def decode_text(data: bytes, uri: str) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{uri!r} is not UTF-8: {error}") from error


def lines_of(text: str, first: int = 1) -> Iterator[tuple[int, str]]:
    """The lines of ``text`` that are not blank, numbered from ``first``. Only line feeds and returns end a line."""
    for number, line in enumerate(io.StringIO(text, newline=None), start=first):
        if line.strip():
            yield number, line.rstrip("\n")


def read_json(place: Location) -> dict[str, Any]:
    """The JSON object in a file; raises DataError when it holds something else."""
    try:
        content = json.loads(read_bytes(place))
    except ValueError as error:
        raise DataError(f"{place.uri!r} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise DataError(f"{place.uri!r} must hold a JSON object, not a {type(content).__name__}")
    return content


def read_names(place: Location, notes: list[str]) -> list[str]:
    """The image names of a split list, each once; repetitions are noted."""
    lines = [line.strip() for _, line in lines_of(read_text(place))]
    names = list(dict.fromkeys(lines))
    if len(names) < len(lines):
        notes.append(f"{place.path.rsplit('/', 1)[-1]}: {counted(len(lines) - len(names), 'line')} with a repeated image")
    return names


def read_tokens(place: Location) -> dict[str, list[str]]:
    """The captions of a token file, ``NAME.jpg#k<TAB>caption``, by image name, in the order of their numbers.

    Raises:
        DataError: a line of another form, with its number.
    """
    numbered: dict[str, list[tuple[int, str]]] = {}
    for line_number, line in lines_of(read_text(place)):
        key, tab, caption = line.partition("\t")
        name, sign, number = key.rpartition("#")
        if not tab or not sign or not number.isdecimal():
            file = place.path.rsplit("/", 1)[-1]
            raise DataError(f"{file}, line {line_number}: expected NAME.jpg#k<TAB>caption, not {line[:60]!r}")
        numbered.setdefault(name, []).append((int(number), caption.strip()))
    return in_order(numbered)


def in_order(numbered: dict[str, list[tuple[int, str]]]) -> dict[str, list[str]]:
    """Captions in the order of their numbers; those of one number as they came."""
    return {name: [caption for _, caption in sorted(found, key=lambda pair: pair[0])] for name, found in numbered.items()}
