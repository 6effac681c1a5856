"""The demo runs to its end, and does not let a captioner pass that has not learned to look."""

import pytest

from capray import demo
from capray.config import DemoConfig
from capray.datasets.settings import ShapesConfig
from capray.errors import CaprayError, ConfigError
from tests.conftest import in_process


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_an_untrained_captioner_does_not_pass(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo, "RECIPE", {**demo.RECIPE, "epochs": 1})
    draw = demo.prepare_shapes
    monkeypatch.setattr(
        demo, "prepare_shapes", lambda config: draw(ShapesConfig(output=config.output, num_images=40, seed=config.seed))
    )
    with in_process(), pytest.raises(CaprayError, match="did not learn to look"):
        demo.demo(DemoConfig(out=str(tmp_path / "demo")))
    printed = capsys.readouterr().out
    assert printed.count("BLEU-4 0.") == 3
    assert "shapes-000036.png" in printed and "mlflow ui" in printed


def test_it_writes_into_an_empty_folder_only(tmp_path):
    (tmp_path / "mine").write_text("kept")
    with pytest.raises(ConfigError, match="not empty"):
        demo.demo(DemoConfig(out=str(tmp_path)))
