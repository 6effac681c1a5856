"""Where a training starts: a new captioner, or one that was trained before. Knows nothing of Ray."""

from __future__ import annotations

import torch

from capray.config import Architecture, Preprocessing, TrainConfig, flag_of
from capray.errors import ConfigError
from capray.model.captioner import Captioner
from capray.model.checkpoint import load_captioner
from capray.model.word_vectors import WordVectors
from capray.tracking.registry import find_model
from capray.vocabulary import Vocabulary

MAY_DIFFER = {*Preprocessing.model_fields, "pool_grid", "grid_dropout", "output_dropout"}
"""Settings of the architecture that trained weights can do without."""


Weights = dict[str, torch.Tensor]


def adopt_captioner(config: TrainConfig) -> tuple[TrainConfig, Vocabulary, Weights]:
    """The settings with the architecture of the captioner ``config.init_from`` where none is given, its vocabulary, and its
    weights.

    Raises:
        CheckpointError: it is no captioner.
        ConfigError: settings were given that its weights do not fit, or MLflow knows no such model.
    """
    assert config.init_from is not None, "there is no captioner to adopt"
    captioner, _ = load_captioner(
        find_model(config.init_from, None if config.tracking_uri == "none" else config.tracking_uri)
    )
    given, architecture = config.model_fields_set, captioner.architecture
    for name in Architecture.model_fields:
        wanted, found = getattr(config, name), getattr(architecture, name)
        if name in given and name not in MAY_DIFFER and wanted != found:
            raise ConfigError(
                f"{flag_of(name)} {wanted!r} does not fit the captioner {config.init_from!r}, which has {found!r}"
            )
    adopted = {name: getattr(architecture, name) for name in Architecture.model_fields if name not in given}
    return TrainConfig.create(config.model_dump(), **adopted), captioner.vocabulary, captioner.state_dict()


def build_captioner(
    config: TrainConfig, vocabulary: Vocabulary, word_vectors: WordVectors | None, weights: Weights | None
) -> Captioner:
    """The captioner as it starts, with ``weights`` if it was trained before, what is not trained frozen.

    Raises:
        ConfigError, CheckpointError: as Captioner does.
    """
    captioner = Captioner(config.subset(Architecture), vocabulary, config.weights, config.fine_tune_from)
    embedding = captioner.decoder.embedding
    if weights is not None:
        captioner.load_state_dict(weights)
    if word_vectors is not None:
        with torch.no_grad():
            embedding.weight[torch.from_numpy(word_vectors.ids_N)] = torch.from_numpy(word_vectors.vectors_NE)
    embedding.requires_grad_(not config.freeze_word_vectors)
    return captioner
