"""Joining a Ray cluster, or starting Ray on this machine, and sharing out its CPUs and GPUs.

The driver asks Ray what the cluster has and never looks at devices itself.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager

from capray.errors import CaprayError, ConfigError

# Under `uv run` Ray would rebuild the environment for its workers; the one this process runs in is there already.
os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")


_started_here = False
"""Whether this process started the Ray it uses."""


def local_cores() -> int:
    """The cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def connect() -> None:
    """Use the Ray this process is connected to, or the cluster named by RAY_ADDRESS, or start Ray here.

    Ray started here declares one CPU more than there are cores: reading waits on storage more than it computes, and
    must find room beside workers that take a core each.

    Raises:
        CaprayError: the cluster of RAY_ADDRESS does not answer.
    """
    import logging
    import warnings

    import ray
    import ray.data

    # A few images keep one actor busy: no fault of the user's.
    warnings.filterwarnings("ignore", "The minimum number of concurrent actors", UserWarning)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.raise_original_map_exception = True  # for own_error
    for name in ("ray.data", "ray.train"):
        logging.getLogger(name).setLevel(logging.ERROR)
    if not ray.is_initialized():
        with _keeping_signal_handlers():
            _init()


@contextmanager
def _keeping_signal_handlers() -> Generator[None]:
    """Ray puts handlers of its own in place, under which SIGTERM aborts the process."""
    numbers = (signal.SIGINT, signal.SIGTERM)
    is_main = threading.current_thread() is threading.main_thread()
    handlers = {number: signal.getsignal(number) for number in numbers} if is_main else {}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _init() -> None:
    import logging

    import ray

    address = os.environ.get("RAY_ADDRESS")
    if address:
        try:
            ray.init(address=address, logging_level=logging.WARNING)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise CaprayError(
                f"no Ray cluster at RAY_ADDRESS={address}: {error}; unset it to run here, or check the address and the "
                "token (RAY_AUTH_TOKEN_PATH)"
            ) from error
        return
    # Ray's own daemons would write to this terminal of things that are no fault (ray-project/ray#53727).
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    global _started_here
    _started_here = True
    ray.init(
        address="local",
        num_cpus=local_cores() + 1,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
    )


def own_error(error: BaseException) -> CaprayError | None:
    """The error of ours that Ray has wrapped in ``error``, as it was raised; None when there is none."""
    found, wrapped = None, error
    while wrapped is not None:
        found = wrapped if isinstance(wrapped, CaprayError) else found
        wrapped = getattr(wrapped, "cause", None) or wrapped.__cause__
    return found


def is_port_taken(host: str, port: int) -> bool:
    """Whether somebody listens at ``port`` of this machine's ``host``."""
    import socket

    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return True
    return False


def cluster_resources() -> tuple[float, float]:
    """CPUs and GPUs of the cluster."""
    import ray

    resources = ray.cluster_resources()
    return resources.get("CPU", 0.0), resources.get("GPU", 0.0)


def gpus_each(wanted: float | None) -> float:
    """GPUs of each worker or replica: as ``wanted``; when that is None, 1 if the cluster has any."""
    return wanted if wanted is not None else float(cluster_resources()[1] > 0)


def resolved_precision(wanted: str, on_gpu: bool) -> str:
    """``wanted``, where `auto` is bf16 on GPUs and fp32 on CPUs."""
    if wanted != "auto":
        return wanted
    return "bf16" if on_gpu else "fp32"


def task_attempt() -> int:
    """How often the task that runs here was started before, because its process died (Ray tells it by no public name)."""
    from ray._private.worker import global_worker

    return global_worker.core_worker.get_current_task_attempt_number()  # ty: ignore[missing-attribute]


def share_cpus(
    num_workers: int, cpus_per_worker: float | None, gpus_per_worker: float, say: Callable[[str], None]
) -> float:
    """CPUs for each of ``num_workers``, one CPU being left to reading.

    A cluster may grow, so one that is too small now is only spoken of; Ray started here cannot.

    Raises:
        ConfigError: Ray was started here, and this machine cannot hold the workers and still read.
    """
    cpus, gpus = cluster_resources()
    if cpus_per_worker is None:
        cpus_per_worker = 1.0 if gpus_per_worker else float(max(1, int(cpus - 1) // num_workers))
    for kind, wanted, available in (
        ("CPUs", num_workers * cpus_per_worker + 1, cpus),
        ("GPUs", num_workers * gpus_per_worker, gpus),
    ):
        if wanted <= available:
            continue
        shortage = f"{num_workers} workers and reading want {wanted:g} {kind}, and there are {available:g}"
        if _started_here:
            raise ConfigError(f"{shortage}: use fewer workers, or less for each (0 GPUs run on CPUs)")
        say(f"{shortage} now: waiting for the cluster to grow")
    return cpus_per_worker
