"""The whole way on a data set drawn on the spot: train, caption images never seen, evaluate, query.

It checks that the captioner looks at the image: its BLEU-4 must beat the best single caption for all images, and its own
captions dealt to the wrong images, by a clear margin.
"""

from __future__ import annotations

import os
import time
from collections import Counter

from nltk.util import ngrams
from rich.console import Console

from capray.captioning.job import caption
from capray.captioning.photos import caption_photos, photos_in
from capray.config import CaptionConfig, DemoConfig, QueryConfig, TrainConfig
from capray.datasets.samples import read_captions
from capray.datasets.settings import ShapesConfig
from capray.datasets.shapes import prepare_shapes
from capray.errors import CaprayError
from capray.metrics import corpus_bleu
from capray.output import Output
from capray.query.answers import run_query
from capray.storage import check_empty
from capray.training.job import train
from capray.vocabulary import tokenise
from capray.wording import counted

MARGIN = 0.10
"""BLEU-4 by which the captioner must beat what does not look at the image."""
NUM_CONSTANTS_TRIED = 20
NUM_PHOTOS = 12
"""Photos of the user's that are captioned."""

RECIPE = {
    "encoder": "tiny",
    "fine_tune_from": "all",
    "size": 64,
    "attention_dim": 96,
    "embed_dim": 64,
    "hidden_dim": 192,
    "grid_dropout": 0.0,
    "output_dropout": 0.0,
    "label_smoothing": 0.0,
    "doubly_stochastic": 0.0,
    "min_word_count": 2,
    "captions_per_image": "all",
    "batch_size": 80,
    "learning_rate": 2e-3,
    "encoder_learning_rate": 1e-3,
    "epochs": 6,
    "beam_size": 3,
}
"""Training settings that suit drawings and minutes."""


def demo(config: DemoConfig) -> None:
    """Run the demo in ``config.out``.

    Raises:
        ConfigError: the folder is not empty, or that of photos holds none.
        CaprayError: the captioner did not beat its controls by MARGIN.
    """
    console = Console(stderr=True, highlight=False)
    check_empty(config.out)
    if config.photos is not None:
        photos = photos_in(config.photos)
        console.rule("0. caption photos of yours with the captioner that comes with capray")
        caption_photos(photos[:NUM_PHOTOS], CaptionConfig(input=photos[0]))
    started = time.monotonic()
    samples, model, tables = (os.path.join(config.out, name) for name in ("samples", "training", "captions"))

    console.rule("1. draw a captioned data set")
    prepared = prepare_shapes(ShapesConfig(output=samples, num_images=3000, seed=config.seed))
    for split, counts in prepared.splits.items():
        console.print(f"{split}: {counted(counts.images, 'image')}, {counted(counts.captions, 'caption')}")
    console.rule("2. train a captioner")
    result = train(TrainConfig.create(RECIPE, samples=samples, output=model, seed=config.seed))
    console.rule("3. caption images it has never seen")
    summary = caption(
        CaptionConfig(input=samples, output=tables, model=result.best, split="test", beam_size=RECIPE["beam_size"])
    )
    console.print(summary.text())
    console.rule("4. evaluate")
    scores = _scores(samples, tables)
    for name, score in scores.items():
        print(f"BLEU-4 {score:.3f}  {name}")
    console.rule("5. query")
    sql = "SELECT image_id, caption, round(score::DOUBLE, 2) AS score FROM captions ORDER BY image_id LIMIT 5"
    console.print(f'capray query {tables} "{sql}"', soft_wrap=True)
    run_query(QueryConfig(output=tables, sql=sql))
    _say_where(config.out, samples, os.path.join(model, "best"), tables, time.monotonic() - started)
    captioner, *controls = scores.values()
    if any(captioner - control < MARGIN for control in controls):
        raise CaprayError(f"the captioner's BLEU-4 does not beat both controls by {MARGIN:.2f}: it did not learn to look")


def _scores(samples: str, tables: str) -> dict[str, float]:
    """BLEU-4 on the test split: the captioner's, the best constant caption's, and of captions dealt to wrong images."""
    with Output(tables).connect(("captions",)) as connection:
        connection.execute(f"CREATE VIEW samples AS FROM read_parquet('{samples}/test-*.parquet')")
        rows = connection.execute(
            "SELECT caption, captions FROM captions JOIN samples USING (image_id) ORDER BY image_id"
        ).fetchall()
    hypotheses, references = [row[0] for row in rows], [row[1] for row in rows]
    dealt = [*hypotheses[1:], hypotheses[0]]
    constants = _likely_constants(read_captions(samples, "train").captions)
    return {
        "the captioner": _bleu_4(references, hypotheses),
        "the best single caption for all images": max(_bleu_4(references, [c] * len(references)) for c in constants),
        "the captioner's captions dealt to the wrong images": _bleu_4(references, dealt),
    }


def _bleu_4(references: list[list[str]], hypotheses: list[str]) -> float:
    return corpus_bleu(references, hypotheses)["bleu_4"]


def _likely_constants(captions: list[list[str]]) -> list[str]:
    """The training captions whose 4-grams are most common, the best of which is a fair constant."""
    tokens = {caption: tokenise(caption) for image in captions for caption in image}
    counts = Counter(gram for words in tokens.values() for gram in ngrams(words, 4))

    def commonness(caption: str) -> float:
        grams = list(ngrams(tokens[caption], 4))
        return sum(counts[gram] for gram in grams) / max(1, len(grams))

    return sorted(tokens, key=commonness, reverse=True)[:NUM_CONSTANTS_TRIED]


def _say_where(out: str, samples: str, model: str, tables: str, seconds: float) -> None:
    print(
        f"\ndone in {seconds:.0f} s; everything is in {out}:\n"
        f"  {samples}  the images and their reference captions\n"
        f"  {model}  the captioner\n"
        f"  {tables}  the captions\n"
        f"  {os.path.join(out, 'training', 'mlflow.db')}  the training's curves "
        f"(mlflow ui --backend-store-uri sqlite:///{os.path.join(out, 'training', 'mlflow.db')})"
    )
