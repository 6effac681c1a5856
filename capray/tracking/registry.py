"""MLflow servers: asking one, and finding the captioner that ``models:/…`` or ``runs:/…`` names.

Credentials are MLflow's own (``MLFLOW_TRACKING_USERNAME`` …, or in the server's address) and are never shown.
"""

from __future__ import annotations

import atexit
import logging
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

from capray.config import CaptionerSettings, ExplainConfig
from capray.errors import CheckpointError, ConfigError, StorageError
from capray.model.captioner_files import BUILT_IN, FILES, built_in_folder
from capray.storage import list_names, locate

_ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_UV_AUTO_DETECT": "false",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
}
"""How MLflow behaves here, where the environment says nothing else: quiet, taking no lock file of the working folder for
the model's, and giving up a server that does not answer within a minute or so (by itself it takes many)."""

for _name, _value in _ENVIRONMENT.items():
    os.environ.setdefault(_name, _value)

MODEL_DATA = os.path.join("data", "captioner")
"""Where in a folder of MLflow's model format the captioner's files lie."""

_SCHEMES = ("models:/", "runs:/")


def without_credentials(text: str | None) -> str:
    """``text`` without the user and password, the query (which may be a signature) and the fragment of URIs in it."""
    text = re.sub(r"(\w://)[^/\s'\"]*@", r"\1…@", text or "")
    return re.sub(r"(\w://[^\s?#'\"]*)[?#][^\s'\"]*", r"\1?…", text)


def describe_mlflow_error(error: BaseException | None) -> str:
    """An error of MLflow's in a line, without credentials."""
    lines = str(error).splitlines() or [repr(error)]
    connection = re.search(r"(Connection refused|timed out|Name or service not known|Failed to resolve)", str(error))
    return connection.group(1).lower() if connection else without_credentials(lines[0])[:300]


@contextmanager
def reach(uri: str | None, way_out: str = "") -> Generator[None]:
    """Turn what MLflow raises while the server at ``uri`` is asked into a StorageError that says so."""
    from mlflow.exceptions import MlflowException
    from requests import RequestException

    for name in ("mlflow", "alembic", "urllib3.connectionpool"):
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        yield
    except (MlflowException, RequestException) as error:
        raise StorageError(f"MLflow at {without_credentials(uri)!r}: {describe_mlflow_error(error)}{way_out}") from error


def is_registered(model: str) -> bool:
    """Whether MLflow has to be asked where ``model`` is."""
    return model.startswith(_SCHEMES)


def find_model_of(config: CaptionerSettings | ExplainConfig) -> str:
    """``find_model`` of the model of ``config``; one that was not asked for is named on standard error."""
    if "model" not in config.model_fields_set:
        say_model(config.model, "which comes with capray (--model chooses another)")
    return find_model(config.model, config.tracking_uri)


def say_model(model: str, why: str) -> None:
    """Name, on standard error, the captioner that captions although it was not asked for."""
    print(f"captioner: {model}, {why}", file=sys.stderr)


_found: dict[tuple[str, str], str] = {}


def find_model(model: str, tracking_uri: str | None = None) -> str:
    """The folder or URI of the captioner that ``model`` names: itself, or where MLflow is asked, a local copy (kept while
    this process lives) or the place on S3 that the server keeps it in.

    Args:
        model: a folder, a URI of one, ``builtin:NAME``, ``models:/NAME/VERSION``, ``models:/NAME@ALIAS``,
            ``models:/NAME/latest``, ``models:/MODEL_ID`` or ``runs:/RUN_ID/PATH``.
        tracking_uri: the MLflow server; ``MLFLOW_TRACKING_URI`` when not given.

    Raises:
        ConfigError: no server is named, or it has no such model, version, alias or run; none of that name is built in.
        CheckpointError: what is there is no captioner.
        StorageError: the server does not answer.
    """
    if model.startswith(BUILT_IN):
        return built_in_folder(model)
    if not is_registered(model):
        return locate(model).uri
    uri = tracking_uri or os.environ.get("MLFLOW_TRACKING_URI")
    if not uri:
        raise ConfigError(f"{model!r} needs an MLflow server: give --tracking-uri, or set MLFLOW_TRACKING_URI")
    with reach(uri):
        from mlflow import MlflowClient

        client = MlflowClient(uri)
        source = _source_of_run(client, model) if model.startswith("runs:/") else _source_of_model(client, model)
        if source.startswith(("s3://", "s3a://")):
            return _captioner_in(source, model)
        if (uri, source) not in _found:
            _found[uri, source] = _download(uri, source, model)
        return _found[uri, source]


def _source_of_run(client: Any, model: str) -> str:
    run_id, _, path = model.removeprefix("runs:/").strip("/").partition("/")
    if not path:
        raise ConfigError(f"{model!r} names no model: runs:/RUN_ID/PATH, where PATH is captioner for capray's own runs")
    run = _known(lambda: client.get_run(run_id), f"{model!r}: no run {run_id!r}")
    for output in run.outputs.model_outputs if run.outputs else ():
        logged = client.get_logged_model(output.model_id)
        if logged.name == path and str(logged.status) == "READY":
            return logged.artifact_location
    if not any(True for _ in client.list_artifacts(run_id, path)):
        raise ConfigError(f"{model!r}: run {run_id!r} has no model and no artifacts of the name {path!r}")
    return f"{run.info.artifact_uri.rstrip('/')}/{path}"


def _source_of_model(client: Any, model: str) -> str:
    name, _, version = model.removeprefix("models:/").strip("/").partition("/")
    if not version and "@" not in name:
        if name.startswith("m-"):
            return _known(lambda: client.get_logged_model(name), f"no logged model {name!r}").artifact_location
        raise ConfigError(f"{model!r} names no version: models:/{name}/1, models:/{name}/latest or models:/{name}@ALIAS")
    alias = ""
    if not version:
        name, alias = name.rsplit("@", 1)
    registered = _known(lambda: client.get_registered_model(name), f"{model!r}: no registered model {name!r}")
    if alias:
        aliases = registered.aliases
        if alias not in aliases:
            known = ", ".join(sorted(aliases)) or "none"
            raise ConfigError(f"{model!r}: model {name!r} has no alias {alias!r}; its aliases: {known}")
        version = str(aliases[alias])
    versions = sorted(int(found.version) for found in client.search_model_versions(f"name = '{name}'"))
    if version == "latest" and versions:
        version = str(versions[-1])
    if version not in map(str, versions):
        known = ", ".join(map(str, versions[-10:])) or "none"
        raise ConfigError(f"{model!r}: model {name!r} has no version {version!r}; its latest: {known}")
    return client.get_model_version_download_uri(name, version)


def _known(ask: Any, unknown: str) -> Any:
    from mlflow.exceptions import MlflowException

    try:
        return ask()
    except MlflowException as error:
        if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE", "NOT_FOUND"):
            raise
        raise ConfigError(f"{unknown} on the MLflow server") from error


def _download(uri: str, source: str, model: str) -> str:
    from mlflow.artifacts import download_artifacts

    folder = tempfile.mkdtemp(prefix="capray-model-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return _captioner_in(download_artifacts(artifact_uri=source, dst_path=folder, tracking_uri=uri), model)


def _captioner_in(place: str, model: str) -> str:
    """The captioner's folder in a model of MLflow's, or among a run's artifacts."""
    for folder in (locate(place).join(MODEL_DATA), locate(place)):
        if set(FILES) <= set(list_names(folder)):
            return folder.uri
    raise CheckpointError(f"{model!r} is no captioner of capray's: it has no {', '.join(FILES)}")
