"""capray: train an image captioner on Ray, caption images by the million, query the captions with SQL.

What programs import stands here. Each name is loaded when it is asked for: ``import capray`` alone loads neither torch nor
Ray.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from capray.captioning.job import caption as caption
    from capray.config import Architecture as Architecture
    from capray.config import CaptionConfig as CaptionConfig
    from capray.config import Decoding as Decoding
    from capray.config import EvaluateConfig as EvaluateConfig
    from capray.config import ExplainConfig as ExplainConfig
    from capray.config import QueryConfig as QueryConfig
    from capray.config import ReportConfig as ReportConfig
    from capray.config import TrainConfig as TrainConfig
    from capray.datasets.flickr8k import prepare_flickr8k as prepare_flickr8k
    from capray.datasets.samples import read_captions as read_captions
    from capray.datasets.samples import read_samples as read_samples
    from capray.datasets.settings import Flickr8kConfig as Flickr8kConfig
    from capray.datasets.settings import ShapesConfig as ShapesConfig
    from capray.datasets.shapes import prepare_shapes as prepare_shapes
    from capray.evaluation import evaluate as evaluate
    from capray.model.captioner import Captioner as Captioner
    from capray.model.checkpoint import load_captioner as load_captioner
    from capray.output import Output as Output
    from capray.query.answers import run_query as run_query
    from capray.report.explanation import explain as explain
    from capray.report.training_report import report_training as report_training
    from capray.training.job import train as train

__version__ = "0.1.0"

_PLACES = {
    "capray.captioning.job": ("caption",),
    "capray.config": (
        "Architecture",
        "CaptionConfig",
        "Decoding",
        "EvaluateConfig",
        "ExplainConfig",
        "QueryConfig",
        "ReportConfig",
        "TrainConfig",
    ),
    "capray.datasets.flickr8k": ("prepare_flickr8k",),
    "capray.datasets.samples": ("read_captions", "read_samples"),
    "capray.datasets.settings": ("Flickr8kConfig", "ShapesConfig"),
    "capray.datasets.shapes": ("prepare_shapes",),
    "capray.evaluation": ("evaluate",),
    "capray.model.captioner": ("Captioner",),
    "capray.model.checkpoint": ("load_captioner",),
    "capray.output": ("Output",),
    "capray.query.answers": ("run_query",),
    "capray.report.explanation": ("explain",),
    "capray.report.training_report": ("report_training",),
    "capray.training.job": ("train",),
}
_MODULES = {name: module for module, names in _PLACES.items() for name in names}
__all__ = sorted(_MODULES)


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
