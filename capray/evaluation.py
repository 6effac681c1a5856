"""Scoring a captioning output against a Samples table."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

import duckdb

from capray.config import EvaluateConfig
from capray.errors import DataError
from capray.metrics import corpus_bleu
from capray.output import create_view, require_output
from capray.storage import Location, find_parquet, locate
from capray.tables import SAMPLES


@dataclass(frozen=True)
class Evaluation:
    """The figures of a split; ``withheld`` says why there are none."""

    split: str
    images: int
    matched: int
    references: int
    bleu: dict[str, float] | None
    withheld: str | None = None

    def json(self) -> str:
        return json.dumps(asdict(self), indent=1)

    def text(self) -> str:
        lines = [
            f"split {self.split}: {self.matched:,} of {self.images:,} images have a caption; {self.references:,} references"
        ]
        lines += [f"{name.replace('bleu_', 'BLEU-')}: {value:.4f}" for name, value in (self.bleu or {}).items()]
        return "\n".join(lines)


def evaluate(config: EvaluateConfig) -> Evaluation:
    """BLEU-1 … BLEU-4 of the captions of ``config.split``, each image once.

    Figures are withheld when an image of the split has no caption, unless ``allow_partial``.

    Raises:
        ConfigError: no captioning output.
        DataError: no such split, or references that share an id.
    """
    captioned, references = _matched(config)
    matched = [image_id for image_id in references if image_id in captioned]
    num_references = sum(len(references[image_id]) for image_id in matched)
    withheld = None
    if not matched:
        withheld = (
            f"none of the {len(references)} images of split {config.split!r} has a caption in {config.output!r}: "
            "their ids differ if the images were captioned under other names (try --match file_name)"
        )
    elif len(matched) < len(references) and not config.allow_partial:
        withheld = (
            f"{len(references) - len(matched)} of {len(references)} images of split {config.split!r} have no caption, so "
            "figures are withheld: caption them, or give --allow-partial"
        )
    bleu = None
    if withheld is None:
        bleu = corpus_bleu([references[i] for i in matched], [captioned[i] for i in matched])
    return Evaluation(config.split, len(references), len(matched), num_references, bleu, withheld)


def _matched(config: EvaluateConfig) -> tuple[dict[str, str], dict[str, list[str]]]:
    """Captions and references of the split, both by the key they are matched by."""
    samples = locate(config.references)
    files = [Location(entry.uri, samples.fs, entry.path) for entry in find_parquet(config.references)]
    with require_output(config.output).connect(samples) as connection:
        create_view(connection, "samples", files, SAMPLES)
        key = "image_id" if config.match == "image_id" else "regexp_extract(image_id, '[^/]*$')"
        try:
            references = connection.execute(
                f"SELECT {key}, captions FROM samples WHERE split = ? ORDER BY image_id", [config.split]
            ).fetchall()
        except duckdb.BinderException as error:
            raise DataError(f"{config.references!r} is no Samples table: {str(error).splitlines()[0]}") from error
        captions = connection.execute(
            f"SELECT {key}, caption FROM captions WHERE {key} IN (SELECT {key} FROM samples WHERE split = ?)",
            [config.split],
        ).fetchall()
    if not references:
        raise DataError(f"no images in split {config.split!r} of {config.references!r}")
    for rows, where in ((references, config.references), (captions, config.output)):
        keys = [row[0] for row in rows]
        if len(set(keys)) < len(keys):
            raise DataError(
                f"{len(keys) - len(set(keys))} images of {where!r} share a key ({config.match}) with another"
            )
    return dict(captions), dict(references)
