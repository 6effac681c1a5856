"""The files of a captioner's folder and its name by content; without torch, for those who only carry captioners."""

from __future__ import annotations

import hashlib
from pathlib import Path

from capray.errors import ConfigError

CONFIG, VOCABULARY, WEIGHTS = "config.json", "vocabulary.json", "model.safetensors"
FILES = (CONFIG, VOCABULARY, WEIGHTS)
BUILT_IN = "builtin:"
"""Before the name of a captioner that comes with capray."""
_CAPTIONERS = Path(__file__).parents[1] / "captioners"


def built_in_folder(model: str) -> str:
    """The folder of a captioner that comes with capray, ``builtin:NAME``.

    Raises:
        ConfigError: there is none of that name.
    """
    names = sorted(folder.name for folder in _CAPTIONERS.iterdir())
    name = model.removeprefix(BUILT_IN)
    if name not in names:
        known = ", ".join(f"{BUILT_IN}{name}" for name in names)
        raise ConfigError(f"no captioner {model!r} comes with capray: {known}, or give a folder or URI")
    return str(_CAPTIONERS / name)


def model_id_of(files: dict[str, bytes]) -> str:
    """SHA-256 over the names and SHA-256s of the folder's three files, in sorted order."""
    lines = (f"{name} {hashlib.sha256(files[name]).hexdigest()}\n" for name in sorted(FILES))
    return hashlib.sha256("".join(lines).encode()).hexdigest()
