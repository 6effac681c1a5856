"""MLflow, spoken to by the driver alone: workers need neither its address nor its credentials.

A server that does not answer at the start is an error. One that fails later does not stop the training: what it was to
be told waits and is sent when it answers again, in order, by a thread of its own. Knows nothing of models.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tenacity
import yaml

import capray
from capray.config import TrainConfig
from capray.errors import ConfigError
from capray.storage import is_s3, locate
from capray.tracking.registry import describe_mlflow_error, reach, without_credentials

POINTS_PER_REQUEST = 900
"""MLflow takes a thousand."""
PARAMS_PER_REQUEST = 100
MAX_PARAM_LENGTH = 500
"""The shortest limit of the MLflow servers in use."""
SECONDS_BETWEEN_SENDS = 2.0
MAX_SECONDS_BETWEEN_ATTEMPTS = 30.0
ATTEMPTS_WHILE_IT_ANSWERS = 5
MODEL_ID_TAG = "capray.model_id"


@dataclass(frozen=True)
class Points:
    """A point on each of some curves."""

    values: Mapping[str, float]
    step: int
    at_ms: int = field(default_factory=lambda: int(time.time() * 1000))

    def __str__(self) -> str:
        return "points of the curves"

    def send(self, client: Any, run_id: str) -> None:
        _send_points(client, run_id, [self])


@dataclass(frozen=True)
class TextFile:
    """A text among the run's artifacts."""

    path: str
    text: str

    def __str__(self) -> str:
        return f"files in {os.path.dirname(self.path)}" if "/" in self.path else self.path

    def send(self, client: Any, run_id: str) -> None:
        client.log_text(run_id, self.text, self.path)


@dataclass
class Model:
    """A folder in MLflow's model format, logged as a model of the run and registered where a name is given.

    Attributes:
        fill: writes the folder; it gets the id MLflow has given the model.
        model_id: the captioner's own id. What is logged or registered under it already is left as it is.
    """

    name: str
    fill: Callable[[str, str], None]
    model_id: str
    register_as: str | None
    registered: str | None = None
    """The registered version's URI, once there is one."""
    _logged: Any = None

    def __str__(self) -> str:
        return "the captioner"

    def send(self, client: Any, run_id: str) -> None:
        logged = self._known(client, run_id) or self._log(client, run_id)
        if self.register_as is not None:
            version = self._version(client, self.register_as) or client.create_model_version(
                self.register_as,
                logged.artifact_location,
                run_id,
                tags={MODEL_ID_TAG: self.model_id},
                model_id=logged.model_id,
            )
            self.registered = f"models:/{self.register_as}/{version.version}"

    def _known(self, client: Any, run_id: str) -> Any:
        outputs = client.get_run(run_id).outputs
        for output in outputs.model_outputs if outputs else []:
            logged = client.get_logged_model(output.model_id)
            if logged.tags.get(MODEL_ID_TAG) == self.model_id and str(logged.status) == "READY":
                return logged
        return None

    def _log(self, client: Any, run_id: str) -> Any:
        from mlflow.entities import LoggedModelOutput

        if self._logged is None:
            experiment_id = client.get_run(run_id).info.experiment_id
            tags = {MODEL_ID_TAG: self.model_id}
            self._logged = client.create_logged_model(experiment_id, self.name, run_id, tags=tags)
        logged_id = self._logged.model_id
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "model")
            self.fill(path, logged_id)
            client.log_model_artifacts(logged_id, path)
        client.log_outputs(run_id, [LoggedModelOutput(logged_id, step=0)])
        return client.finalize_logged_model(logged_id, "READY")

    def _version(self, client: Any, name: str) -> Any:
        """The version that is this captioner already; the name is created where it is new."""
        from mlflow.exceptions import MlflowException

        try:
            client.create_registered_model(name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        versions = client.search_model_versions(f"name = '{name}'")
        return next((v for v in versions if v.tags.get(MODEL_ID_TAG) == self.model_id), None)


@dataclass(frozen=True)
class _End:
    status: str

    def __str__(self) -> str:
        return "the end of the run"

    def send(self, client: Any, run_id: str) -> None:
        client.set_terminated(run_id, self.status)


Item = Points | TextFile | Model | _End


def _send_points(client: Any, run_id: str, points: list[Points]) -> None:
    from mlflow.entities import Metric

    client.log_batch(run_id, [Metric(name, value, p.at_ms, p.step) for p in points for name, value in p.values.items()])


class Tracker:
    """The MLflow run of a training. ``put`` never waits; without a server all of it does nothing.

    Raises:
        ConfigError: the output is remote and no server is named: a store on it could not be shared.
        StorageError: the server does not answer.
    """

    def __init__(self, config: TrainConfig):
        self._config = config
        self._pending: deque[Item] = deque()
        self._lost: dict[str, int] = {}
        self._refused: set[str] = set()
        self._problem = ""
        self._is_failing = False
        self._wake = threading.Condition()
        self._closing = threading.Event()
        self._thread: threading.Thread | None = None
        self.run_id: str | None = None
        self.uri: str | None = None
        self._say: Callable[[str], None] = lambda line: None
        if config.tracking_uri == "none":
            return
        self.uri = config.tracking_uri or os.environ.get("MLFLOW_TRACKING_URI") or None
        self._artifacts: str | None = None
        if self.uri is None:
            output = locate(config.output)
            if not output.is_local:
                raise ConfigError(f"the remote output {config.output!r} needs --tracking-uri: an MLflow server, or none")
            self.uri = f"sqlite:///{output.join('mlflow.db').path}"
            self._artifacts = output.join("mlartifacts").path
            return
        with self._at_the_start():
            self._client().search_experiments(max_results=1)

    def _at_the_start(self):
        return reach(self.uri, "; or set tracking_uri to 'none'")

    def _client(self) -> Any:
        from mlflow import MlflowClient

        return MlflowClient(self.uri)

    def start(
        self, known_run_id: str | None, parameters: Mapping[str, Any], digest: str, say: Callable[[str], None]
    ) -> None:
        """Create the run, or take up ``known_run_id`` where a resumed training has one that the server knows.

        Raises:
            ConfigError: artifacts cannot be written from here.
            StorageError: the server does not answer.
        """
        if self.uri is None:
            return
        self._say = say
        config = self._config
        with self._at_the_start():
            if self._artifacts is not None:
                os.makedirs(locate(config.output).path, exist_ok=True)
            client = self._client()
            if known_run_id is not None and _take_up(client, known_run_id):
                self.run_id = known_run_id
            else:
                self.run_id = self._create_run(client, parameters, digest)
            check_artifact_store(client.get_run(self.run_id).info.artifact_uri)
        settings = yaml.safe_dump(shown_settings(config), sort_keys=False, allow_unicode=True)
        self.put(TextFile("config.yaml", settings))
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def _create_run(self, client: Any, parameters: Mapping[str, Any], digest: str) -> str:
        from mlflow.entities import Param

        config = self._config
        experiment = client.get_experiment_by_name(config.experiment)
        experiment_id = (
            experiment.experiment_id if experiment else client.create_experiment(config.experiment, self._artifacts)
        )
        name = os.path.basename(locate(config.output).path.rstrip("/"))
        run_id = client.create_run(experiment_id, run_name=name, tags=revision_tags()).info.run_id
        params = [Param(key, _short(str(value))) for key, value in {**shown_settings(config), **parameters}.items()]
        for start in range(0, len(params), PARAMS_PER_REQUEST):
            client.log_batch(run_id, params=params[start : start + PARAMS_PER_REQUEST])
        client.log_inputs(run_id, [_dataset_input(config, digest)])
        return run_id

    def put(self, item: Item) -> None:
        """Have ``item`` sent."""
        if self.run_id is not None:
            with self._wake:
                self._pending.append(item)

    def close(self, status: str) -> None:
        """Send what waits, end the run as FINISHED, FAILED or KILLED, and tell what MLflow lacks, if anything."""
        if self._thread is None:
            return
        self.put(_End(status))
        self._closing.set()
        with self._wake:
            self._wake.notify()
        self._thread.join()
        self._thread = None
        if self._lost:
            lacking = ", ".join(f"{count:,} {name}" if count > 1 else name for name, count in self._lost.items())
            self._say(f"tracking is incomplete: {without_credentials(self.uri)} lacks {lacking} ({self._problem})")

    def _work(self) -> None:
        client = self._client()
        while True:
            with self._wake:
                self._wake.wait_for(self._closing.is_set, SECONDS_BETWEEN_SENDS)
                if self._closing.is_set() and not self._pending:
                    return
            while self._pending:
                items = self._next()
                try:
                    self._retrying(client, items)
                except Exception as error:  # Whatever it is, the training is worth more.
                    self._problem = describe_mlflow_error(error)
                    is_refusal = not _may_pass(error) or self._answers(client)
                    with self._wake:
                        lost = items if is_refusal else list(self._pending)
                        for _ in lost:
                            self._pending.popleft()
                    for item in lost:
                        self._lost[str(item)] = self._lost.get(str(item), 0) + 1
                    if is_refusal and str(items[0]) not in self._refused:
                        self._refused.add(str(items[0]))
                        self._say(f"MLflow refuses {items[0]}: {self._problem}; the training goes on")
                else:
                    with self._wake:
                        for _ in items:
                            self._pending.popleft()
                    if self._is_failing:
                        self._is_failing = False
                        self._say("MLflow answers again")

    def _next(self) -> list[Item]:
        """The first item that waits, and where it is of curves those behind it that go along in one request."""
        with self._wake:
            items: list[Item] = []
            num_points = 0
            for item in self._pending:
                if items and not (isinstance(item, Points) and isinstance(items[0], Points)):
                    break
                num_points += len(item.values) if isinstance(item, Points) else 0
                if items and num_points > POINTS_PER_REQUEST:
                    break
                items.append(item)
            return items

    def _retrying(self, client: Any, items: list[Item]) -> None:
        """Send ``items``, again and again while the fault is one that may pass; once more when the training is over.

        What fails while the server answers to other things is no fault that passes, whatever it is called.
        """

        def send() -> None:
            if isinstance(items[0], Points):
                _send_points(client, self.run_id or "", [item for item in items if isinstance(item, Points)])
            else:
                items[0].send(client, self.run_id or "")

        tenacity.Retrying(
            retry=tenacity.retry_if_exception(_may_pass),
            wait=tenacity.wait_exponential(max=MAX_SECONDS_BETWEEN_ATTEMPTS),
            stop=lambda state: (
                self._closing.is_set() or (state.attempt_number >= ATTEMPTS_WHILE_IT_ANSWERS and self._answers(client))
            ),
            sleep=tenacity.sleep_using_event(self._closing),
            before_sleep=self._tell,
            reraise=True,
        )(send)

    def _answers(self, client: Any) -> bool:
        try:
            client.get_run(self.run_id)
        except Exception:
            return False
        return True

    def _tell(self, state: tenacity.RetryCallState) -> None:
        if not self._is_failing and state.outcome is not None:
            self._is_failing = True
            reason = describe_mlflow_error(state.outcome.exception())
            self._say(f"MLflow fails ({reason}); the training goes on, and what MLflow lacks is sent when it answers")


def _may_pass(error: BaseException) -> bool:
    """Whether the server did not answer or was busy, in contrast to a refusal."""
    from mlflow.exceptions import MlflowException
    from requests import RequestException

    if isinstance(error, MlflowException):
        return error.get_http_status_code() in (408, 429) or error.get_http_status_code() >= 500
    response = getattr(error, "response", None)
    if response is not None:
        return response.status_code in (408, 429) or response.status_code >= 500
    return isinstance(error, (RequestException, OSError))


def _take_up(client: Any, run_id: str) -> bool:
    """Have the run go on; False when the server has none of that id (it may be another server than it was)."""
    from mlflow.exceptions import MlflowException

    try:
        if client.get_run(run_id).info.lifecycle_stage != "active":
            return False
        client.update_run(run_id, status="RUNNING")
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return False
    return True


def check_artifact_store(uri: str) -> None:
    """Raise ConfigError where the server has its clients write artifacts to S3 themselves, and they cannot."""
    if uri.startswith("s3://") and importlib.util.find_spec("boto3") is None:
        raise ConfigError(
            f"the MLflow experiment keeps its artifacts at {without_credentials(uri)}, which needs the package boto3 here: "
            "install s3fs[boto3], or let the server pass artifacts on (mlflow server --serve-artifacts "
            "--artifacts-destination s3://…)"
        )


def shown_settings(config: TrainConfig) -> dict[str, Any]:
    """The settings without the server's address, and without credentials in URIs."""
    settings = config.model_dump(mode="json")
    del settings["tracking_uri"]
    return {name: without_credentials(value) if isinstance(value, str) else value for name, value in settings.items()}


def _short(value: str) -> str:
    """``value``, cut visibly where servers would refuse it; config.yaml has all of it."""
    if len(value) <= MAX_PARAM_LENGTH:
        return value
    note = " … (whole in config.yaml)"
    return value[: MAX_PARAM_LENGTH - len(note)] + note


def _dataset_input(config: TrainConfig, digest: str) -> Any:
    from mlflow.entities import Dataset, DatasetInput, InputTag

    place = locate(config.samples)
    source = json.dumps({"uri": without_credentials(place.uri)})
    name = os.path.basename(place.path.rstrip("/")) or "samples"
    # 36 characters are what MLflow takes; the parameter dataset_digest has all of them.
    data = Dataset(name[:500], digest[:36], "s3" if is_s3(place) else "local", source)
    return DatasetInput(data, [InputTag("mlflow.data.context", "training")])


def revision_tags() -> dict[str, str]:
    """What code it is: capray's version, and the commit where it runs from a git repository that tracks it."""
    tags = {"capray.version": capray.__version__, "mlflow.source.name": "capray train", "mlflow.source.type": "LOCAL"}
    folder = Path(capray.__file__).parent

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(folder), *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", Path(capray.__file__).name)
        tags["mlflow.source.git.commit"] = git("rev-parse", "HEAD")
        tags["capray.uncommitted_changes"] = str(bool(git("status", "--porcelain", "--", "."))).lower()
    except (OSError, subprocess.SubprocessError):
        pass
    return tags
