"""The files in a training's output folder beside its captioners ``best`` and ``last``."""

SETTINGS = "training.json"
"""The settings given, and the run in MLflow."""
HISTORY = "history.json"
"""The best epoch and the metrics of every epoch."""
SAMPLES = "samples.json"
"""Captions of a few validation images at the best epoch, with their references."""
