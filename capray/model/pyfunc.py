"""A captioner as MLflow's python_function: the module its models name as their loader. Knows nothing of MLflow.

A model of this flavour holds the captioner's three files and the name of this module, nothing pickled.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from capray.config import Decoding, ImageLimits
from capray.errors import CaprayError, DataError
from capray.images import ImageError, load
from capray.inference import Inference
from capray.storage import locate, read_bytes

if TYPE_CHECKING:
    import pandas as pd

INPUTS = ("image", "uri")
OUTPUTS = ("caption", "log_prob", "score", "error")
BATCH_SIZE = 64


class CaptioningFunction:
    """``predict``: a data frame of images in, a data frame of captions out, on a GPU where there is one."""

    def __init__(self, inference: Inference):
        self.inference = inference

    def predict(self, model_input: pd.DataFrame, params: Mapping[str, Any] | None = None) -> pd.DataFrame:
        """Caption the images of ``model_input``, one per row.

        Args:
            model_input: a column ``image`` of encoded bytes (base64 in a request to a model server, which MLflow decodes
                by the signature), or ``uri`` of paths and URIs that this process can read; a row has one of the two.
            params: settings of Decoding.

        Returns:
            Under the same index ``caption``, ``log_prob`` (natural, summed over tokens) and ``score`` (after length
            normalisation); in ``error`` why an image has none.

        Raises:
            ConfigError: a parameter that is none of Decoding's, or out of its range.
            DataError: neither column is there.
        """
        import pandas as pd

        if not set(INPUTS) & set(model_input.columns):
            raise DataError(f"no column {' or '.join(map(repr, INPUTS))} among {list(model_input.columns)}")
        decoding = Decoding.create({"n_best": 1, **{k: v for k, v in (params or {}).items() if v is not None}})
        rows = [dict.fromkeys(OUTPUTS) for _ in range(len(model_input))]
        inputs = model_input.reindex(columns=list(INPUTS)).astype(object).to_dict("records")
        for start in range(0, len(rows), BATCH_SIZE):
            self._predict(inputs[start : start + BATCH_SIZE], rows[start : start + BATCH_SIZE], decoding)
        return pd.DataFrame(rows, columns=list(OUTPUTS), index=model_input.index)

    def _predict(self, inputs: list[dict[str, Any]], rows: list[dict[str, Any]], decoding: Decoding) -> None:
        pixels, wanted = [], []
        for image, row in zip(inputs, rows, strict=True):
            try:
                pixels.append(load(_read(image), self.inference.captioner.architecture, ImageLimits())[0])
                wanted.append(row)
            except (ImageError, CaprayError) as error:
                row["error"] = str(error)
        if not pixels:
            return
        for row, outcome in zip(wanted, self.inference(pixels, decoding), strict=True):
            if outcome.hypotheses:
                best = outcome.hypotheses[0]
                row |= {"caption": best.caption, "log_prob": best.log_prob, "score": best.score}
            else:
                row["error"] = outcome.error


def _read(row: dict[str, Any]) -> bytes:
    image, uri = (row[name] for name in INPUTS)
    if isinstance(image, (bytes, bytearray, memoryview)):
        data = bytes(image)
    elif isinstance(uri, str) and uri:
        data = read_bytes(locate(uri))
    else:
        raise DataError("neither image bytes nor a URI")
    if len(data) > ImageLimits().max_image_bytes:
        raise DataError(f"{len(data):,} bytes are more than {ImageLimits().max_image_bytes:,}")
    return data


def _load_pyfunc(data_path: str) -> CaptioningFunction:
    """What MLflow calls with the captioner's folder."""
    return CaptioningFunction(Inference.load(data_path))
