"""A captioner in MLflow's model format, to be logged and registered."""

from __future__ import annotations

import os
import tempfile
import warnings
from collections.abc import Mapping

import capray
from capray.config import Decoding
from capray.model import pyfunc
from capray.tracking.registry import MODEL_DATA


def write_model(folder: str, files: Mapping[str, bytes], decoding: Decoding, logged_model_id: str | None = None) -> None:
    """Write ``files``, a captioner's, to ``folder`` as a model that ``mlflow.pyfunc.load_model`` loads with
    ``capray.model.pyfunc``; ``decoding`` gives the defaults of its parameters.
    """
    import mlflow.pyfunc
    from mlflow.models import Model, ModelSignature
    from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema

    optional = {"required": False}
    types = {bool: DataType.boolean, int: DataType.long, float: DataType.double}
    defaults = decoding.model_dump(exclude={"n_best"})
    signature = ModelSignature(
        Schema([ColSpec(DataType.binary, "image", **optional), ColSpec(DataType.string, "uri", **optional)]),
        Schema(
            [
                ColSpec(DataType.string if name in ("caption", "error") else DataType.double, name, **optional)
                for name in pyfunc.OUTPUTS
            ]
        ),
        ParamSchema([ParamSpec(name, types[type(value)], value) for name, value in defaults.items()]),
    )
    with tempfile.TemporaryDirectory() as temporary:
        data = os.path.join(temporary, os.path.basename(MODEL_DATA))
        os.mkdir(data)
        for name, content in files.items():
            with open(os.path.join(data, name), "wb") as file:
                file.write(content)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # An example of the input is missed: it would be an image.
            mlflow.pyfunc.save_model(
                folder,
                loader_module=pyfunc.__name__,
                data_path=data,
                mlflow_model=Model(model_id=logged_model_id) if logged_model_id else None,
                signature=signature,
                pip_requirements=[f"capray=={capray.__version__}"],
            )
