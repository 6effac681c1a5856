"""The captioning job: plan, one CPU operator, a pool of captioning actors, the driver as the single writer, and the loop
that settles: after the last row the parts are listed afresh, and what is still missing goes into another pass.
"""

from __future__ import annotations

import json
import os
import queue
import secrets
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from typing import Any

import pyarrow as pa

from capray import cluster
from capray.captioning.actor import CaptioningActor
from capray.captioning.fetching import Fetcher, fetch_block
from capray.captioning.lease import Lease
from capray.captioning.plan import Plan, Work, remove_duplicates
from capray.captioning.sources import Source
from capray.captioning.writer import PartWriter
from capray.config import CaptionConfig, Decoding, ImageLimits, Preprocessing
from capray.errors import CaprayError, ConfigError, Interrupted, OutputConflictError
from capray.model.checkpoint import load_captioner
from capray.output import Output, first_row
from capray.progress import ProgressDisplay, duration
from capray.storage import list_names, locate, write_atomic
from capray.tables import SCHEMA_VERSION

MAX_PASSES = 3
FETCH_CPUS = 0.5
"""CPUs a fetching task asks for: it mostly waits. Unlike an actor's, so that Ray does not fuse the two into one."""
HOPELESS_AFTER = 200
"""When the first so many results are all failures, the fault is not the images'."""


@dataclass
class Summary:
    """What a run did, and where the output stands."""

    output: str
    run_id: str
    model_id: str
    status: str = "running"
    images: int = 0
    duplicates: int = 0
    hidden_files: int = 0
    captioned_before: int = 0
    captions: int = 0
    failures: dict[str, int] = field(default_factory=dict)
    current_failures: dict[str, int] = field(default_factory=dict)
    parts: int = 0
    seconds: float = 0.0
    images_per_second: float = 0.0
    passes: int = 0

    def text(self) -> str:
        lines = [
            f"{self.images:,} images: {self.captioned_before + self.captions:,} captioned, "
            f"{sum(self.current_failures.values()):,} failed",
            f"this run: {self.captions:,} captions, {sum(self.failures.values()):,} failures in {duration(self.seconds)} "
            f"({self.images_per_second:.1f} images/s), {self.parts} parts",
        ]
        lines += [f"  {kind}: {count:,}" for kind, count in sorted(self.current_failures.items())]
        if self.duplicates:
            lines.append(f"  note: {self.duplicates:,} rows of the input repeat an image id and were captioned once")
        if self.hidden_files:
            lines.append(f"  note: {self.hidden_files:,} files with names that begin with . or _ were left out")
        return "\n".join([*lines, f"tables in {self.output}"])


def caption(config: CaptionConfig) -> Summary:
    """Caption every image of the input that has no caption yet.

    Raises:
        ConfigError: settings, input or output that cannot be used; another run writes the output.
        CheckpointError: the model cannot be loaded.
        StorageError: storage that cannot be reached or written.
        Interrupted: stopped by Ctrl-C or SIGTERM, what was done being published.
        CaprayError: everything fails, or ids stay unaccounted for after MAX_PASSES.
    """
    output_uri = config.output
    assert output_uri is not None
    config = config.model_copy(update={"model": locate(config.model).uri, "input": locate(config.input).uri})
    captioner, model_id = load_captioner(config.model)
    preprocessing = captioner.architecture.subset(Preprocessing)
    del captioner
    source, output = Source(config), Output(output_uri)
    _check_job(config, output, model_id)
    with (
        ProgressDisplay("listing") as display,
        _Signals() as signals,
        Lease(output.private, display.say) as lease,
    ):
        return _Run(config, output, model_id, preprocessing, lease, signals, display).caption(source)


def _check_job(config: CaptionConfig, output: Output, model_id: str) -> dict[str, Any] | None:
    """The output's job.json, or None; an error when the output belongs to another job."""
    job = output.read_job()
    if job is None:
        if names := list_names(output.root):
            raise OutputConflictError(
                f"{config.output!r} holds {names[0]!r} and no captioning job: choose a new folder or empty it"
            )
        return None
    if job["model_id"] != model_id:
        raise OutputConflictError(
            f"{config.output!r} was written by model {job['model_id'][:12]}…, not {model_id[:12]}…: choose another output, "
            "or the same model"
        )
    now = config.subset(Decoding).model_dump()
    changed = [
        f"{name}: {job['decoding'][name]} -> {now[name]}" for name in now if job["decoding"].get(name) != now[name]
    ]
    if config.precision not in ("auto", job["precision"]):
        changed.append(f"precision: {job['precision']} -> {config.precision}")
    if changed:
        raise OutputConflictError(
            f"{config.output!r} was written with other settings ({'; '.join(changed)}): choose another output, or the same "
            "settings"
        )
    return job


class _Signals:
    """Ctrl-C and SIGTERM ask the job to stop; a second one ends the process at once."""

    def __init__(self) -> None:
        self.received: int | None = None

    def __enter__(self) -> _Signals:
        self._previous = {}
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: object) -> None:
        if self.received is not None:
            os._exit(128 + number)
        self.received = number

    def check(self) -> None:
        if self.received is not None:
            raise Interrupted("stopped; the same command goes on where it was", self.received)


@dataclass(frozen=True)
class _Actors:
    """The pool of captioning actors."""

    number: int
    gpus: float
    threads: int


class _Run:
    """One run of the job on an output it holds the lease of."""

    def __init__(
        self,
        config: CaptionConfig,
        output: Output,
        model_id: str,
        preprocessing: Preprocessing,
        lease: Lease,
        signals: _Signals,
        display: ProgressDisplay,
    ):
        self.config, self.output, self.preprocessing = config, output, preprocessing
        self.signals, self.display = signals, display
        run_id = f"{datetime.now(UTC):%Y%m%dT%H%M%S}-{secrets.token_hex(4)}"
        self.summary = Summary(output.root.uri, run_id, model_id)
        self.writer = PartWriter(output, run_id, config.part_rows, config.part_seconds, lease.check)
        self.plan = Plan(output, run_id, config.retry_failed)
        self.results: Counter[str] = Counter()
        self.started = time.monotonic()
        self.seconds_in_passes = 0.0

    def caption(self, source: Source) -> Summary:
        try:
            self._list(source)
            self._settle()
            self.summary.status = "complete"
            self._record()
        except BaseException as error:
            self._save_what_is_held(error)
            raise
        finally:
            self.plan.remove()
        return self.summary

    @cached_property
    def actors(self) -> _Actors:
        """The pool; asking for it connects to Ray."""
        config = self.config
        self.display.update(0, "", "starting Ray")
        cluster.connect()
        cpus, gpus = cluster.cluster_resources()
        gpus_per_actor = config.gpus_per_actor if config.gpus_per_actor is not None else float(gpus > 0)
        number = config.num_actors
        if number is None:
            fitting = gpus / gpus_per_actor if gpus_per_actor else (cpus - 1) / config.threads_per_actor
            number = max(1, int(fitting))
        cluster.share_cpus(number, config.threads_per_actor, gpus_per_actor, self.display.say)
        return _Actors(number, gpus_per_actor, config.threads_per_actor)

    @cached_property
    def precision(self) -> str:
        """The precision the job runs with: resolved once, and kept in job.json, which is written where there is none."""
        job = _check_job(self.config, self.output, self.summary.model_id)
        if job is not None:
            return job["precision"]
        precision = self.config.precision
        if precision == "auto":
            precision = "bf16" if self.actors.gpus else "fp32"
        job = {
            "schema_version": SCHEMA_VERSION,
            "model_id": self.summary.model_id,
            "decoding": self.config.subset(Decoding).model_dump(),
            "precision": precision,
            "kept_columns": [],
        }
        write_atomic(self.output.job, json.dumps(job, indent=2).encode(), self.output.scratch)
        return precision

    def _record(self) -> None:
        """Write runs/<run_id>.json as things stand."""
        summary, writer = self.summary, self.writer
        summary.captions, summary.failures, summary.parts = writer.num_captions, dict(writer.failures), writer.num_parts
        summary.seconds = time.monotonic() - self.started
        done = summary.captions + sum(summary.failures.values())
        summary.images_per_second = done / self.seconds_in_passes if self.seconds_in_passes else 0.0
        record = {**asdict(summary), "input": self.config.input, "updated_at": datetime.now(UTC).isoformat()}
        place = self.output.runs.join(f"{summary.run_id}.json")
        write_atomic(place, json.dumps(record, indent=2).encode(), self.output.scratch)

    def _list(self, source: Source) -> None:
        self.columns = source.columns
        for listed in self.plan.list_wanted(source.chunks()):
            self.signals.check()
            self.display.update(0, f"{listed:,} images listed", "listing")
        wanted = self.plan.count_wanted()
        if not wanted.images:
            raise ConfigError(f"there are no images at {self.config.input!r}" + self._of_split())
        self.summary.images, self.summary.duplicates = wanted.images, wanted.duplicates
        self.summary.hidden_files = source.hidden
        with self.output.connect() as connection:
            (self.summary.captioned_before,) = first_row(connection, "SELECT count(*) FROM captions")

    def _of_split(self) -> str:
        return f" in split {self.config.split!r}" if self.config.split else ""

    def _settle(self) -> None:
        for number in range(1, MAX_PASSES + 1):
            work = self.plan.remaining(number, self.config.batch_size, lambda: self.actors.number)
            if not work.num_images:
                break
            self.summary.passes = number
            actors, precision = self.actors, self.precision
            self._record()
            self.display.say(
                f"{'captioning' if number == 1 else 'once more:'} {work.num_images:,} of {self.summary.images:,} images "
                f"with {actors.number} actor{'s' if actors.number > 1 else ''}, {precision}"
            )
            self._pass(work)
        self.writer.before_publish()
        remove_duplicates(self.output)
        lost, names = self.plan.unaccounted()
        if lost:
            raise CaprayError(
                f"{lost} images have neither a caption nor a failure after {MAX_PASSES} passes: {', '.join(names)}"
                f"{' …' if lost > len(names) else ''}; run the same command again"
            )
        with self.output.connect() as connection:
            kinds = connection.execute("SELECT error_type, count(*) FROM failures GROUP BY ALL ORDER BY ALL").fetchall()
        self.summary.current_failures = dict(kinds)

    def _pass(self, work: Work) -> None:
        started, before = time.monotonic(), self.seconds_in_passes
        done = 0
        with _streamed(self._dataset(work)) as tables:
            for table in tables:
                self.seconds_in_passes = before + time.monotonic() - started
                if table is None:
                    self._publish(self.writer.tick)
                else:
                    done += table.num_rows
                    self._take(table)
                self.signals.check()
                rate = done / (time.monotonic() - started)
                failed = sum(count for kind, count in self.results.items() if kind != "captioned")
                figures = f"{done:,}/{work.num_images:,} images  {rate:.1f} images/s  {failed:,} failed"
                self.display.update(done, figures, "captioning", work.num_images)
        self.writer.flush()
        self.seconds_in_passes = before + time.monotonic() - started

    def _take(self, table: pa.Table) -> None:
        kinds = ["captioned" if kind is None else kind for kind in table["error_type"].to_pylist()]
        self.results.update(kinds)
        self._publish(lambda: self.writer.add(table))
        total = self.results.total()
        if total >= HOPELESS_AFTER and not self.results["captioned"]:
            ((kind, count),) = self.results.most_common(1)
            example = table["message"][0].as_py()
            raise CaprayError(f"the first {total} images all failed, {count} of them as {kind}: {example}")

    def _publish(self, write: Callable[[], None]) -> None:
        """Let the writer do something, and refresh the run's record if it published a part."""
        parts = self.writer.num_parts
        write()
        if self.writer.num_parts > parts:
            self._record()

    def _dataset(self, work: Work):
        import ray.data

        # A replayed task must give the same blocks: one block per task, never split by size.
        ray.data.DataContext.get_current().target_max_block_size = 2**40
        config, actors = self.config, self.actors
        fetcher = Fetcher(
            work,
            config.input,
            self.columns.image if self.columns else None,
            self.preprocessing,
            config.subset(ImageLimits),
            config.fetch_concurrency,
        )
        blocks = ray.data.range(work.num_blocks, override_num_blocks=work.num_blocks)
        fetched = blocks.map_batches(
            fetch_block,  # ty: ignore[invalid-argument-type]
            batch_size=1,
            fn_kwargs={"fetcher": fetcher},
            num_cpus=FETCH_CPUS,
        )
        return fetched.map_batches(
            CaptioningActor,
            batch_size=config.batch_size,
            batch_format="pyarrow",
            fn_constructor_kwargs={
                "model": config.model,
                "expected_model_id": self.summary.model_id,
                "decoding": config.subset(Decoding),
                "precision": self.precision,
                "on_gpu": actors.gpus > 0,
                "num_threads": actors.threads,
            },
            num_cpus=actors.threads,
            num_gpus=actors.gpus or None,
            compute=ray.data.ActorPoolStrategy(size=actors.number),
        )

    def _save_what_is_held(self, error: BaseException) -> None:
        """Publish what was done before the run ended early, and say so in its record, as far as that is possible."""
        self.summary.status = "interrupted" if isinstance(error, (Interrupted, KeyboardInterrupt)) else "failed"
        if not self.summary.passes:
            return
        with suppress(CaprayError):
            self.writer.flush()
            self._record()


@contextmanager
def _streamed(data: Any) -> Generator[Iterator[pa.Table | None]]:
    """The dataset's tables as they come, read in a thread of their own; None each half second in which none came.

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
                item = tables.get(timeout=0.5)
            except queue.Empty:
                yield None
                continue
            if item is None:
                return
            if isinstance(item, BaseException):
                raise CaprayError(f"captioning failed: {_last_line(item)}") from item
            yield item

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    try:
        yield take()
    finally:
        stop.set()
        reader.join(2)


def _last_line(error: BaseException) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else repr(error)
