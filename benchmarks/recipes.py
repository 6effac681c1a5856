"""The parameters of every recipe, counted, beside the published count where there is one.

    uv run python benchmarks/recipes.py

Vocabularies (four special tokens included) are those of Flickr8k's 6,000 training images as `capray train` builds them; for
COCO, which is not at hand, 10,000 is assumed.
"""

from __future__ import annotations

import re
from pathlib import Path

import torch
import yaml
from rich.console import Console
from rich.table import Table

from capray.config import Architecture, TrainConfig
from capray.model.captioner import Captioner
from capray.vocabulary import SPECIAL_TOKENS, Vocabulary

FOLDER = Path(__file__).parents[1] / "jobs" / "recipes"
FLICKR8K_VOCABULARY = {5: 2543, 3: 3491}
"""By min_word_count."""
ASSUMED_VOCABULARY = 10_000
PUBLISHED = {"flickr8k-resnet-free-running": "136,587,749 (depth, widths and vocabulary not stated)"}


def read(name: str) -> TrainConfig:
    """The recipe; a later stage has the architecture of its first."""
    values = yaml.safe_load((FOLDER / f"{name}.yaml").read_text())
    first_name, *later = re.split(r"-stage\d$", name)
    if later:
        first = read(first_name)
        values = {**first.subset(Architecture).model_dump(), **values}
    return TrainConfig.create(values, samples="", output="")


def count(name: str) -> tuple[str, int, int, int]:
    """Encoder, vocabulary size, parameters in all, parameters trained."""
    config = read(name)
    is_flickr8k = name.startswith("flickr8k")
    size = FLICKR8K_VOCABULARY[config.min_word_count] if is_flickr8k else ASSUMED_VOCABULARY
    vocabulary = Vocabulary([str(i) for i in range(size - len(SPECIAL_TOKENS))])
    with torch.device("meta"):
        captioner = Captioner(config.subset(Architecture), vocabulary, fine_tune_from=config.fine_tune_from)
    parameters = list(captioner.parameters())
    trained = sum(p.numel() for p in parameters if p.requires_grad)
    return config.encoder, size, sum(p.numel() for p in parameters), trained


def main() -> None:
    table = Table("recipe", "encoder")
    for column in ("vocabulary", "parameters", "trained"):
        table.add_column(column, justify="right")
    table.add_column("published parameters")
    for path in sorted(FOLDER.glob("*.yaml")):
        encoder, *counts = count(path.stem)
        table.add_row(path.stem, encoder, *(f"{n:,}" for n in counts), PUBLISHED.get(path.stem, ""))
    Console(width=150).print(table)


if __name__ == "__main__":
    main()
