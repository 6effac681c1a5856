"""The demo runs to its end, and does not let a captioner pass that has not learned to look."""

import shutil
from pathlib import Path

import pytest

from capray import demo
from capray.config import DemoConfig
from capray.datasets.settings import ShapesConfig
from capray.errors import CaprayError, ConfigError
from capray.model import captioner_files
from tests.conftest import in_process, write_photos
from tests.local_executor import captioning_in_process


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_an_untrained_captioner_does_not_pass(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo, "RECIPE", {**demo.RECIPE, "epochs": 1})
    draw = demo.prepare_shapes
    monkeypatch.setattr(
        demo, "prepare_shapes", lambda config: draw(ShapesConfig(output=config.output, num_images=40, seed=config.seed))
    )
    with in_process(), captioning_in_process(), pytest.raises(CaprayError, match="did not learn to look"):
        demo.demo(DemoConfig(out=str(tmp_path / "demo")))
    printed = capsys.readouterr().out
    assert printed.count("BLEU-4 0.") == 3
    assert "shapes-000036.png" in printed and "mlflow ui" in printed


def test_it_writes_into_an_empty_folder_only(tmp_path):
    (tmp_path / "mine").write_text("kept")
    with pytest.raises(ConfigError, match="not empty"):
        demo.demo(DemoConfig(out=str(tmp_path)))


class TestPhotosOfTheUsers:
    def test_they_are_captioned_first(self, tmp_path, model, monkeypatch, capsys):
        monkeypatch.setattr(demo, "prepare_shapes", lambda _: pytest.skip("the rest is the demo without photos"))
        monkeypatch.setattr(captioner_files, "_CAPTIONERS", tmp_path / "captioners")
        shutil.copytree(model, tmp_path / "captioners" / "flickr8k")
        photos = write_photos(tmp_path / "photos", 20)
        Path(photos[3]).write_text("no photo")
        with pytest.raises(pytest.skip.Exception):
            demo.demo(DemoConfig(out=str(tmp_path / "demo"), photos=str(tmp_path / "photos")))
        out, err = capsys.readouterr()
        assert [line.split("\t")[0] for line in out.splitlines()] == photos[:3] + photos[4:12]
        assert "captioner: builtin:flickr8k" in err and f"capray: {photos[3]}: not_an_image" in err

    def test_a_folder_without_any(self, tmp_path):
        with pytest.raises(ConfigError, match="no photos in"):
            demo.demo(DemoConfig(out=str(tmp_path / "demo"), photos=str(tmp_path)))
