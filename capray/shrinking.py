"""A captioner in half the space."""

from __future__ import annotations

from capray.config import ShrinkConfig
from capray.model.captioner_files import WEIGHTS
from capray.storage import check_empty, locate, read_bytes
from capray.tracking.registry import find_model


def shrink(config: ShrinkConfig) -> str:
    """Copy a captioner with its weights in float16; what was written, in words.

    Raises:
        ConfigError: the output is not empty, or there is no such model.
        CheckpointError: the model cannot be loaded, or a weight is too large for float16.
        StorageError: storage that cannot be reached or written.
    """
    from capray.model.checkpoint import load_captioner, save_captioner

    check_empty(config.output)
    captioner, _ = load_captioner(find_model(config.model, config.tracking_uri))
    model_id = save_captioner(captioner, config.output, half=True)
    size = len(read_bytes(locate(config.output).join(WEIGHTS)))
    return f"wrote {config.output} (model_id {model_id}), {size / 1e6:.1f} MB"
