"""Runs a captioning job's passes in this process, without Ray: `caption(config, executor=LocalExecutor())`, for tests of all
that is not Ray's, and of faults that strike at a chosen moment."""

from __future__ import annotations

import hashlib
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import fields, replace
from functools import cache
from typing import TYPE_CHECKING
from unittest import mock

import pyarrow as pa

from capray import cluster
from capray.captioning.fetching import Decode, Fetcher, Look
from capray.captioning.isolation import Crashed, Isolated
from capray.captioning.rows import results_schema, table_of, with_table
from capray.captioning.units import Unit, Work, read_units
from capray.inputs.places import Row

if TYPE_CHECKING:  # A child process that fetches loads no torch.
    from capray.captioning.actor import CaptioningSettings
    from capray.captioning.stream import Pool


@contextmanager
def models_loaded_once() -> Generator[None]:
    """Runs in this process load a model, and caption its canary, only once."""
    from capray.captioning import canary
    from capray.inference import Inference

    with ExitStack() as patches:
        patches.enter_context(mock.patch.object(Inference, "load", cache(Inference.load)))
        patches.enter_context(mock.patch.object(canary, "canary_score", cache(canary.canary_score)))
        yield


@contextmanager
def captioning_in_process() -> Generator[None]:
    """Captioning jobs started by a command or function caption in this process, with the real actor and without Ray."""
    from capray.captioning import stream
    from capray.captioning.actor import CaptioningActor

    def executor(*_: object) -> LocalExecutor:
        return LocalExecutor(CaptioningActor)

    with mock.patch.object(stream, "RayExecutor", executor):
        yield


Captioner = Callable[[pa.Table], pa.Table]
Hook = Callable[[int], None]
TICK_SECONDS = 0.05
UNIT_SECONDS = 60.0


class LocalExecutor:
    """Fetches units in threads, and captions their blocks in the order of the plan.

    Args:
        captioner: makes what captions BLOCK rows: a stand-in, or ``CaptioningActor`` for real captions.
        num_threads: units fetched at once.
        decode_seconds: an image that takes longer to decode is given up.
        is_isolated: which units to fetch in a process of their own and, when that dies, carefully in another one, as Ray
            does. When not given, nothing is fetched in another process, second looks neither: that takes its time.
        before_unit, after_block: called with the number of a unit that will be fetched, or of a block that was captioned.
    """

    def __init__(
        self,
        captioner: Callable[[CaptioningSettings], Captioner] | None = None,
        num_threads: int = 2,
        decode_seconds: float = 60.0,
        is_isolated: Callable[[Unit], bool] | None = None,
        before_unit: Hook = lambda number: None,
        after_block: Hook = lambda number: None,
    ):
        self.captioner = captioner or StandIn
        self.num_threads, self.decode_seconds, self.is_isolated = num_threads, decode_seconds, is_isolated
        self.before_unit, self.after_block = before_unit, after_block
        self.num_units = self.num_blocks = self.num_captioned = 0
        self.told: list[str] = []
        """All that tasks and actors had to tell."""
        self._notices: deque[str] = deque()
        self._looks: list[Future[list[Look]]] = []
        self._threads: ThreadPoolExecutor | None = None

    @property
    def pool(self) -> Pool:
        from capray.captioning.stream import Pool

        return Pool(1, 1, 0.0, 1)

    @contextmanager
    def tables(self, work: Work, fetcher: Fetcher, settings: CaptioningSettings) -> Generator[Iterator[pa.Table | None]]:
        with mock.patch.object(cluster, "post_notice", self._take_notice):
            yield self._blocks(work, self._adapted(fetcher), self.captioner(settings))

    def look(self, places: list[Row], node: str, fetcher: Fetcher) -> None:
        self._looks.append(self._pool().submit(self._adapted(fetcher).look, places))

    def looks(self) -> list[Look]:
        done = [future for future in self._looks if future.done()]
        self._looks = [future for future in self._looks if future not in done]
        return [look for future in done for look in future.result()]

    def notices(self) -> list[str]:
        return [self._notices.popleft() for _ in range(len(self._notices))]

    def close(self) -> None:
        if self._threads is not None:
            self._threads.shutdown(wait=False, cancel_futures=True)
            self._threads = None

    def _adapted(self, fetcher: Fetcher) -> Fetcher:
        if self.is_isolated is not None:
            return replace(fetcher, decode_seconds=self.decode_seconds)
        return _Careless(**{each.name: getattr(fetcher, each.name) for each in fields(fetcher) if each.init})

    def _pool(self) -> ThreadPoolExecutor:
        if self._threads is None:
            self._threads = ThreadPoolExecutor(self.num_threads, "fetch")
        return self._threads

    def _blocks(self, work: Work, fetcher: Fetcher, captioner: Captioner) -> Iterator[pa.Table | None]:
        units = (unit for file in work.files for unit in read_units(file))
        under_way: deque[Future[list[pa.Table]]] = deque()
        while True:
            while len(under_way) < self.num_threads and (unit := next(units, None)) is not None:
                self.before_unit(self.num_units)
                self.num_units += 1
                fetch = self._fetch_isolated if self.is_isolated and self.is_isolated(unit) else self._fetch
                under_way.append(self._pool().submit(fetch, fetcher, unit))
            if not under_way:
                return
            future = under_way.popleft()
            while not wait([future], TICK_SECONDS).done:
                yield None
            for block in future.result():
                results = captioner(block)
                self.num_captioned += table_of(results)["error_type"].null_count
                yield results
                self.num_blocks += 1
                self.after_block(self.num_blocks)

    @staticmethod
    def _fetch(fetcher: Fetcher, unit: Unit) -> list[pa.Table]:
        return list(fetcher.fetch(unit.places, unit.skipped, careful=False))

    @staticmethod
    def _fetch_isolated(fetcher: Fetcher, unit: Unit) -> list[pa.Table]:
        for careful in (False, True):
            with Isolated(_Fetching, (fetcher, careful), UNIT_SECONDS) as child:
                try:
                    return child.call(unit)
                except Crashed:
                    if careful:
                        raise
        raise AssertionError

    def _take_notice(self, run_id: str, text: str) -> None:
        self.told.append(text)
        self._notices.append(text)


class _Careless(Fetcher):
    """Decodes in this process whatever it is asked."""

    def _decoder(self, careful: bool) -> AbstractContextManager[Decode]:
        return super()._decoder(careful=False)


class _Fetching:
    """A unit's blocks, in a child process."""

    def __init__(self, fetcher: Fetcher, careful: bool):
        self.fetcher, self.careful = fetcher, careful

    def __call__(self, unit: Unit) -> list[pa.Table]:
        return list(self.fetcher.fetch(unit.places, unit.skipped, careful=self.careful))


class StandIn:
    """Captions that follow from the pixels, made without a model."""

    def __init__(self, settings: CaptioningSettings):
        self.settings = settings
        self.schema = results_schema(settings.source_type)

    def __call__(self, block: pa.Table) -> pa.Table:
        now = time.time_ns() // 1000
        rows = [self._result(row, now) for row in table_of(block).to_pylist()]
        return with_table(block, pa.Table.from_pylist(rows, self.schema))

    def _result(self, row: Row, now: int) -> Row:
        result = {name: row.get(name) for name in self.schema.names}
        if row["pixels"] is None:
            return result
        return result | {
            "caption": f"pixels {hashlib.sha256(row['pixels']).hexdigest()[:16]}",
            "log_prob": -1.0,
            "score": -1.0,
            "num_tokens": 2,
            "finished": True,
            "alternatives": [],
            "model_id": self.settings.model_id,
            "captioned_at": now,
        }
