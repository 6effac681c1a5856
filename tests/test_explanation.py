"""Where the captioner looked, from a captioner and from a table."""

import io
import json
import re

import numpy as np
import pytest
import torch
from PIL import Image

from capray.captioning.actor import CaptioningActor
from capray.captioning.job import caption
from capray.config import CaptionConfig, ExplainConfig, ImageLimits, Preprocessing
from capray.errors import CaprayError, ConfigError
from capray.images import load
from capray.model.checkpoint import load_captioner
from capray.report.explanation import explain, figure, page, region_of
from tests.conftest import image_bytes, write_photos
from tests.local_executor import LocalExecutor

DECODING = {"beam_size": 2, "max_length": 6}


@pytest.fixture
def photo(tmp_path) -> str:
    return write_photos(tmp_path / "photos", 1)[0]


def explained(image, tmp_path, **settings):
    return explain(ExplainConfig(image=image, out=str(tmp_path / "figure.png"), **DECODING, **settings))


class TestByCaptioning:
    def test_a_map_and_a_probability_for_each_word(self, photo, model, tmp_path):
        found = explained(photo, tmp_path, model=model)
        assert found.words == found.caption.split()
        assert found.attention_Tkk.shape == (len(found.words), 4, 4)
        assert found.attention_Tkk.sum((1, 2)) == pytest.approx(1, abs=1e-5)
        with Image.open(tmp_path / "figure.png") as drawn:
            assert drawn.format == "PNG" and np.asarray(drawn.convert("L")).std() > 10

    def test_the_probabilities_are_those_of_the_search(self, photo, model, tmp_path):
        captioner, _ = load_captioner(model)
        with open(photo, "rb") as file:
            pixels, _, _ = load(file.read(), captioner.architecture, ImageLimits())
        decoding = ExplainConfig(image=photo, model=model, out="x.png", **DECODING)
        with torch.inference_mode():
            memory = captioner.encode_all([pixels])
            ((best, *_),) = captioner.caption(memory, decoding)
            (log_probs,) = captioner.log_probs(memory, [best.token_ids])
        assert float(log_probs.sum()) == pytest.approx(best.log_prob, abs=1e-4)
        shown = explained(photo, tmp_path, model=model).probabilities_T
        assert shown == pytest.approx(log_probs.exp().tolist()[: len(shown)], rel=1e-5)

    def test_the_page_has_all_in_it_and_escapes_words(self, photo, model, tmp_path):
        found = explained(photo, tmp_path, model=model, html=str(tmp_path / "page.html"))
        text = (tmp_path / "page.html").read_text()
        assert text.count('class="heat"') == len(found.words) == text.count("<button>")
        assert not re.search(r"""(src|href)=["'](?!data:)""", text), "nothing is fetched from elsewhere"
        evil = page(type(found)(**{**vars(found), "caption": "<script>alert(1)</script>"})).decode()
        assert "<script>alert" not in evil

    def test_a_captioner_without_attention(self, photo, tmp_path):
        from capray.config import Architecture
        from capray.model.captioner import Captioner
        from capray.model.checkpoint import save_captioner
        from capray.vocabulary import Vocabulary
        from tests.conftest import TINY

        save_captioner(Captioner(Architecture(**TINY, attention="none"), Vocabulary(["a"])), str(tmp_path / "none"))
        with pytest.raises(ConfigError, match="has no attention to show"):
            explained(photo, tmp_path, model=str(tmp_path / "none"))

    def test_what_is_no_photo(self, model, tmp_path):
        (tmp_path / "text.jpg").write_text("text")
        with pytest.raises(CaprayError, match=r"text\.jpg: not_an_image"):
            explained(str(tmp_path / "text.jpg"), tmp_path, model=model)

    def test_a_format_that_is_none(self, photo, model, tmp_path):
        with pytest.raises(ConfigError, match="'xyz'"):
            figure(explained(photo, tmp_path, model=model), "xyz")


def test_from_a_table(photo, model, tmp_path):
    output = str(tmp_path / "out")
    config = CaptionConfig(input=str(tmp_path / "photos"), output=output, model=model, attention=True, **DECODING)
    caption(config, LocalExecutor(CaptioningActor))
    by_table = explained(photo, tmp_path, table=output)
    by_model = explained(photo, tmp_path, model=model)
    assert (by_table.caption, by_table.words) == (by_model.caption, by_model.words)
    np.testing.assert_allclose(by_table.attention_Tkk, by_model.attention_Tkk, atol=1e-5)
    assert by_table.region == by_model.region and by_table.probabilities_T is None

    with pytest.raises(ConfigError, match="no caption of an image 'other'"):
        explained("other", tmp_path, table=output)
    write_photos(tmp_path / "others", 1, seed=1)
    with pytest.raises(ConfigError, match="is not the image that was captioned"):
        explained(photo, tmp_path, table=output, photo=str(tmp_path / "others" / "photo-0000.jpg"))
    job = tmp_path / "out" / "_capray" / "job.json"
    job.write_text(json.dumps(json.loads(job.read_text()) | {"attention": False}))
    with pytest.raises(ConfigError, match="holds no attention"):
        explained(photo, tmp_path, table=output)


@pytest.mark.parametrize("resize", ["squash", "crop", "pad"])
@pytest.mark.parametrize("size", [(90, 30), (30, 90)])
def test_the_region_is_what_the_encoder_sees(resize, size):
    """A white dot on black is where the region says, before and after the fit."""
    preprocessing = Preprocessing(resize=resize, size=120)
    image = Image.new("RGB", size)
    x, y = size[0] // 2 + 6, size[1] // 2 - 8
    image.paste((255, 255, 255), (x - 2, y - 2, x + 2, y + 2))
    pixels, width, height = load(image_bytes(image), preprocessing)
    rows, columns = np.nonzero(pixels.min(2) > 200)
    left, top, right, bottom = region_of(width, height, preprocessing)
    assert left + columns.mean() / 120 * (right - left) == pytest.approx(x / width, abs=0.02)
    assert top + rows.mean() / 120 * (bottom - top) == pytest.approx(y / height, abs=0.02)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"out": "x.png", "model": "m", "table": "t"}, "one of the two"),
        ({"model": "m"}, "give out, a picture"),
        ({"out": "x.png", "model": "m", "photo": "p"}, "photo goes with table"),
    ],
)
def test_settings_that_do_not_fit(settings, message):
    with pytest.raises(ConfigError, match=message):
        ExplainConfig.create(image="i", **settings)


def test_every_format(photo, model, tmp_path):
    found = explained(photo, tmp_path, model=model)
    with Image.open(io.BytesIO(figure(found, "jpg"))) as drawn:
        assert drawn.format == "JPEG"
    assert figure(found, "pdf").startswith(b"%PDF") and b"<svg" in figure(found, "svg")
