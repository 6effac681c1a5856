"""One run of the captioning job, on an output it holds the lease of.

What is listed is captioned in waves while the listing goes on; then what is left, in a few passes; then the parts are listed
afresh and every wanted id is accounted for. Knows nothing of Ray: an ``Executor`` runs the passes.
"""

from __future__ import annotations

import json
import time
from collections import Counter, deque
from contextlib import suppress
from datetime import UTC, datetime
from functools import cached_property
from typing import Any

import pyarrow as pa

from capray import cluster
from capray.captioning.actor import CaptioningSettings
from capray.captioning.breaker import Breaker
from capray.captioning.failure_limits import FailureLimits
from capray.captioning.fetching import Fetcher, Look
from capray.captioning.lease import Lease
from capray.captioning.opening import OpenedJob
from capray.captioning.plan import Plan
from capray.captioning.record import RunRecord, Summary
from capray.captioning.rows import events_of, table_of
from capray.captioning.second_looks import AS_TRANSIENT, SecondLooks
from capray.captioning.settled import ATTEMPTS_PER_RUN, Settled
from capray.captioning.signals import Signals
from capray.captioning.stream import Executor, Stalled
from capray.captioning.units import Work, block_rows_of
from capray.captioning.writer import FencedWrites, PartWriter
from capray.config import CaptionConfig, Decoding, ImageLimits
from capray.errors import CaprayError, ConfigError, DataError, Interrupted, TryAgain
from capray.inputs.base import Changed, Event, LeftOut, TarMembers, TarUnreadable
from capray.inputs.listing import Listing
from capray.inputs.reader import Reader
from capray.output import first_row
from capray.progress import ProgressDisplay
from capray.tables import FINAL_FAILURES
from capray.wording import counted

MAX_WAVES = 5
"""At most this many passes while the listing goes on; the last waits for its end."""
WAVE_GROWTH = 4
"""A wave waits until the listing is this many times what was planned before: every wave restarts the actors."""
MAX_PASSES = 3
"""At most this many passes over what is left."""
MAX_CAREFUL = 10_000
"""Ids held of images that have killed a captioning process; what is beyond them is found out again."""
WITNESS_SECONDS = 120.0
"""How long looking at witnesses may take."""


class Run:
    """One run.

    Args:
        signals: tell when the run is to stop.
    """

    def __init__(
        self, job: OpenedJob, run_id: str, lease: Lease, signals: Signals, display: ProgressDisplay, executor: Executor
    ):
        self.job, self.signals, self.display, self.executor = job, signals, display, executor
        self.config, self.output = config, output = job.config, job.output
        sources = job.sources
        self.bound_to = job.bound_to()
        self.write = FencedWrites(output, lease)
        self.summary = Summary(output.root.uri, run_id, job.model_id)
        self.source_type = sources[0].source_type
        self.listing = Listing(output.plan, run_id, sources, config, self.write, config.relist)
        self.settled = Settled(output, run_id, retried_kinds(config))
        self.plan = Plan(output, run_id, self.listing, self.settled, self.write)
        self.limits = FailureLimits(config.max_failure_rate, config.max_bad_images)
        self.breaker = Breaker()
        self.looks = SecondLooks(config.second_look_seconds)
        self.record = RunRecord(
            self.write, output, run_id, _told(config), [source.kind for source in sources], self._summary
        )
        self.started = time.monotonic()
        self.seconds_in_passes = 0.0
        self.num_done = 0
        self._careful: set[str] = set()
        self._careful_from = 0.0
        self._witness_looks: deque[Look] = deque()
        self._changed: set[tuple[int, str]] = set()
        self._unread_tars: Counter[str] = Counter()
        self._faults: dict[str, CaprayError] = {}
        self._faults_of_tars: dict[str, CaprayError] = {}
        self._last_notices = 0.0
        self._is_saved = False

    def caption(self) -> Summary:
        """Do all that is to be done; raises what ``job.caption`` raises."""
        with self.settled, self.listing, self.record:
            try:
                with self.signals.interrupting():
                    self._begin()
                self._follow_listing()
                self._work_off()
                try:
                    self.writer.flush()
                    with self.signals.interrupting():
                        self._account()
                except CaprayError:
                    # The next run is to find new images whatever this one could not read.
                    if self.listing.is_complete and self._room_left() is None:
                        self.listing.close()
                    raise
                if self.listing.is_complete and not self.summary.left:
                    self.listing.close()
                # Nothing was captioned yet, as of an empty shard; or somebody has removed the file.
                if "precision" not in self.bound_to or self.output.read_job() is None:
                    self._bind()
                self.summary.status = "complete"
                self.record.write()
            except BaseException as error:
                self._save_what_is_held(error)
                raise
            finally:
                self.executor.close()
                if writer := self._built_writer():
                    writer.close()
        return self.summary

    def _begin(self) -> None:
        if num := self.settled.remove_duplicates(self.write):
            self.display.say(_removed(num))
        self.summary.captioned_before = self.settled.num_captions
        self.limits.has_captions = self.settled.num_captions > 0
        if self.listing.resumed_at is not None:
            listed_at = datetime.fromtimestamp(self.listing.resumed_at, UTC)
            self.display.say(
                f"going on with the listing begun at {listed_at:%Y-%m-%d %H:%M} UTC "
                f"({counted(self.listing.num_rows, 'image')} so far); --relist starts over"
            )
        if self.config.batch_size is not None and self.block_rows < self.config.batch_size:
            self.display.say(
                f"--batch-size {self.config.batch_size}: of this model's images only {self.block_rows} fit into a block and "
                "are captioned together"
            )
        for remark in self.listing.remarks:
            self.display.say(remark)
        self.plan.versions.record(self.summary.run_id, self.write)

    @cached_property
    def writer(self) -> PartWriter:
        with self.output.connect(("failure_log",)) as connection:
            (newest,) = first_row(connection, "SELECT coalesce(max(epoch_us(failed_at)), 0) FROM failure_log")
        config = self.config
        return PartWriter(
            self.output,
            self.summary.run_id,
            config.part_rows,
            config.part_seconds,
            self.write,
            newest,
            source_type=self.source_type,
            attention=config.attention,
        )

    def _built_writer(self) -> PartWriter | None:
        """The writer, if it was needed so far: the run's own thread builds it, the heartbeat does not, nor does an end."""
        return self.__dict__.get("writer")

    # Waves and passes.

    def _follow_listing(self) -> None:
        """Caption what is listed so far, wave by wave, until all is listed and has been attempted."""
        taken = planned = waves = 0
        while True:
            self._wait_for_wave(taken, planned if waves < MAX_WAVES - 1 else None)
            chunks = self.listing.chunks()
            fresh, taken = chunks[taken:], len(chunks)
            if fresh and self._room_left() != 0:
                waves, planned = waves + 1, self.listing.num_rows
                with self.signals.interrupting():
                    work = self.plan.fresh(fresh, self.block_rows, self._room_left())
                self._caption(work, "captioning")
            # A pass may have found that there is more to list.
            if self._room_left() == 0 or (self.listing.is_complete and taken == len(self.listing.chunks())):
                return

    def _wait_for_wave(self, taken: int, planned: int | None) -> None:
        """Wait until enough is listed beyond ``planned`` images and ``taken`` chunks for another wave; until all is listed
        when it is None."""
        while True:
            more = self.listing.wait(taken, 0.2)
            enough = planned is not None and self.listing.num_rows >= WAVE_GROWTH * planned
            if more and (enough or self.listing.is_complete):
                return
            rows, rate = self.listing.num_rows, self.listing.keys_per_second
            self._watch(f"{counted(rows, 'image')} listed  {rate:,.0f}/s", "listing")
            if more:
                time.sleep(0.2)  # `wait` returns at once.

    def _work_off(self) -> None:
        """Attempt once more what is neither captioned nor settled as failed."""
        passes_left = MAX_PASSES if self.config.limit is None else MAX_WAVES + MAX_PASSES
        while passes_left:
            self._await_second_looks()
            if self._room_left() == 0:
                return
            given_up = {uri for uri, count in self._unread_tars.items() if count >= ATTEMPTS_PER_RUN}
            with self.signals.interrupting():
                given_up |= self._faults.keys()
                work = self.plan.remaining(self.block_rows, self._room_left(), frozenset(given_up))
            if not work.num_units and self.listing.is_complete:
                self._relist_rewritten()
                if self.listing.is_complete:
                    return
                self._follow_listing()
                continue
            num_done, num_known = self.num_done, len(self.listing.known_tars)
            self._caption(work, "retrying")
            self.listing.flush()
            # How often a container is listed again has a limit of its own, and tars that are done are read once each.
            only_read = self.num_done == num_done and len(self.listing.known_tars) > num_known
            if not self._changed and not only_read:
                passes_left -= 1
            if not self.listing.is_complete:
                self._follow_listing()

    def _relist_rewritten(self) -> None:
        """List lists of URIs again that were rewritten since."""
        self._changed.clear()
        with self.signals.interrupting():
            rewritten = self.listing.rewritten_lists()
        for key in rewritten:
            if key[1] not in self._faults:
                self._take_event(Changed(*key))

    @property
    def block_rows(self) -> int:
        return block_rows_of(self.job.preprocessing.size, self.config.batch_size)

    def _room_left(self) -> int | None:
        limit = self.config.limit
        return None if limit is None else max(0, limit - self.limits.results.total())

    def _caption(self, work: Work, doing: str) -> None:
        """A pass over ``work``."""
        if not work.num_units:
            return
        self.summary.passes += 1
        self._changed.clear()
        self.display.update(0, "", "starting Ray")
        with self.signals.interrupting():
            pool, settings = self.executor.pool.for_work(work), self._settings()
            self.plan.versions.record_changed(self.listing.versions_listed_again(), self.summary.run_id, self.write)
        self.record.write()
        tars = f" and {counted(work.num_tars, 'tar shard')}" if work.num_tars else ""
        listed = "" if self.listing.is_complete else " (listing goes on)"
        self.display.say(
            f"{doing} {counted(work.num_images, 'image')}{tars} with {counted(pool.num_actors, 'actor')}, "
            f"{settings.precision}{listed}"
        )
        started, before, done_before = time.monotonic(), self.seconds_in_passes, self.num_done
        with self.executor.tables(work, self.fetcher, settings) as tables:
            try:
                for row in tables:
                    if row is not None:
                        self._take(row)
                    seconds = time.monotonic() - started
                    self.seconds_in_passes = before + seconds
                    self._show(work, self.num_done - done_before, seconds)
                self.writer.flush()
            except Stalled:
                self.display.say("blocks were left waiting for actors of lost nodes: planning again")
                self.writer.flush()
            except BaseException as error:
                self._save_what_is_held(error)
                raise

    @property
    def fetcher(self) -> Fetcher:
        """What fetches as things are known now: listing finds mounts, and images that kill processes turn up."""
        config = self.config
        limits = config.subset(ImageLimits)
        return Fetcher(
            Reader.of(self.job.sources, limits, config.fetch_concurrency, config.patience_seconds),
            self.job.preprocessing,
            self.block_rows,
            self.summary.run_id,
            frozenset(self._careful),
            self.source_type,
        )

    def _settings(self) -> CaptioningSettings:
        config = self.config
        return CaptioningSettings(
            config.model,
            self.summary.model_id,
            config.subset(Decoding),
            self.precision,
            config.attention,
            1 if config.deterministic else config.batch_size,
            self.executor.pool.gpus_per_actor > 0,
            self.executor.pool.threads,
            source_type=self.source_type,
            run_id=self.summary.run_id,
            patience_seconds=config.patience_seconds,
            canary=self.job.canary,
        )

    @cached_property
    def precision(self) -> str:
        """The precision the job runs with: resolved once, and kept in job.json, which is written where there is none."""
        if "precision" not in self.bound_to:
            precision = cluster.resolved_precision(self.config.precision, self.executor.pool.gpus_per_actor > 0)
            self.bound_to |= {"precision": precision}
            self._bind()
        return self.bound_to["precision"]

    def _bind(self) -> None:
        """Write to which job the output belongs."""
        self.write(self.output.job, json.dumps(self.bound_to, indent=2).encode())

    # What comes out of a pass.

    def _take(self, row: pa.Table) -> None:
        for event in events_of(row):
            self._take_event(event)
        table = table_of(row)
        if not table.num_rows:
            return
        self.num_done += table.num_rows
        kinds = table["error_type"].to_pylist()
        messages = table["message"].to_pylist()
        self.limits.add(kinds, next((m for m in reversed(messages) if m), ""))
        self.breaker.add(table, self.limits.is_healthy)
        self.writer.add(self._with_uncertain_as_transient(table, kinds, messages))
        if any(kinds):
            if self.limits.has_tripped:
                self._look_at_witnesses()
            try:
                self.limits.check()
            except CaprayError:
                # Or the next run would begin with the same images, and end as this one.
                if self.looks.num_open:
                    self.display.say("too many images fail: looking again at those that failed once, and then stopping")
                    self._await_second_looks()
                raise

    def _take_event(self, event: Event) -> None:
        if isinstance(event, Changed):
            key = (event.input, event.container)
            if key in self._changed:
                return  # Another unit of this pass, planned when that was.
            self._changed.add(key)
            if self.listing.relist(event.input, event.container):
                self.display.say(f"{event.container} has changed since it was listed: listing it again")
            else:
                self._faults[event.container] = TryAgain("it changes again and again while it is read")
            return
        if isinstance(event, TarUnreadable):
            self._unread_tars[event.container] += 1
            self._faults_of_tars[event.container] = DataError(event.message)
        elif isinstance(event, TarMembers):
            self.listing.add_members(event)
        elif isinstance(event, LeftOut):
            self.listing.add_left_out(event)

    def _with_uncertain_as_transient(self, table: pa.Table, kinds: list, messages: list) -> pa.Table:
        """``table`` with failures that have to be seen again under transient kinds; a second look at them is planned."""
        certain, places = table["certain"].to_pylist(), table["place"].to_pylist()
        uncertain = [i for i, kind in enumerate(kinds) if kind in AS_TRANSIENT and certain[i] is False]
        if not uncertain:
            return table
        for i in uncertain:
            if kinds[i] == "crashed":
                self._take_care_of(table["image_id"][i].as_py())
            if places[i] is not None:
                node, sha256 = (table[name][i].as_py() for name in ("node", "sha256"))
                self.looks.add(json.loads(places[i]), node or "", kinds[i], sha256)
            messages[i] = f"{kinds[i]}, to be looked at again: {messages[i]}"
            kinds[i] = AS_TRANSIENT[kinds[i]]
        for name, values in (("error_type", kinds), ("message", messages)):
            index = table.column_names.index(name)
            table = table.set_column(index, table.field(index), pa.array(values, pa.string()))
        return table

    def _take_care_of(self, image_id: str) -> None:
        if len(self._careful) < MAX_CAREFUL:
            self._careful.add(image_id)
            self._careful_from = time.monotonic() + self.looks.seconds

    # Second looks, and witnesses.

    def _take_looks(self) -> None:
        """Begin the second looks that are due, and take those that have ended."""
        for batch in self.looks.due():
            self.executor.look(batch.places, batch.node, self.fetcher)
        finals = []
        for look in self.executor.looks():
            if not self.looks.is_asked(look):
                self._witness_looks.append(look)
            elif row := self.looks.take(look):
                finals.append(row)
        if finals:
            self.writer.add_failures(finals)
            self.breaker.add_finals(finals)
        self.summary.second_looks = self.looks.num_taken

    def _await_second_looks(self) -> None:
        """Until all second looks were taken, and what killed a process may be tried again."""
        while (waiting := self.looks.num_open) or (self._careful and time.monotonic() < self._careful_from):
            self._watch(counted(waiting or len(self._careful), "image"), "looking again at")
            time.sleep(0.1)
        self.writer.flush()

    def _look_at_witnesses(self) -> None:
        """All of a sudden images fail: when those that could be read before no longer can, the fault is not the images'.

        Raises:
            TryAgain: it is not; what was recorded against images is superseded.
        """
        self.display.say("images fail all of a sudden: looking at images that could be read before")
        self.executor.look(self.breaker.ask(), "", self.fetcher)
        deadline = time.monotonic() + WITNESS_SECONDS
        while (witness := self.breaker.waits_for) and time.monotonic() < deadline:
            self._take_looks()
            while self._witness_looks:
                if fault := self.breaker.answer(self._witness_looks.popleft()):
                    self._take_back(fault)
            self._watch("", "looking at images that could be read before")
            time.sleep(0.05)
        if witness:
            self._take_back(f"{witness}: no answer in {WITNESS_SECONDS:g} s")
        self.display.say("images read earlier are still readable, so the failing images are really bad: going on")
        self.limits.reset()

    def _take_back(self, fault: str) -> None:
        """Supersede what was recorded against images, and stop."""
        why = f"the run stopped, since images that could be read before no longer could be ({fault})"
        self.writer.add_failures(self.breaker.taken_back(why))
        self.writer.flush()
        raise TryAgain(
            f"images failed all of a sudden ({self.limits.example}), and {why}: mend the disk, mount or device and run the "
            "same command again; nothing final was recorded against these images"
        )

    # The account.

    def _account(self) -> None:
        """Remove what stands twice, account for every id, and say what could not be read."""
        num_removed = self.settled.remove_duplicates(self.write)
        if num_removed:
            self.display.say(_removed(num_removed))
            self.writer.num_captions = self.settled.num_captions_of(self.summary.run_id)
            self.summary.captioned_before = self.settled.num_captions - self.writer.num_captions
        wanted = self.plan.count_wanted()
        unread = self.plan.unread_tars()
        if not (wanted.images or unread or self.listing.faults or self.config.shard):
            split = f" in split {self.config.split!r}" if self.config.split else ""
            globs = " that --include and --exclude choose" if self.config.include or self.config.exclude else ""
            raise ConfigError(f"there are no images at {', '.join(map(repr, self.config.inputs))}{split}{globs}")
        summary = self.summary
        summary.images, summary.duplicates, summary.kept = wanted.images, wanted.duplicates, wanted.kept
        summary.elsewhere, summary.first_elsewhere = wanted.elsewhere, wanted.first_elsewhere
        summary.hidden_files = self.listing.num_hidden
        summary.left_out = self.listing.count_left_out()
        summary.current_failures = self.plan.current_failures()
        faults = self.listing.faults | self._faults
        faults |= {uri: self._faults_of_tars[uri] for uri in unread if uri in self._faults_of_tars}
        lost, names = self.plan.unaccounted()
        if self._room_left() != 0 and lost and not self._faults:
            raise TryAgain(
                f"{counted(lost, 'image has', 'images have')} neither a caption nor a failure after "
                f"{counted(summary.passes, 'pass', 'passes')}: "
                f"{', '.join(names)}{' …' if lost > len(names) else ''}; run the same command again"
            )
        unread = [uri for uri in unread if uri not in faults]
        summary.left = lost + len(unread) + (not self.listing.is_complete)
        if faults:
            some = "; ".join(f"{uri}: {reason}" for uri, reason in list(faults.items())[:5])
            passes_by_itself = all(isinstance(reason, TryAgain) for reason in faults.values())
            raise (TryAgain if passes_by_itself else DataError)(
                f"{counted(len(faults), 'file or folder', 'files or folders')} of the input cannot be read: {some}; "
                f"{'all else is done; ' if self._room_left() is None else ''}mend that and run the same command again, or "
                "leave it out with --exclude"
            )
        if self._room_left() is None and not self.listing.is_complete:
            raise TryAgain("not all was listed: run the same command again")
        if unread and self._room_left() is None:
            raise TryAgain(
                f"{counted(len(unread), 'tar was not read to its end', 'tars were not read to their ends')} after "
                f"{counted(summary.passes, 'pass', 'passes')}: "
                f"{', '.join(unread[:10])}{' …' if len(unread) > 10 else ''}; run the same command again"
            )
        self.limits.check_any()
        may_be_all = sum(summary.current_failures.values()) >= wanted.images > 0
        failed = self.plan.wholly_failed() if may_be_all else {}
        if sum(failed.values()) >= wanted.images > 0:
            kind, count = next(iter(failed.items()))
            with self.output.connect() as connection:
                sql = f"SELECT message FROM failures WHERE error_type = '{kind}' ORDER BY failed_at DESC LIMIT 1"
                (message,) = first_row(connection, sql)
            raise CaprayError(
                f"no image could be captioned, all {wanted.images:,} have failed, {count:,} of them as {kind}: {message}"
            )

    # For whoever watches.

    def _watch(self, figures: str, doing: str) -> None:
        """Housekeeping while the run waits: signals, due parts, second looks, progress."""
        self._tick()
        self.display.update(0, figures, doing)

    def _show(self, work: Work, done: int, seconds: float) -> None:
        self._tick()
        of = "" if work.num_tars else f"/{work.num_images:,}"
        figures = f"{done:,}{of} images  {done / max(seconds, 1e-9):.1f} images/s  {self.limits.text()} failed"
        if self.looks.num_open:
            figures += f"  {self.looks.num_open:,} to look at again"
        if not self.listing.is_complete:
            figures += f"  {self.listing.num_rows:,} listed"
        doing = "captioning" if done else "waiting for the first captions"
        self.display.update(done, figures, doing, None if work.num_tars else work.num_images)

    def _tick(self) -> None:
        self.signals.check()
        if not self.summary.passes:
            return
        self.writer.tick()
        if self.looks.num_open:
            self._take_looks()
        if time.monotonic() - self._last_notices > 1:
            self._last_notices = time.monotonic()
            for text, count in Counter(self.executor.notices()).items():
                self.display.say(f"{text} (x{count})" if count > 1 else text)

    def _summary(self) -> Summary:
        """The summary as things stand."""
        summary = self.summary
        if writer := self._built_writer():
            summary.captions, summary.failures, summary.parts = (
                writer.num_captions,
                dict(writer.failures),
                writer.num_parts,
            )
        summary.seconds = time.monotonic() - self.started
        done = summary.captions + sum(summary.failures.values())
        summary.images_per_second = done / self.seconds_in_passes if self.seconds_in_passes else 0.0
        return summary

    def _save_what_is_held(self, error: BaseException) -> None:
        """Publish what was done before the run ended early, and say so in its record, as far as that is possible."""
        if self._is_saved:
            return
        self._is_saved = True
        is_stopped = isinstance(error, (Interrupted, KeyboardInterrupt))
        self.summary.status = "interrupted" if is_stopped else "failed"
        with suppress(CaprayError):
            if writer := self._built_writer():
                writer.flush()
        with suppress(CaprayError):
            self.record.write()
        if not is_stopped and not isinstance(error, ConfigError) and (place := self.record.keep_traceback(error)):
            self.display.say(f"how it came to this is in {place}")


def _removed(num: int) -> str:
    return f"{counted(num, 'duplicate caption')} removed (of ids in two inputs, or by a run that had lost its lease)"


def retried_kinds(config: CaptionConfig) -> tuple[str, ...]:
    """The final kinds of failure to attempt again."""
    return FINAL_FAILURES if config.retry_failed == () else config.retry_failed or ()


def _told(config: CaptionConfig) -> dict[str, Any]:
    """The settings that were given; without the tracking server, whose address may hold a password."""
    return config.model_dump(mode="json", exclude_defaults=True, exclude={"tracking_uri"})
