"""The feature cache: the same training with and without it, and nothing of it used that is not surely right."""

import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from threading import Lock

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
import torch

from capray.config import Augmentation, ImageLimits, Preprocessing, TrainConfig
from capray.datasets.samples import read_captions
from capray.errors import ConfigError, DataError
from capray.images import load, normalise
from capray.model.checkpoint import load_captioner
from capray.model.encoder import Encoder
from capray.progress import ProgressDisplay
from capray.storage import locate
from capray.tables import SAMPLES, encode_parquet
from capray.training.encoding import build_cache
from capray.training.features import MANIFEST, Cache, _read_cached, choose_root, identify, read_grids
from capray.training.job import _digest, train
from capray.training.mirroring import OPPOSITES, is_mirrored
from capray.vocabulary import Vocabulary, tokenise
from tests.conftest import in_process, ray_processes
from tests.test_training import SETTINGS, with_oddities

FROZEN = {**SETTINGS, "fine_tune_from": None, "epochs": 1, "tracking_uri": "none"}
CHANCE = Lock()
"""Held where torch's one source of random numbers is used by several threads."""
pytestmark = pytest.mark.timeout(400)


def run(samples, output, **settings):
    return train(TrainConfig(samples=str(samples), output=str(output), **{**FROZEN, **settings}))


def config_of(samples, **settings) -> TrainConfig:
    return TrainConfig(samples=str(samples), output="out", **{**FROZEN, **settings})


def frozen_encoder(seed=0) -> Encoder:
    with CHANCE:
        torch.manual_seed(seed)
        return Encoder("tiny")


def manifests(root) -> list[Path]:
    return sorted(Path(root).glob(f"*/*/{MANIFEST}"))


def to_build(samples, root, **settings) -> tuple:
    """What is given to ``build_cache``, display apart, by a training with these samples; of the train split."""
    config = config_of(samples, feature_cache=str(root), **settings)
    encoder = frozen_encoder(config.seed)
    splits = {"train": read_captions(str(samples), "train")}
    return str(root), identify(config, encoder, "d"), encoder, config, splits


def build_on_ray(samples, root) -> Cache:
    return build_cache(*to_build(samples, root), ProgressDisplay(""))


def build(samples, root, **settings) -> Cache:
    with in_process():
        return build_cache(*to_build(samples, root, **settings), ProgressDisplay(""))


@pytest.fixture(scope="module")
def built(samples, tmp_path_factory, ray_cluster):
    root = tmp_path_factory.mktemp("features")
    build(samples, root)
    return root


@pytest.fixture
def root(built, tmp_path):
    """A cache of the train split, in a copy to spoil."""
    shutil.copytree(built, tmp_path / "cache")
    return tmp_path / "cache"


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_cached_and_uncached_training_agree(samples, tmp_path, capfd):
    odd = with_oddities(samples, tmp_path / "odd")
    with in_process():
        plain = run(odd, tmp_path / "plain", feature_cache="none").metrics[0]
    assert "1 image that could not be decoded" in capfd.readouterr().err
    with in_process():
        cached = run(odd, tmp_path / "cached").metrics[0]
    said = capfd.readouterr().err
    assert "encoding the 48 images of split train once" in said
    assert "1 image that could not be decoded" in said
    for name in ("train_loss", "train_objective", "val_loss", "train_regulariser"):
        assert cached[name] == pytest.approx(plain[name], rel=1e-2), name
    assert [cached[f"bleu_{n}"] for n in range(1, 5)] == pytest.approx([plain[f"bleu_{n}"] for n in range(1, 5)], abs=0.02)
    assert cached["val_images"] == plain["val_images"]

    dev, trained = (json.loads(path.read_text()) for path in manifests(Path(odd) / "_features"))
    assert (dev["split"], dev["images"], dev["undecodable"]) == ("dev", 6, [])
    assert (trained["split"], trained["images"], len(trained["undecodable"])) == ("train", 48, 1)

    before = {path: path.stat().st_mtime_ns for path in (Path(odd) / "_features").rglob("*.arrow")}
    with in_process():
        again = run(odd, tmp_path / "again", pool_grid=6).metrics[0]
    assert "encoding" not in capfd.readouterr().err, "another captioner over the same encoder uses the same features"
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert 0 < again["val_loss"] < 10


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_the_last_blocks_are_trained_from_the_features_before_them(samples, tmp_path):
    """As they are without a cache, and again from the same one, whatever became of them."""
    settings = {"fine_tune_from": "layer4", "encoder_learning_rate": 1e-2, "epochs": 2}
    root = str(tmp_path / "cache")
    with in_process():
        plain = run(samples, tmp_path / "plain", **settings).metrics
        cached = run(samples, tmp_path / "cached", feature_cache=root, **settings)
    for found, wanted in zip(cached.metrics, plain, strict=True):
        for name in ("train_loss", "val_loss", "train_regulariser"):
            assert found[name] == pytest.approx(wanted[name], rel=1e-2), name
    encoder = load_captioner(cached.last)[0].encoder.state_dict()
    changed = {
        name.split(".")[1] for name, value in frozen_encoder().state_dict().items() if not torch.equal(value, encoder[name])
    }
    assert changed == {"layer4"}
    grid = read_grids(locate(str(next(Path(root).glob("*/train")))), next(Path(root).glob("*/train/*.arrow")).name)
    assert (grid["height"][0].as_py(), len(grid["grid"][0].as_py())) == (4, 2 * 128 * 4 * 4)


class TestRefusals:
    def test_a_damaged_file_ends_the_training(self, samples, tmp_path, ray_cluster):
        config = config_of(samples, feature_cache=str(tmp_path / "cache"))
        splits = {name: read_captions(samples, name) for name in ("train", "dev")}
        encoder = frozen_encoder(config.seed)
        identity = identify(config, encoder, _digest(samples))
        with in_process():
            build_cache(config.feature_cache, identity, encoder, config, splits, ProgressDisplay(""))
        file = next((tmp_path / "cache").glob("*/train/*.arrow"))
        whole = file.read_bytes()
        file.write_bytes(whole[:1000] + bytes([whole[1000] ^ 1]) + whole[1001:])
        damaged = rf"{file.name}' of the feature cache is damaged: delete it, and it is rebuilt"
        with in_process(), pytest.raises(DataError, match=damaged):
            run(samples, tmp_path / "out", feature_cache=config.feature_cache)

    @pytest.mark.parametrize("change", ["identity", "images", "split", "files", "json"])
    def test_a_manifest_of_something_else(self, change, root, samples):
        (path,) = manifests(root)
        manifest = json.loads(path.read_text())
        if change == "json":
            path.write_text("{")
        else:
            changed = {
                "identity": {**manifest["identity"], "encoder_sha256": "0" * 64},
                "images": 7,
                "split": "test",
                "files": ["../../secret", *manifest["files"][1:]],
            }
            path.write_text(json.dumps({**manifest, change: changed[change]}))
        with pytest.raises(DataError, match=r"feature cache.*(something else|damaged).*delete"):
            build(samples, root)

    def test_a_missing_file_is_built_anew(self, root, samples):
        (file,) = root.glob("*/train/*.arrow")
        whole = file.read_bytes()
        file.unlink()
        build(samples, root)
        assert file.read_bytes() == whole, "the same features under the same name"

    def test_a_damaged_file_is_not_taken_over_by_a_build(self, root, samples):
        (manifest,), (file,) = manifests(root), root.glob("*/train/*.arrow")
        manifest.unlink()
        file.write_bytes(b"half")
        with pytest.raises(DataError, match="is damaged: delete it"):
            build_on_ray(samples, root)

    def test_an_encoder_without_frozen_blocks(self, samples, tmp_path):
        with pytest.raises(ConfigError, match="needs frozen blocks of the encoder, and --fine-tune-from is 'all'"):
            run(samples, tmp_path / "out", fine_tune_from="all", feature_cache=str(tmp_path / "cache"))

    def test_a_file_under_another_name(self, tmp_path):
        (tmp_path / "unit-000000.arrow").write_bytes(b"")
        with pytest.raises(DataError, match="is damaged"):
            read_grids(locate(str(tmp_path)), "unit-000000.arrow")


class TestViews:
    FLIP = Augmentation(flip=0.5, flip_left_right_words="swap-words")

    @pytest.fixture(scope="class")
    @classmethod
    def cache(cls, samples, built):
        return build(samples, built, cached_views=3, **cls.FLIP.model_dump())

    @pytest.fixture(scope="class")
    @classmethod
    def read(cls, samples, cache):
        """One unit as an epoch of this seed has it: which view, and its rows."""
        vocabulary = Vocabulary(["left", "right"])
        views = cache.splits["train"]
        item = {"unit": read_captions(str(samples), "train").units[0], "files": [view.files[0] for view in views]}
        grids = [read_grids(locate(view.folder), view.files[0])["grid"].to_pylist() for view in views]

        def of(seed: str):
            folders = [view.folder for view in views]
            table = _read_cached(item, str(samples), "train", vocabulary, folders, cls.FLIP, seed)
            return grids.index(table["pixels"].to_pylist()), table.to_pylist()

        return of

    def test_each_is_the_images_as_augmentation_changes_them(self, samples, cache):
        rows = pq.read_table(next(Path(samples).glob("train-*.parquet"))).to_pylist()[:8]
        encoder, config = frozen_encoder().eval(), config_of(samples)
        for number, view in enumerate(cache.splits["train"]):
            found = read_grids(locate(view.folder), view.files[0])["grid"].to_pylist()
            mirrored = 0
            for row, grid in zip(rows, found, strict=False):
                words = [tokenise(caption) for caption in row["captions"]]
                pixels = load(row["image"], config.subset(Preprocessing), config.subset(ImageLimits))[0]
                if number and is_mirrored(words, self.FLIP, f"view {number} {row['image_id']}"):
                    pixels, mirrored = np.ascontiguousarray(pixels[:, ::-1]), mirrored + 1
                with torch.inference_mode():
                    batch = normalise(torch.tensor(pixels)[None], config.subset(Preprocessing))
                    wanted = encoder.begin(batch)[0].half().numpy()
                np.testing.assert_allclose(np.frombuffer(grid, np.float16), wanted.ravel(), atol=2e-2, rtol=2e-2)
            assert (0 < mirrored < len(rows)) == (number > 0)

    def test_an_epoch_has_one_of_them_with_its_words(self, read):
        seen = {}
        for epoch in range(12):
            view, rows = read(f"0 {epoch}")
            assert read(f"0 {epoch}") == (view, rows), "the same when a training is taken up again"
            seen[view] = rows
        assert sorted(seen) == [0, 1, 2]
        for view, rows in seen.items():
            for row in rows:
                captions = [tokenise(caption) for caption in row["captions"]]
                swapped = view > 0 and is_mirrored(captions, self.FLIP, f"view {view} {row['image_id']}")
                sides = [[word for word in caption if word in ("left", "right")] for caption in captions]
                told = [[{4: "left", 5: "right"}.get(word) for word in caption if word > 3] for caption in row["words"]]
                assert told == ([[OPPOSITES[word] for word in caption] for caption in sides] if swapped else sides)
        assert seen[0] != seen[1]

    def test_the_images_themselves_are_a_cache_without_views_too(self, samples, cache, built):
        assert build(samples, built).splits["train"] == cache.splits["train"][:1]

    def test_they_need_a_cache_and_something_to_change(self, samples):
        with pytest.raises(ValueError, match="need `flip`, `min_crop_area` or `color_jitter`"):
            config_of(samples, cached_views=2)
        with pytest.raises(ConfigError, match=r"--cached-views 2 needs a feature cache: give --feature-cache"):
            choose_root(config_of(samples, cached_views=2, flip=0.5, feature_cache="none"), frozen_encoder())
        with pytest.raises(ConfigError, match=r"\(--cached-views 2 or more keeps views\)"):
            choose_root(config_of(samples, flip=0.5, feature_cache="here"), frozen_encoder())
        assert choose_root(config_of(samples, cached_views=2, flip=0.5), frozen_encoder()) is not None


class TestIdentity:
    def key(self, samples, seed=0, digest="d", **settings) -> str:
        return identify(config_of(samples, **settings), frozen_encoder(seed), digest).key

    def test_what_the_features_depend_on_changes_the_key(self, samples):
        changes = [{"seed": 1}, {"digest": "e"}, {"size": 48}, {"resize": "pad"}, {"mean": (0, 0, 0)}]
        keys = [self.key(samples, **change) for change in [{}, *changes, {"max_image_pixels": 10}]]
        assert len(set(keys)) == len(keys)

    def test_what_they_do_not_depend_on_keeps_it(self, samples):
        assert self.key(samples) == self.key(samples, hidden_dim=64, learning_rate=1, pool_grid=3, captions_per_image="1")

    def test_the_frozen_blocks_are_all_it_depends_on(self, samples):
        def key(block: str | None, change: str = "") -> str:
            encoder = Encoder("tiny", fine_tune_from=block)
            encoder.load_state_dict(frozen_encoder().state_dict())
            with torch.no_grad():
                for name, value in encoder.named_parameters():
                    value += name.startswith(f"backbone.{change}.")
            return identify(config_of(samples, fine_tune_from=block), encoder, "d").key

        assert key(None) == self.key(samples)
        assert key("layer3") == key("layer3", "layer3") == key("layer3", "layer4")
        assert len({key(None), key("layer3"), key("layer4"), key("layer4", "layer3"), key("layer3", "layer2")}) == 5

    def test_a_table_edited_after_it_was_prepared_has_another_key(self, samples, tmp_path):
        before = self.key(samples)
        assert self.key(with_oddities(samples, tmp_path / "odd")) != before


class TestWhere:
    def test_auto_is_beside_the_samples_or_in_the_output(self, samples, tmp_path):
        assert choose_root(config_of(samples), frozen_encoder()) == f"{samples}/_features"
        file = next(Path(samples).glob("train-*.parquet"))
        config = config_of(file).model_copy(update={"output": str(tmp_path / "out")})
        assert choose_root(config, frozen_encoder()) == str(tmp_path / "out" / "_features")

    def test_a_fine_tuned_encoder_has_one_where_it_is_asked_for(self, samples):
        encoder, asked = Encoder("tiny", fine_tune_from="layer4"), "s3://bucket/features"
        settings = {"fine_tune_from": "layer4"}
        assert choose_root(config_of(samples, **settings), encoder) is None
        assert choose_root(config_of(samples, **settings, feature_cache=asked), encoder) == asked

    def test_none_and_a_fine_tuned_encoder_have_no_cache(self, samples):
        assert choose_root(config_of(samples, feature_cache="none"), frozen_encoder()) is None
        assert choose_root(config_of(samples, fine_tune_from="all"), Encoder("tiny", fine_tune_from="all")) is None


def in_small_units(samples, folder, copies: int) -> str:
    """The samples with ``copies`` of each image and two images per row group: many files of a cache."""
    folder.mkdir()
    for file in Path(samples).glob("*.parquet"):
        rows = pq.read_table(file).to_pylist()
        rows = [{**row, "image_id": f"{row['image_id']}-{i}"} for i in range(copies) for row in rows]
        (folder / file.name).write_bytes(encode_parquet(pa.Table.from_pylist(rows, SAMPLES), 2))
    return str(folder)


BUILD = """
import pickle, sys
from capray import cluster
from capray.progress import ProgressDisplay
from capray.training.encoding import build_cache
cluster.connect()
build_cache(*pickle.load(sys.stdin.buffer), ProgressDisplay(""))
"""


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_a_killed_build_leaves_nothing_half_used_and_what_it_finished_is_kept(samples, tmp_path):
    """The driver and its actors, in the tests' Ray."""
    many, root = in_small_units(samples, tmp_path / "many", copies=3), tmp_path / "cache"
    environment = {**os.environ, "RAY_ADDRESS": ray.get_runtime_context().gcs_address}
    driver = subprocess.Popen([sys.executable, "-c", BUILD], stdin=subprocess.PIPE, env=environment)
    assert driver.stdin is not None
    with driver.stdin as given:
        pickle.dump(to_build(many, root), given)
    try:
        deadline = time.monotonic() + 120
        while len(list(root.glob("*/train/unit-*.arrow"))) < 5:
            assert driver.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
    finally:
        actors = ray_processes("_Encoding")
        for pid in (driver.pid, *actors):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        driver.wait()
    assert actors
    while ray_processes("_Encoding"):
        time.sleep(0.02)
    assert not manifests(root)
    before = {path: path.stat().st_mtime_ns for path in root.glob("*/train/unit-*.arrow")}
    assert 5 <= len(before) < 72

    build_on_ray(many, root)
    (trained,) = (json.loads(path.read_text()) for path in manifests(root))
    assert len(trained["files"]) == 72 and trained["images"] == 144
    assert {path.name for path in before} <= set(trained["files"])
    assert {path: path.stat().st_mtime_ns for path in before} == before


@pytest.mark.usefixtures("ray_cluster")
def test_two_builds_at_once_on_s3_and_what_they_cache(samples, s3):
    with ThreadPoolExecutor(2) as pool:
        caches = list(pool.map(lambda _: build_on_ray(samples, f"{s3}/features").splits["train"], range(2)))
    assert build(samples, f"{s3}/features").splits["train"] in caches
    for (cache,) in caches:
        for name in cache.files:
            grids = read_grids(locate(cache.folder), name)
            first = np.frombuffer(grids["grid"][0].as_py(), np.float16).reshape(-1, 4, 4)
            assert first.shape == (frozen_encoder().dim, 4, 4)
            assert np.isfinite(first).all() and first.std() > 0
