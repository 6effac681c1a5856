"""What runs a pass: a plan's units through fetching and captioning, as a stream of BLOCK rows that hold results.

``Executor`` is what the run needs; ``RayExecutor`` does it with Ray Data. Knows nothing of outputs, waves or what a failure
means.
"""

from __future__ import annotations

import queue
import random
import threading
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Protocol

import pyarrow as pa

from capray import cluster
from capray.captioning.actor import CaptioningActor, CaptioningSettings
from capray.captioning.fetching import Fetcher, Look, expand, fetch_unit
from capray.captioning.model_transfer import ModelTransfer, transfer_model
from capray.captioning.units import Work
from capray.config import GPU_BATCH, CaptionConfig
from capray.errors import CaprayError, TryAgain
from capray.inputs.places import Row

EXPAND_CPUS = 0.1
FETCH_CPUS = 0.5
"""CPUs of a task that expands plan files into units, and of one that fetches: both mostly wait. Unlike an actor's and each
other's, so that Ray does not fuse them into one."""
BATCHES_TOGETHER = 2
"""That a GPU's actor is given at once: one is gathered and written while the other is computed."""
MAX_IN_FLIGHT = 2
"""Blocks an actor is given at once."""
GROWTH = 8
"""A pool of GPU actors may grow to this many times its size, as nodes join."""
END_SECONDS = 10.0
"""How long Ray Data may take to end an execution that is given up."""
TICK_SECONDS = 0.2
STALL_SECONDS = 60.0
"""When a node was lost and no result came for so long, what is left waits for actors that cannot restart."""


class Stalled(Exception):
    """What is left of a pass waits for actors of lost nodes: end it, and plan again."""


@dataclass(frozen=True)
class Pool:
    """The captioning actors."""

    num_actors: int
    max_actors: int
    gpus_per_actor: float
    threads: int

    def for_work(self, work: Work) -> Pool:
        """No more actors than there are blocks, for each takes seconds to start. How many tars give is not known before they
        are read."""
        if work.num_tars:
            return self
        most = max(1, work.num_blocks)
        return replace(self, num_actors=min(self.num_actors, most), max_actors=min(self.max_actors, most))


class Executor(Protocol):
    """Runs passes over work, and second looks."""

    @property
    def pool(self) -> Pool:
        """The actors there will be; asking for it connects to the cluster."""
        ...

    def tables(
        self, work: Work, fetcher: Fetcher, settings: CaptioningSettings
    ) -> AbstractContextManager[Iterator[pa.Table | None]]:
        """BLOCK rows holding results, as they come; None each TICK_SECONDS in which none came. Leaving the context ends the
        pass.

        Raises:
            CaprayError: what stops the job, from the iterator.
            Stalled: see there.
        """
        ...

    def look(self, places: list[Row], node: str, fetcher: Fetcher) -> None:
        """Begin a second look at images, on another node than ``node`` where there is one."""
        ...

    def looks(self) -> list[Look]:
        """The second looks that have ended since the last call."""
        ...

    def notices(self) -> list[str]:
        """What tasks and actors have to tell whoever watches."""
        ...

    def close(self) -> None:
        """Give back what the executor holds."""
        ...


class RayExecutor:
    """Passes as Ray Data datasets: expand plan files into units → fetch and decode → caption."""

    def __init__(self, config: CaptionConfig, run_id: str, say: Callable[[str], None]):
        self.config, self.run_id, self.say = config, run_id, say
        self._looks: list[Any] = []
        self._transfer: ModelTransfer | None = None

    @cached_property
    def pool(self) -> Pool:
        config = self.config
        cluster.connect()
        cpus, gpus = cluster.cluster_resources()
        each = cluster.gpus_each(config.gpus_per_actor)
        number = config.num_actors
        if number is None:
            fitting = gpus / each if each else (cpus - 1) / config.threads_per_actor
            number = max(1, int(fitting))
        cluster.share_cpus(number, config.threads_per_actor, each, self.say)
        can_grow = config.num_actors is None and each > 0
        return Pool(number, number * GROWTH if can_grow else number, each, config.threads_per_actor)

    @contextmanager
    def tables(self, work: Work, fetcher: Fetcher, settings: CaptioningSettings) -> Generator[Iterator[pa.Table | None]]:
        nodes = cluster.alive_nodes()
        with _streamed(self._dataset(work, fetcher, settings)) as stream:

            def watched() -> Iterator[pa.Table | None]:
                since = time.monotonic()
                for table in stream:
                    if table is not None:
                        since = time.monotonic()
                    elif time.monotonic() - since > STALL_SECONDS and nodes - cluster.alive_nodes():
                        raise Stalled
                    yield table

            yield watched()

    def _dataset(self, work: Work, fetcher: Fetcher, settings: CaptioningSettings):
        import ray.data

        config, pool = self.config, self.pool.for_work(work)
        if self._transfer is None:
            self._transfer = transfer_model(settings.model, settings.model_id)
        data = ray.data.from_blocks([pa.table({"file": [file.uri]}) for file in work.files])
        # A block of this job is one Ray row: each is to leave its task by itself.
        data.context.target_max_block_size = 1
        units = data.map_batches(
            expand, batch_size=1, batch_format="pyarrow", num_cpus=EXPAND_CPUS, compute=ray.data.TaskPoolStrategy(2)
        )
        fetched = units.map_batches(
            fetch_unit, batch_size=1, batch_format="pyarrow", fn_kwargs={"fetcher": fetcher}, num_cpus=FETCH_CPUS
        )
        on_gpu = pool.gpus_per_actor > 0
        together = BATCHES_TOGETHER * max(1, GPU_BATCH // fetcher.block_rows) if on_gpu and not config.batch_size else 1
        return fetched.map_batches(
            CaptioningActor,
            batch_size=together,
            batch_format="pyarrow",
            fn_constructor_args=(replace(settings, transfer=self._transfer),),
            num_cpus=pool.threads,
            num_gpus=pool.gpus_per_actor or None,
            compute=ray.data.ActorPoolStrategy(
                min_size=pool.num_actors, max_size=pool.max_actors, max_tasks_in_flight_per_actor=MAX_IN_FLIGHT
            ),
        )

    def look(self, places: list[Row], node: str, fetcher: Fetcher) -> None:
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        others = sorted(cluster.alive_nodes() - {node})
        strategy = NodeAffinitySchedulingStrategy(random.choice(others), soft=True) if others else "DEFAULT"
        task = ray.remote(Fetcher.look).options(num_cpus=FETCH_CPUS, scheduling_strategy=strategy)
        self._looks.append(task.remote(fetcher, places))

    def looks(self) -> list[Look]:
        import ray

        if not self._looks:
            return []
        done, self._looks = ray.wait(self._looks, num_returns=len(self._looks), timeout=0)
        try:
            return [look for looks in ray.get(done) for look in looks]
        except Exception as error:
            raise _told(error) from error

    def notices(self) -> list[str]:
        return cluster.take_notices(self.run_id)

    def close(self) -> None:
        self._looks.clear()


@contextmanager
def _streamed(data: Any) -> Generator[Iterator[pa.Table | None]]:
    """The dataset's tables as they come, read in a thread of their own; None each TICK_SECONDS in which none came.

    Leaving the context ends the dataset's execution.
    """
    tables: queue.Queue[pa.Table | BaseException | None] = queue.Queue(maxsize=2)
    stop = threading.Event()

    def put(item: pa.Table | BaseException | None) -> None:
        while not stop.is_set():
            try:
                tables.put(item, timeout=0.2)
                return
            except queue.Full:
                continue

    def read() -> None:
        try:
            for table in data.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=1):
                put(table)
                if stop.is_set():
                    return
            put(None)
        except BaseException as error:
            put(error)

    def take() -> Iterator[pa.Table | None]:
        while True:
            try:
                item = tables.get(timeout=TICK_SECONDS)
            except queue.Empty:
                yield None
                continue
            if item is None:
                return
            if isinstance(item, BaseException):
                raise _told(item) from item
            yield item

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    try:
        yield take()
    finally:
        stop.set()
        reader.join(2)
        if reader.is_alive():
            _end_executions()
            reader.join(END_SECONDS)


def _end_executions() -> None:
    """End what Ray Data executes in this process: one that gives nothing more would stay, and end the process with 1 when
    Ray is shut down under it. There is no public name for this, and a dataset knows its execution only after a table."""
    from ray.data._internal.execution.streaming_executor import StreamingExecutor

    for thread in threading.enumerate():
        if isinstance(thread, StreamingExecutor):
            thread.shutdown(force=True)
            thread.join(END_SECONDS)


def _told(error: BaseException) -> CaprayError:
    """What a task or actor raised, as a CaprayError with one message."""
    own = cluster.own_error(error)
    if own is not None:
        return own
    lines = [line for line in str(error).splitlines() if line.strip()]
    what = lines[-1] if lines else repr(error)
    kind = TryAgain if any(sign in str(error) for sign in _PASSING) else CaprayError
    return kind(f"captioning failed: {what}")


_PASSING = ("OutOfMemoryError", "OutOfDiskError", "NodeDiedError", "ObjectLostError", "WorkerCrashedError", "ActorDiedError")
"""In the names of Ray's errors: faults of the cluster, not of the job."""
