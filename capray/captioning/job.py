"""The captioning job: what it needs is opened and checked, then a run does the work (``run.py``)."""

from __future__ import annotations

import secrets
from datetime import UTC, datetime
from typing import Any

from capray.captioning.device import canary_score
from capray.captioning.lease import Lease, ray_job_is_terminal
from capray.captioning.record import Summary
from capray.captioning.run import Run
from capray.captioning.signals import Signals
from capray.captioning.stream import Executor, RayExecutor
from capray.config import CaptionConfig, Decoding, Preprocessing, SourceSettings
from capray.errors import ConfigError, OutputConflictError
from capray.inputs import Source, open_sources
from capray.model.checkpoint import load_captioner
from capray.output import Output
from capray.progress import ProgressDisplay
from capray.storage import is_within, list_names, locate
from capray.tables import SCHEMA_VERSION
from capray.tracking.registry import find_model


def caption(config: CaptionConfig, executor: Executor | None = None) -> Summary:
    """Caption every image of the input that has no caption yet.

    Args:
        executor: what runs the passes; Ray Data when not given.

    Raises:
        ConfigError: settings, input or output that cannot be used.
        LeaseHeldError: another run writes the output.
        CheckpointError: the model cannot be loaded.
        StorageError: storage that cannot be reached or written.
        TryAgain: what passes: a mount, device or store that is away, ids that stay unaccounted for.
        Interrupted: stopped by Ctrl-C or SIGTERM, what was done being published.
        CaprayError: everything fails, or files of the input cannot be read.
    """
    config = with_absolute_paths(config)
    assert config.output is not None
    captioner, model_id = load_captioner(config.model)
    preprocessing = captioner.architecture.subset(Preprocessing)
    if config.attention and captioner.architecture.attention == "none":
        raise ConfigError(f"the model at {config.model!r} has no attention: leave --attention out")
    canary = canary_score(captioner)
    del captioner
    output = Output(config.output)
    check_apart(config, output)
    sources = open_sources(config.inputs, config.subset(SourceSettings), config.keep)
    check_job(config, output, model_id, sources)
    run_id = f"{datetime.now(UTC):%Y%m%dT%H%M%S}-{secrets.token_hex(4)}"
    lease = Lease(
        output.private,
        steal=config.steal_lease,
        enforce=not config.unsafe_no_lease,
        is_job_terminal=ray_job_is_terminal,
    )
    with ProgressDisplay("listing") as display:
        lease.say = display.say
        with lease, Signals() as signals:
            # What stood there may have been changed by the run that held the lease before.
            job = check_job(config, output, model_id, sources)
            executor = executor or RayExecutor(config, run_id, display.say)
            bound = job or job_of(config, model_id, sources) | {"preprocessing": preprocessing.model_dump(mode="json")}
            with signals.interrupting():
                run = Run(
                    config, output, run_id, bound, preprocessing, lease, signals, display, sources, executor, canary
                )
            return run.caption()


def with_absolute_paths(config: CaptionConfig) -> CaptionConfig:
    """``config`` with absolute paths, which mean the same to every process, and the place of a model in MLflow."""
    inputs = [locate(uri).uri for uri in config.inputs]
    model = find_model(config.model, config.tracking_uri)
    return config.model_copy(update={"model": model, "input": inputs[0], "also": tuple(inputs[1:])})


def check_apart(config: CaptionConfig, output: Output) -> None:
    """Raise ConfigError when the output lies inside an input."""
    for uri in config.inputs:
        if is_within(output.root, locate(uri)):
            raise ConfigError(
                f"the output {config.output!r} lies inside the input {uri!r}, where its files would be taken for images: "
                "choose an output beside it"
            )


def job_of(config: CaptionConfig, model_id: str, sources: list[Source]) -> dict[str, Any]:
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
    """The output's job.json, or None; an error when the output belongs to another job. Settings that the version which
    wrote it did not know yet had their defaults."""
    job = output.read_job()
    if job is None:
        _check_empty(config, output)
        return None
    if job["model_id"] != model_id:
        raise OutputConflictError(
            f"{config.output!r} was written by model {job['model_id'][:12]}…, not {model_id[:12]}…: choose another output, "
            "or the same model"
        )
    now = job_of(config, model_id, sources)
    defaults = {name: field.default for name, field in Decoding.model_fields.items()}
    pairs = {name: (job["decoding"].get(name, defaults[name]), value) for name, value in now["decoding"].items()}
    for name, default in (("kept_columns", {}), ("attention", False), ("shard", None)):
        pairs[name] = (job.get(name) or default, now[name])
    if config.precision != "auto":
        pairs["precision"] = (job["precision"], config.precision)
    changed = [f"{name}: {before} -> {value}" for name, (before, value) in pairs.items() if before != value]
    if changed:
        raise OutputConflictError(
            f"{config.output!r} was written with other settings ({'; '.join(changed)}): choose another output, or the same "
            "settings"
        )
    return job


def _check_empty(config: CaptionConfig, output: Output) -> None:
    ours = {folder.uri.rsplit("/", 1)[-1] for folder in (output.captions, output.failures, output.private)}
    names = [name for name in list_names(output.root, folders=True) if name not in ours]
    if names:
        raise OutputConflictError(
            f"{config.output!r} holds {names[0]!r} and no captioning job: choose a new folder or empty it"
        )
    parts = [*output.parts(output.captions), *output.parts(output.failures)]
    if parts:
        raise OutputConflictError(
            f"{config.output!r} holds {len(parts)} parts ({parts[0].uri} …) whose {output.job.uri} is gone, so it is not "
            "known which model and settings they are of: put that file back, or choose another output"
        )
