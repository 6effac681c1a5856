"""The server: the batch job's captions over HTTP, in batches, with polite refusals; and its page in a real browser."""

import asyncio
import io
import re
import shutil
from collections import Counter

import httpx
import numpy as np
import pytest
from PIL import Image

from capray.config import ExplainConfig, ServeConfig
from capray.errors import ConfigError
from capray.report.explanation import explain
from capray.serving.server import start
from tests.conftest import free_port, image_bytes

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]
DECODING = {"beam_size": 3, "max_length": 8}
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def server(ray_cluster, model):
    from ray import serve

    config = ServeConfig(
        precision="fp32",
        model=model,
        port=free_port(),
        batch_wait_ms=200,
        max_image_bytes=200_000,
        max_requests=64,
        **DECODING,
    )
    address = start(config)
    with httpx.Client(base_url=address, timeout=60) as client:
        yield client
    serve.shutdown()


def photo(seed=0, size=(60, 40)) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    return image_bytes(Image.fromarray(pixels).resize(size, Image.Resampling.NEAREST), "PNG")


class TestCaption:
    def test_is_that_of_the_captioner_with_its_attention(self, server, model, tmp_path):
        (tmp_path / "photo.png").write_bytes(photo())
        expected = explain(
            ExplainConfig(image=str(tmp_path / "photo.png"), model=model, out=str(tmp_path / "f.png"), **DECODING)
        )
        answer = server.post("/caption", params={"attention": True}, files={"image": photo()}).json()
        assert answer["caption"] == expected.caption
        assert (answer["width"], answer["height"]) == (60, 40)
        assert answer["finished"] in (True, False) and answer["score"] < 0
        assert len(answer["alternatives"]) == 2
        assert [a["score"] for a in answer["alternatives"]] == sorted(
            (a["score"] for a in answer["alternatives"]), reverse=True
        )
        assert answer["attention"]["words"] == expected.words
        weights = np.array(answer["attention"]["weights"]).reshape(expected.attention_Tkk.shape)
        np.testing.assert_allclose(weights, expected.attention_Tkk, atol=1e-4)
        assert tuple(answer["attention"]["region"]) == expected.region

    def test_bytes_do_as_well_as_a_form(self, server):
        form = server.post("/caption", files={"image": photo()}).json()
        for kind in ("image/png", "application/octet-stream"):
            plain = server.post("/caption", content=photo(), headers={"content-type": kind}).json()
            assert plain["caption"] == form["caption"]
        assert "attention" not in form

    @pytest.mark.parametrize(
        ("request_", "status", "message"),
        [
            ({"content": b""}, 400, "holds no photo"),
            ({"files": {"other": b"x"}}, 400, "no file `image`"),
            ({"data": {"image": "text"}}, 415, "not_an_image"),
            ({"content": b"x", "headers": {"content-type": "multipart/form-data"}}, 400, "cannot be read"),
            ({"content": b"this is no image"}, 415, "not_an_image"),
            ({"content": b"%!PS-Adobe-3.0"}, 415, "unsupported_format"),
            ({"content": photo()[:60]}, 422, "truncated"),
            ({"content": bytes(200_001)}, 413, "more than 200,000 bytes"),
            ({"files": {"image": bytes(300_000)}}, 413, "more than 200,000 bytes"),
        ],
    )
    def test_what_is_no_photo_is_refused(self, server, request_, status, message):
        response = server.post("/caption", **request_)
        assert (response.status_code, message in response.json()["detail"]) == (status, True), response.text

    def test_many_pixels_are_refused_before_they_are_decoded(self, server):
        response = server.post("/caption", content=image_bytes(Image.new("1", (20_000, 20_000)), "PNG"))
        assert response.status_code == 413 and "too_large" in response.json()["detail"]


def test_requests_at_once_are_captioned_together(server):
    async def all_at_once(count: int) -> list[httpx.Response]:
        async with httpx.AsyncClient(base_url=server.base_url, timeout=60) as client:
            return await asyncio.gather(*(client.post("/caption", content=photo(seed)) for seed in range(count)))

    responses = asyncio.run(all_at_once(48))
    assert Counter(response.status_code for response in responses) == {200: 48}
    sizes = [response.json()["batch_size"] for response in responses]
    assert 48 / sum(1 / size for size in sizes) > 4, "the mean batch"
    alone = [server.post("/caption", content=photo(seed)).json()["caption"] for seed in range(0, 48, 12)]
    assert [responses[seed].json()["caption"] for seed in range(0, 48, 12)] == alone

    refused = Counter(response.status_code for response in asyncio.run(all_at_once(160)))
    assert set(refused) <= {200, 503} and refused[200] >= 64 and refused[503], "more than 64 at once are refused"


def test_health_readiness_and_description(server, model):
    from capray.model.checkpoint import load_captioner

    assert server.get("/healthz").json() == {"status": "ok"}
    assert server.get("/readyz").json() == {"status": "ready", "model_id": load_captioner(model)[1]}
    described = server.get("/openapi.json").json()
    post = described["paths"]["/caption"]["post"]
    assert {"200", "400", "413", "415", "422", "503", "504"} <= set(post["responses"])
    assert "multipart/form-data" in post["requestBody"]["content"]


def test_metrics_are_ray_s(server):
    import time

    import ray

    server.post("/caption", content=photo())
    (node,) = ray.nodes()
    deadline = time.monotonic() + 60
    while True:
        text = httpx.get(f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics").text
        if re.search(r'capray_captions\w*\{.*status="200"', text) and "capray_batch_size" in text:
            return
        assert time.monotonic() < deadline
        time.sleep(1)


def test_a_port_that_is_taken(server, model):
    with pytest.raises(ConfigError, match="is taken: choose another with --port"):
        start(ServeConfig(model=model, port=server.base_url.port))


def test_a_ray_that_serves_already_is_left_alone(server, model):
    with pytest.raises(ConfigError, match="Ray Serve runs on this cluster already"):
        start(ServeConfig(model=model, port=free_port()))
    assert server.get("/readyz").json()["status"] == "ready"


def test_replicas_in_their_order():
    with pytest.raises(ConfigError, match="max_replicas 1 is less than min_replicas 2"):
        ServeConfig.create(model="m", min_replicas=2)


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium (apt-get install chromium)")
class TestPage:
    @pytest.fixture(scope="class")
    def browser(self):
        from playwright.sync_api import sync_playwright

        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
            yield browser
            browser.close()

    @pytest.fixture
    def page(self, browser, server):
        page = browser.new_page(viewport={"width": 390, "height": 800})
        self.asked: list[str] = []
        page.on("request", lambda request: self.asked.append(request.url))
        self.errors: list[str] = []
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.goto(str(server.base_url))
        yield page
        assert not self.errors
        assert all(url.startswith((str(server.base_url), "blob:", "data:")) for url in self.asked), "no other server"
        page.close()

    def choose(self, page, name: str, data: bytes, kind: str = "image/png") -> None:
        page.set_input_files("#file", {"name": name, "mimeType": kind, "buffer": data})

    def test_a_photo_its_caption_and_the_heat_of_a_word(self, page, server, tmp_path):
        answer = server.post("/caption", content=photo()).json()
        self.choose(page, "photo.png", photo())
        page.wait_for_selector("#result:not([hidden])")
        assert page.inner_text("#caption") == answer["caption"]
        words = page.locator(".words button")
        assert words.all_inner_texts() == answer["caption"].split()
        assert page.locator("#others tbody tr").count() == 3
        assert page.locator(".heat:visible").count() == 0
        before = Image.open(io.BytesIO(page.locator(".attended").screenshot()))
        words.nth(1).hover()
        assert page.locator(".heat:visible").count() == 1
        assert f"“{words.nth(1).inner_text()}”" in page.locator(".heat:visible").get_attribute("alt")
        after = Image.open(io.BytesIO(page.locator(".attended").screenshot()))
        assert np.asarray(after).mean() < np.asarray(before).mean() - 5, "what was not looked at is darker"
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "a phone need not scroll sideways"

    def test_by_keyboard_alone(self, page):
        # Registered before the first key: the browser must know that the dialog is ours before it opens.
        image = {"name": "photo.png", "mimeType": "image/png", "buffer": photo()}
        page.on("filechooser", lambda chooser: chooser.set_files(image))
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.id") == "file"
        page.keyboard.press("Enter")
        page.wait_for_selector(".words button")
        page.keyboard.press("Tab")
        assert page.locator(".heat:visible").count() == 1
        page.keyboard.press("Enter")
        assert page.locator("button[aria-pressed=true]").count() == 1
        page.keyboard.press("Tab")
        page.keyboard.press("Tab")

    def test_a_bad_file_is_refused_politely_and_the_next_photo_works(self, page):
        self.choose(page, "notes.txt", b"this is no image", "text/plain")
        page.wait_for_selector("#problem:not([hidden])")
        assert "notes.txt could not be captioned: not_an_image" in page.inner_text("#problem")
        assert page.get_attribute("#problem", "role") == "alert"
        self.choose(page, "large.png", bytes(200_001))
        page.wait_for_function("document.getElementById('problem').textContent.includes('200,001')")
        self.choose(page, "photo.png", photo())
        page.wait_for_selector("#result:not([hidden])")
        assert page.locator("#problem:visible").count() == 0

    def test_a_photo_dropped(self, page):
        page.evaluate(
            """(bytes) => {
                const transfer = new DataTransfer();
                transfer.items.add(new File([new Uint8Array(bytes)], "dropped.png", { type: "image/png" }));
                document.dispatchEvent(new DragEvent("drop", { dataTransfer: transfer }));
            }""",
            list(photo()),
        )
        page.wait_for_selector("#result:not([hidden])")
