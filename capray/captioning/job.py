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
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from typing import Any

import pyarrow as pa

from capray import cluster
from capray.captioning.actor import MAX_IN_FLIGHT, CaptioningActor
from capray.captioning.fetching import Fetcher, fetch_unit
from capray.captioning.lease import Lease, ray_job_is_terminal
from capray.captioning.model_transfer import Shipment, ship
from capray.captioning.plan import ATTEMPTS_PER_RUN, Plan, Work, remove_duplicates
from capray.captioning.rows import unpack
from capray.captioning.writer import PartWriter
from capray.config import CaptionConfig, Decoding, ImageLimits, Preprocessing, SourceSettings
from capray.errors import CaprayError, ConfigError, Interrupted, OutputConflictError
from capray.inputs import Source, open_sources
from capray.inputs.listing import Listing
from capray.model.checkpoint import load_captioner
from capray.output import Output, first_row
from capray.progress import ProgressDisplay, duration
from capray.registry import find_model
from capray.storage import list_names, locate, write_atomic
from capray.tables import FINAL_FAILURES, SCHEMA_VERSION, TRANSIENT_FAILURES

MAX_PASSES = 3
FETCH_CPUS = 0.5
"""CPUs a fetching task asks for: it mostly waits. Unlike an actor's, so that Ray does not fuse the two into one."""
HOPELESS_AFTER = 200
"""When the first so many results are all failures, the fault is not the images'. Failure rates are judged from here on."""
RATE_WINDOW = 2000
"""Results over which failure rates are judged."""
MAX_BLOCK_ROWS = 512
MAX_BLOCK_BYTES = 96 * 2**20


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
    left: int = 0
    captioned_before: int = 0
    captions: int = 0
    failures: dict[str, int] = field(default_factory=dict)
    current_failures: dict[str, int] = field(default_factory=dict)
    parts: int = 0
    seconds: float = 0.0
    images_per_second: float = 0.0
    passes: int = 0

    def json(self) -> str:
        return json.dumps(asdict(self), indent=1)

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
        if self.left:
            lines.append(
                f"  note: stopped at the limit; the same command goes on ({self.left:,} images or shards known of)"
            )
        if self.hidden_files:
            lines.append(
                f"  note: {self.hidden_files:,} hidden files (names that begin with ., in tables and shards _) were left out"
            )
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
    config = localised(config)
    captioner, model_id = load_captioner(config.model)
    preprocessing = captioner.architecture.subset(Preprocessing)
    if config.attention and captioner.architecture.attention == "none":
        raise ConfigError(f"the model at {config.model!r} has no attention: leave --attention out")
    del captioner
    output = Output(output_uri)
    check_apart(config, output)
    sources = open_sources(config.inputs, config.subset(SourceSettings), config.keep)
    check_job(config, output, model_id, sources)
    lease = Lease(
        output.private,
        steal=config.steal_lease,
        enforce=not config.unsafe_no_lease,
        is_job_terminal=ray_job_is_terminal,
    )
    with ProgressDisplay("listing") as display:
        lease.say = display.say
        with lease, _Signals() as signals:
            return _Run(config, output, model_id, preprocessing, lease, signals, display, sources).caption()


def localised(config: CaptionConfig) -> CaptionConfig:
    """``config`` with absolute paths, which mean the same to every process, and the place of a model in MLflow."""
    inputs = [locate(uri).uri for uri in config.inputs]
    model = find_model(config.model, config.tracking_uri)
    return config.model_copy(update={"model": model, "input": inputs[0], "also": tuple(inputs[1:])})


def retried_kinds(config: CaptionConfig) -> tuple[str, ...]:
    """The final kinds of failure to attempt again."""
    return FINAL_FAILURES if config.retry_failed == () else config.retry_failed or ()


def check_apart(config: CaptionConfig, output: Output) -> None:
    for uri in config.inputs:
        place = locate(uri)
        inside = f"{output.root.path.rstrip('/')}/".startswith(f"{place.path.rstrip('/')}/")
        if inside and type(output.root.fs) is type(place.fs):
            raise ConfigError(
                f"the output {config.output!r} lies inside the input {uri!r}, where its files would be taken for images: "
                "choose an output beside it"
            )


def _job_of(config: CaptionConfig, model_id: str, sources: list[Source]) -> dict[str, Any]:
    """What an output is bound to, but for the precision."""
    source_type = sources[0].source_type
    return {
        "schema_version": SCHEMA_VERSION,
        "model_id": model_id,
        "decoding": config.subset(Decoding).model_dump(),
        "kept_columns": {} if source_type is None else {field.name: str(field.type) for field in source_type},
        "attention": config.attention,
        "shard": config.shard,
    }


def check_job(config: CaptionConfig, output: Output, model_id: str, sources: list[Source]) -> dict[str, Any] | None:
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
    now = _job_of(config, model_id, sources)
    changed = [
        f"{name}: {job['decoding'].get(name)} -> {value}"
        for name, value in now["decoding"].items()
        if job["decoding"].get(name) != value
    ]
    for name, default in (("kept_columns", {}), ("attention", False), ("shard", None)):
        if (job.get(name) or default) != now[name]:
            changed.append(f"{name}: {job.get(name)} -> {now[name]}")
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
        sources: list[Source],
    ):
        self.config, self.output, self.preprocessing = config, output, preprocessing
        self.signals, self.display, self.sources = signals, display, sources
        self.source_type = sources[0].source_type
        run_id = f"{datetime.now(UTC):%Y%m%dT%H%M%S}-{secrets.token_hex(4)}"
        self.summary = Summary(output.root.uri, run_id, model_id)
        self.writer = PartWriter(
            output,
            run_id,
            config.part_rows,
            config.part_seconds,
            lease.check,
            source_type=self.source_type,
            attention=config.attention,
        )
        self.listing = Listing(output, sources, config, config.relist)
        self.plan = Plan(output, run_id, self.listing, retried_kinds(config))
        self.results: Counter[str] = Counter()
        self.example = ""
        self.recent: deque[str] = deque(maxlen=RATE_WINDOW)
        self.tar_attempts: Counter[str] = Counter()
        self.tar_faults: dict[str, str] = {}
        self.started = time.monotonic()
        self.seconds_in_passes = 0.0
        self._shipment: Shipment | None = None

    def caption(self) -> Summary:
        try:
            self.plan.remove_others()
            with self.listing:
                self._caption_while_listing()
                self._count()
                self._settle()
            if self.listing.is_complete and not self.summary.left:
                self.listing.remove()
            self.summary.status = "complete"
            self._record()
        except BaseException as error:
            self._save_what_is_held(error)
            raise
        finally:
            self.plan.remove()
        return self.summary

    def _caption_while_listing(self) -> None:
        """Caption what is listed so far, wave by wave, until all is listed and has been attempted."""
        if self.listing.resumed_at is not None:
            listed_at = datetime.fromtimestamp(self.listing.resumed_at, UTC)
            self.display.say(
                f"going on with the listing begun at {listed_at:%Y-%m-%d %H:%M} UTC ({self.listing.num_rows:,} images so "
                "far); --relist lists anew"
            )
        taken = 0
        with self.output.connect() as connection:
            (self.summary.captioned_before,) = first_row(connection, "SELECT count(*) FROM captions")
        while True:
            while not self.listing.wait(taken, 0.5):
                self.signals.check()
                rows, rate = self.listing.num_rows, self.listing.keys_per_second
                self.display.update(0, f"{rows:,} images listed  {rate:,.0f}/s", "listing")
            self.signals.check()
            is_complete, chunks = self.listing.is_complete, self.listing.chunks()
            fresh, taken = chunks[taken:], len(chunks)
            if fresh and self._room():
                self._caption(
                    self.plan.fresh([*fresh, *self._members()], self.block_rows, self._room_left()), "captioning"
                )
            if not self._room() or (is_complete and taken == len(self.listing.chunks())):
                return

    def _members(self) -> list[Any]:
        return [] if self.summary.passes else self.listing.member_chunks()

    @property
    def block_rows(self) -> int:
        """Images of a block: not more than an actor should hold, and on a CPU, which is slow, a batch."""
        side = self.preprocessing.size
        fitting = max(1, MAX_BLOCK_BYTES // (3 * side * side))
        return min(MAX_BLOCK_ROWS, fitting, self.config.batch_size)

    def _room_left(self) -> int | None:
        return None if self.config.limit is None else max(0, self.config.limit - self.results.total())

    def _room(self) -> bool:
        return self._room_left() != 0

    def _count(self) -> None:
        wanted = self.plan.count_wanted()
        if not wanted.images and not self.tar_attempts and not self.listing.faults:
            raise ConfigError(f"there are no images at {', '.join(map(repr, self.config.inputs))}" + self._of_split())
        self.summary.hidden_files = self.listing.num_hidden
        self.summary.images, self.summary.duplicates = wanted.images, wanted.duplicates

    def _of_split(self) -> str:
        return f" in split {self.config.split!r}" if self.config.split else ""

    def _caption(self, work: Work, doing: str) -> None:
        if not work.num_units:
            return
        self.summary.passes += 1
        actors, precision = self.actors, self.precision
        self._record()
        tars = f" and {work.num_tars:,} tar shards" if work.num_tars else ""
        listed = "" if self.listing.is_complete else " (listing goes on)"
        self.display.say(
            f"{doing} {work.num_images:,} images{tars} with {actors.number} actor{'s' if actors.number > 1 else ''}, "
            f"{precision}{listed}"
        )
        self._pass(work)

    @cached_property
    def actors(self) -> _Actors:
        """The pool; asking for it connects to Ray."""
        config = self.config
        self.display.update(0, "", "starting Ray")
        cluster.connect()
        cpus, gpus = cluster.cluster_resources()
        gpus_per_actor = cluster.gpus_each(config.gpus_per_actor)
        number = config.num_actors
        if number is None:
            fitting = gpus / gpus_per_actor if gpus_per_actor else (cpus - 1) / config.threads_per_actor
            number = max(1, int(fitting))
        cluster.share_cpus(number, config.threads_per_actor, gpus_per_actor, self.display.say)
        return _Actors(number, gpus_per_actor, config.threads_per_actor)

    @cached_property
    def precision(self) -> str:
        """The precision the job runs with: resolved once, and kept in job.json, which is written where there is none."""
        job = check_job(self.config, self.output, self.summary.model_id, self.sources)
        if job is not None:
            return job["precision"]
        precision = cluster.resolved_precision(self.config.precision, self.actors.gpus > 0)
        job = _job_of(self.config, self.summary.model_id, self.sources)
        job |= {"precision": precision, "preprocessing": self.preprocessing.model_dump(mode="json")}
        write_atomic(self.output.job, json.dumps(job, indent=2).encode(), self.output.scratch)
        return precision

    def _record(self) -> None:
        """Write runs/<run_id>.json as things stand."""
        summary, writer = self.summary, self.writer
        summary.captions, summary.failures, summary.parts = writer.num_captions, dict(writer.failures), writer.num_parts
        summary.seconds = time.monotonic() - self.started
        done = summary.captions + sum(summary.failures.values())
        summary.images_per_second = done / self.seconds_in_passes if self.seconds_in_passes else 0.0
        record = {**asdict(summary), "inputs": self.config.inputs, "updated_at": datetime.now(UTC).isoformat()}
        place = self.output.runs.join(f"{summary.run_id}.json")
        write_atomic(place, json.dumps(record, indent=2).encode(), self.output.scratch)

    def _settle(self) -> None:
        """Attempt once more what is not settled, remove what stands twice, and account for every id."""
        for _ in range(MAX_PASSES - 1):
            if not self._room():
                break
            given_up = {uri for uri, count in self.tar_attempts.items() if count >= ATTEMPTS_PER_RUN}
            work = self.plan.remaining(self.block_rows, self._room_left(), frozenset(given_up))
            if not work.num_units:
                break
            self._caption(work, "once more:")
        self.writer.before_publish()
        remove_duplicates(self.output)
        self._count()
        lost, names = self.plan.unaccounted()
        unread = self.plan.unread_tars()
        if self._room() and lost:
            raise CaprayError(
                f"{lost} images have neither a caption nor a failure after {self.summary.passes} passes: "
                f"{', '.join(names)}{' …' if lost > len(names) else ''}; run the same command again"
            )
        untried = [uri for uri in unread if uri not in self.tar_attempts]
        self.summary.left = lost + len(untried) + (not self.listing.is_complete)
        with self.output.connect() as connection:
            kinds = connection.execute("SELECT error_type, count(*) FROM failures GROUP BY ALL ORDER BY ALL").fetchall()
        self.summary.current_failures = dict(kinds)
        faults = self.listing.faults | {uri: self.tar_faults[uri] for uri in unread if uri in self.tar_faults}
        if faults:
            some = "; ".join(f"{uri}: {reason}" for uri, reason in list(faults.items())[:5])
            raise CaprayError(
                f"all else is done, but {len(faults)} files of the input cannot be read: {some}; mend them and run the same "
                "command again, or leave them out with --exclude"
            )
        if self.results["captioned"] == 0 and self.results.total() and self._all_passing(self.results):
            raise CaprayError(
                f"no image could be captioned, all {self.results.total()} attempts failed, {self._kinds()}: {self.example}"
            )

    def _all_passing(self, counts: Counter[str]) -> bool:
        return all(kind in TRANSIENT_FAILURES for kind in counts)

    def _kinds(self) -> str:
        ((kind, count),) = Counter(
            {kind: count for kind, count in self.results.items() if kind != "captioned"}
        ).most_common(1)
        return f"{count} of them as {kind}"

    def _pass(self, work: Work) -> None:
        started, before = time.monotonic(), self.seconds_in_passes
        done = 0
        with _streamed(self._dataset(work)) as tables:
            for row in tables:
                self.seconds_in_passes = before + time.monotonic() - started
                if row is None:
                    self._publish(self.writer.tick)
                else:
                    table = unpack(row)
                    assert table is not None
                    done += table.num_rows
                    self._take(table)
                    self._take_tar(row)
                self.signals.check()
                rate = done / (time.monotonic() - started)
                failed = ", ".join(f"{n:,} {kind}" for kind, n in sorted(self.results.items()) if kind != "captioned")
                of = "" if work.num_tars else f"/{work.num_images:,}"
                figures = f"{done:,}{of} images  {rate:.1f} images/s  {failed or 'none'} failed"
                if not self.listing.is_complete:
                    figures += f"  {self.listing.num_rows:,} listed"
                self.display.update(done, figures, "captioning", None if work.num_tars else work.num_images)
        self.writer.flush()
        self.seconds_in_passes = before + time.monotonic() - started

    def _take(self, table: pa.Table) -> None:
        if not table.num_rows:
            return
        kinds = ["captioned" if kind is None else kind for kind in table["error_type"].to_pylist()]
        self.results.update(kinds)
        self.recent.extend(kinds)
        self._publish(lambda: self.writer.add(table))
        failed = table.filter(table["error_type"].is_valid())
        if failed.num_rows:
            self.example = failed["message"][0].as_py()
            self._judge()

    def _judge(self) -> None:
        """Stop when the failures tell of a fault that is not the images'."""
        total = self.results.total()
        if total < HOPELESS_AFTER:
            return
        if not self.results["captioned"]:
            raise CaprayError(f"the first {total} images all failed, {self._kinds()}: {self.example}")
        recent = Counter(self.recent)
        limits = (
            ("max_failure_rate", self.config.max_failure_rate, TRANSIENT_FAILURES),
            ("max_bad_images", self.config.max_bad_images, FINAL_FAILURES),
        )
        for name, limit, kinds in limits:
            failed = sum(recent[kind] for kind in kinds)
            if limit is not None and failed > limit * recent.total():
                raise CaprayError(
                    f"{failed:,} of the last {recent.total():,} images failed, above {name} {limit:g}: {self.example}; what "
                    "was done is kept, and the same command goes on"
                )

    def _take_tar(self, row: pa.Table) -> None:
        container = row["container"][0].as_py()
        if container is None:
            return
        self.tar_attempts[container] += 1
        members = unpack(row, "members")
        if members is None:
            self.tar_faults[container] = row["fault"][0].as_py()
        else:
            self.listing.add_members(row["input"][0].as_py(), container, members)

    def _publish(self, write: Callable[[], None]) -> None:
        """Let the writer do something, and refresh the run's record if it published a part."""
        parts = self.writer.num_parts
        write()
        if self.writer.num_parts > parts:
            self._record()

    def _dataset(self, work: Work):
        import ray.data

        # A block of ours is a row of Ray's: each is to come out of a task by itself.
        ray.data.DataContext.get_current().target_max_block_size = 1
        config, actors = self.config, self.actors
        fetcher = Fetcher(
            work,
            tuple(source.image_column for source in self.sources),
            tuple(source.selection for source in self.sources),
            self.preprocessing,
            config.subset(ImageLimits),
            config.fetch_concurrency,
            self.source_type,
        )
        units = ray.data.range(work.num_units, override_num_blocks=work.num_units)
        fetched = units.map_batches(
            fetch_unit,  # ty: ignore[invalid-argument-type]
            batch_size=1,
            batch_format="pyarrow",
            fn_kwargs={"fetcher": fetcher},
            num_cpus=FETCH_CPUS,
        )
        arguments = (
            config.model,
            self.summary.model_id,
            config.subset(Decoding),
            self.precision,
            config.attention,
            config.batch_size,
            actors.gpus > 0,
            actors.threads,
        )
        if self._shipment is None:
            self._shipment = ship(config.model, self.summary.model_id)
        return fetched.map_batches(
            CaptioningActor,
            batch_size=1,
            batch_format="pyarrow",
            fn_constructor_args=(arguments, self.source_type, self._shipment),
            num_cpus=actors.threads,
            num_gpus=actors.gpus or None,
            compute=ray.data.ActorPoolStrategy(size=actors.number, max_tasks_in_flight_per_actor=MAX_IN_FLIGHT),
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
