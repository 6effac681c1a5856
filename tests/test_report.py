"""Pages about an output and about a training: they say what the tables say, and hold all they show."""

import json
import re
from html import unescape
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from capray.config import ReportConfig
from capray.errors import ConfigError
from capray.output import Output
from capray.report.output_report import report_output
from capray.report.training_report import report_training
from capray.storage import write_atomic
from capray.tables import encode_parquet
from tests.conftest import image_bytes, write_photos
from tests.test_query import START, write_captions, write_failures


def make(output, tmp_path, **settings) -> tuple[str, str]:
    """The page and what is said of it."""
    html = tmp_path / "report.html"
    said = report_output(ReportConfig(output=output.root.uri, html=str(html), **settings))
    text = html.read_text()
    assert not re.search(r"""(src|href|url\()\s*=?["']?https?:""", text), "nothing is fetched from elsewhere"
    return text, said


def write_described_job(output: Output) -> None:
    write_atomic(output.job, json.dumps({"schema_version": 1, "model_id": "m" * 64, "decoding": {"beam_size": 3}}).encode())


@pytest.fixture
def output(tmp_path) -> Output:
    output = Output(str(tmp_path / "out"))
    write_described_job(output)
    return output


class TestOutput:
    def test_says_what_the_tables_say(self, output, tmp_path):
        photos = write_photos(tmp_path / "photos", 3)
        captions = dict(zip(photos, ["a dog", "a dog", "<b>two cats</b>"], strict=True))
        write_captions(output, captions)
        write_failures(output, {"x": "missing", "y": "missing", "z": "truncated"}, "run-1", START)
        text, said = make(output, tmp_path)
        assert said.endswith("0 of 3 pictures could be shown"), "these rows have no URI"
        assert "3 (2 different)" in text and "<dd>3</dd>" in text
        assert re.search(r"<td>missing</td><td class=\"number\">2</td>\s*<td><div>x", text)
        assert '<td>a dog</td><td class="number">2</td>' in text
        assert "<b>two cats</b>" not in text and "&lt;b&gt;two cats&lt;/b&gt;" in text
        searchable = json.loads(re.search(r'id="captions">(.*?)</script>', text, re.S)[1])
        assert {row["image_id"]: row["caption"] for row in searchable} == captions

    def test_shows_the_pictures_behind_uris(self, output, tmp_path):
        photos = write_photos(tmp_path / "photos", 3)
        write_captions(output, dict.fromkeys(photos, "a dog"))
        (part,) = (tmp_path / "out" / "captions").iterdir()
        table = pq.read_table(part)
        Path(photos[2]).write_bytes(b"no image any more")
        part.write_bytes(encode_parquet(table.set_column(1, "uri", table["image_id"])))
        text, said = make(output, tmp_path)
        assert said.endswith("2 of 3 pictures could be shown")
        assert text.count("data:image/jpeg;base64,") == 4 * 2 and text.count("no picture at hand") == 4

    def test_takes_the_pictures_from_a_table(self, output, tmp_path):
        write_captions(output, {"a": "a dog", "b": "a cat"})
        rows = [{"image_id": "a", "image": image_bytes(), "captions": [], "split": "dev"}]
        (tmp_path / "images.parquet").write_bytes(encode_parquet(pa.Table.from_pylist(rows)))
        _, said = make(output, tmp_path, images=str(tmp_path / "images.parquet"))
        assert said.endswith("1 of 2 pictures could be shown")

    def test_a_table_without_images(self, output, tmp_path):
        write_captions(output, {"a": "a dog"})
        (tmp_path / "images.csv").write_text("image_id,picture\na,b\n")
        with pytest.raises(ConfigError, match=r"no column `image` of encoded images, but image_id \(VARCHAR\), picture"):
            make(output, tmp_path, images=str(tmp_path / "images.csv"))

    def test_before_the_first_caption(self, output, tmp_path):
        text, _ = make(output, tmp_path)
        assert "<dt>captions</dt><dd>0" in text

    def test_only_so_many_captions_are_in_it(self, output, tmp_path, monkeypatch):
        monkeypatch.setattr("capray.report.output_report.NUM_SEARCHABLE", 10)
        write_captions(output, {str(i): "a dog" for i in range(30)})
        text, said = make(output, tmp_path, pictures=2)
        assert "Over 10 captions drawn at random" in text
        assert len(json.loads(re.search(r'id="captions">(.*?)</script>', text, re.S)[1])) == 10
        assert int(re.search(r"0 of (\d+)", said)[1]) <= 8

    def test_the_rate_counts_every_caption(self, output, tmp_path):
        write_captions(output, {str(i): "a dog" for i in range(50)})
        text, _ = make(output, tmp_path)
        assert "minutes since the first caption" in unescape(text)

    def test_of_s3_to_s3(self, tmp_path, s3):
        import s3fs

        output = Output(f"{s3}/report-{tmp_path.name}")
        write_described_job(output)
        write_captions(output, {"a": "a dog"})
        report_output(ReportConfig(output=output.root.uri, html=f"{output.root.uri}-page.html"))
        assert b"a dog" in s3fs.S3FileSystem(use_listings_cache=False).cat_file(f"{output.root.uri}-page.html")

    def test_no_output(self, tmp_path):
        with pytest.raises(ConfigError, match="is no captioning output"):
            report_output(ReportConfig(output=str(tmp_path / "x"), html=str(tmp_path / "r.html")))


class TestTraining:
    @pytest.fixture
    def training(self, samples, tmp_path) -> Path:
        epochs = [
            {
                "epoch": n,
                "train_loss": 3.0 / n,
                "val_loss": 3.5 / n,
                "bleu_1": 0.1 * n,
                "bleu_2": 0.1,
                "bleu_3": 0.1,
                "bleu_4": 0.05,
                "learning_rate": 1e-3,
            }
            for n in (1, 2)
        ]
        folder = tmp_path / "training"
        folder.mkdir()
        settings = {"samples": samples, "validation_split": "dev", "encoder": "tiny", "note": "<script>"}
        (folder / "training.json").write_text(json.dumps({"settings": settings}))
        (folder / "history.json").write_text(json.dumps({"best_epoch": 2, "epochs": epochs}))
        return folder

    def test_curves_epochs_and_settings(self, training, tmp_path):
        html = tmp_path / "r.html"
        assert report_training(ReportConfig(training=str(training), html=str(html))) == f"wrote {html}: 2 epochs, 0 samples"
        text = html.read_text()
        assert text.count("<svg") == 3, "losses, BLEU, learning rate; accuracies it has none"
        assert "epoch 2" in text and ">1.75<" in text and "<td>tiny</td>" in text
        assert "<td><script>" not in text

    def test_what_is_no_training_or_has_no_epoch(self, training, tmp_path):
        (training / "history.json").unlink()
        with pytest.raises(ConfigError, match="has not finished an epoch"):
            report_training(ReportConfig(training=str(training), html="r.html"))
        with pytest.raises(ConfigError, match=r"holds no training: it has no training\.json"):
            report_training(ReportConfig(training=str(tmp_path), html="r.html"))

    def test_pictures_that_are_gone_are_said_to_be(self, training, tmp_path):
        (training / "samples.json").write_text(json.dumps([{"image_id": "gone", "caption": "a", "references": ["b"]}]))
        html = tmp_path / "r.html"
        report_training(ReportConfig(training=str(training), html=str(html)))
        assert "1 of the pictures are no longer in" in html.read_text()


def test_one_of_both():
    for settings in ({}, {"output": "o", "training": "t"}):
        with pytest.raises(ConfigError, match="one of the two"):
            ReportConfig.create(html="x", **settings)
