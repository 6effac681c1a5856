"""The files of a captioner's folder and its name by content; without torch, for those who only carry captioners."""

from __future__ import annotations

import hashlib

CONFIG, VOCABULARY, WEIGHTS = "config.json", "vocabulary.json", "model.safetensors"
FILES = (CONFIG, VOCABULARY, WEIGHTS)


def model_id_of(files: dict[str, bytes]) -> str:
    """SHA-256 over the names and SHA-256s of the folder's three files, in sorted order."""
    lines = (f"{name} {hashlib.sha256(files[name]).hexdigest()}\n" for name in sorted(FILES))
    return hashlib.sha256("".join(lines).encode()).hexdigest()
