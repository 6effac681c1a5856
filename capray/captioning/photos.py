"""A few photos given by name: captioned in this process, one line each. No Ray, no tables."""

from __future__ import annotations

import json
import os
import sys

from capray import cluster
from capray.config import CaptionConfig, Decoding, ImageLimits, flag_of
from capray.errors import ConfigError
from capray.images import ends_like_image
from capray.inputs import are_containers
from capray.storage import list_names, locate

_SETTINGS = {
    *("input", "output", "also", "model", "tracking_uri", "precision"),
    *Decoding.model_fields,
    *ImageLimits.model_fields,
}


def are_photos(paths: list[str]) -> bool:
    """Whether these are photos to caption, judged by the last argument: it ends like an image's name, or is a local file
    that is no table, tar or list."""
    last = paths[-1]
    return ends_like_image(last) or (os.path.isfile(last) and not are_containers(last))


def photos_in(folder: str) -> list[str]:
    """The photos in ``folder`` (a path or URI), by their names' endings.

    Raises:
        ConfigError: there are none.
    """
    place = locate(folder)
    names = [name for name in list_names(place) if ends_like_image(name)]
    if not names:
        raise ConfigError(f"no photos in {folder!r}: give a folder of .jpg, .png …")
    return [place.join(name).uri for name in names]


def caption_photos(paths: list[str], config: CaptionConfig, as_json: bool = False) -> int:
    """Print ``path<TAB>caption`` for each photo, or a JSON object; a bad one is said on standard error. How many were bad.

    Raises:
        ConfigError: a path that is no file, or settings that only mean something for tables.
        CheckpointError: the model cannot be loaded.
    """
    if tables_only := config.model_fields_set - _SETTINGS:
        flags = ", ".join(map(flag_of, sorted(tables_only)))
        raise ConfigError(f"{flags}: not for single photos, which give lines and no tables (capray caption INPUT OUTPUT)")
    for path in paths:
        place = locate(path)
        if place.is_local and not os.path.isfile(place.path):
            raise ConfigError(f"no photo at {path!r}")

    import torch

    from capray.images import ImageError, load
    from capray.inference import Inference
    from capray.inputs.byte_reader import read_image
    from capray.tracking.registry import find_model_of

    precision = cluster.resolved_precision(config.precision, torch.cuda.is_available())
    inference = Inference.load(find_model_of(config), precision=precision)
    limits, decoding = config.subset(ImageLimits), config.subset(Decoding)
    failed = 0
    for path in paths:
        try:
            pixels, _, _ = load(read_image(path, limits.max_image_bytes), inference.captioner.architecture, limits)
        except ImageError as error:
            failed += 1
            print(f"capray: {path}: {error.kind}: {error.message}", file=sys.stderr)
            continue
        (outcome,) = inference([pixels], decoding)
        if not outcome.hypotheses:
            failed += 1
            print(f"capray: {path}: captioning_error: {outcome.error}", file=sys.stderr)
            continue
        best = outcome.hypotheses[0]
        about = {"image": path, "caption": best.caption, "log_prob": best.log_prob}
        print(json.dumps(about) if as_json else f"{path}\t{best.caption}", flush=True)
    return failed
