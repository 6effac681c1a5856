"""The figures of an output are BLEU over the split, each image once, and withheld when they would mislead."""

import json

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
    rows = [
        {"image_id": name, "image": b"x", "captions": captions, "split": split} for name, captions in references.items()
    ]
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


def score(root, split: str = "test", **settings):
    return evaluate(EvaluateConfig(output=f"{root}/out", references=f"{root}/samples", split=split, **settings))


def test_the_figures_are_those_of_the_metric(place):
    make(place, CAPTIONS)
    write_samples(f"{place}/samples", {"z.jpg": ["In another split ."]}, split="train")
    evaluation = score(place)
    assert evaluation.bleu == pytest.approx(EXPECTED)
    assert 0 < EXPECTED["bleu_4"] < EXPECTED["bleu_1"] < 1
    assert (evaluation.images, evaluation.matched, evaluation.references) == (3, 3, 7)
    assert evaluation.withheld is None
    assert json.loads(evaluation.json())["bleu"] == pytest.approx(EXPECTED)
    assert evaluation.text().splitlines()[0] == "split test: 3 of 3 images have a caption; 7 references"
    assert f"BLEU-4: {EXPECTED['bleu_4']:.4f}" in evaluation.text()


def test_captions_of_other_images_are_left_out(tmp_path):
    make(tmp_path, {"0.jpg": "a man", **CAPTIONS, "zz.jpg": "two dogs"})
    assert score(tmp_path).bleu == pytest.approx(EXPECTED)


def test_withheld_when_an_image_has_no_caption(tmp_path):
    make(tmp_path, {name: text for name, text in CAPTIONS.items() if name != "b.jpg"})
    evaluation = score(tmp_path)
    assert (evaluation.bleu, evaluation.matched) == (None, 2)
    assert "1 of 3 images of split 'test' have no caption" in evaluation.withheld
    assert "--allow-partial" in evaluation.withheld
    assert "BLEU" not in evaluation.text()


def test_partial_figures_when_asked_for(tmp_path):
    make(tmp_path, {name: text for name, text in CAPTIONS.items() if name != "b.jpg"})
    evaluation = score(tmp_path, allow_partial=True)
    expected = corpus_bleu([REFERENCES["a.jpg"], REFERENCES["c.jpg"]], [CAPTIONS["a.jpg"], CAPTIONS["c.jpg"]])
    assert evaluation.bleu == pytest.approx(expected)
    assert (evaluation.matched, evaluation.references, evaluation.withheld) == (2, 4, None)


def test_matching_by_file_name(tmp_path):
    make(tmp_path, {f"s3://bucket/photos {i}/{name}": text for i, (name, text) in enumerate(CAPTIONS.items())})
    assert "try --match file_name" in score(tmp_path).withheld
    assert score(tmp_path, match="file_name").bleu == pytest.approx(EXPECTED)


@pytest.mark.parametrize("allow_partial", [False, True])
def test_none_matched(tmp_path, allow_partial):
    make(tmp_path, {"other.jpg": "a man"})
    evaluation = score(tmp_path, allow_partial=allow_partial)
    assert (evaluation.bleu, evaluation.matched) == (None, 0)
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
    evaluation = evaluate(EvaluateConfig(output=str(tmp_path / "out"), references=samples, split="test"))
    assert evaluation.bleu == pytest.approx(dict.fromkeys(("bleu_1", "bleu_2", "bleu_3", "bleu_4"), 1.0))
