"""What all settings have in common, and the settings of every job but those that prepare data sets, validated.

A job's settings are one frozen object. Its fields are the flags of the command line and the keys of the YAML
file, flat, under the same names; the docstring under a field is its help. Groups that several jobs share are
base classes, and ``subset`` takes one out of a larger whole.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self, TypeVar

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from capray.errors import ConfigError

T = TypeVar("T", bound="Settings")


def _named(place: str) -> str:
    if not place:
        raise ValueError("'' names nothing (the current folder is '.')")
    return place


Place = Annotated[str, AfterValidator(_named)]
"""A path or URI."""
Fraction = Annotated[float, Field(ge=0, lt=1)]
Channels = tuple[float, float, float]
FailureKind = Literal[
    "missing", "archived", "too_large", "not_an_image", "truncated", "unsupported_format", "decode_error", "crashed"
]
"""The final kinds of failure: those another attempt is not expected to mend."""
MetricName = Literal["bleu", "rouge_l", "cider_d", "meteor", "meteor_nltk", "diversity"]
"""Groups of figures of captions; the names that `metrics.REFERENCE_METRICS` has, and `diversity`."""

IN_THE_BOX = "builtin:flickr8k"
"""The captioner that comes with capray: what captions where no model is given."""

CPU_BATCH, GPU_BATCH = 64, 512
"""Images captioned together, where nothing else is asked for."""


class Settings(BaseModel):
    """Frozen, validated, without unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)
    positional: ClassVar[tuple[str, ...]] = ()
    """Fields the command line takes by position; all others are flags."""

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        """Positional fields come first and the class's own before the inherited, in help and on the command line; a field's
        help is one line."""
        fields = cls.model_fields
        own = [name for name in cls.__annotations__ if name in fields]
        order = dict.fromkeys((*cls.positional, *own, *fields))
        ordered = {name: fields[name] for name in order}
        fields.clear()
        fields.update(ordered)
        for name, field in fields.items():
            field.kw_only = name not in cls.positional
            if field.description:
                field.description = " ".join(field.description.split())  # The terminal breaks lines, not the source.

    @classmethod
    def create(cls, values: Mapping[str, Any] | None = None, /, **overrides: Any) -> Self:
        """The settings from ``values`` with ``overrides`` over them.

        Raises:
            ConfigError: an unknown key (with the nearest known one) or a value out of its range.
        """
        merged = {**(values or {}), **overrides}
        reject_unknown(merged, cls)
        try:
            return cls(**merged)
        except ValidationError as error:
            raise ConfigError(describe_error(error)) from error

    @classmethod
    def from_yaml(cls, path: str | Path, **overrides: Any) -> Self:
        """The settings of a YAML file with ``overrides`` over them; raises ConfigError as ``create`` does."""
        return cls.create(read_yaml(path, cls), **overrides)

    def subset(self, group: type[T]) -> T:
        """The settings of ``group``, a base class of this one, on their own."""
        return group(**{name: getattr(self, name) for name in group.model_fields})


def reject_unknown(values: Mapping[str, Any], model: type[Settings], source: str = "settings") -> None:
    """Raise ConfigError, naming the nearest valid key, if ``values`` has a key that ``model`` does not know."""
    for key in values:
        if key not in model.model_fields:
            near = difflib.get_close_matches(str(key), model.model_fields, n=1, cutoff=0.4)
            hint = f"did you mean {near[0]!r}?" if near else f"valid keys: {', '.join(sorted(model.model_fields))}"
            raise ConfigError(f"unknown key {key!r} in {source}: {hint}")


def read_yaml(path: str | Path, model: type[Settings]) -> dict[str, Any]:
    """The mapping in a YAML file, its keys checked against ``model``.

    Raises:
        ConfigError: the file is missing, is not YAML, is not a mapping, or has an unknown key.
    """
    try:
        values = yaml.safe_load(Path(path).read_text("utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read the configuration {str(path)!r}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{str(path)!r} is not YAML: {error}") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(f"{str(path)!r} must hold a mapping of keys to values, not a {type(values).__name__}")
    reject_unknown(values, model, str(path))
    return values


def flag_of(setting: str) -> str:
    """The flag that ``setting`` is on the command line: ``beam_size`` is ``--beam-size``."""
    return f"--{setting.replace('_', '-')}"


def describe_error(error: ValidationError, spelled: Callable[[str], str] = str) -> str:
    """A pydantic error as one line for a user: the setting, what is wrong, and the value it had. Settings, which validators'
    messages have in backticks, stand as they are ``spelled``."""
    lines = []
    for problem in error.errors():
        name = spelled(".".join(part for part in problem["loc"] if isinstance(part, str))) if problem["loc"] else ""
        reason = problem["msg"].removeprefix("Value error, ")
        if problem["type"] == "value_error":
            reason = re.sub("`([a-z_]+)`", lambda setting: spelled(setting[1]), reason)
        reason = reason[:1].lower() + reason[1:]
        if problem["type"] == "missing":
            lines.append(f"{name} is required")
        elif problem["type"] == "value_error":
            lines.append(f"{name}: {reason}" if name else reason)
        else:
            lines.append(f"{name}: {reason}, not {problem['input']!r}")
    return "; ".join(lines)


class Preprocessing(Settings):
    """From an image's pixels to the encoder's input; part of a captioner."""

    resize: Literal["squash", "crop", "pad", "keep-aspect"] = "squash"
    """How an image meets the input size: squash it, scale and crop the centre, scale and pad, or scale the shorter
    side and keep the aspect ratio (needs --pool-grid)."""
    size: Annotated[int, Field(ge=16, le=2048)] = 224
    """Side of the encoder's input in pixels (the shorter side with keep-aspect)."""
    interpolation: Literal["nearest", "bilinear", "bicubic", "lanczos"] = "bilinear"
    """Filter of the resizing."""
    mean: Channels = (0.485, 0.456, 0.406)
    """Mean of the red, green and blue channels on a scale of 0 to 1, subtracted (ImageNet's by default)."""
    std: Annotated[Channels, Field()] = (0.229, 0.224, 0.225)
    """Standard deviation of the channels on a scale of 0 to 1, divided by (ImageNet's by default)."""

    @field_validator("std")
    @classmethod
    def _positive(cls, std: Channels) -> Channels:
        if min(std) <= 0:
            raise ValueError(f"must be above 0, not {std}")
        return std


class ImageLimits(Settings):
    """What an image may cost before it is refused with a failure row."""

    max_image_bytes: Annotated[int, Field(ge=1)] = 64 * 2**20
    """Largest encoded image in bytes."""
    max_image_pixels: Annotated[int, Field(ge=1, le=178_956_970)] = 100_000_000
    """Largest image in pixels, judged from its header before anything is decoded (Pillow opens no larger ones)."""


class Architecture(Preprocessing):
    """The captioner's shape: everything that rebuilds it around its weights and vocabulary."""

    encoder: str = "resnet101"
    """Convolutional encoder: a ResNet of torchvision's, or another of its networks with a sequence of `features`
    (mobilenet_v2, efficientnet_b0, densenet121, vgg16, convnext_tiny …); one of timm's that gives a grid
    (`timm/regnety_008`; needs `uv sync --extra timm`, but for `timm/tf_efficientnet_lite0` with weights from a file); or
    `tiny`, a small one to train from scratch."""
    pool_grid: Annotated[int, Field(ge=1, le=64)] | None = None
    """Side of the grid after adaptive average pooling (14 in Show, Attend and Tell's reimplementations); the encoder's
    own grid when not given."""
    grid_projection: Annotated[int, Field(ge=1)] | None = None
    """Width that a linear layer brings the grid to before the decoder sees it, for fewer weights wherever the grid comes in
    (as in Luo's implementation of Rennie et al. 2017, without its ReLU); the encoder's own when not given."""
    attention: Literal["additive", "multiplicative", "none"] = "additive"
    """Additive (Bahdanau), multiplicative (Luong), or none (Show and Tell: the pooled image is the first input)."""
    attention_activation: Literal["tanh", "relu"] = "tanh"
    """Non-linearity of additive attention."""
    multiplicative_score: Literal["dot", "general", "concat"] = "general"
    """Score function of multiplicative attention (Luong et al. 2015, section 3.1)."""
    attention_dim: Annotated[int, Field(ge=1)] = 256
    """Width of additive attention's and of the concat score's hidden layer."""
    embed_dim: Annotated[int, Field(ge=1)] = 256
    """Width of the word embedding."""
    tie_embeddings: bool = False
    """Score words by their embeddings, to which a linear layer brings the state (Press and Wolf 2017, Inan et al. 2017)."""
    hidden_dim: Annotated[int, Field(ge=1)] = 512
    """Width of the decoder's state."""
    cell: Literal["lstm", "gru"] = "lstm"
    """Recurrent cell of the decoder."""
    initial_state: Literal["tanh", "linear"] = "tanh"
    """How the decoder's state starts from the mean grid with attention: a linear layer each for hidden state and cell,
    with tanh over it or without (as in Show, Attend and Tell's reimplementations)."""
    gate: bool = True
    """Sigmoid gate on the attended context (Show, Attend and Tell, section 4.2.1)."""
    grid_dropout: Fraction = 0.2
    """Dropout on the grid."""
    output_dropout: Fraction = 0.5
    """Dropout on the decoder's output, before the word layer."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.resize == "keep-aspect" and self.pool_grid is None:
            raise ValueError("`resize` 'keep-aspect' gives grids of different sizes: set `pool_grid` (14, say)")
        return self


class Decoding(Settings):
    """How captions are searched for."""

    beam_size: Annotated[int, Field(ge=1, le=100)] = 5
    """Hypotheses kept per image; 1 is greedy search."""
    n_best: Annotated[int, Field(ge=1, le=100)] | None = None
    """Hypotheses returned per image, the best as the caption and the rest as alternatives; all of the beam when not
    given."""
    max_length: Annotated[int, Field(ge=1, le=1000)] = 20
    """Most tokens of a caption, its end token included."""
    min_length: Annotated[int, Field(ge=0, le=1000)] = 0
    """Fewest words of a caption."""
    length_penalty: Annotated[float, Field(ge=0, le=5)] = 0.9
    """Hypotheses are ranked by log_prob / num_tokens ** --length-penalty; 0 ranks by log_prob."""
    no_repeat_ngram: Annotated[int, Field(ge=0, le=10)] = 0
    """No caption holds the same run of this many words twice; 0 allows it."""
    allow_unk: bool = False
    """Whether the unknown-word token may be emitted."""

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if self.n_best is not None and self.n_best > self.beam_size:
            raise ValueError(f"`n_best` {self.n_best} is more than `beam_size` {self.beam_size}: raise `beam_size`")
        if self.min_length >= self.max_length:
            raise ValueError(f"`min_length` {self.min_length} must be below `max_length` {self.max_length}")
        return self


class Augmentation(Settings):
    """Random augmentation of training images, at the encoder's input size; validation never sees it."""

    flip: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Probability that a training image is mirrored left to right."""
    flip_left_right_words: Literal["keep-image", "swap-words"] = "keep-image"
    """What becomes of images whose captions say left or right: never mirrored, or mirrored with the words swapped."""
    min_crop_area: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Smallest share of a training image's area that a random crop keeps and scales up; 1 crops nothing."""
    color_jitter: Fraction = 0.0
    """A training image's brightness, contrast and saturation change by up to this share."""

    @property
    def augments(self) -> bool:
        return self.flip > 0 or self.min_crop_area < 1 or self.color_jitter > 0


class Optimisation(Settings):
    """How gradients become steps."""

    optimizer: Literal["adam", "adamw", "rmsprop", "sgd"] = "adam"
    """Optimiser, as torch.optim has it; its other constants are torch's."""
    learning_rate: Annotated[float, Field(gt=0)] = 4e-4
    """Learning rate of the decoder."""
    encoder_learning_rate: Annotated[float, Field(gt=0)] = 1e-4
    """Learning rate of the fine-tuned blocks."""
    momentum: Fraction = 0.0
    """Momentum of rmsprop and sgd."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Weight decay (decoupled in adamw, added to the gradient in the others)."""
    clip: Literal["norm", "value", "none"] = "norm"
    """Gradient clipping: by the norm of all gradients, by the value of each, or none."""
    clip_threshold: Annotated[float, Field(gt=0)] = 5.0
    """Threshold of the clipping."""
    accumulate_batches: Annotated[int, Field(ge=1)] = 1
    """Batches whose gradients make one step, exactly that of one batch as large as all of them."""
    ema_decay: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Decay per step of an exponential moving average of the weights, which is what is validated and saved as the
    captioner (0.999, say); (1 + step) / (10 + step) while that is less. No average when not given."""

    average_epochs: Annotated[int, Field(ge=2)] | None = None
    """Validate and save the mean of the weights at the end of the last so many epochs (Vaswani et al. 2017, section 6.1); no
    mean when not given."""

    schedule: Literal["constant", "step", "plateau", "cosine"] = "constant"
    """Learning-rate schedule: constant; times --schedule-factor every --schedule-epochs; the same after --schedule-epochs
    without a gain in --schedule-metric; or down a cosine to 0 at the last step, after --warmup-steps."""
    schedule_factor: Annotated[float, Field(gt=0, lt=1)] = 0.8
    """What `step` and `plateau` multiply the learning rates by."""
    schedule_epochs: Annotated[int, Field(ge=1)] = 8
    """Epochs between two cuts of `step`; epochs without a gain before a cut of `plateau`."""
    schedule_metric: Literal["bleu_4", "cider_d", "val_loss"] = "bleu_4"
    """Validation metric that `plateau` watches."""
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Steps of linear warm-up before the cosine."""

    @model_validator(mode="after")
    def _fits_the_optimizer_and_schedule(self) -> Self:
        if self.momentum and self.optimizer not in ("rmsprop", "sgd"):
            raise ValueError(
                f"`momentum` is of rmsprop and sgd, not of {self.optimizer}: leave it out or choose one of them"
            )
        if self.ema_decay is not None and self.average_epochs is not None:
            raise ValueError("`ema_decay` and `average_epochs` are two averages of the weights: choose one")
        if self.warmup_steps and self.schedule != "cosine":
            raise ValueError(
                f"`warmup_steps` is of `schedule` 'cosine', not of {self.schedule!r}: leave it out or choose cosine"
            )
        return self


class ScheduledSampling(Settings):
    """Which words the decoder is fed in training: the reference's (teacher forcing) or its own."""

    teacher_forcing_ratio: Annotated[float, Field(ge=0, le=1)] = 1.0
    """Probability, word by word, that the decoder is fed the reference's previous word (teacher forcing), else its own
    likeliest; 0 feeds only its own."""
    teacher_forcing_schedule: Literal["constant", "linear", "exponential", "inverse-sigmoid"] = "constant"
    """Schedule of that probability over the epochs (scheduled sampling, Bengio et al. 2015, section 2.4)."""
    teacher_forcing_decay: Annotated[float, Field(gt=0)] | None = None
    """The schedule's constant, at epoch e = 0, 1 …: linear subtracts decay * e, exponential multiplies by decay ** e (below
    1), inverse-sigmoid by decay / (decay + exp(e / decay)) (1 or more)."""
    min_teacher_forcing_ratio: Annotated[float, Field(ge=0, le=1)] = 0.0
    """The schedule ends at this probability."""

    @model_validator(mode="after")
    def _declines(self) -> Self:
        schedule, decay = self.teacher_forcing_schedule, self.teacher_forcing_decay
        if (decay is None) != (schedule == "constant"):
            raise ValueError(
                f"`teacher_forcing_schedule` {schedule!r} with `teacher_forcing_decay` {decay}: set both or neither"
            )
        if decay is not None and (
            (schedule == "exponential" and decay >= 1) or (schedule == "inverse-sigmoid" and decay < 1)
        ):
            bound = "below 1" if schedule == "exponential" else "1 or more"
            raise ValueError(f"`teacher_forcing_decay` of the {schedule} schedule must be {bound}, not {decay}")
        return self


class SelfCriticalSettings(Settings):
    """What self-critical training draws and rewards."""

    samples_per_image: Annotated[int, Field(ge=2)] = 5
    """Captions that self-critical training draws for each image; the baseline of each is the mean of the others."""
    bleu_reward_weight: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the sentence's BLEU-4 (0 to 1) in the reward, beside its CIDEr-D (0 to 10)."""


class TrainConfig(Augmentation, SelfCriticalSettings, ScheduledSampling, Optimisation, ImageLimits, Decoding, Architecture):
    """Train a captioner on a Samples table with data-parallel Ray Train."""

    positional: ClassVar[tuple[str, ...]] = ("samples", "output")

    samples: str
    """Samples table, as `capray prepare` writes it: a folder or URI of Parquet files."""
    output: str
    """Folder or URI for the training: `best/` and `last/` (the captioner), checkpoints to resume from, MLflow's store."""
    train_split: str = "train"
    """Split to train on."""
    validation_split: str = "dev"
    """Split to validate on after each epoch."""

    weights: str | None = None
    """Encoder weights: `imagenet` (torchvision's or timm's, downloaded), one of torchvision's weight names, or a file or URI
    (.safetensors, or .pth with tensors only); random when not given."""
    fine_tune_from: str | None = None
    """First block of the encoder to fine-tune (`layer2`, `features.14`; `all` for the whole); frozen when not given."""
    init_from: str | None = None
    """Captioner to start from (folder, URI, or in MLflow, as `caption --model`): its weights, its vocabulary, and its
    architecture where no setting is given for it."""
    word_vectors: str | None = None
    """File or URI of pretrained word vectors in GloVe's text format (.txt or .txt.gz), of --embed-dim numbers each;
    words they lack start at random."""
    freeze_word_vectors: bool = False
    """Whether the word embedding is left as it starts."""
    feature_cache: str = "auto"
    """Where what the encoder's frozen blocks make of an image is kept, so that they see it once: a folder or URI; `auto`,
    which is `_features` beside the samples (in the output where that cannot be written) with a whole encoder frozen, and
    `none` with a fine-tuned one; `none` to encode in every epoch."""
    cached_views: Annotated[int, Field(ge=1)] = 1
    """Views of each training image that the feature cache keeps: the image itself, and the others as the augmentation
    changes it; an epoch is given one of them, drawn anew. Augmentation with a cache needs 2 or more."""

    min_word_count: Annotated[int, Field(ge=1)] = 5
    """Words seen less often in the training split become the unknown word."""
    max_vocabulary: Annotated[int, Field(ge=1)] | None = None
    """Most words of the vocabulary, the most frequent first; all when not given."""
    max_caption_words: Annotated[int, Field(ge=1, le=1000)] = 50
    """Training captions are cut after this many words."""
    captions_per_image: Literal["1", "all"] = "all"
    """Captions an image brings to a step: `1`, drawn again each epoch, or `all`, sharing one encoding."""

    stage: Literal["cross_entropy", "self_critical"] = "cross_entropy"
    """What is learnt from: the references, or the reward of captions drawn by the captioner of --init-from (Rennie et al.
    2017)."""
    epochs: Annotated[int, Field(ge=1)] = 20
    """Passes over the training split."""
    epoch: Literal["images", "pairs"] = "images"
    """What one epoch covers: every image once, or, with --captions-per-image 1, every image-caption pair once."""
    batch_size: Annotated[int, Field(ge=1)] = 160
    """Image-caption pairs per step, over all workers."""
    label_smoothing: Fraction = 0.1
    """Share of the target's probability spread over all words that may be emitted: not `<unk>`."""
    doubly_stochastic: Annotated[float, Field(ge=0)] = 1.0
    """Weight of Show, Attend and Tell's doubly stochastic term (section 4.2.1, eq. 14); 0 without attention."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Precision of the forward pass; weights and losses stay fp32."""
    select_by: Literal["bleu_4", "cider_d"] = "bleu_4"
    """Validation metric by which an epoch is the best: what `best/` holds and what patience waits for."""
    patience: Annotated[int, Field(ge=1)] | None = None
    """Stop after this many epochs without a better one (see --select-by); never when not given."""
    seed: int = 0
    """Seed of initial weights, shuffling, augmentation and dropout: the same seed and number of workers give the same
    losses."""
    shuffle_buffer: Annotated[int, Field(ge=1)] = 1000
    """Images each worker shuffles among."""

    num_workers: Annotated[int, Field(ge=1)] = 1
    """Data-parallel workers."""
    gpus_per_worker: Annotated[float, Field(ge=0)] | None = None
    """GPUs per worker; when not given, 1 if the cluster has GPUs."""
    cpus_per_worker: Annotated[float, Field(gt=0)] | None = None
    """CPUs per worker, and with them its threads; when not given, an equal share, one CPU being left to reading."""
    max_restarts: Annotated[int, Field(ge=0)] = 3
    """Times a training that lost a worker restarts from its last checkpoint."""
    checkpoint_every_steps: Annotated[int, Field(ge=1)] | None = None
    """Steps between checkpoints within an epoch, of which each may take some seconds; when not given, there are those at the
    ends of epochs alone."""
    tracking_uri: str | None = None
    """MLflow tracking server, `none` for no tracking; when not given, MLFLOW_TRACKING_URI, else an SQLite store in the
    output, where that is a local folder (one on S3 needs a server, or `none`)."""
    experiment: str = "capray"
    """MLflow experiment."""
    register_as: str | None = None
    """Name in MLflow's model registry under which the best captioner becomes a version in the end; none when not given."""
    log_every_steps: Annotated[int, Field(ge=1)] = 50
    """Steps between the points of the curves per step that MLflow gets."""

    @field_validator("register_as")
    @classmethod
    def _name_of_a_model(cls, name: str | None) -> str | None:
        if name is not None and (not name.strip() or set(name) & set("/:@'")):
            raise ValueError(f"must be a name without / : @ and ', not {name!r}")
        return name

    @model_validator(mode="after")
    def _regularised(self) -> Self:
        if self.attention == "none" and self.doubly_stochastic > 0:
            raise ValueError("`doubly_stochastic` needs attention weights: set it to 0 with `attention` 'none'")
        if self.batch_size < self.num_workers:
            raise ValueError(f"`batch_size` {self.batch_size} is less than `num_workers` {self.num_workers}")
        if self.epoch == "pairs" and self.captions_per_image == "all":
            raise ValueError("`epoch` 'pairs' goes with `captions_per_image` 1: with all, an epoch has every pair already")
        if self.cached_views > 1 and not self.augments:
            raise ValueError(
                f"`cached_views` {self.cached_views} need `flip`, `min_crop_area` or `color_jitter` to differ by"
            )
        if self.register_as is not None and self.tracking_uri == "none":
            raise ValueError("`register_as` needs an MLflow server: leave `tracking_uri` 'none' out")
        return self

    @model_validator(mode="after")
    def _self_critical(self) -> Self:
        if self.stage == "self_critical":
            if self.init_from is None:
                raise ValueError("`stage` 'self_critical' needs `init_from`, a captioner trained with cross-entropy")
            if self.captions_per_image == "1":
                raise ValueError("`stage` 'self_critical' needs `captions_per_image` all: the references of its reward")
            if self.teacher_forcing_ratio < 1 or self.teacher_forcing_decay is not None:
                raise ValueError("`teacher_forcing_ratio` and its schedule are of `stage` 'cross_entropy': leave them out")
        return self

    @model_validator(mode="after")
    def _starts_from_one_thing(self) -> Self:
        if self.init_from is not None:
            for name in ("weights", "word_vectors", "min_word_count", "max_vocabulary"):
                if (value := getattr(self, name)) != type(self).model_fields[name].default:
                    raise ValueError(
                        f"`{name}` {value!r} has no use with `init_from`, whose captioner brings it: leave one out"
                    )
        if self.freeze_word_vectors and self.init_from is None and self.word_vectors is None:
            raise ValueError("`freeze_word_vectors` would freeze random vectors: give `word_vectors` or `init_from`")
        return self


class SourceSettings(Settings):
    """What of the inputs is wanted, and how tables among them are read."""

    input_kind: Literal["auto", "images", "parquet", "tar", "manifest", "inventory"] = "auto"
    """What the inputs are: a folder or prefix of images, Parquet tables, tar shards (WebDataset, img2dataset), manifests
    of URIs (CSV, JSONL, text), or an S3 Inventory's manifest.json; judged from names when auto."""
    include: tuple[str, ...] = ()
    """Only images that match one of these globs. A glob is compared with the image id, less the input's own URI in
    front; `*` matches `/` too."""
    exclude: tuple[str, ...] = ()
    """No images that match one of these globs, nor what lies in folders and tar shards whose names do."""
    split: str | None = None
    """Only the rows of this split, of a Samples table."""
    id_column: str | None = None
    """Column of the image ids of a table, manifest or img2dataset sidecar; when not given, `image_id`, else the URI
    column (of tar shards: the URI of the shard, `#`, and the member)."""
    image_column: str | None = None
    """Column of encoded image bytes of a Parquet input; when not given, `image` if there is one."""
    uri_column: str | None = None
    """Column of image URIs of a table or manifest; when not given, `uri`, `url` or `path`, if there is no image column."""
    shard: str | None = None
    """`i/n`: only the i-th (from 1) of n parts of the images, by a hash of the image id (tar shards: of the shard's
    URI). An output keeps to its part; give each part an output of its own."""

    @field_validator("shard")
    @classmethod
    def _a_part_of_the_whole(cls, shard: str | None) -> str | None:
        if shard is None:
            return None
        part, _, parts = shard.partition("/")
        if not (part.isdecimal() and parts.isdecimal() and 1 <= int(part) <= int(parts)):
            raise ValueError(f"must be i/n with 1 <= i <= n (1/4 … 4/4), not {shard!r}")
        return f"{int(part)}/{int(parts)}"


class RegistrySettings(Settings):
    """Where captioners are found by name."""

    tracking_uri: str | None = None
    """MLflow server that a `models:/` or `runs:/` model is on; MLFLOW_TRACKING_URI when not given."""


class CaptionerSettings(RegistrySettings):
    """The captioner, and its precision."""

    model: str = IN_THE_BOX
    """Captioner: a folder or URI, or one in MLflow: `models:/NAME/VERSION`, `models:/NAME@ALIAS`, `runs:/ID/captioner`; when
    not given, the one that comes with capray (`caption`: the one its output was begun with)."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Precision of the encoder and decoder; auto is bf16 on GPUs and on CPUs that compute in it (AVX-512 BF16 or
    AMX), else fp32."""


class CaptionConfig(CaptionerSettings, ImageLimits, SourceSettings, Decoding):
    """Caption every image of a source into Parquet tables, as a resumable Ray Data job."""

    positional: ClassVar[tuple[str, ...]] = ("input", "output")

    input: Place
    """Images: a folder, an s3:// prefix, Parquet with an image or URI column, tar shards, a manifest of URIs, or an S3
    Inventory; a glob of such files too."""
    output: Place | None = None
    """Folder or URI for the tables. Without it the arguments are photos, captioned one per line."""
    also: tuple[Place, ...] = ()
    """Further inputs, captioned into the same output."""

    keep: tuple[str, ...] = ()
    """Columns of a table, manifest or img2dataset sidecar to carry into the captions, in a struct `source`."""
    attention: bool = False
    """Store the caption's tokens and the attention over the grid at each of them."""

    batch_size: Annotated[int, Field(ge=1, le=512)] | None = None
    """Images captioned together by an actor, as far as they fit into blocks of 96 MiB; when not given, 64 on a CPU, and 512
    on a GPU."""
    deterministic: bool = False
    """Caption each image by itself, which takes some three times as long: on machines of one kind, with as many threads per
    actor, it has the same captions and scores to the last digit whatever lies beside it."""
    num_actors: Annotated[int, Field(ge=1)] | None = None
    """Captioning actors, but no more than there are blocks of images (of tars that were not read yet, nobody knows);
    when not given, one per GPU, or one per CPU that Ray has but one (where capray starts Ray itself, one per CPU of this
    machine)."""
    gpus_per_actor: Annotated[float, Field(ge=0)] | None = None
    """GPUs per actor; when not given, 1 if the cluster has GPUs."""
    threads_per_actor: Annotated[int, Field(ge=1)] = 1
    """CPUs and threads of an actor."""
    fetch_concurrency: Annotated[int, Field(ge=1, le=256)] = 16
    """Images one fetching task reads at once."""

    part_rows: Annotated[int, Field(ge=1)] = 50_000
    """Rows after which a part is cut and published."""
    part_seconds: Annotated[float, Field(gt=0)] = 60
    """Seconds after which a part is cut and published."""
    retry_failed: tuple[FailureKind, ...] | None = None
    """Attempt the images again whose current failure is final: of these kinds, or of all when none is named."""
    limit: Annotated[int, Field(ge=1)] | None = None
    """Attempt this many images in this run, wherever they lie (a tar shard without a sidecar is read whole)."""
    relist: bool = False
    """List the inputs from the start instead of continuing the listing an interrupted run has stored."""
    dry_run: bool = False
    """Write nothing: list the inputs, time the captioning of a few images, and print what a run would do."""

    max_failure_rate: Annotated[float, Field(gt=0, le=1)] = 0.5
    """Stop when more than this share of the last 2,000 results (judged from 200) are failures that may pass."""
    max_bad_images: Annotated[float, Field(gt=0, le=1)] | None = None
    """Stop when more than this share of the last 2,000 results (judged from 200) are images that cannot be read; never
    when not given."""
    second_look_seconds: Annotated[float, Field(ge=0)] = 30
    """Seconds after which an image that was missing, truncated or not to be decoded, or crashed its process, is looked at
    again, on another node where there is one, before that is taken for final."""
    patience_seconds: Annotated[float, Field(ge=0)] = 600
    """Seconds to wait for a mount or device that went away, or a store that asks to slow down, before the job stops."""
    fail_on_failures: bool = False
    """Exit with code 3 when images have failed."""
    steal_lease: bool = False
    """Take the output from the run that holds its lease without waiting until that run is known to be gone (on a local disk
    nothing is taken from a process that lives: stop it)."""
    unsafe_no_lease: bool = False
    """Write without a lease, to a store without conditional writes: two runs at once would spoil the output."""

    @property
    def inputs(self) -> tuple[str, ...]:
        return (self.input, *self.also)


class ExplainConfig(RegistrySettings, ImageLimits, Decoding):
    """Show where the captioner looked at each word of a photo's caption."""

    positional: ClassVar[tuple[str, ...]] = ("image",)

    image: str
    """A photo, a file or URI; with --table, an image id."""
    model: str = IN_THE_BOX
    """Captioner that captions the photo: a folder, a URI or `models:/…`; the one that comes with capray when not given."""
    table: str | None = None
    """Captioning output, written with --attention, that holds the image's caption, in place of --model."""
    photo: str | None = None
    """With --table: file or URI of the image, where the table does not hold it."""
    out: str | None = None
    """Picture to write (.png, .pdf, .svg, .jpg): the photo with a heat map for each word."""
    html: str | None = None
    """Page to write: the photo, whose heat map is that of the word under the pointer."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Precision of the encoder and decoder."""

    @model_validator(mode="after")
    def _of_one_thing(self) -> Self:
        if self.table is not None and "model" in self.model_fields_set:
            raise ValueError("give a captioner with `model`, or a captioning output with `table`: one of the two")
        if self.photo is not None and self.table is None:
            raise ValueError("`photo` goes with `table`: the image itself is the photo otherwise")
        if self.out is None and self.html is None:
            raise ValueError("give `out`, a picture to write (figure.png), or `html`, a page")
        return self


class ServeConfig(CaptionerSettings, ImageLimits, Decoding):
    """Caption photos over HTTP, with Ray Serve."""

    host: str = "127.0.0.1"
    """Address to listen at; 0.0.0.0 for all, which lets anybody who reaches this machine in."""
    port: Annotated[int, Field(ge=1, le=65_535)] = 8000
    """Port to listen at."""
    min_replicas: Annotated[int, Field(ge=1)] = 1
    """Replicas of the captioner at least."""
    max_replicas: Annotated[int, Field(ge=1)] = 1
    """Replicas at most, as many as the load asks for."""
    batch_size: Annotated[int, Field(ge=1, le=1024)] = 32
    """Photos captioned together at most."""
    batch_wait_ms: Annotated[float, Field(ge=0, le=10_000)] = 10
    """Milliseconds the first photo of a batch waits for others."""
    gpus_per_replica: Annotated[float, Field(ge=0)] | None = None
    """GPUs of a replica; when not given, 1 if the cluster has GPUs."""
    threads_per_replica: Annotated[int, Field(ge=1)] = 1
    """CPUs and threads of a replica."""
    max_requests: Annotated[int, Field(ge=1)] = 256
    """Photos in work at once; more are refused with status 503."""
    timeout_seconds: Annotated[float, Field(gt=0)] = 30
    """Seconds after which a request is given up with status 504."""

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.max_replicas < self.min_replicas:
            raise ValueError(f"`max_replicas` {self.max_replicas} is less than `min_replicas` {self.min_replicas}")
        return self


class VerifyConfig(SourceSettings):
    """Check that captioning outputs are complete and undamaged: every image once, every part readable."""

    positional: ClassVar[tuple[str, ...]] = ("output",)

    output: str
    """Folder or URI a captioning job wrote."""
    also: tuple[str, ...] = ()
    """Further outputs, the other parts of the same work."""
    against: tuple[Place, ...] = ()
    """Inputs, every image of which must be accounted for."""
    check_bytes: Annotated[int, Field(ge=0)] = 0
    """Read this many images again, drawn at random, and compare their SHA-256."""

    @property
    def outputs(self) -> tuple[str, ...]:
        return (self.output, *self.also)


class CompactConfig(Settings):
    """Copy a captioning output into a new one, sorted by image id, in large parts."""

    positional: ClassVar[tuple[str, ...]] = ("output", "new")

    output: str
    """Folder or URI a captioning job wrote; it stays as it is."""
    new: str
    """Folder or URI for the copy."""
    part_rows: Annotated[int, Field(ge=1)] = 500_000
    """Rows of a part of the copy."""


class EvaluateConfig(RegistrySettings, ImageLimits):
    """Score the captions of an output against the references of a Samples table."""

    positional: ClassVar[tuple[str, ...]] = ("output",)

    output: str
    """Folder or URI a captioning job wrote."""
    references: str
    """Samples table with the reference captions."""
    split: str
    """Split to score."""
    match: Literal["image_id", "file_name"] = "image_id"
    """How captions find their references: by image id, or by the last part of it (for ids that are URIs)."""
    baseline: str | None = None
    """Another output with captions of the same images: what this one's figures have over that one's, with intervals of
    the paired bootstrap, and the share of images with the same caption in both."""
    allow_partial: bool = False
    """Print the figures although images of the split have no caption."""
    metrics: tuple[MetricName, ...] | None = None
    """Figures wanted: `bleu`, `rouge_l`, `cider_d`, `meteor` (1.5: needs the extra `meteor` and Java), `meteor_nltk` (needs
    NLTK's WordNet corpus), `diversity` (lengths, words, distinct and novel captions); when not given, all that this
    machine can compute, and a line for each that it cannot."""
    train_split: str = "train"
    """Split of the references' table whose captions are not novel."""
    model: str | None = None
    """Captioner whose captions these are, a folder, a URI or `models:/…`: with it come its perplexity and top-5 accuracies
    over the images and references of the split."""
    resamples: Annotated[int, Field(ge=0, le=1_000_000)] = 1000
    """Resamples of the bootstrap over images that the 95 % intervals come from; 0 for no intervals."""
    seed: int = 0
    """Seed of the resampling."""

    @field_validator("metrics")
    @classmethod
    def _some(cls, metrics: tuple[MetricName, ...] | None) -> tuple[MetricName, ...] | None:
        if metrics == ():
            raise ValueError("name at least one metric")
        return metrics


class ImportSgrvinodConfig(Settings):
    """Turn a checkpoint of sgrvinod's PyTorch tutorial to image captioning into a captioner folder."""

    positional: ClassVar[tuple[str, ...]] = ("checkpoint", "word_map", "output")

    checkpoint: str
    """File or URI of the checkpoint (`BEST_checkpoint_….pth.tar`); nothing in it is executed."""
    word_map: str
    """File or URI of the word map it was trained with (`WORDMAP_….json`)."""
    output: str
    """Folder or URI for the captioner."""


class ShrinkConfig(RegistrySettings):
    """Copy a captioner with its weights in float16."""

    positional: ClassVar[tuple[str, ...]] = ("model", "output")

    model: str
    """Captioner: a folder or URI, or one in MLflow."""
    output: str
    """Folder or URI for the copy."""


class AverageConfig(RegistrySettings):
    """Write the weighted mean of two captioners' weights."""

    positional: ClassVar[tuple[str, ...]] = ("model", "other", "output")

    model: str
    """Captioner: a folder or URI, or one in MLflow."""
    other: str
    """Another one of the same shape and words."""
    output: str
    """Folder or URI for the mean."""
    share: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Share of OTHER's weights in the mean: 0 is MODEL, 1 is OTHER."""


class QueryConfig(Settings):
    """Query a captioning output: with SQL (DuckDB), by words, or in part."""

    positional: ClassVar[tuple[str, ...]] = ("output", "sql")

    output: str
    """Folder or URI a captioning job wrote."""
    sql: str | None = None
    """Query over the views captions, failures (current ones), failure_log, caption_counts, words, failure_kinds and runs;
    a summary when not given."""
    search: str | None = None
    """Captions with these words or inflections of them, the best matches first (BM25)."""
    where: str | None = None
    """Only captions for which this SQL condition holds: `"score > -0.5 AND width > 640"`."""
    sample: Annotated[int, Field(ge=1)] | None = None
    """So many captions drawn at random."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of the drawing."""
    limit: Annotated[int, Field(ge=1)] | None = None
    """At most this many rows; 20 of a search or condition, and all to an export, when not given."""
    join: str | None = None
    """Table with a column image_id (Parquet, CSV or JSON lines, local or on S3) to query beside the captions: the views
    source_table and joined."""
    export: Literal["csv", "parquet", "jsonl", "coco"] | None = None
    """Write all columns to a file: CSV, Parquet, JSON lines or COCO's results format."""
    out: str | None = None
    """File or URI of the export."""
    coco_id: str | None = None
    """Carried column (of `caption --keep`) that holds COCO's integer image ids; when not given, the digits at the end of the
    file's name."""
    format: Literal["table", "csv", "json"] = "table"
    """How an answer is printed."""

    @model_validator(mode="after")
    def _one_question(self) -> Self:
        for name in ("search", "where", "sample", "limit"):
            if self.sql is not None and getattr(self, name) is not None:
                raise ValueError(f"`{name}` has no use beside a query in SQL: put it into the query")
        if self.search is not None and self.sample is not None:
            raise ValueError("`search` and `sample` are two questions: ask one")
        if (self.export is None) != (self.out is None):
            raise ValueError("`export` needs `out`, the file to write, and `out` needs `export`, its format")
        if self.coco_id is not None and self.export != "coco":
            raise ValueError("`coco_id` goes with `export` coco")
        return self


class ReportConfig(Settings):
    """Make one page, with everything in it, about a captioning output or a training."""

    positional: ClassVar[tuple[str, ...]] = ("output",)

    output: str | None = None
    """Folder or URI a captioning job wrote."""
    training: str | None = None
    """Folder or URI of a training, in place of an output."""
    html: str
    """Page to write, a file or URI."""
    images: str | None = None
    """Table with the columns image_id and image (a Samples table) to take the pictures from, where the captions hold no
    URIs of images that can be read."""
    pictures: Annotated[int, Field(ge=0, le=200)] = 12
    """Pictures in each gallery: drawn at random, the surest captions, the least sure, the longest."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of what is drawn at random."""

    @model_validator(mode="after")
    def _about_one_thing(self) -> Self:
        if (self.output is None) == (self.training is None):
            raise ValueError("give a captioning output, or a training with `training`: one of the two")
        return self


class DemoConfig(Settings):
    """Draw a data set, train on it, caption images it has never seen, evaluate and query."""

    out: str = "capray-demo"
    """Folder for everything the demo makes."""
    photos: str | None = None
    """Folder of photos of yours, a few of which the captioner that comes with capray captions first."""
    seed: int = 0
    """Seed of the data set and of the training."""
