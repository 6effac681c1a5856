"""Joining a Ray cluster, or starting Ray on this machine, and sharing out its CPUs and GPUs.

The driver asks Ray what the cluster has and never looks at devices itself.
"""

from __future__ import annotations

import ctypes
import os
import secrets
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress

from capray.errors import CaprayError, ConfigError

# Under `uv run` Ray would rebuild the environment for its workers; the one this process runs in is there already.
os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")

_NAMESPACE = "capray"
"""Of what is kept in the cluster's key-value store."""

_ASKING_SECONDS = 60.0
"""How long nodes are asked what their CPUs can."""

CPU_FLAGS = "/proc/cpuinfo"

_started_here = False
"""Whether this process started the Ray it uses."""


def local_cores() -> int:
    """The cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def end_with_raylet() -> None:
    """Have the kernel kill this process, one of Ray's, when the raylet that started it ends. Ray's own way has left
    processes hanging in their shutdown, with all their memory. Does nothing but on Linux."""
    if not sys.platform.startswith("linux") or os.environ.get("RAY_RAYLET_PID") != str(os.getppid()):
        return
    set_parent_death_signal = 1  # PR_SET_PDEATHSIG of prctl(2)
    ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)


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
    warnings.filterwarnings("ignore", "The m(in|ax)imum number of concurrent (actors|tasks)", UserWarning)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.raise_original_map_exception = True  # for own_error
    for name in ("ray.data", "ray.train"):
        logging.getLogger(name).setLevel(logging.ERROR)
    logging.getLogger("ray.data.exceptions").setLevel(logging.CRITICAL)  # Tracebacks of what is raised here anyhow.
    if not ray.is_initialized():
        with _signals_wait():
            _init()


@contextmanager
def _signals_wait() -> Generator[None]:
    """Ctrl-C and SIGTERM wait until Ray has started: one that is half started crashes the process at its end. A second
    signal ends it at once. Ray's own handler, under which SIGTERM aborts the process, is not put in their place."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    from ray._private import utils

    received: list[int] = []

    def wait(number: int, frame: object) -> None:
        if received:
            os._exit(128 + number)
        received.append(number)

    set_handler = utils.set_sigterm_handler
    setattr(utils, "set_sigterm_handler", lambda handler: None)  # noqa: B010
    handlers = {number: signal.signal(number, wait) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        utils.set_sigterm_handler = set_handler
        for number, handler in handlers.items():
            signal.signal(number, handler)
        if received:
            signal.raise_signal(received[0])


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
    with _standard_error_without(b"Set ray log level from environment variable"):
        ray.init(
            address="local",
            num_cpus=local_cores() + 1,
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
        )


@contextmanager
def _standard_error_without(unwanted: bytes) -> Generator[None]:
    """Hold back what is written to the process's standard error, C++ included; lines with ``unwanted`` in them for good."""
    sys.stderr.flush()
    terminal = os.dup(2)
    with tempfile.TemporaryFile() as held:
        os.dup2(held.fileno(), 2)
        try:
            yield
        finally:
            sys.stderr.flush()
            os.dup2(terminal, 2)
            os.close(terminal)
            held.seek(0)
            os.write(2, b"".join(line for line in held if unwanted not in line))


def own_error(error: BaseException) -> CaprayError | None:
    """The CaprayError that Ray has wrapped in ``error``, as it was raised; None when there is none."""
    found, wrapped = None, error
    while wrapped is not None:
        found = wrapped if isinstance(wrapped, CaprayError) else found
        wrapped = getattr(wrapped, "cause", None) or wrapped.__cause__
    if found is not None and found.args:
        # Ray Data appends advice on retries of its own.
        found.args = (str(found.args[0]).partition("\nFailed to apply ")[0], *found.args[1:])
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
    """``wanted``, where `auto` is bf16 on GPUs, and on CPUs where all nodes of the cluster compute in it; else fp32."""
    if wanted != "auto":
        return wanted
    return "bf16" if on_gpu or _all_nodes_have_bf16() else "fp32"


def _all_nodes_have_bf16() -> bool:
    if not has_bf16():
        return False
    others = alive_nodes() - {node_id()} if _worker() else set()
    if not others:
        return True
    import ray.exceptions
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    on = [NodeAffinitySchedulingStrategy(node, soft=True) for node in others]
    asked = [ray.remote(has_bf16).options(num_cpus=0, scheduling_strategy=node).remote() for node in on]
    try:
        return all(ray.get(asked, timeout=_ASKING_SECONDS))
    except ray.exceptions.RayError:
        return False


def has_bf16() -> bool:
    """Whether the CPU of this machine computes in bf16, as Linux tells of those of Intel and AMD."""
    try:
        with open(CPU_FLAGS) as file:
            flags = next((line for line in file if line.startswith("flags")), "").split()
    except OSError:
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags


def task_attempt() -> int:
    """How often the task that runs here was started before, because its process died (Ray tells it by no public name);
    0 outside Ray."""
    worker = _worker()
    return worker.get_current_task_attempt_number() if worker else 0


def node_id() -> str:
    """The id of the node this process runs on; "" outside Ray."""
    worker = _worker()
    return worker.get_current_node_id().hex() if worker else ""


def alive_nodes() -> set[str]:
    """The ids of the cluster's nodes that are alive."""
    import ray

    return {node["NodeID"] for node in ray.nodes() if node["Alive"]}


def count_restart() -> int:
    """How often in a row the actor that runs here has been restarted, this time included, because its process died; 0 when
    it was not restarted, or outside an actor. ``end_restarts`` begins a new row."""
    if not _actor_key():
        return 0
    import ray
    from ray.experimental.internal_kv import _internal_kv_get, _internal_kv_put

    if not ray.get_runtime_context().was_current_actor_reconstructed:
        return 0
    number = int(_internal_kv_get(_actor_key(), namespace=_NAMESPACE) or 0) + 1
    _internal_kv_put(_actor_key(), str(number), namespace=_NAMESPACE)
    return number


def end_restarts() -> None:
    """The actor that runs here works again; see ``count_restart``."""
    if key := _actor_key():
        from ray.experimental.internal_kv import _internal_kv_del

        _internal_kv_del(key, namespace=_NAMESPACE)


def _actor_key() -> str:
    worker = _worker()
    actor_id = worker.get_actor_id() if worker else None
    return f"restarts/{actor_id.hex()}" if actor_id and not actor_id.is_nil() else ""


def post_notice(run_id: str, text: str) -> None:
    """Tell the driver of the run, from any task or actor, something for whoever watches. Never raises; outside Ray, or
    without a run, nobody hears."""
    if not run_id or not _worker():
        return
    with suppress(Exception):
        from ray.experimental.internal_kv import _internal_kv_put

        key = f"notice/{run_id}/{time.time_ns():020d}-{secrets.token_hex(4)}"
        _internal_kv_put(key, text, namespace=_NAMESPACE)


def take_notices(run_id: str) -> list[str]:
    """The notices posted for the run since the last call, in order; what cannot be fetched now comes later."""
    texts: list[str] = []
    if not _worker():
        return texts
    with suppress(Exception):
        from ray.experimental.internal_kv import _internal_kv_del, _internal_kv_get, _internal_kv_list

        for key in sorted(_internal_kv_list(f"notice/{run_id}/", namespace=_NAMESPACE)):
            texts.append(_internal_kv_get(key, namespace=_NAMESPACE).decode())
            _internal_kv_del(key, namespace=_NAMESPACE)
    return texts


def _worker():
    """Ray's worker of this process; None where it is connected to no cluster."""
    module = sys.modules.get("ray._private.worker")
    return module.global_worker.core_worker if module and module.global_worker.connected else None


def share_cpus(num_workers: int, cpus_per_worker: float | None, gpus_per_worker: float, say: Callable[[str], None]) -> float:
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
