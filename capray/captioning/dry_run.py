"""What a captioning job would do: the inputs listed, less what is done, and a few images timed. Writes nothing to the
output and starts no Ray."""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass

from capray import cluster
from capray.captioning.actor import Captioning
from capray.captioning.fetching import Fetcher
from capray.captioning.job import MAX_BLOCK_ROWS, check_apart, check_job, localised, retried_kinds
from capray.captioning.plan import Plan, Work
from capray.captioning.rows import unpack
from capray.config import CaptionConfig, Decoding, ImageLimits, Preprocessing, SourceSettings
from capray.inputs import Source, open_sources
from capray.inputs.listing import Listing
from capray.model.checkpoint import load_captioner
from capray.output import Output, create_view
from capray.progress import ProgressDisplay, duration
from capray.storage import locate

SAMPLE_IMAGES = 32


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
class Rehearsal:
    """What a run would do. ``images_per_second`` is of one actor on this machine's CPU; 0 when nothing could be timed."""

    inputs: list[InputPlan]
    duplicates: int
    parts: int
    images_per_second: float

    def text(self) -> str:
        lines = []
        for plan in self.inputs:
            tars = f" and {plan.unread_tars:,} tar shards not read yet" if plan.unread_tars else ""
            size = f", {plan.bytes / 1e9:,.2f} GB" if plan.bytes else ""
            lines.append(
                f"{plan.uri} ({plan.kind}): {plan.listed:,} images listed, {plan.to_do:,} to do{tars}; "
                f"{plan.reads:,} GETs{size}"
            )
        if self.duplicates:
            lines.append(f"{self.duplicates:,} rows repeat an image id")
        lines.append(f"{self.parts:,} parts of captions")
        if self.images_per_second:
            seconds = sum(plan.to_do for plan in self.inputs) / self.images_per_second
            lines.append(
                f"{duration(seconds)} with one actor on this machine's CPU ({self.images_per_second:.1f} images/s in a "
                "short measurement)"
            )
        return "\n".join([*lines, "nothing was written"])


def rehearse(config: CaptionConfig) -> Rehearsal:
    """List the inputs and plan a run; raises what ``job.caption`` raises before it starts."""
    config = localised(config)
    assert config.output is not None
    captioner, model_id = load_captioner(config.model)
    preprocessing = captioner.architecture.subset(Preprocessing)
    del captioner
    output = Output(config.output)
    check_apart(config, output)
    sources = open_sources(config.inputs, config.subset(SourceSettings), config.keep)
    check_job(config, output, model_id, sources)
    with tempfile.TemporaryDirectory() as folder, ProgressDisplay("listing") as display:
        output.plan, output.scratch = locate(f"{folder}/plan"), locate(f"{folder}/scratch")
        listing = Listing(output, sources, config)
        plan = Plan(output, "dry-run", listing, retried_kinds(config))
        with listing:
            while not listing.is_complete:
                listing.wait(len(listing.chunks()), 0.5)
                display.update(0, f"{listing.num_rows:,} images listed", "listing")
            work = plan.remaining(min(config.batch_size, MAX_BLOCK_ROWS), config.limit)
            inputs = _by_input(output, listing, work, sources)
            rate = _rate(config, model_id, work, sources, preprocessing)
            duplicates = plan.count_wanted().duplicates
    by_rows = -(-work.num_images // config.part_rows)
    by_time = int(work.num_images / rate / config.part_seconds) if rate else 0
    return Rehearsal(inputs, duplicates, max(by_rows, by_time), rate)


def _by_input(output: Output, listing: Listing, work: Work, sources: list[Source]) -> list[InputPlan]:
    with output.connect(output.plan) as connection:
        create_view(connection, "listed", [*listing.chunks(), *listing.member_chunks()], listing.schema)
        create_view(connection, "units", work.files, listing.schema)
        is_tar = "(container IS NOT NULL AND row_group IS NULL AND member IS NULL)"
        listed = dict(
            connection.execute(
                f"SELECT input, count(DISTINCT image_id) FROM listed WHERE NOT {is_tar} GROUP BY 1"
            ).fetchall()
        )
        to_do = {
            number: figures
            for number, *figures in connection.execute(f"""
                SELECT input, count(*) FILTER (NOT {is_tar}), count(*) FILTER ({is_tar}),
                       count(*) FILTER (container IS NULL)
                         + count(DISTINCT (container, row_group)) FILTER (container IS NOT NULL),
                       coalesce(sum(size), 0)
                FROM units GROUP BY 1
            """).fetchall()
        }
    return [
        InputPlan(source.place.uri, source.kind, listed.get(i, 0), *map(int, to_do.get(i, (0, 0, 0, 0))))
        for i, source in enumerate(sources)
    ]


def _rate(
    config: CaptionConfig, model_id: str, work: Work, sources: list[Source], preprocessing: Preprocessing
) -> float:
    """Images per second of one actor here, over the first few images that can be read."""
    if not work.num_units:
        return 0.0
    fetcher = Fetcher(
        work,
        tuple(source.image_column for source in sources),
        tuple(source.selection for source in sources),
        preprocessing,
        config.subset(ImageLimits),
        config.fetch_concurrency,
        sources[0].source_type,
    )
    precision = cluster.resolved_precision(config.precision, on_gpu=False)
    captioning = Captioning(
        config.model, model_id, config.subset(Decoding), precision, False, 8, False, config.threads_per_actor
    )
    started = time.monotonic()
    block = unpack(next(fetcher.fetch(0)))
    assert block is not None
    rows = [row for row in block.slice(0, SAMPLE_IMAGES).to_pylist() if row["pixels"] is not None]
    fetch_seconds = (time.monotonic() - started) * len(rows) / max(1, block.num_rows)
    started = time.monotonic()
    captioning(rows)
    return len(rows) / max(fetch_seconds, time.monotonic() - started, 1e-9) if rows else 0.0
