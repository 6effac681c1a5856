"""A real MLflow server on this machine, its store in a folder; it can be stopped and started again."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

from mlflow import MlflowClient

from tests.conftest import free_port


class MlflowServer:
    """``mlflow server`` with an SQLite store, passing artifacts on."""

    def __init__(self, folder: Path):
        self.folder = folder
        port = free_port()
        self.uri = f"http://127.0.0.1:{port}"
        self._command = [sys.executable, "-m", "mlflow", "server", "--host=127.0.0.1", f"--port={port}", "--workers=1"]
        self._command += [f"--backend-store-uri=sqlite:///{folder}/mlflow.db", "--serve-artifacts"]
        self._command += [f"--artifacts-destination={folder}/artifacts"]
        self._server: subprocess.Popen | None = None

    @property
    def client(self) -> MlflowClient:
        return MlflowClient(self.uri)

    def start(self) -> None:
        environment = {**os.environ, "MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        environment.pop("MLFLOW_TRACKING_URI", None)
        log = self.folder / "log"
        with open(log, "a") as file:
            self._server = subprocess.Popen(
                self._command, env=environment, stdout=file, stderr=file, start_new_session=True, cwd=self.folder
            )
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            assert self._server.poll() is None, f"MLflow ended: {log.read_text()[-2000:]}"
            try:
                urllib.request.urlopen(f"{self.uri}/health", timeout=2)
                return
            except OSError:
                time.sleep(0.3)
        raise AssertionError(f"MLflow did not start: {log.read_text()[-2000:]}")

    def stop(self) -> None:
        """Kill the server and its workers, its port being closed behind it."""
        if self._server is not None:
            os.killpg(self._server.pid, signal.SIGKILL)
            self._server.wait()
            self._server = None
