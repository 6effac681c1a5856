"""Data sets become the Samples table: what goes into which split, what is left out, and what is refused."""

import io
import json
import os
from itertools import chain
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from capray.config import FlickrConfig, ShapesConfig
from capray.datasets import samples as samples_module
from capray.datasets.flickr8k import prepare_flickr8k
from capray.datasets.samples import Sample, write_samples
from capray.datasets.shapes import BACKGROUNDS, COLOURS, RELATIONS, SIZES, draw_scenes, prepare_shapes
from capray.errors import ConfigError, DataError
from capray.tables import SAMPLES

SPLITS = {"train": ["1_a.jpg", "2_b.jpg"], "dev": ["3_c.jpg"], "test": ["4_d.jpg"]}
LISTED = list(chain.from_iterable(SPLITS.values()))


def original(folder: Path, names: tuple[str, ...] = ("1_a.jpg", "2_b.jpg", "3_c.jpg", "4_d.jpg"), beside="") -> Path:
    """The layout of the original release, two captions an image; the text files in ``beside``."""
    texts = folder / beside
    (folder / "Flicker8k_Dataset").mkdir(parents=True)
    texts.mkdir(exist_ok=True)
    for name in names:
        (folder / "Flicker8k_Dataset" / name).write_bytes(f"bytes of {name}".encode())
    lines = [f"{name}#{k}\tCaption {k} of {name} ." for name in LISTED for k in range(2)]
    (texts / "Flickr8k.token.txt").write_text("\n".join(lines) + "\n")
    write_splits(texts, SPLITS)
    return folder


def kaggle(folder: Path) -> Path:
    """Kaggle's layout with the split lists added, some captions quoted as there."""
    (folder / "Images").mkdir(parents=True)
    rows = ["image,caption"]
    for name in LISTED:
        (folder / "Images" / name).write_bytes(f"bytes of {name}".encode())
        rows += [f"{name},A plain caption .", f'{name},"A man , a dog and a ""stop"" sign ."']
    (folder / "captions.txt").write_text("\n".join(rows) + "\n")
    write_splits(folder, SPLITS)
    return folder


def write_splits(folder: Path, splits: dict[str, list[str]]) -> None:
    for split, names in splits.items():
        (folder / f"Flickr_8k.{split}Images.txt").write_text("".join(f"{name}\n" for name in names))


def prepare(raw: Path, output: Path):
    return prepare_flickr8k(FlickrConfig(raw=str(raw), output=str(output)))


def read_samples(output: Path | str) -> list[dict]:
    return [row for file in sorted(Path(output).glob("*.parquet")) for row in pq.read_table(file).to_pylist()]


class TestFlickr8k:
    @pytest.mark.parametrize("beside", ["", "Flickr8k_text"])
    def test_the_original_layout(self, tmp_path, beside):
        prepared = prepare(original(tmp_path / "raw", beside=beside), tmp_path / "out")
        rows = {row["image_id"]: row for row in read_samples(tmp_path / "out")}
        assert {name: row["split"] for name, row in rows.items()} == {
            name: split for split, names in SPLITS.items() for name in names
        }
        for name, row in rows.items():
            assert row["image"] == f"bytes of {name}".encode()
            assert row["captions"] == [f"Caption 0 of {name} .", f"Caption 1 of {name} ."]
        counts = {split: (of.images, of.captions) for split, of in prepared.splits.items()}
        assert counts == {"train": (2, 4), "dev": (1, 2), "test": (1, 2)}
        assert prepared.notes == []

    def test_kaggles_layout(self, tmp_path):
        prepare(kaggle(tmp_path / "raw"), tmp_path / "out")
        rows = read_samples(tmp_path / "out")
        assert [row["image_id"] for row in rows if row["split"] == "train"] == SPLITS["train"]
        for row in rows:
            assert row["captions"] == ["A plain caption .", 'A man , a dog and a "stop" sign .']

    def test_the_token_file_goes_before_kaggles(self, tmp_path):
        raw = original(tmp_path / "raw")
        (raw / "captions.txt").write_text("image,caption\n1_a.jpg,Another .\n")
        prepare(raw, tmp_path / "out")
        assert read_samples(tmp_path / "out")[0]["captions"][0].startswith("Caption 0 of")

    def test_the_nested_folder_the_archive_unpacks_to(self, tmp_path):
        raw = original(tmp_path / "raw")
        (raw / "Flickr8k_Dataset").mkdir()
        (raw / "Flicker8k_Dataset").rename(raw / "Flickr8k_Dataset" / "Flicker8k_Dataset")
        assert len(read_samples(prepare(raw, tmp_path / "out").output)) == 4

    def test_what_cannot_be_used_is_noted(self, tmp_path):
        raw = original(tmp_path / "raw", names=("1_a.jpg", "3_c.jpg", "4_d.jpg", "5_e.JPG", "6_f.jpeg"))
        (raw / "Flicker8k_Dataset" / "Thumbs.db").write_bytes(b"no photo")
        tokens = (raw / "Flickr8k.token.txt").read_text()
        tokens = "\n".join(line for line in tokens.splitlines() if not line.startswith("4_d.jpg"))
        (raw / "Flickr8k.token.txt").write_text(tokens + "\n9_z.jpg.1#0\tStray .\n5_e.JPG#0\tIn no split .\n")
        prepared = prepare(raw, tmp_path / "out")
        assert prepared.notes == [
            "train: 1 of 2 listed images are missing",
            "test: 1 images have no captions and are left out",
            "2 images are in no split and are left out",
            "1 caption ids name no image: 9_z.jpg.1",
        ]
        assert {row["image_id"] for row in read_samples(tmp_path / "out")} == {"1_a.jpg", "3_c.jpg"}
        assert set(prepared.splits) == {"train", "dev"}
        record = json.loads((tmp_path / "out" / "_dataset.json").read_text())
        assert record["notes"] == prepared.notes

    def test_a_long_list_of_stray_ids_is_cut(self, tmp_path):
        raw = original(tmp_path / "raw")
        with open(raw / "Flickr8k.token.txt", "a") as file:
            file.writelines(f"x{i}.jpg#0\tStray .\n" for i in range(7))
        (note,) = prepare(raw, tmp_path / "out").notes
        assert note == "7 caption ids name no image: x0.jpg, x1.jpg, x2.jpg, x3.jpg, x4.jpg …"

    def test_captions_come_in_the_order_of_their_numbers(self, tmp_path):
        raw = original(tmp_path / "raw")
        lines = (raw / "Flickr8k.token.txt").read_text().splitlines()
        (raw / "Flickr8k.token.txt").write_text("\n".join(reversed(lines)) + "\n")
        prepare(raw, tmp_path / "out")
        for row in read_samples(tmp_path / "out"):
            assert row["captions"] == [f"Caption 0 of {row['image_id']} .", f"Caption 1 of {row['image_id']} ."]

    def test_a_name_listed_twice_in_a_split_is_one_image(self, tmp_path):
        raw = original(tmp_path / "raw")
        write_splits(raw, SPLITS | {"dev": ["3_c.jpg", "3_c.jpg"]})
        prepare(raw, tmp_path / "out")
        assert [row["image_id"] for row in read_samples(tmp_path / "out")].count("3_c.jpg") == 1

    def test_blank_lines_and_windows_line_ends_in_split_lists(self, tmp_path):
        raw = original(tmp_path / "raw")
        (raw / "Flickr_8k.trainImages.txt").write_bytes(b"1_a.jpg\r\n\r\n2_b.jpg\r\n\r\n")
        prepared = prepare(raw, tmp_path / "out")
        assert (prepared.splits["train"].images, prepared.notes) == (2, [])


class TestFlickr8kRefusals:
    def refuse(self, raw, tmp_path, message, error=DataError):
        with pytest.raises(error, match=message):
            prepare(raw, tmp_path / "out")
        assert not (tmp_path / "out" / "_dataset.json").exists()

    def test_no_folder(self, tmp_path):
        self.refuse(tmp_path / "nowhere", tmp_path, "no folder at '.*nowhere'")

    def test_no_folder_of_images(self, tmp_path):
        raw = original(tmp_path / "raw")
        (raw / "Flicker8k_Dataset").rename(raw / "jpegs")
        self.refuse(raw, tmp_path, "has no folder of images: expected one of Images, Flicker8k_Dataset")

    def test_no_captions(self, tmp_path):
        raw = original(tmp_path / "raw")
        (raw / "Flickr8k.token.txt").unlink()
        self.refuse(raw, tmp_path, r"has no captions: expected Flickr8k\.token\.txt or captions\.txt")

    @pytest.mark.parametrize("line", ["1_a.jpg#0 no tab", "1_a.jpg\tno number"])
    def test_a_malformed_token_line(self, tmp_path, line):
        raw = original(tmp_path / "raw")
        with open(raw / "Flickr8k.token.txt", "a") as file:
            file.write(line + "\n")
        self.refuse(raw, tmp_path, r"Flickr8k\.token\.txt, line 9: expected NAME\.jpg#k<TAB>caption, not '1_a\.jpg")

    def test_a_csv_with_another_header(self, tmp_path):
        raw = kaggle(tmp_path / "raw")
        (raw / "captions.txt").write_text("image_name| comment_number| comment\n")
        self.refuse(raw, tmp_path, r"captions\.txt: expected the header image,caption, not 'image_name\|")

    def test_an_empty_csv(self, tmp_path):
        raw = kaggle(tmp_path / "raw")
        (raw / "captions.txt").write_text("")
        self.refuse(raw, tmp_path, "expected the header image,caption, not ''")

    def test_a_csv_row_too_long(self, tmp_path):
        raw = kaggle(tmp_path / "raw")
        (raw / "captions.txt").write_text("image,caption\n1_a.jpg,one\n2_b.jpg,a man , a dog\n")
        self.refuse(raw, tmp_path, r"captions\.txt, line 3: expected image,caption, not '2_b\.jpg,a man , a dog'")

    @pytest.mark.parametrize("split", ["train", "dev", "test"])
    def test_no_split_list(self, tmp_path, split):
        raw = kaggle(tmp_path / "raw")
        (raw / f"Flickr_8k.{split}Images.txt").unlink()
        self.refuse(raw, tmp_path, rf"has no Flickr_8k\.{split}Images\.txt: Kaggle's copy leaves the split lists out")

    def test_an_image_in_two_splits(self, tmp_path):
        raw = original(tmp_path / "raw")
        write_splits(raw, SPLITS | {"test": ["4_d.jpg", "1_a.jpg"]})
        self.refuse(raw, tmp_path, r"'1_a\.jpg' is listed in both the train and the test split")

    def test_none_of_the_listed_images_is_there(self, tmp_path):
        self.refuse(original(tmp_path / "raw", names=("7.jpg",)), tmp_path, "no images for '.*out'")

    def test_an_output_that_holds_something(self, tmp_path):
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "notes.txt").write_text("mine")
        self.refuse(original(tmp_path / "raw"), tmp_path, "is not empty .*'notes.txt'", ConfigError)
        assert [file.name for file in (tmp_path / "out").iterdir()] == ["notes.txt"]


@pytest.mark.slow
def test_the_real_flickr8k(flickr8k, tmp_path):
    prepared = prepare(flickr8k, tmp_path / "out")
    counts = {split: (of.images, of.captions) for split, of in prepared.splits.items()}
    notes = "\n".join(prepared.notes)
    assert counts == {"train": (6000, 30000), "dev": (1000, 5000)}
    assert "test: 1000 of 1000 listed images are missing" in notes
    assert "91 images are in no split and are left out" in notes
    assert "1 caption ids name no image: 2258277193_586949ec62.jpg.1" in notes
    table = pq.read_table(str(tmp_path / "out"), columns=["image_id", "captions", "split"])
    assert len(set(table["image_id"].to_pylist())) == 7000
    assert {len(captions) for captions in table["captions"].to_pylist()} == {5}


class TestTheTable:
    def test_schema_and_record(self, samples):
        files = sorted(Path(samples).iterdir())
        for file in files:
            if file.suffix == ".parquet":
                assert pq.read_schema(file).equals(SAMPLES, check_metadata=True)
                assert file.name.startswith(pq.read_table(file)["split"][0].as_py() + "-")
        record = json.loads((Path(samples) / "_dataset.json").read_text())
        assert record["dataset"] == "shapes"
        assert record["splits"] == {
            "train": {"images": 48, "captions": 240},
            "dev": {"images": 6, "captions": 30},
            "test": {"images": 6, "captions": 30},
        }
        assert len(record["digest"]) == 64

    def test_shards_and_the_record_last(self, tmp_path, monkeypatch):
        monkeypatch.setattr(samples_module, "IMAGES_PER_SHARD", 3)
        written = []

        def spy(location, data, scratch=None):
            written.append(os.path.basename(location.path))
            write_atomic(location, data, scratch)

        write_atomic = samples_module.write_atomic
        monkeypatch.setattr(samples_module, "write_atomic", spy)
        rows = [Sample(f"{i}", b"x", ["c"], "train" if i < 7 else "dev") for i in range(10)]
        write_samples(iter(rows), str(tmp_path), "made up", [])
        assert written == [
            "train-00000.parquet",
            "train-00001.parquet",
            "train-00002.parquet",
            "dev-00000.parquet",
            "_dataset.json",
        ]
        assert {row["image_id"] for row in read_samples(tmp_path)} == {str(i) for i in range(10)}

    def test_a_source_that_fails_half_way_leaves_no_record(self, tmp_path):
        def failing():
            yield Sample("1", b"x", ["c"], "train")
            raise DataError("the disk went away")

        with pytest.raises(DataError):
            write_samples(failing(), str(tmp_path / "out"), "made up", [])
        assert not (tmp_path / "out" / "_dataset.json").exists()

    def test_on_s3(self, s3):
        prepared = prepare_shapes(ShapesConfig(output=f"{s3}/shapes", num_images=10, image_size=32))
        assert {split: of.images for split, of in prepared.splits.items()} == {"train": 8, "dev": 1, "test": 1}
        with pytest.raises(ConfigError, match="is not empty"):
            prepare_shapes(ShapesConfig(output=f"{s3}/shapes", num_images=10, image_size=32))


class TestShapes:
    def test_the_seed_makes_the_scenes(self):
        config = {"output": "unused", "num_images": 10, "image_size": 32}
        assert list(draw_scenes(ShapesConfig(**config))) == list(draw_scenes(ShapesConfig(**config)))
        other = list(draw_scenes(ShapesConfig(**config, seed=1)))
        assert not {scene.image for scene in other} & {scene.image for scene in draw_scenes(ShapesConfig(**config))}

    def test_a_scene_does_not_depend_on_how_many_there_are(self):
        few = list(draw_scenes(ShapesConfig(output="unused", num_images=10, image_size=32)))
        many = list(draw_scenes(ShapesConfig(output="unused", num_images=25, image_size=32)))
        assert [scene._replace(split="") for scene in few] == [scene._replace(split="") for scene in many[:10]]

    @pytest.mark.parametrize(("num_images", "expected"), [(10, (8, 1, 1)), (25, (21, 2, 2)), (100, (80, 10, 10))])
    def test_splits(self, num_images, expected):
        splits = [
            scene.split for scene in draw_scenes(ShapesConfig(output="unused", num_images=num_images, image_size=32))
        ]
        assert tuple(splits.count(split) for split in ("train", "dev", "test")) == expected
        assert splits == sorted(splits, key=["train", "dev", "test"].index)

    def test_the_same_table_twice_has_the_same_digest(self, tmp_path):
        digests = {
            prepare_shapes(ShapesConfig(output=str(tmp_path / name), num_images=10, image_size=32)).digest
            for name in "ab"
        }
        assert len(digests) == 1

    def test_captions_say_what_is_drawn(self):
        scenes = list(draw_scenes(ShapesConfig(output="unused", num_images=40, image_size=96)))
        for scene in scenes:
            assert len(set(scene.captions)) == 5
            pixels = np.asarray(Image.open(io.BytesIO(scene.image)).convert("RGB")).astype(int)
            drawn = {name: places(pixels, colour) for name, colour in COLOURS.items()}
            drawn = {name: at for name, at in drawn.items() if len(at) > 20}
            for caption in scene.captions:
                words = caption.lower().strip(".").split()
                assert {word for word in words if word in COLOURS} == set(drawn), (scene.image_id, caption)
                if "background" in words:
                    background = words[words.index("background") - 1]
                    assert len(places(pixels, BACKGROUNDS[background])) > pixels.shape[0] ** 2 / 3, caption
                check_relation(caption.lower(), drawn)
            check_sizes(scene.captions[0].lower(), drawn, pixels.shape[0])


def places(pixels: np.ndarray, colour: tuple[int, int, int]) -> np.ndarray:
    """The (y, x) of the pixels of ``colour``."""
    return np.argwhere(np.abs(pixels - colour).max(-1) <= 6)


def check_relation(caption: str, drawn: dict[str, np.ndarray]) -> None:
    """The first colour of ``caption`` lies where it says, seen from the second."""
    said = [name for name, phrases in RELATIONS.items() if any(f" {phrase} " in caption for phrase in phrases)]
    if not said:
        return
    (relation,) = said
    first, second = sorted(drawn, key=caption.index)
    (y1, x1), (y2, x2) = drawn[first].mean(0), drawn[second].mean(0)
    assert {"left": x1 < x2, "right": x1 > x2, "above": y1 < y2, "below": y1 > y2}[relation], caption


def check_sizes(caption: str, drawn: dict[str, np.ndarray], side: int) -> None:
    """A single circle or square is as large as ``caption`` says."""
    words = caption.strip(".").split()
    for i, word in enumerate(words):
        area_of_radius = {"circle": np.pi, "square": 2 * 1.2**2}.get(words[i + 1] if i + 1 < len(words) else "")
        if word in COLOURS and area_of_radius:
            radius = np.sqrt(len(drawn[word]) / area_of_radius) / side
            assert words[i - 1] in SIZES["large" if radius > 0.097 else "small"], (caption, radius)
