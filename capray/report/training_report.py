"""The report on a training: its settings, its curves, and what its best captioner says of some images."""

from __future__ import annotations

import json
from typing import Any

from capray.config import ImageLimits, ReportConfig
from capray.datasets.samples import read_captions
from capray.errors import CaprayError, ConfigError
from capray.report.charts import lines
from capray.report.rendering import data_uri, render
from capray.report.training_samples import pick_pictures
from capray.storage import exists, locate, read_bytes, write_atomic
from capray.training_files import HISTORY, SAMPLES, SETTINGS
from capray.wording import counted

CURVES = (
    ("loss", {"train_loss": "training", "val_loss": "validation"}),
    ("reward", {"train_reward": "training"}),
    ("BLEU", {f"bleu_{n}": f"BLEU-{n}" for n in range(1, 5)}),
    ("CIDEr-D", {"cider_d": "CIDEr-D"}),
    (
        "top-5 accuracy",
        {"val_teacher_forced_top5_accuracy": "teacher-forced", "val_free_running_top5_accuracy": "free-running"},
    ),
    ("learning rate", {"learning_rate": "learning rate"}),
)


def report_training(config: ReportConfig) -> str:
    """Write the report on the training in the folder ``config.training`` to ``config.html``; what was written, in a line.

    Raises:
        ConfigError: no training, or one without a finished epoch.
        StorageError: it cannot be read, or the page cannot be written.
    """
    assert config.training is not None
    folder = locate(config.training)
    if not exists(folder.join(SETTINGS)):
        raise ConfigError(f"{config.training!r} holds no training: it has no {SETTINGS} (capray train writes one)")
    if not exists(folder.join(HISTORY)):
        raise ConfigError(f"the training in {config.training!r} has not finished an epoch yet")
    settings = json.loads(read_bytes(folder.join(SETTINGS)))["settings"]
    history = json.loads(read_bytes(folder.join(HISTORY)))
    epochs: list[dict[str, float]] = history["epochs"]
    numbers = [epoch["epoch"] for epoch in epochs]
    samples = json.loads(read_bytes(folder.join(SAMPLES))) if exists(folder.join(SAMPLES)) else []
    pictures, note = _pictures(settings, {sample["image_id"] for sample in samples})
    html = render(
        "training.html",
        title=config.training,
        best=history["best_epoch"],
        epochs=epochs,
        curves=[
            (title, lines({label: [epoch[name] for epoch in epochs] for name, label in curves.items()}, numbers, "epoch"))
            for title, curves in CURVES
            if all(name in epoch for name in curves for epoch in epochs)
        ],
        settings={name: value for name, value in sorted(settings.items()) if value is not None},
        samples=samples,
        pictures=pictures,
        note=note,
    )
    write_atomic(locate(config.html), html.encode())
    return f"wrote {config.html}: {counted(len(epochs), 'epoch')}, {counted(len(samples), 'sample')}"


def _pictures(settings: dict[str, Any], ids: set[str]) -> tuple[dict[str, str], str]:
    """The pictures of ``ids`` by id, as sources of an ``<img>``, and why some are missing."""
    if not ids:
        return {}, ""
    try:
        limits = ImageLimits.create({name: settings[name] for name in ImageLimits.model_fields if name in settings})
        units = read_captions(settings["samples"], settings["validation_split"]).units
        found = pick_pictures(settings["samples"], settings["validation_split"], units, limits)
    except CaprayError as error:
        return {}, f"The pictures cannot be shown: {error}"
    pictures = {name: data_uri(data, "JPEG") for name, data in found.items() if name in ids}
    missing = len(ids - set(pictures))
    return pictures, f"{missing} of the pictures are no longer in {settings['samples']}." if missing else ""
