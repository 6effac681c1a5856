"""Scoring a captioning output against a Samples table, and how well the captioner predicts the references there."""

from __future__ import annotations

import io
import json
import sys
from dataclasses import asdict, dataclass, field
from typing import NamedTuple, get_args

import duckdb
import numpy as np
from rich.console import Console
from rich.table import Table

from capray.config import EvaluateConfig, ImageLimits, MetricName
from capray.datasets.samples import read_samples
from capray.errors import ConfigError, DataError
from capray.metrics import (
    REFERENCE_METRICS,
    Corpus,
    Figure,
    Statistics,
    bootstrap,
    distinct_captions,
    mean_length,
    mean_of,
    novel_captions,
    paired_bootstrap,
    vocabulary_used,
)
from capray.output import create_view, require_output
from capray.progress import ProgressDisplay
from capray.storage import Location, find_parquet, locate
from capray.tables import SAMPLES
from capray.vocabulary import tokenise

IMAGES_PER_BATCH = 32
ALL_METRICS: tuple[MetricName, ...] = get_args(MetricName)
LABELS = {
    **{f"bleu_{n}": f"BLEU-{n}" for n in range(1, 5)},
    "rouge_l": "ROUGE-L",
    "cider_d": "CIDEr-D",
    "meteor": "METEOR 1.5",
    "meteor_nltk": "METEOR (NLTK)",
    "mean_length": "words per caption",
    "vocabulary_used": "different words",
    "distinct_captions": "distinct captions",
    "novel_captions": "novel captions",
    "same_captions": "same as the baseline's",
    "perplexity": "perplexity",
    "teacher_forced_top5_accuracy": "top-5 accuracy, teacher-forced",
    "free_running_top5_accuracy": "top-5 accuracy, free-running",
}


@dataclass
class Evaluation:
    """The figures of a split by name, and what they have over the baseline's; ``withheld`` says why there are none,
    ``left_out`` why some are missing."""

    split: str
    images: int
    matched: int
    references: int
    figures: dict[str, Figure] = field(default_factory=dict)
    differences: dict[str, Figure] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)
    withheld: str | None = None

    def json(self) -> str:
        return json.dumps(asdict(self), indent=1)

    def text(self) -> str:
        stream = io.StringIO()
        console = Console(file=stream, width=160, highlight=False, markup=False, emoji=False, soft_wrap=True)
        console.print(
            f"split {self.split}: {self.matched:,} of {self.images:,} images have a caption; {self.references:,} references"
        )
        if self.figures:
            table = Table("figure")
            for kind in ("value", "over the baseline") if self.differences else ("value",):
                table.add_column(kind, justify="right")
                table.add_column("95 % interval", justify="right")
            for name, figure in self.figures.items():
                cells = [_plain(figure.value), _interval(figure)]
                if name in self.differences:
                    cells += [f"{self.differences[name].value:+.4f}", _interval(self.differences[name])]
                table.add_row(LABELS[name], *cells)
            console.print(table)
        for line in (*self.notes, *(f"left out: {LABELS[name]}: {reason}" for name, reason in self.left_out.items())):
            console.print(line)
        return stream.getvalue().rstrip("\n")


def _plain(value: float | None) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.4f}"


def _interval(figure: Figure) -> str:
    return "" if figure.low is None else f"{_plain(figure.low)} – {_plain(figure.high)}"


def evaluate(config: EvaluateConfig) -> Evaluation:
    """The figures of the captions of ``config.split``, each image once, and of the captioner where one is given.

    Figures are withheld when an image of the split has no caption, unless ``allow_partial``.

    Raises:
        ConfigError: no captioning output; a metric named that this machine cannot compute; a captioner that is not the one
            whose captions these are.
        DataError: no such split, an image without references, references that share an id.
        CheckpointError: the captioner cannot be loaded.
    """
    texts = _read(config)
    matched = [image_id for image_id in texts.references if all(image_id in of.captions for of in texts.outputs)]
    evaluation = Evaluation(
        config.split,
        images=len(texts.references),
        matched=len(matched),
        references=sum(len(texts.references[image_id]) for image_id in matched),
        withheld=_why_withheld(config, len(matched), len(texts.references)),
    )
    if evaluation.withheld is not None:
        return evaluation
    references = [texts.references[i] for i in matched]
    corpora = [Corpus.of(references, [of.captions[i] for i in matched]) for of in texts.outputs]
    _score(corpora, config, texts.training, evaluation)
    if config.model is not None:
        _score_captioner(config, config.model, texts.outputs[0].model_ids, evaluation)
    if config.resamples:
        evaluation.notes.append(f"intervals: bootstrap over images, {config.resamples:,} resamples, seed {config.seed}")
    return evaluation


def _why_withheld(config: EvaluateConfig, num_matched: int, num_images: int) -> str | None:
    outputs = repr(config.output) if config.baseline is None else f"both {config.output!r} and {config.baseline!r}"
    if not num_matched:
        return (
            f"none of the {num_images} images of split {config.split!r} has a caption in {outputs}: "
            "their ids differ if the images were captioned under other names (try --match file_name)"
        )
    if num_matched < num_images and not config.allow_partial:
        return (
            f"{num_images - num_matched} of {num_images} images of split {config.split!r} have no caption in {outputs}, "
            "so figures are withheld: caption them, or give --allow-partial"
        )
    return None


def _score(corpora: list[Corpus], config: EvaluateConfig, training: list[str], evaluation: Evaluation) -> None:
    """Add the figures of the captions; with those of a baseline behind them, what the first have over them."""
    corpus, *others = corpora
    statistics = _statistics(corpus, config, training, evaluation)
    evaluation.figures.update(bootstrap(statistics, config.resamples, config.seed))
    for other in others:
        baseline = _statistics(other, config, training, evaluation)
        evaluation.differences.update(paired_bootstrap(statistics, baseline, config.resamples, config.seed))
        same = mean_of(
            "same_captions", [ours == theirs for ours, theirs in zip(corpus.hypotheses, other.hypotheses, strict=True)]
        )
        evaluation.figures.update(bootstrap([same], config.resamples, config.seed))
    if "diversity" in (config.metrics or ALL_METRICS):
        evaluation.figures["distinct_captions"] = Figure(distinct_captions(corpus.hypotheses))
        evaluation.figures["vocabulary_used"] = Figure(vocabulary_used(corpus.hypotheses))
    if "cider_d" in evaluation.figures:
        evaluation.notes.append(f"CIDEr-D: idf from the references of these {len(corpus.references):,} images")


def _statistics(corpus: Corpus, config: EvaluateConfig, training: list[str], evaluation: Evaluation) -> list[Statistics]:
    """Of the metrics that are wanted and can be computed; the others are noted as left out."""
    wanted = config.metrics or ALL_METRICS
    statistics: list[Statistics] = []
    for name in [name for name in REFERENCE_METRICS if name in wanted]:
        try:
            statistics.append(REFERENCE_METRICS[name](corpus))
        except ConfigError as error:
            if config.metrics is not None:
                raise
            evaluation.left_out[name] = str(error)
    if "diversity" in wanted:
        statistics.append(mean_length(corpus.hypotheses))
        if training:
            statistics.append(novel_captions(corpus.hypotheses, [tokenise(caption) for caption in training]))
        else:
            reason = f"{config.references!r} has no captions in split {config.train_split!r} (--train-split)"
            if config.metrics is not None:
                raise DataError(f"novel captions: {reason}")
            evaluation.left_out["novel_captions"] = reason
    return statistics


def _score_captioner(config: EvaluateConfig, model: str, model_ids: set[str], evaluation: Evaluation) -> None:
    """Add the perplexity and top-5 accuracies of the captioner in ``model`` over the split, read as a stream."""
    import torch

    from capray.images import ImageError, load
    from capray.inference import Inference
    from capray.model.accuracy import accuracy_figures, accuracy_sums
    from capray.model.loss import collate
    from capray.tracking.registry import find_model

    folder = find_model(model, config.tracking_uri)
    inference = Inference.load(folder)
    captioner, model_id = inference.captioner, inference.model_id
    if model_ids != {model_id}:
        raise ConfigError(
            f"the captions in {config.output!r} are by {', '.join(sorted(model_ids))}, not by {model!r} ({model_id}): "
            "give the captioner they are by, or none"
        )
    limits = config.subset(ImageLimits)
    sums: list[np.ndarray] = []
    undecodable = 0
    with ProgressDisplay("perplexity and accuracy", evaluation.images) as progress:
        for samples in read_samples(config.references, config.split, IMAGES_PER_BATCH):
            pixels, captions = [], []
            for sample in samples:
                try:
                    pixels.append(load(sample.image, captioner.architecture, limits)[0])
                except ImageError:
                    undecodable += 1
                    continue
                captions.append([captioner.vocabulary.encode(tokenise(caption)) for caption in sample.captions])
            if pixels:
                batch = collate(captions, max_words=sys.maxsize).to(captioner.device)
                with torch.inference_mode():
                    memory = inference.memory(pixels)
                    sums.append(torch.stack(accuracy_sums(captioner, memory, batch), 1).cpu().numpy())
            num_images = sum(map(len, sums))
            progress.update(num_images + undecodable, f"{num_images:,} images")
    if not sums:
        raise DataError(f"no image of split {config.split!r} of {config.references!r} can be decoded")
    statistics = Statistics(np.concatenate(sums), accuracy_figures)
    evaluation.figures.update(bootstrap([statistics], config.resamples, config.seed))
    evaluation.notes.append(f"perplexity and accuracy: captioner {model_id[:12]} over {num_images:,} images, <end> included")
    if undecodable:
        evaluation.notes.append(f"{undecodable:,} images cannot be decoded and are not among those")


class _Captions(NamedTuple):
    """The captions of an output of the split's images, by the key they are matched by; and who wrote them."""

    captions: dict[str, str]
    model_ids: set[str]


class _Texts(NamedTuple):
    """The captions of the output and of the baseline's, where there is one; the references by the same key; and the training
    split's captions, where they are wanted."""

    outputs: list[_Captions]
    references: dict[str, list[str]]
    training: list[str]


def _read(config: EvaluateConfig) -> _Texts:
    samples = locate(config.references)
    files = [Location(entry.uri, samples.fs, entry.path) for entry in find_parquet(config.references)]
    key = "image_id" if config.match == "image_id" else "regexp_extract(image_id, '[^/]*$')"
    outputs = []
    for place in (config.output, *filter(None, [config.baseline])):
        with require_output(place).connect(("captions",), samples) as connection:
            create_view(connection, "samples", files, SAMPLES)
            if not outputs:
                references, training = _read_samples(connection, key, config)
            rows = connection.execute(
                f"SELECT {key}, caption, model_id FROM captions WHERE {key} IN (SELECT {key} FROM samples WHERE split = ?)",
                [config.split],
            ).fetchall()
        captions = _by_key([(key, caption) for key, caption, _ in rows], place, config)
        outputs.append(_Captions(captions, {model_id for _, _, model_id in rows}))
    return _Texts(outputs, references, training)


def _read_samples(
    connection: duckdb.DuckDBPyConnection, key: str, config: EvaluateConfig
) -> tuple[dict[str, list[str]], list[str]]:
    try:
        references = connection.execute(
            f"SELECT {key}, captions FROM samples WHERE split = ? ORDER BY image_id", [config.split]
        ).fetchall()
    except duckdb.BinderException as error:
        raise DataError(f"{config.references!r} is no Samples table: {str(error).splitlines()[0]}") from error
    if not references:
        raise DataError(f"no images in split {config.split!r} of {config.references!r}")
    for image_id, texts in references:
        if not texts or None in texts:
            raise DataError(
                f"image {image_id!r} of {config.references!r} has {'a null' if texts else 'no'} reference caption"
            )
    training = []
    if "diversity" in (config.metrics or ALL_METRICS):
        training = connection.execute(
            "SELECT DISTINCT unnest(captions) FROM samples WHERE split = ?", [config.train_split]
        ).fetchall()
    return (
        _by_key(references, config.references, config),
        [caption for (caption,) in training if caption is not None],
    )


def _by_key(rows: list[tuple], place: str, config: EvaluateConfig) -> dict:
    found = dict(rows)
    if len(found) < len(rows):
        raise DataError(f"{len(rows) - len(found)} images of {place!r} share a key ({config.match}) with another")
    return found
