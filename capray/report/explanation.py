"""Where the captioner looked: a photo with a heat map for each word, as a figure or a page.

The maps are those of Show, Attend and Tell (Xu et al. 2015, figure 5), upsampled bilinearly instead of by a Gaussian.
Axes: T words, k rows and columns of the grid.
"""

from __future__ import annotations

import hashlib
import io
import math
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import PurePosixPath

import numpy as np
from PIL import Image

from capray.config import Decoding, ExplainConfig, ImageLimits, Preprocessing
from capray.errors import CaprayError, ConfigError
from capray.images import Decoded, ImageError, decode, fit
from capray.inputs.byte_reader import read_image
from capray.output import require_output
from capray.report.rendering import data_uri, encoded, render
from capray.storage import locate, write_atomic
from capray.tracking.registry import find_model_of
from capray.vocabulary import without_end

SIDE = 480
"""Longer side of the photo drawn, in pixels."""
_DARKEST = 0.15
"""Brightness of the photo where a word's attention is none."""
Box = tuple[float, float, float, float]
"""Left, top, right, bottom as shares of the photo's width and height; a padded photo's lies outside of it."""


@dataclass(frozen=True)
class Explanation:
    """A caption, word by word.

    ``words`` are the T tokens as they were emitted, without ``<end>``; ``attention_Tkk`` sums to 1 over the grid of
    each; ``probabilities_T`` are the model's for each word after those before it, or None where a table does not hold
    them. ``region`` is what of the photo the grid covers.
    """

    photo: Image.Image
    caption: str
    words: list[str]
    attention_Tkk: np.ndarray
    probabilities_T: list[float] | None
    region: Box


def explain(config: ExplainConfig) -> Explanation:
    """The explanation of a photo's caption, written to ``config.out`` and ``config.html``.

    Raises:
        ConfigError: settings that do not fit each other, no such row, or a captioner without attention.
        CaprayError: the photo cannot be read or decoded.
        CheckpointError, StorageError: as loading and reading do.
    """
    explanation = _from_table(config, config.table) if config.table else _by_captioning(config)
    if config.out is not None:
        write_atomic(locate(config.out), figure(explanation, PurePosixPath(config.out).suffix.lstrip(".").lower() or "png"))
    if config.html is not None:
        write_atomic(locate(config.html), page(explanation))
    return explanation


def region_of(width: int, height: int, preprocessing: Preprocessing) -> Box:
    """What of a photo the encoder's input covers."""
    if preprocessing.resize not in ("crop", "pad"):
        return 0.0, 0.0, 1.0, 1.0
    side = min(width, height) if preprocessing.resize == "crop" else max(width, height)
    across, down = side / width, side / height
    return (1 - across) / 2, (1 - down) / 2, (1 + across) / 2, (1 + down) / 2


def _by_captioning(config: ExplainConfig) -> Explanation:
    from capray.inference import Inference
    from capray.model.captioner import NO_CAPTION

    limits = config.subset(ImageLimits)
    with _failures_of(config.image):
        decoded = decode(read_image(config.image, limits.max_image_bytes), limits)
    inference = Inference.load(find_model_of(config), precision=config.precision)
    captioner = inference.captioner
    if captioner.decoder.attention is None:
        raise ConfigError(f"the captioner {config.model!r} has no attention to show")
    found = inference.explained(fit(decoded.image, captioner.architecture), config.subset(Decoding))
    if found is None:
        raise CaprayError(f"{config.image}: {NO_CAPTION}")
    return _explanation(
        decoded,
        found.hypothesis.caption,
        captioner.vocabulary.tokens(found.hypothesis.token_ids),
        found.attention_TP.numpy(),
        found.log_probs_T.exp().tolist(),
        captioner.architecture,
    )


def _from_table(config: ExplainConfig, table: str) -> Explanation:
    output = require_output(table)
    job = output.read_job() or {}
    if not job.get("attention"):
        raise ConfigError(f"{table!r} holds no attention: caption with --attention, or give --model in place of --table")
    with output.connect(("captions",)) as connection:
        found = connection.execute(
            "SELECT caption, tokens, attention, uri, sha256 FROM captions WHERE image_id = ?", [config.image]
        ).fetchone()
    if found is None:
        raise ConfigError(f"{table!r} has no caption of an image {config.image!r} (capray query shows its ids)")
    caption, tokens, weights_TP, uri, digest = found
    place = config.photo or uri
    if place is None:
        raise ConfigError(f"{table!r} does not say where the image {config.image!r} is: give it with --photo FILE")
    limits = config.subset(ImageLimits)
    with _failures_of(place):
        data = read_image(place, limits.max_image_bytes)
    if hashlib.sha256(data).digest() != bytes(digest):
        raise ConfigError(f"{place!r} is not the image that was captioned: its SHA-256 is another")
    with _failures_of(place):
        decoded = decode(data, limits)
    return _explanation(
        decoded, caption, tokens, np.asarray(weights_TP, np.float32), None, Preprocessing.create(job["preprocessing"])
    )


def _explanation(
    decoded: Decoded,
    caption: str,
    tokens: list[str],
    weights_TP: np.ndarray,
    probabilities_T: list[float] | None,
    preprocessing: Preprocessing,
) -> Explanation:
    """The explanation without the step of ``<end>``, the photo made smaller."""
    words = without_end(tokens)
    count = len(words)
    side = math.isqrt(weights_TP.shape[1])
    photo = decoded.image.copy()
    photo.thumbnail((SIDE, SIDE), Image.Resampling.BILINEAR)
    return Explanation(
        photo,
        caption,
        words,
        weights_TP[:count].reshape(count, side, side),
        None if probabilities_T is None else probabilities_T[:count],
        region_of(decoded.width, decoded.height, preprocessing),
    )


@contextmanager
def _failures_of(place: str) -> Generator[None]:
    try:
        yield
    except ImageError as error:
        raise CaprayError(f"{place}: {error.kind}: {error.message}") from error


def heat_map(weights_kk: np.ndarray) -> Image.Image:
    """The attention of a word as a picture of the region, bilinearly upsampled, grey, 255 where it is strongest."""
    scaled = 255 * weights_kk / max(float(weights_kk.max()), 1e-12)
    return Image.fromarray(scaled.astype(np.uint8)).resize((SIDE // 2, SIDE // 2), Image.Resampling.BILINEAR)


def _over_photo(explanation: Explanation, weights_kk: np.ndarray) -> np.ndarray:
    """The heat map (height, width) over the whole photo, 0 to 1; 0 outside of the region."""
    width, height = explanation.photo.size
    left, top, right, bottom = (
        round(share * size) for share, size in zip(explanation.region, (width, height, width, height), strict=True)
    )
    canvas = Image.new("L", (width, height))
    canvas.paste(heat_map(weights_kk).resize((right - left, bottom - top), Image.Resampling.BILINEAR), (left, top))
    return np.asarray(canvas, np.float32) / 255


def figure(explanation: Explanation, image_format: str = "png") -> bytes:
    """The photo, then the photo with the heat map of each word, four in a row: a picture in matplotlib's ``image_format``.

    Raises:
        ConfigError: a format that matplotlib does not write.
    """
    from matplotlib.figure import Figure

    width, height = explanation.photo.size
    columns = 4
    rows = math.ceil((len(explanation.words) + 1) / columns)
    drawing = Figure(figsize=(3 * columns, rows * (3 * height / width + 0.4)), dpi=100, layout="constrained")
    axes = drawing.subplots(rows, columns, squeeze=False).flat
    for place in axes:
        place.axis("off")
    photo_HW3 = np.asarray(explanation.photo)
    axes[0].imshow(photo_HW3)
    axes[0].set_title("the photo", fontsize=11)
    for i, (word, weights_kk) in enumerate(zip(explanation.words, explanation.attention_Tkk, strict=True)):
        place = axes[i + 1]
        light_HW = _DARKEST + (1 - _DARKEST) * _over_photo(explanation, weights_kk)
        place.imshow((photo_HW3 * light_HW[..., None]).astype(np.uint8))
        probability = "" if explanation.probabilities_T is None else f"  {explanation.probabilities_T[i]:.2f}"
        place.set_title(f"{word}{probability}", fontsize=11, parse_math=False)
    drawing.suptitle(explanation.caption, fontsize=13, parse_math=False)
    buffer = io.BytesIO()
    try:
        drawing.savefig(buffer, format=image_format)
    except ValueError as error:
        raise ConfigError(f"no picture of format {image_format!r} can be written ({error}): try .png") from error
    return buffer.getvalue()


def page(explanation: Explanation) -> bytes:
    """One HTML file with everything in it: the photo, and the caption whose words show their heat map when the pointer is
    over them or the keyboard is at them."""
    words = [
        {
            "word": word,
            "heat": data_uri(encoded(heat_map(weights_kk), "PNG"), "PNG"),
            "probability": None if explanation.probabilities_T is None else explanation.probabilities_T[i],
        }
        for i, (word, weights_kk) in enumerate(zip(explanation.words, explanation.attention_Tkk, strict=True))
    ]
    photo = data_uri(encoded(explanation.photo, "JPEG"), "JPEG")
    text = render("explanation.html", caption=explanation.caption, words=words, photo=photo, region=explanation.region)
    return text.encode()
