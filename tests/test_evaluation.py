"""The figures of an output are BLEU over the split, each image once, and withheld when they would mislead."""

import json
import math

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from capray.config import EvaluateConfig
from capray.errors import ConfigError, DataError
from capray.evaluation import evaluate
from capray.metrics import corpus_bleu
from capray.output import Output
from capray.storage import write_atomic
from capray.tables import SAMPLES, encode_parquet
from tests.test_query import write_captions, write_job

REFERENCES = {
    "a.jpg": ["A man rides a brown horse .", "A man on a horse ."],
    "b.jpg": ["Two dogs run on the green grass .", "Dogs running over grass .", "Two brown dogs play ."],
    "c.jpg": ["A child in a red coat plays in the snow .", "A child in the snow ."],
}
CAPTIONS = {
    "a.jpg": "a man rides a brown horse",
    "b.jpg": "two dogs run on the beach",
    "c.jpg": "a woman in a red coat",
}
EXPECTED = corpus_bleu(list(REFERENCES.values()), list(CAPTIONS.values()))


def write_samples(root: str, references: dict[str, list[str]], split: str = "test", shard: int = 0) -> None:
    rows = [{"image_id": name, "image": b"x", "captions": captions, "split": split} for name, captions in references.items()]
    table = pa.Table.from_pylist(rows, schema=SAMPLES)
    write_atomic(Output(root).root.join(f"{split}-{shard:05d}.parquet"), encode_parquet(table))


@pytest.fixture(params=["local", "s3"])
def place(request, tmp_path) -> str:
    return str(tmp_path) if request.param == "local" else f"{request.getfixturevalue('s3')}/{tmp_path.name}"


def make(root: str, captions: dict[str, str], references: dict[str, list[str]] = REFERENCES) -> None:
    output = Output(f"{root}/out")
    write_job(output)
    if captions:
        write_captions(output, captions)
    write_samples(f"{root}/samples", references)


def score(root, split: str = "test", metrics=("bleu",), **settings):
    settings["metrics"] = metrics
    return evaluate(EvaluateConfig(output=f"{root}/out", references=f"{root}/samples", split=split, **settings))


def bleu(evaluation) -> dict[str, float]:
    return {name: figure.value for name, figure in evaluation.figures.items() if name.startswith("bleu")}


def line_of(evaluation, label: str) -> str:
    (line,) = [line for line in evaluation.text().splitlines() if label in line]
    return line


def test_the_figures_are_those_of_the_metric(place):
    make(place, CAPTIONS)
    write_samples(f"{place}/samples", {"z.jpg": ["In another split ."]}, split="train")
    evaluation = score(place)
    assert bleu(evaluation) == pytest.approx(EXPECTED)
    assert 0 < EXPECTED["bleu_4"] < EXPECTED["bleu_1"] < 1
    assert (evaluation.images, evaluation.matched, evaluation.references) == (3, 3, 7)
    assert evaluation.withheld is None
    assert json.loads(evaluation.json())["figures"]["bleu_4"]["value"] == pytest.approx(EXPECTED["bleu_4"])
    assert evaluation.text().splitlines()[0] == "split test: 3 of 3 images have a caption; 7 references"
    assert f"{EXPECTED['bleu_4']:.4f}" in line_of(evaluation, "BLEU-4")


def test_what_the_figures_have_over_a_baseline(tmp_path):
    make(tmp_path, CAPTIONS)
    baseline = Output(f"{tmp_path}/baseline")
    write_job(baseline)
    write_captions(baseline, {**CAPTIONS, "b.jpg": "a cat"})
    evaluation = score(tmp_path, baseline=f"{tmp_path}/baseline")
    theirs = corpus_bleu(list(REFERENCES.values()), list({**CAPTIONS, "b.jpg": "a cat"}.values()))
    assert bleu(evaluation) == pytest.approx(EXPECTED)
    for name, difference in evaluation.differences.items():
        assert difference.value == pytest.approx(EXPECTED[name] - theirs[name])
    first = evaluation.differences["bleu_1"]
    assert first.low == 0 < first.value < first.high, "resamples without b.jpg have no difference"
    assert evaluation.figures["same_captions"].value == pytest.approx(2 / 3)
    assert f"{first.value:+.4f}" in line_of(evaluation, "BLEU-1")
    same = score(tmp_path, baseline=f"{tmp_path}/out")
    assert {(figure.low, figure.value, figure.high) for figure in same.differences.values()} == {(0, 0, 0)}


def test_an_image_that_the_baseline_lacks_is_in_neither_figure(tmp_path):
    make(tmp_path, CAPTIONS)
    baseline = Output(f"{tmp_path}/baseline")
    write_job(baseline)
    write_captions(baseline, {name: text for name, text in CAPTIONS.items() if name != "b.jpg"})
    settings = {"baseline": f"{tmp_path}/baseline"}
    assert "1 of 3 images of split 'test' have no caption in both" in score(tmp_path, **settings).withheld
    evaluation = score(tmp_path, allow_partial=True, **settings)
    assert (evaluation.matched, evaluation.figures["same_captions"].value) == (2, 1.0)
    assert evaluation.differences["bleu_1"].value == 0


def test_captions_of_other_images_are_left_out(tmp_path):
    make(tmp_path, {"0.jpg": "a man", **CAPTIONS, "zz.jpg": "two dogs"})
    assert bleu(score(tmp_path)) == pytest.approx(EXPECTED)


def test_withheld_when_an_image_has_no_caption(tmp_path):
    make(tmp_path, {name: text for name, text in CAPTIONS.items() if name != "b.jpg"})
    evaluation = score(tmp_path)
    assert (evaluation.figures, evaluation.matched) == ({}, 2)
    assert "1 of 3 images of split 'test' have no caption" in evaluation.withheld
    assert "--allow-partial" in evaluation.withheld
    assert "BLEU" not in evaluation.text()


def test_partial_figures_when_asked_for(tmp_path):
    make(tmp_path, {name: text for name, text in CAPTIONS.items() if name != "b.jpg"})
    evaluation = score(tmp_path, allow_partial=True)
    expected = corpus_bleu([REFERENCES["a.jpg"], REFERENCES["c.jpg"]], [CAPTIONS["a.jpg"], CAPTIONS["c.jpg"]])
    assert bleu(evaluation) == pytest.approx(expected)
    assert (evaluation.matched, evaluation.references, evaluation.withheld) == (2, 4, None)


def test_matching_by_file_name(tmp_path):
    make(tmp_path, {f"s3://bucket/photos {i}/{name}": text for i, (name, text) in enumerate(CAPTIONS.items())})
    assert "try --match file_name" in score(tmp_path).withheld
    assert bleu(score(tmp_path, match="file_name")) == pytest.approx(EXPECTED)


@pytest.mark.parametrize("allow_partial", [False, True])
def test_none_matched(tmp_path, allow_partial):
    make(tmp_path, {"other.jpg": "a man"})
    evaluation = score(tmp_path, allow_partial=allow_partial)
    assert (evaluation.figures, evaluation.matched) == ({}, 0)
    assert "none of the 3 images of split 'test' has a caption" in evaluation.withheld


def test_an_output_without_captions(tmp_path):
    make(tmp_path, {})
    assert "none of the 3 images" in score(tmp_path).withheld


def test_an_unknown_split(tmp_path):
    make(tmp_path, CAPTIONS)
    with pytest.raises(DataError, match="no images in split 'tset' of"):
        score(tmp_path, split="tset")


def test_what_is_no_output(tmp_path):
    write_samples(f"{tmp_path}/samples", REFERENCES)
    with pytest.raises(ConfigError, match="is no captioning output"):
        score(tmp_path)


def test_no_references(tmp_path):
    make(tmp_path, CAPTIONS)
    (tmp_path / "samples" / "test-00000.parquet").unlink()
    with pytest.raises(DataError, match="no Parquet files at"):
        score(tmp_path)


def test_references_that_are_no_samples_table(tmp_path):
    make(tmp_path, CAPTIONS)
    pq.write_table(pa.table({"x": [1]}), tmp_path / "samples" / "test-00000.parquet")
    with pytest.raises(DataError):
        score(tmp_path)


def test_images_that_share_a_key(tmp_path):
    make(tmp_path, {"x/a.jpg": "a man", "y/a.jpg": "a dog"})
    with pytest.raises(DataError, match=r"1 images of '.*out' share a key \(file_name\)"):
        score(tmp_path, match="file_name")
    write_samples(f"{tmp_path}/samples", {"a.jpg": ["Again ."]}, shard=1)
    with pytest.raises(DataError, match=r"1 images of '.*samples' share a key \(image_id\)"):
        score(tmp_path)


def test_the_table_written_by_prepare(samples, tmp_path):
    table = pq.read_table(f"{samples}/test-00000.parquet").to_pylist()
    output = Output(str(tmp_path / "out"))
    write_job(output)
    write_captions(output, {row["image_id"]: row["captions"][0] for row in table})
    evaluation = evaluate(EvaluateConfig(output=str(tmp_path / "out"), references=samples, split="test", metrics=("bleu",)))
    assert bleu(evaluation) == pytest.approx(dict.fromkeys(("bleu_1", "bleu_2", "bleu_3", "bleu_4"), 1.0))


def test_captions_beside_those_of_training(tmp_path):
    make(tmp_path, CAPTIONS)
    write_samples(f"{tmp_path}/samples", {"t.jpg": ["Two dogs run on the beach!", "A man"]}, split="train")
    evaluation = score(tmp_path, metrics=("diversity",))
    values = {name: figure.value for name, figure in evaluation.figures.items()}
    assert values == {
        "mean_length": 6.0,
        "novel_captions": pytest.approx(2 / 3),
        "distinct_captions": 1.0,
        "vocabulary_used": len({word for caption in CAPTIONS.values() for word in caption.split()}),
    }
    assert line_of(evaluation, "different words").split() == ["│", "different", "words", "│", "15", "│", "│"]


def test_no_training_split(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "")  # METEOR takes its time where there is Java.
    make(tmp_path, CAPTIONS)
    assert "no captions in split 'train'" in score(tmp_path, metrics=None).left_out["novel_captions"]
    with pytest.raises(DataError, match=r"novel captions: .* has no captions in split 'trian'"):
        score(tmp_path, metrics=("diversity",), train_split="trian")


def test_what_this_machine_cannot_compute(tmp_path, monkeypatch):
    """Left out with its reason, or a fault where it was asked for by name."""
    monkeypatch.setenv("PATH", "")
    make(tmp_path, CAPTIONS)
    evaluation = score(tmp_path, metrics=None)
    assert {"bleu_4", "rouge_l", "cider_d", "mean_length"} <= evaluation.figures.keys()
    assert "meteor" not in evaluation.figures and "Java" in evaluation.left_out["meteor"]
    assert "left out: METEOR 1.5: METEOR 1.5 needs" in evaluation.text()
    assert "CIDEr-D: idf from the references of these 3 images" in evaluation.text()
    with pytest.raises(ConfigError, match="METEOR 1.5 needs"):
        score(tmp_path, metrics=("bleu", "meteor"))


def test_intervals(tmp_path):
    make(tmp_path, CAPTIONS)
    evaluation = score(tmp_path, metrics=("bleu", "rouge_l"), resamples=200)
    assert all(figure.low <= figure.value <= figure.high for figure in evaluation.figures.values())
    figure = evaluation.figures["rouge_l"]
    assert figure.low < figure.high
    assert f"{figure.low:.4f} – {figure.high:.4f}" in line_of(evaluation, "ROUGE-L")
    assert "200 resamples" in evaluation.text()
    assert score(tmp_path, metrics=("bleu", "rouge_l"), resamples=200).figures == evaluation.figures
    assert score(tmp_path, resamples=0).figures["bleu_1"].low is None


@pytest.mark.parametrize("captions", [[], ["A dog .", None]])
def test_an_image_without_references(tmp_path, captions):
    make(tmp_path, CAPTIONS, {**REFERENCES, "a.jpg": captions})
    with pytest.raises(DataError, match=r"image 'a\.jpg' of .* has (no|a null) reference caption"):
        score(tmp_path)


class TestCaptioner:
    """`model`: how well the captioner predicts the references, over the images themselves."""

    @pytest.fixture
    def captioned(self, samples, model, tmp_path) -> str:
        from capray.model.checkpoint import load_captioner

        _, model_id = load_captioner(model)
        table = pq.read_table(f"{samples}/test-00000.parquet").to_pylist()
        output = Output(str(tmp_path / "out"))
        write_job(output)
        write_captions(output, {row["image_id"]: row["captions"][0] for row in table}, model_id=model_id)
        return str(tmp_path / "out")

    def score(self, output, samples, model, **settings):
        config = EvaluateConfig(output=output, references=samples, split="test", model=model, metrics=("bleu",), **settings)
        return evaluate(config)

    def test_perplexity_is_that_of_the_loss(self, captioned, samples, model):
        from capray.images import load
        from capray.model.checkpoint import load_captioner
        from capray.model.loss import collate, loss_sums
        from capray.vocabulary import tokenise

        captioner, _ = load_captioner(model)
        nll = tokens = 0.0
        for row in pq.read_table(f"{samples}/test-00000.parquet").to_pylist():
            pixels, _, _ = load(row["image"], captioner.architecture)
            words = [[captioner.vocabulary.encode(tokenise(text)) for text in row["captions"]]]
            batch = collate(words, 100)
            nll += float(loss_sums(captioner, captioner.encode_all([pixels]), batch).nll)
            tokens += batch.num_tokens
        figures = self.score(captioned, samples, model).figures
        assert figures["perplexity"].value == pytest.approx(math.exp(nll / tokens), rel=1e-5)
        assert figures["perplexity"].low < figures["perplexity"].value < figures["perplexity"].high
        assert 0 <= figures["free_running_top5_accuracy"].value <= 1
        assert 0 <= figures["teacher_forced_top5_accuracy"].value <= 1

    def test_an_image_that_cannot_be_decoded(self, captioned, samples, model, tmp_path):
        table = pq.read_table(f"{samples}/test-00000.parquet")
        images = [b"no image", *table["image"].to_pylist()[1:]]
        table = table.set_column(table.schema.get_field_index("image"), SAMPLES.field("image"), pa.array(images))
        (tmp_path / "broken").mkdir()
        pq.write_table(table, tmp_path / "broken" / "test-00000.parquet")
        text = self.score(captioned, str(tmp_path / "broken"), model).text()
        assert "over 5 images" in text and "1 images cannot be decoded" in text

    def test_captions_of_another_captioner(self, captioned, samples, tmp_path):
        from tests.conftest import make_model

        with pytest.raises(ConfigError, match="the captions in .* are by .*, not by"):
            self.score(captioned, samples, make_model(tmp_path / "other", seed=1))
