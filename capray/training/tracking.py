"""MLflow: the driver creates the run, rank 0 joins it, the driver ends it. Knows nothing of models."""

from __future__ import annotations

import json
import logging
import os
import re
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from capray.config import TrainConfig
from capray.errors import ConfigError, StorageError
from capray.storage import locate

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")


@dataclass(frozen=True)
class Run:
    """An MLflow run that can be joined from another process; all methods do nothing when tracking is off."""

    tracking_uri: str | None
    run_id: str | None

    def _client(self):
        from mlflow import MlflowClient

        return MlflowClient(self.tracking_uri)

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        if self.run_id is None:
            return
        from mlflow.entities import Metric
        from mlflow.utils.time import get_current_time_millis

        now = get_current_time_millis()
        self._client().log_batch(self.run_id, [Metric(key, value, now, step) for key, value in metrics.items()])

    def log_json(self, value: Any, path: str) -> None:
        if self.run_id is not None:
            self._client().log_text(self.run_id, json.dumps(value, indent=1, ensure_ascii=False), path)

    def log_files(self, files: Mapping[str, bytes], folder: str) -> None:
        if self.run_id is None:
            return
        with tempfile.TemporaryDirectory() as temporary:
            for name, data in files.items():
                with open(os.path.join(temporary, name), "wb") as file:
                    file.write(data)
            self._client().log_artifacts(self.run_id, temporary, folder)

    def end(self, status: str) -> None:
        """End the run as FINISHED, FAILED or KILLED."""
        if self.run_id is not None:
            self._client().set_terminated(self.run_id, status)

    def to_dict(self) -> dict[str, str | None]:
        return asdict(self)


def start_run(config: TrainConfig, known_run_id: str | None, parameters: Mapping[str, Any]) -> Run:
    """Create the MLflow run of a training, or take up ``known_run_id`` where a resumed training has one.

    Raises:
        ConfigError: the output is remote and no server is named: a store on it could not be shared.
        StorageError: the tracking server does not answer.
    """
    if config.tracking_uri == "none":
        return Run(None, None)
    output = locate(config.output)
    uri, artifacts = config.tracking_uri, None
    if uri is None:
        if not output.is_local:
            raise ConfigError(
                f"tracking_uri is needed with the remote output {config.output!r}: name an MLflow server, or 'none'"
            )
        os.makedirs(output.path, exist_ok=True)
        uri = f"sqlite:///{output.join('mlflow.db').path}"
        artifacts = output.join("mlartifacts").path
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)
    try:
        client = MlflowClient(uri)
        if known_run_id is not None:
            client.update_run(known_run_id, status="RUNNING")
            return Run(uri, known_run_id)
        experiment = client.get_experiment_by_name(config.experiment)
        experiment_id = (
            experiment.experiment_id if experiment else client.create_experiment(config.experiment, artifacts)
        )
        run = client.create_run(experiment_id, run_name=os.path.basename(output.path.rstrip("/")))
        for name, value in parameters.items():
            client.log_param(run.info.run_id, name, str(value)[:500])
        return Run(uri, run.info.run_id)
    except MlflowException as error:
        shown = re.sub(r"//[^/@]*@", "//…@", f"MLflow at {uri!r}: {str(error).splitlines()[0]}")
        raise StorageError(f"{shown}; or set tracking_uri to 'none'") from error
