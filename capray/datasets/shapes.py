"""An embedded data set: drawn scenes of coloured shapes with sizes, counts and relations, and five captions each.

Every scene has two groups of objects at places that are drawn at random, so a caption needs what is where: a captioner that
cannot look at parts of the image confuses colours, sizes and counts between the groups.
"""

from __future__ import annotations

import io
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass

from PIL import Image, ImageDraw

from capray.datasets.samples import Prepared, Sample, write_samples
from capray.datasets.settings import ShapesConfig

COLOURS = {
    "red": (214, 40, 40),
    "green": (40, 160, 60),
    "blue": (40, 80, 210),
    "yellow": (240, 205, 40),
    "purple": (140, 60, 170),
    "orange": (240, 130, 30),
}
SHAPES = {"circle": 0, "square": 4, "triangle": 3, "star": 5}
BACKGROUNDS = {"white": (245, 245, 245), "black": (25, 25, 25), "grey": (140, 140, 140)}
SIZES = {"small": ("small", "little"), "large": ("large", "big")}
NUMBERS = {1: "a", 2: "two", 3: "three"}
RELATIONS = {
    "left": ("to the left of", "left of", "on the left of"),
    "right": ("to the right of", "right of", "on the right of"),
    "above": ("above", "over"),
    "below": ("below", "under"),
}
OPPOSITE = {"left": "right", "right": "left", "above": "below", "below": "above"}


@dataclass(frozen=True)
class Group:
    """One to three alike objects."""

    count: int
    size: str
    colour: str
    shape: str

    def phrase(self, rng: random.Random, with_size: bool = True) -> str:
        size = [rng.choice(SIZES[self.size])] if with_size else []
        noun = self.shape + ("s" if self.count > 1 else "")
        article = NUMBERS[self.count]
        words = [*size, self.colour, noun]
        if article == "a" and words[0][0] in "aeiou":
            article = "an"
        return " ".join([article, *words])


def prepare_shapes(config: ShapesConfig) -> Prepared:
    """Draw ``num_images`` scenes into a Samples table: 80 % train, 10 % dev, 10 % test.

    Raises:
        ConfigError: the output is not empty.
    """
    return write_samples(draw_scenes(config), config.output, "shapes", [])


def draw_scenes(config: ShapesConfig) -> Iterator[Sample]:
    """The scenes, split by split. Scene ``i`` depends on the seed and ``i`` alone."""
    held_out = max(1, config.num_images // 10)
    num_train = config.num_images - 2 * held_out
    for i in range(config.num_images):
        split = "train" if i < num_train else "dev" if i < num_train + held_out else "test"
        rng = random.Random(f"{config.seed}-{i}")
        image, captions = _scene(rng, config.image_size)
        yield Sample(f"shapes-{i:06d}.png", image, captions, split)


def _scene(rng: random.Random, side: int) -> tuple[bytes, list[str]]:
    colours = rng.sample(sorted(COLOURS), 2)
    groups = [
        Group(rng.choice((1, 1, 2, 3)), rng.choice(sorted(SIZES)), colour, rng.choice(sorted(SHAPES))) for colour in colours
    ]
    relation = rng.choice(sorted(RELATIONS))
    background = rng.choice(sorted(BACKGROUNDS))
    scale = 4
    canvas = Image.new("RGB", (side * scale, side * scale), BACKGROUNDS[background])
    draw = ImageDraw.Draw(canvas)
    boundary = rng.uniform(0.42, 0.58)
    halves = {
        "left": (0.0, 0.0, boundary, 1.0),
        "right": (boundary, 0.0, 1.0, 1.0),
        "above": (0.0, 0.0, 1.0, boundary),
        "below": (0.0, boundary, 1.0, 1.0),
    }
    for group, place in zip(groups, (relation, OPPOSITE[relation]), strict=True):
        _draw_group(draw, rng, group, halves[place], side * scale)
    buffer = io.BytesIO()
    canvas.resize((side, side), Image.Resampling.LANCZOS).save(buffer, "PNG")
    return buffer.getvalue(), _captions(rng, groups[0], groups[1], relation, background)


def _draw_group(draw, rng: random.Random, group: Group, half: tuple[float, float, float, float], side: int) -> None:
    left, top, right, bottom = half
    wide = right - left > bottom - top
    base = 0.075 if group.size == "small" else 0.125
    length = (right - left if wide else bottom - top) / group.count
    for i in range(group.count):
        radius = base * rng.uniform(0.9, 1.1)
        start = (left if wide else top) + i * length
        along = start + rng.uniform(min(radius, length / 2), max(length - radius, length / 2))
        across_from, across_to = (top, bottom) if wide else (left, right)
        across = rng.uniform(across_from + radius, across_to - radius)
        x, y = (along, across) if wide else (across, along)
        _draw_object(draw, group, x * side, y * side, radius * side, rng.uniform(-0.2, 0.2))


def _draw_object(draw, group: Group, x: float, y: float, radius: float, turn: float) -> None:
    fill = COLOURS[group.colour]
    if group.shape == "circle":
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=fill)
        return
    corners = SHAPES[group.shape]
    radii = [radius * 1.25, radius * 0.5] * corners if group.shape == "star" else [radius * 1.2] * corners
    offset = turn - math.pi / 2 + (math.pi / 4 if group.shape == "square" else 0)
    points = [
        (
            x + r * math.cos(offset + 2 * math.pi * i / len(radii)),
            y + r * math.sin(offset + 2 * math.pi * i / len(radii)),
        )
        for i, r in enumerate(radii)
    ]
    draw.polygon(points, fill=fill)


def _captions(rng: random.Random, first: Group, second: Group, relation: str, background: str) -> list[str]:
    there = rng.choice(RELATIONS[relation])
    back = rng.choice(RELATIONS[OPPOSITE[relation]])
    verb = "is" if first.count == 1 else "are"
    be = "is" if second.count == 1 else "are"
    captions = [
        f"{first.phrase(rng)} {there} {second.phrase(rng)}",
        f"{second.phrase(rng)} {back} {first.phrase(rng)} on a {background} background",
        f"there {verb} {first.phrase(rng)} {there} {second.phrase(rng)}",
        f"{first.phrase(rng, False)} and {second.phrase(rng, False)} on a {background} background",
        f"{second.phrase(rng)} {be} {back} {first.phrase(rng)}",
    ]
    return [caption[0].upper() + caption[1:] + "." for caption in captions]
