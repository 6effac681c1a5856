"""What a captioning job needs, opened and checked before anything is written; a dry run needs the same."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from capray.captioning.container_versions import containers_read
from capray.config import CaptionConfig, Decoding, Preprocessing, SourceSettings, flag_of
from capray.errors import CaprayError, ConfigError, DataError, OutputConflictError, TryAgain
from capray.inputs import NothingThere, Source, open_sources
from capray.inputs.base import root_of
from capray.model.captioner_files import FILES, model_id_of
from capray.output import Output
from capray.storage import (
    Location,
    exists,
    file_above,
    glob_names,
    identity,
    is_glob,
    is_within,
    list_names,
    locate,
    read_bytes,
)
from capray.tables import SCHEMA_VERSION
from capray.tracking.registry import find_model, find_model_of, say_model
from capray.wording import counted


@dataclass(frozen=True)
class OpenedJob:
    """A job that may run.

    Attributes:
        config: with absolute paths, and the model's place.
        canary: the canary's score by this process's own captioner (``canary_score``).
    """

    config: CaptionConfig
    output: Output
    sources: list[Source]
    model_id: str
    preprocessing: Preprocessing
    canary: float

    def bound_to(self) -> dict[str, Any]:
        """What the output is bound to: as job.json there has it, or as it will; its precision may be missing, and is then
        to be resolved and written. Another run may have begun the output since it was opened.

        Raises:
            OutputConflictError: it is another job's.
        """
        stored = _check_job(self.config, self.output, self.model_id, self.sources)
        preprocessing = self.preprocessing.model_dump(mode="json")
        return stored or _job_of(self.config, self.model_id, self.sources) | {"preprocessing": preprocessing}


def open_job(config: CaptionConfig) -> OpenedJob:
    """Open and check all that a job needs.

    Raises:
        ConfigError: settings, input or output that cannot be used, or an output of another job.
        CheckpointError: the model cannot be loaded.
        StorageError: storage that cannot be reached.
    """
    config = _with_absolute_paths(config)
    assert config.output is not None
    output = Output(config.output)
    _check_apart(config, output)
    sources = _open_as_before(config, output)

    from capray.captioning.canary import canary_score
    from capray.inference import Inference

    inference = Inference.load(config.model, "cpu")
    architecture, model_id = inference.captioner.architecture, inference.model_id
    if config.attention and architecture.attention == "none":
        raise ConfigError(f"the model at {config.model!r} has no attention: leave --attention out")
    preprocessing = architecture.subset(Preprocessing)
    job = OpenedJob(config, output, sources, model_id, preprocessing, canary_score(inference))
    job.bound_to()
    return job


def _open_as_before(config: CaptionConfig, output: Output) -> list[Source]:
    """The inputs of ``config``, opened, as what they were when a run on ``output`` read them before.

    Raises:
        TryAgain: they could be read then, or were tables, tars or lists, and a mount that is away may be why.
    """
    _check_globs(config, output)
    before = output.last_inputs()
    if list(before) != list(config.inputs):
        before = {}
    try:
        sources = open_sources(config.inputs, config.subset(SourceSettings), config.keep)
    except CaprayError as error:
        is_mistake = isinstance(error, ConfigError) and not isinstance(error, NothingThere)
        if not before or is_mistake or config.input_kind not in ("auto", *before.values()):
            raise
        raise TryAgain(f"{error}; a run on this output could read it before: is a mount away?") from error
    for source in sources:
        if exists(Output(source.place.uri).job):
            raise ConfigError(f"the input {source.place.uri!r} is a captioning output: name the images it was made from")
    if config.input_kind == "auto":
        for source, (uri, kind) in zip(sources, before.items(), strict=False):
            if source.kind == "images" and kind not in ("", "images"):
                raise TryAgain(
                    f"{uri!r} was read as {kind} by a run on this output, and now holds none: if a mount is away, mount it; "
                    "if the input is images now, give --input-kind images"
                )
    return sources


def _check_globs(config: CaptionConfig, output: Output) -> None:
    """Raise TryAgain when what would be taken for a glob is the name of a file that is gone."""
    globs = {uri for uri in config.inputs if is_glob(locate(uri))}
    if globs and (gone := globs & containers_read(output)):
        raise TryAgain(
            f"{min(gone)!r} was a file that a run on this output read, and is gone: put it back (files "
            "that match it as a glob were not meant)"
        )


def _with_absolute_paths(config: CaptionConfig) -> CaptionConfig:
    """``config`` with absolute paths, which mean the same to every process, and the place of a model in MLflow."""
    inputs = [locate(uri).uri for uri in config.inputs]
    is_chosen = "model" in config.model_fields_set
    model = find_model(config.model, config.tracking_uri) if is_chosen else _model_of_output(config)
    return config.model_copy(update={"model": model, "input": inputs[0], "also": tuple(inputs[1:])})


def _model_of_output(config: CaptionConfig) -> str:
    """The place of the captioner that captions where none was given, which is named: the one the output was begun with,
    else the one that comes with capray.

    Raises:
        OutputConflictError: the output's captioner is not where it was.
    """
    output, built_in = Output(config.output or ""), find_model(config.model)
    wanted = (output.read_job() or {}).get("model_id")
    if wanted is None or wanted == _model_id_in(built_in):
        return find_model_of(config)
    model = output.last_model()
    if model is None or _model_id_in(model) != wanted:
        where = "" if model is None else f" (it was at {model!r})"
        raise OutputConflictError(
            f"{config.output!r} was written by model {wanted[:12]}…{where}, not by the one that comes with this capray: "
            "give it with --model, or choose another output"
        )
    say_model(model, f"with which {config.output!r} was begun")
    return model


def _model_id_in(folder: str) -> str | None:
    """The model_id of the captioner in ``folder``; None where there is none."""
    place = locate(folder)
    if not set(FILES) <= set(list_names(place)):
        return None
    return model_id_of({name: read_bytes(place.join(name)) for name in FILES})


def _check_apart(config: CaptionConfig, output: Output) -> None:
    """Raise ConfigError when the output lies inside an input, or below a file."""
    if (file := file_above(output.root)) is not None:
        raise ConfigError(f"the output {config.output!r} cannot be made: {file!r} is a file, or a link to nowhere")
    for uri in config.inputs:
        if _would_be_read(output, locate(uri)):
            raise ConfigError(
                f"the output {config.output!r} lies inside the input {uri!r}, where its files would be taken for images: "
                "choose an output beside it"
            )


def _would_be_read(output: Output, place: Location) -> bool:
    """Whether the files of ``output`` would be among those of the input at ``place``."""
    if not is_glob(place):
        return is_within(output.root, place)
    above = locate(root_of(place))
    if not is_within(output.root, above):
        return False
    below = identity(output.root).removeprefix(identity(above).rstrip("/"))
    part = output.new_part_name(output.new_run_id(), 0)
    tables = (folder.uri.removeprefix(output.root.uri.rstrip("/")) for folder in (output.captions, output.failures))
    return any(glob_names(place, f"{above.path.rstrip('/')}{below}{table}/{part}") for table in tables)


def _job_of(config: CaptionConfig, model_id: str, sources: list[Source]) -> dict[str, Any]:
    """The settings that every later run on this output must match, except precision."""
    source_type = sources[0].source_type
    return {
        "schema_version": SCHEMA_VERSION,
        "model_id": model_id,
        "decoding": config.subset(Decoding).model_dump(),
        "kept_columns": {} if source_type is None else {field.name: str(field.type) for field in source_type},
        "attention": config.attention,
        "shard": config.shard,
        "deterministic": config.deterministic,
    }


def _check_job(config: CaptionConfig, output: Output, model_id: str, sources: list[Source]) -> dict[str, Any] | None:
    """The output's job.json, or None; an error when the output belongs to another job. Settings that the version which
    wrote it did not know yet had their defaults."""
    job = output.read_job()
    if job is None:
        _check_empty(config, output)
        return None
    if not {"model_id", "decoding"} <= job.keys():
        raise DataError(f"{output.job.uri} is damaged: put it back, or choose another output")
    if job["model_id"] != model_id:
        raise OutputConflictError(
            f"{config.output!r} was written by model {job['model_id'][:12]}…, not {model_id[:12]}…: choose another output, "
            "or the same model"
        )
    now = _job_of(config, model_id, sources)
    defaults = {name: field.default for name, field in Decoding.model_fields.items()}
    pairs = {name: (job["decoding"].get(name, defaults[name]), value) for name, value in now["decoding"].items()}
    pairs["schema_version"] = (job["schema_version"], SCHEMA_VERSION)
    for name, default in (("kept_columns", {}), ("attention", False), ("shard", None), ("deterministic", False)):
        pairs[name] = (job.get(name) or default, now[name])
    if config.precision != "auto" and "precision" in job:
        pairs["precision"] = (job["precision"], config.precision)
    changed = [f"{_spelled(name)}: {before} -> {value}" for name, (before, value) in pairs.items() if before != value]
    if changed:
        raise OutputConflictError(
            f"{config.output!r} was written with other settings ({'; '.join(changed)}): choose another output, or the same "
            "settings"
        )
    return job


def _spelled(name: str) -> str:
    """A setting of job.json as the user knows it."""
    return {"kept_columns": "--keep", "schema_version": "schema version"}.get(name) or flag_of(name)


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
            f"{config.output!r} holds {counted(len(parts), 'part')} ({parts[0].uri} …) whose {output.job.uri} is gone, so "
            "it is not known which model and settings they are of: put that file back, or choose another output"
        )
