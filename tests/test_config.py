"""Settings are validated, and a mistake is answered with the way out."""

import pytest

from capray.config import Architecture, CaptionConfig, Decoding, EvaluateConfig, Preprocessing, TrainConfig
from capray.errors import ConfigError

REQUIRED = {"samples": "s", "output": "o"}


def test_an_unknown_key_names_the_nearest():
    with pytest.raises(ConfigError, match="unknown key 'lerning_rate'.*'learning_rate'"):
        TrainConfig.create(REQUIRED, lerning_rate=1)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"learning_rate": -1}, "learning_rate: input should be greater than 0, not -1"),
        ({"encoder": 3}, "encoder"),
        ({"beam_size": 0}, "beam_size"),
        ({"output_dropout": 1.0}, "output_dropout"),
        ({"resize": "stretch"}, "'squash', 'crop', 'pad' or 'keep-aspect', not 'stretch'"),
        ({"std": (0.2, 0.0, 0.2)}, "std: must be above 0"),
        ({"attention": "none"}, "doubly_stochastic needs attention"),
        ({"batch_size": 1, "num_workers": 2}, "batch_size 1 is less than num_workers 2"),
        ({"beam_size": 2, "n_best": 3}, "n_best 3 is more than beam_size 2"),
        ({"momentum": 0.9}, "momentum is of rmsprop and sgd, not of adam"),
        ({"warmup_steps": 9}, "warmup_steps is of schedule 'cosine', not of 'constant'"),
        ({"teacher_forcing_schedule": "linear"}, "teacher_forcing_decay None: set both"),
        (
            {"teacher_forcing_schedule": "exponential", "teacher_forcing_decay": 2},
            "of the exponential schedule must be below 1, not 2",
        ),
        ({"init_from": "a", "weights": "imagenet"}, "weights 'imagenet' has no use with init_from"),
        ({"init_from": "a", "min_word_count": 3}, "min_word_count 3 has no use with init_from"),
        ({"freeze_word_vectors": True}, "freeze_word_vectors would freeze random vectors"),
        ({"min_length": 20}, "min_length 20 must be below max_length 20"),
    ],
)
def test_values_out_of_range_are_refused_with_the_value(values, message):
    with pytest.raises(ConfigError, match=message):
        TrainConfig.create(REQUIRED, **values)


def test_a_missing_setting_is_named():
    with pytest.raises(ConfigError, match="split is required"):
        EvaluateConfig.create(output="a", references="b")


def test_settings_are_frozen():
    with pytest.raises(ValueError):
        Decoding().beam_size = 3


def test_yaml_with_overrides(tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text("encoder: resnet18\nmean: [0.5, 0.5, 0.5]\nlearning_rate: 4.0e-4\n")
    config = TrainConfig.from_yaml(file, **REQUIRED, learning_rate=0.1)
    assert (config.encoder, config.mean, config.learning_rate) == ("resnet18", (0.5, 0.5, 0.5), 0.1)


@pytest.mark.parametrize(
    ("text", "message"),
    [("- a\n- b\n", "must hold a mapping"), ("a: [", "is not YAML"), ("beem_size: 3", r"recipe\.yaml.*'beam_size'")],
)
def test_a_bad_yaml_file(tmp_path, text, message):
    file = tmp_path / "recipe.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=message):
        TrainConfig.from_yaml(file, **REQUIRED)


def test_a_missing_yaml_file():
    with pytest.raises(ConfigError, match="cannot read the configuration 'nowhere.yaml'"):
        TrainConfig.from_yaml("nowhere.yaml")


def test_a_group_is_taken_out_of_the_whole():
    config = TrainConfig.create(REQUIRED, size=64, beam_size=3)
    assert config.subset(Decoding) == Decoding(beam_size=3)
    assert config.subset(Architecture).subset(Preprocessing) == Preprocessing(size=64)


def test_every_setting_is_documented_in_one_line():
    for model in (TrainConfig, CaptionConfig):
        for name, field in model.model_fields.items():
            assert field.description, name
            assert "\n" not in field.description, name
