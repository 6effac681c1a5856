"""What a captioning job would do: the inputs listed, less what is done, and a few images timed. Writes nothing to the
output and starts no Ray."""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass

from capray import cluster
from capray.captioning.actor import Captioning, CaptioningSettings
from capray.captioning.fetching import Fetcher
from capray.captioning.opening import OpenedJob, open_job
from capray.captioning.plan import Plan
from capray.captioning.rows import table_of
from capray.captioning.run import retried_kinds
from capray.captioning.settled import Settled
from capray.captioning.units import Work, block_rows_of, read_units
from capray.config import CaptionConfig, Decoding, ImageLimits
from capray.inputs import Source
from capray.inputs.listing import Listing
from capray.inputs.places import PLACES
from capray.inputs.reader import Reader
from capray.output import Output, create_view
from capray.progress import ProgressDisplay, duration
from capray.storage import locate, write_atomic
from capray.wording import counted

SAMPLE_IMAGES = 32
_RUN_ID = "dry-run"


@dataclass(frozen=True)
class InputPlan:
    """What is to be done of one input; ``bytes`` as far as the listing tells."""

    uri: str
    kind: str
    listed: int
    to_do: int
    unread_tars: int
    reads: int
    bytes: int


@dataclass(frozen=True)
class DryRun:
    """What a run would do. ``images_per_second`` is of one actor on this machine's CPU; 0 when nothing could be timed."""

    inputs: list[InputPlan]
    duplicates: int
    parts: int
    images_per_second: float

    def text(self) -> str:
        lines = []
        for plan in self.inputs:
            tars = f" and {counted(plan.unread_tars, 'tar shard')} not read yet" if plan.unread_tars else ""
            size = f", {plan.bytes / 1e9:,.2f} GB" if plan.bytes else ""
            lines.append(
                f"{plan.uri} ({plan.kind}): {counted(plan.listed, 'image')} listed, {plan.to_do:,} to do{tars}; "
                f"{counted(plan.reads, 'GET')}{size}"
            )
        if self.duplicates:
            lines.append(f"{counted(self.duplicates, 'row')} with a repeated image id")
        lines.append(f"{counted(self.parts, 'part')} of captions")
        if self.images_per_second:
            seconds = sum(plan.to_do for plan in self.inputs) / self.images_per_second
            lines.append(
                f"{duration(seconds)} with one actor on this machine's CPU ({self.images_per_second:.1f} images/s in a "
                "short measurement)"
            )
        return "\n".join([*lines, "nothing was written"])


def dry_run(config: CaptionConfig) -> DryRun:
    """List the inputs and plan a run; raises what ``job.caption`` raises before it starts."""
    job = open_job(config)
    config, output, sources = job.config, job.output, job.sources
    with tempfile.TemporaryDirectory() as folder, ProgressDisplay("listing") as display:
        output.plan = locate(f"{folder}/plan")
        listing = Listing(output.plan, _RUN_ID, sources, config, write_atomic)
        with Settled(output, _RUN_ID, retried_kinds(config)) as settled, listing:
            plan = Plan(output, _RUN_ID, listing, settled, write_atomic)
            while not listing.is_complete:
                listing.wait(len(listing.chunks()), 0.5)
                display.update(0, f"{counted(listing.num_rows, 'image')} listed", "listing")
            block_rows = block_rows_of(job.preprocessing.size, config.batch_size)
            work = plan.remaining(block_rows, config.limit)
            inputs = _by_input(output, listing, work, sources)
            rate = _rate(job, work, block_rows)
            duplicates = plan.count_wanted().duplicates
    by_rows = -(-work.num_images // config.part_rows)
    by_time = int(work.num_images / rate / config.part_seconds) if rate else 0
    return DryRun(inputs, duplicates, max(by_rows, by_time), rate)


def _by_input(output: Output, listing: Listing, work: Work, sources: list[Source]) -> list[InputPlan]:
    with output.connect((), output.plan) as connection:
        create_view(connection, "listed", listing.chunks(), PLACES)
        create_view(connection, "units", work.files, PLACES)
        listed = dict(
            connection.execute(
                "SELECT input, count(DISTINCT image_id) FROM listed WHERE kind <> 'tar' GROUP BY 1"
            ).fetchall()
        )
        to_do = {
            number: figures
            for number, *figures in connection.execute("""
                SELECT input, count(*) FILTER (kind <> 'tar'), count(*) FILTER (kind = 'tar'),
                       count(*) FILTER (kind = 'object')
                         + count(DISTINCT (container, row_group)) FILTER (kind <> 'object'),
                       coalesce(sum(size), 0)
                FROM units GROUP BY 1
            """).fetchall()
        }
    return [
        InputPlan(source.place.uri, source.kind, listed.get(i, 0), *map(int, to_do.get(i, (0, 0, 0, 0))))
        for i, source in enumerate(sources)
    ]


def _rate(job: OpenedJob, work: Work, block_rows: int) -> float:
    """Images per second of one actor here, over the first few images that can be read."""
    if not work.num_units:
        return 0.0
    config, sources = job.config, job.sources
    reader = Reader.of(sources, config.subset(ImageLimits), config.fetch_concurrency, config.patience_seconds)
    fetcher = Fetcher(reader, job.preprocessing, block_rows, _RUN_ID, source_type=sources[0].source_type)
    precision = cluster.resolved_precision(config.precision, on_gpu=False)
    decoding, together = config.subset(Decoding), 1 if config.deterministic else 8
    captioning = Captioning(
        CaptioningSettings(config.model, job.model_id, decoding, precision, False, together, False, config.threads_per_actor)
    )
    unit = next(iter(read_units(work.files[0])))
    started = time.monotonic()
    block = table_of(next(fetcher.fetch(unit.places, unit.skipped)))
    rows = [row for row in block.slice(0, SAMPLE_IMAGES).to_pylist() if row["pixels"] is not None]
    fetch_seconds = (time.monotonic() - started) * len(rows) / max(1, block.num_rows)
    started = time.monotonic()
    captioning(rows)
    return len(rows) / max(fetch_seconds, time.monotonic() - started, 1e-9) if rows else 0.0
