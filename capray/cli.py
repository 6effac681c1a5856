"""`capray`: thin and lazy. Parses settings and calls the one function each job has; torch and Ray load when needed.

Exit codes: 0 done, 1 fault, 2 the user's mistake, 3 images have failed (when asked for), 75 run the same command again,
130 and 143 stopped by a signal, 141 whoever read the output has gone.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from typing import Annotated, get_type_hints

import cyclopts
from cyclopts import App, Parameter
from pydantic import ValidationError

import capray
from capray import config as settings
from capray.config import (
    AverageConfig,
    CaptionConfig,
    CompactConfig,
    DemoConfig,
    EvaluateConfig,
    ExplainConfig,
    ImportSgrvinodConfig,
    QueryConfig,
    ReportConfig,
    ServeConfig,
    Settings,
    ShrinkConfig,
    TrainConfig,
    VerifyConfig,
    flag_of,
    read_yaml,
)
from capray.datasets.settings import CocoConfig, Flickr8kConfig, Flickr30kConfig, FolderConfig, ShapesConfig
from capray.errors import CaprayError, ConfigError, ImagesFailed, Interrupted
from capray.wording import counted

Flat = Parameter(name="*")
_DEMO, _SERVE = DemoConfig(), ServeConfig()

app = App(
    name="capray",
    help="Train an image captioner on Ray, caption images by the million, query the captions with SQL.",
    version=capray.__version__,
    help_format="plaintext",
    result_action="return_value",
    suppress_keyboard_interrupt=False,
    default_parameter=Parameter(negative_iterable=(), consume_multiple=True),
)
prepare_app = App(name="prepare", help="Turn a captioned data set into the Samples table that `train` reads.")
app.command(prepare_app)
import_app = App(name="import", help="Turn a captioner trained elsewhere into a captioner folder.")
app.command(import_app)


@prepare_app.command
def flickr8k(config: Annotated[Flickr8kConfig, Flat]) -> None:
    """Flickr8k as it is distributed, or with Karpathy's JSON."""
    from capray.datasets.flickr8k import prepare_flickr8k

    _report_prepared(prepare_flickr8k(config))


@prepare_app.command
def flickr30k(config: Annotated[Flickr30kConfig, Flat]) -> None:
    """Flickr30k: Karpathy's JSON, the original token file or Kaggle's CSV."""
    from capray.datasets.flickr30k import prepare_flickr30k

    _report_prepared(prepare_flickr30k(config))


@prepare_app.command
def coco(config: Annotated[CocoConfig, Flat]) -> None:
    """MS COCO: the official captions of 2014 or 2017, or Karpathy's splits."""
    from capray.datasets.coco import prepare_coco

    _report_prepared(prepare_coco(config))


@prepare_app.command
def folder(config: Annotated[FolderConfig, Flat]) -> None:
    """Any folder of images with a manifest: CSV, TSV, JSONL or Parquet."""
    from capray.datasets.folder import prepare_folder

    _report_prepared(prepare_folder(config))


@prepare_app.command
def shapes(config: Annotated[ShapesConfig, Flat]) -> None:
    """A drawn data set of coloured shapes, made on the spot."""
    from capray.datasets.shapes import prepare_shapes

    _report_prepared(prepare_shapes(config))


def _report_prepared(prepared) -> None:
    for split, counts in prepared.splits.items():
        print(f"{split:>6}: {counted(counts.images, 'image')}, {counted(counts.captions, 'caption')}")
    for note in prepared.notes:
        print(f"  note: {note}")
    print(f"wrote {prepared.output}")


@import_app.command
def sgrvinod(config: Annotated[ImportSgrvinodConfig, Flat]) -> None:
    """A checkpoint of sgrvinod's PyTorch tutorial to image captioning, and its word map."""
    from capray.importing.sgrvinod import import_sgrvinod

    print(import_sgrvinod(config).text())


@app.command
def train(config: Annotated[TrainConfig, Flat]) -> None:
    """Train a captioner; the same command goes on after an interruption."""
    from capray.training.job import train as run

    result = run(config)
    print(f"best epoch {result.best_epoch}: {result.best}")
    if result.registered:
        print(f"registered as {result.registered}")


@app.command
def caption(config: Annotated[CaptionConfig, Flat], *photos: str, json: bool = False) -> None:
    """Caption inputs (the last argument is the output) into Parquet tables; the same command does what is missing.

    `capray caption PHOTO …` captions single photos instead, one per line.

    Parameters
    ----------
    photos
        Further inputs and, last, the output; or further photos.
    json
        Print the summary as JSON; of photos, an object a line.
    """
    from capray.captioning.photos import are_photos, caption_photos

    paths = [path for path in (config.input, config.output, *photos) if path is not None]
    if are_photos(paths):
        if failed := caption_photos(paths, config, json):
            raise CaprayError(f"{failed:,} of {counted(len(paths), 'photo')} could not be captioned")
        return
    if photos:
        given = config.model_dump(exclude_unset=True) | {"also": (*config.also, *paths[1:-1]), "output": paths[-1]}
        config = CaptionConfig.create(given)
    if config.output is None:
        raise ConfigError(f"{config.input!r} is no photo: an output is needed for its tables (capray caption INPUT OUTPUT)")
    if config.dry_run:
        from capray.captioning.dry_run import dry_run

        print(dry_run(config).text())
        return
    from capray.captioning.job import caption as run

    summary = run(config)
    print(summary.json() if json else summary.text())
    if config.fail_on_failures and summary.current_failures:
        raise ImagesFailed(f"{counted(sum(summary.current_failures.values()), 'image')} failed")


@app.command
def serve(config: Annotated[ServeConfig, Flat] = _SERVE) -> None:
    """Caption photos over HTTP: a page for people, JSON for programs."""
    from capray.serving.server import run as serve_until_stopped

    serve_until_stopped(config)


@app.command
def explain(config: Annotated[ExplainConfig, Flat]) -> None:
    """Draw where the captioner looked: a photo with a heat map for each word of its caption."""
    from capray.report.explanation import explain as run

    print(f"{config.image}\t{run(config).caption}")


@app.command
def shrink(config: Annotated[ShrinkConfig, Flat]) -> None:
    """Copy a captioner with its weights in float16: half the size, and the same captions but for rounding."""
    from capray.shrinking import shrink as run

    print(run(config))


@app.command
def average(config: Annotated[AverageConfig, Flat]) -> None:
    """Write the mean of two captioners' weights: of a stage and the next one, or of one stage trained twice."""
    from capray.averaging import average as run

    print(run(config))


@app.command
def evaluate(config: Annotated[EvaluateConfig, Flat], *, json: bool = False) -> None:
    """Score a captioning output against reference captions.

    Parameters
    ----------
    json
        Print JSON.
    """
    from capray.evaluation import evaluate as run

    evaluation = run(config)
    print(evaluation.json() if json else evaluation.text())
    if evaluation.withheld:
        raise CaprayError(evaluation.withheld)


@app.command
def query(config: Annotated[QueryConfig, Flat]) -> None:
    """Query a captioning output with SQL; without a query, sum it up."""
    from capray.query.answers import run_query

    run_query(config)


@app.command
def report(config: Annotated[ReportConfig, Flat]) -> None:
    """Make one page about a captioning output or a training: counts, curves, failures, captions with pictures."""
    from capray.report.output_report import report_output
    from capray.report.training_report import report_training

    print(report_training(config) if config.training is not None else report_output(config))


@app.command
def compact(config: Annotated[CompactConfig, Flat]) -> None:
    """Copy a captioning output into a new one, sorted by image id, in large parts, and prove the copy."""
    from capray.output.compact import compact as run

    print(run(config).text())


@app.command
def verify(config: Annotated[VerifyConfig, Flat], *also: str, json: bool = False) -> None:
    """Check that captioning outputs are complete and undamaged: every image once, every part readable.

    Parameters
    ----------
    also
        Further outputs, the other parts of the same work.
    json
        Print JSON.
    """
    from capray.output.verify import verify as run

    verification = run(config.model_copy(update={"also": (*config.also, *also)}))
    print(verification.json() if json else verification.text())
    if verification.problems:
        raise CaprayError(counted(len(verification.problems), "problem"))


@app.command
def demo(config: Annotated[DemoConfig, Flat] = _DEMO) -> None:
    """Draw a data set, train, caption images never seen, evaluate and query: the whole way in minutes."""
    from capray.demo import demo as run

    run(config)


def settings_of(command: Sequence[str]) -> type[Settings] | None:
    """The settings that ``command`` (`["prepare", "coco"]`, say) takes; None for what is no job."""
    _, apps, _ = app.parse_commands(command)
    function = apps[-1].default_command
    return get_type_hints(function).get("config") if function and apps[-1] is not app else None


app.meta.suppress_keyboard_interrupt = False


@app.meta.default
def launch(
    *tokens: Annotated[str, Parameter(show=False, allow_leading_hyphen=True)],
    config: Annotated[str | None, Parameter(help="YAML file of settings; flags go over it.")] = None,
) -> None:
    app.config = ()
    if config is not None:
        command, _, _ = app.parse_commands(tokens)
        model = settings_of(command)
        if model is None:
            raise ConfigError("a configuration file needs a job: capray train --config FILE, say")
        app.config = (cyclopts.config.Dict(read_yaml(config, model), source=config, use_commands_as_keys=False),)
    app(tokens, exit_on_error=False, print_error=False)


def run(arguments: Sequence[str]) -> int:
    """Run a command line and return its exit code. A user's mistake is one line on standard error."""
    os.environ.setdefault("RAY_ENABLE_AUTO_CONNECT", "0")  # What still asks Ray at the end must not start another one.
    received: list[int] = []

    def stop(number: int, frame: object) -> None:
        received.append(number)
        raise KeyboardInterrupt  # Ray swallows all else where it waits.

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    try:
        app.meta(arguments, exit_on_error=False, print_error=False)
    except Interrupted as error:
        return _fail(str(error), 128 + received[0] if received else error.exit_code)
    except CaprayError as error:
        return _fail(str(error), error.exit_code)
    except cyclopts.CycloptsError as error:
        return _fail(_describe(error), 2)
    except KeyboardInterrupt:
        number = received[0] if received else signal.SIGINT
        return _fail("terminated" if number == signal.SIGTERM else "interrupted", 128 + number)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception:
        if not received:  # Libraries (DuckDB) put errors of their own in a signal's place.
            raise
        return _fail("interrupted", 128 + received[0])
    return 0


def _describe(error: cyclopts.CycloptsError) -> str:
    """What is wrong with a command line, in the words it is typed in."""
    cause = error.__cause__
    if isinstance(cause, ValidationError):
        return settings.describe_error(cause, flag_of)
    if not isinstance(error, cyclopts.MissingArgumentError):
        return str(error)
    command = list(error.command_chain or ())
    model = settings_of(command)
    needed = [name for name, field in model.model_fields.items() if field.is_required()] if model else []
    if model and error.argument and error.argument.name in map(flag_of, needed):
        places = [name.upper() for name in model.positional if name in needed]
        flags = [f"{flag_of(name)} …" for name in needed if name not in model.positional]
        return f"something is missing: capray {' '.join([*command, *places, *flags])} (capray {' '.join(command)} --help)"
    return str(error)


def _fail(message: str, code: int) -> int:
    print(f"capray: {message}", file=sys.stderr)
    return code


def main() -> None:
    """The console script, and with a job's name in front what `jobs/*.py` call."""
    sys.exit(run(sys.argv[1:]))
