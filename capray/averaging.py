"""The mean of two captioners' weights."""

from __future__ import annotations

from capray.config import AverageConfig
from capray.errors import ConfigError
from capray.storage import check_empty
from capray.tracking.registry import find_model


def average(config: AverageConfig) -> str:
    """Write the captioner whose weights lie between those of two that come from one training and its next stage, or from
    one stage trained twice; what was written, in words. (Between a stage and the one that was fine-tuned from it: Wortsman
    et al. 2022, "Robust fine-tuning of zero-shot models", section 3.)

    Raises:
        ConfigError: the output is not empty, there is no such model, or the two are of different shapes or words.
        CheckpointError: a model cannot be loaded.
        StorageError: storage that cannot be reached or written.
    """
    from capray.model.checkpoint import load_captioner, save_captioner

    check_empty(config.output)
    (one, _), (other, _) = (load_captioner(find_model(m, config.tracking_uri)) for m in (config.model, config.other))
    differing = [
        f"{name} {value!r} and {getattr(other.architecture, name)!r}"
        for name, value in one.architecture
        if value != getattr(other.architecture, name)
    ]
    if one.vocabulary.words != other.vocabulary.words:
        differing.append("the words they know")
    if differing:
        raise ConfigError(
            f"{config.model!r} and {config.other!r} differ in {', '.join(differing)}: only captioners of one architecture "
            "and vocabulary can be averaged, of which one started from the other or both from the same weights"
        )
    mine, its = one.state_dict(), other.state_dict()
    for name, value in mine.items():
        if value.is_floating_point():
            value.lerp_(its[name], config.share)
    model_id = save_captioner(one, config.output)
    return f"wrote {config.output} (model_id {model_id})"
