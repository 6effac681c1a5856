"""Data sets become the Samples table: what goes into which split, what is left out, and what is refused."""

import csv
import gzip
import io
import json
import os
from itertools import chain
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from capray.datasets import samples as samples_module
from capray.datasets.coco import coco_id, prepare_coco
from capray.datasets.flickr8k import prepare_flickr8k
from capray.datasets.flickr30k import prepare_flickr30k
from capray.datasets.folder import prepare_folder
from capray.datasets.samples import Sample, write_samples
from capray.datasets.selection import divide
from capray.datasets.settings import CocoConfig, Flickr8kConfig, Flickr30kConfig, FolderConfig, ShapesConfig
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


def prepare(raw: Path, output: Path, **options):
    return prepare_flickr8k(Flickr8kConfig(raw=str(raw), output=str(output), **options))


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
            "train: 1 of 2 listed images missing",
            "test: 1 image without captions left out",
            "2 images in no split left out",
            "1 caption id without an image: 9_z.jpg.1",
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
        assert note == "7 caption ids without an image: x0.jpg, x1.jpg, x2.jpg, x3.jpg, x4.jpg …"

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


KARPATHYS = [("1_a.jpg", "train"), ("2_b.jpg", "test"), ("3_c.jpg", "val"), ("4_d.jpg", "train")]
KARPATHYS_COCO = [
    ("COCO_train2014_000000000009.jpg", "train"),
    ("COCO_train2014_000000000025.jpg", "train"),
    ("COCO_val2014_000000391895.jpg", "test"),
    ("COCO_val2014_000000060623.jpg", "restval"),
    ("COCO_val2014_000000483108.jpg", "val"),
]


def karpathys_images(images: list[tuple[str, str]], dataset: str) -> list[dict]:
    """Entries as the published JSON has them."""
    entries = []
    for number, (name, split) in enumerate(images):
        sentences = [
            {"tokens": ["caption", str(k)], "raw": f"Caption {k} of {name}. ", "imgid": number, "sentid": 2 * number + k}
            for k in range(2)
        ]
        entry = {"sentids": [2 * number, 2 * number + 1], "imgid": number, "sentences": sentences, "split": split}
        entry["filename"] = name
        if dataset == "coco":
            entry |= {"filepath": name.split("_")[1], "cocoid": int(name[-16:-4])}
        entries.append(entry)
    return entries


def write_karpathy(folder: Path, dataset: str, images: list[tuple[str, str]], entries: list[dict] | None = None) -> Path:
    path = folder / f"dataset_{dataset}.json"
    path.write_text(json.dumps({"images": entries or karpathys_images(images, dataset), "dataset": dataset}))
    return path


def splits_of(output: Path | str) -> dict[str, str]:
    return {row["image_id"]: row["split"] for row in read_samples(output)}


class TestKarpathy:
    def raw(self, tmp_path: Path, entries: list[dict] | None = None, dataset: str = "flickr8k") -> Path:
        raw = tmp_path / "raw"
        photos(raw / "Images", LISTED)
        write_karpathy(raw, dataset, KARPATHYS, entries)
        return raw

    def test_captions_and_splits(self, tmp_path):
        prepared = prepare(self.raw(tmp_path), tmp_path / "out")
        assert splits_of(tmp_path / "out") == {"1_a.jpg": "train", "2_b.jpg": "test", "3_c.jpg": "dev", "4_d.jpg": "train"}
        row = read_samples(tmp_path / "out")[0]
        assert row["captions"] == [f"Caption {k} of {row['image_id']}." for k in range(2)]
        assert prepared.notes == []

    @pytest.mark.parametrize(("splits", "expected"), [(None, "train"), ("original", "train"), ("karpathy", "test")])
    def test_the_original_goes_first_unless_karpathys_is_chosen(self, tmp_path, splits, expected):
        raw = original(tmp_path / "raw")
        (raw / "caption_datasets").mkdir()
        write_karpathy(raw / "caption_datasets", "flickr8k", KARPATHYS)
        prepare(raw, tmp_path / "out", splits=splits)
        assert splits_of(tmp_path / "out")["2_b.jpg"] == expected

    def test_what_cannot_be_used_is_noted(self, tmp_path):
        entries = karpathys_images([*KARPATHYS, ("9.jpg", "train"), KARPATHYS[0]], "flickr8k")
        entries[1]["sentences"][0]["raw"] = "  "
        entries[2]["sentences"] = []
        prepared = prepare(self.raw(tmp_path, entries), tmp_path / "out")
        assert prepared.notes == [
            "dataset_flickr8k.json: 1 entry with a repeated image",
            "1 empty caption left out",
            "train: 1 of 3 listed images missing",
            "dev: 1 image without captions left out",
        ]
        assert {row["image_id"]: len(row["captions"]) for row in read_samples(tmp_path / "out")} == {
            "1_a.jpg": 2,
            "2_b.jpg": 1,
            "4_d.jpg": 2,
        }

    def refuse(self, raw: Path, tmp_path: Path, message: str) -> None:
        with pytest.raises(DataError, match=message):
            prepare(raw, tmp_path / "out", splits="karpathy")
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize("part", ["filename", "split", "sentences"])
    def test_an_image_lacks_a_part(self, tmp_path, part):
        entries = karpathys_images(KARPATHYS, "flickr8k")
        del entries[2][part]
        self.refuse(self.raw(tmp_path, entries), tmp_path, f"flickr8k.json', image 2: expected filename, split.*'{part}'")

    def test_a_sentence_without_its_text(self, tmp_path):
        entries = karpathys_images(KARPATHYS, "flickr8k")
        entries[1]["sentences"][0]["raw"] = 7
        self.refuse(self.raw(tmp_path, entries), tmp_path, "image 1: expected filename, split and sentences with their raw")

    def test_an_unknown_split(self, tmp_path):
        entries = karpathys_images([("1_a.jpg", "validation")], "flickr8k")
        self.refuse(self.raw(tmp_path, entries), tmp_path, "unknown split 'validation': expected train, restval, val, test")

    def test_an_image_in_two_splits(self, tmp_path):
        entries = karpathys_images([*KARPATHYS, ("1_a.jpg", "test")], "flickr8k")
        self.refuse(self.raw(tmp_path, entries), tmp_path, "'1_a.jpg' is in both the train and the test split")

    def test_another_data_sets(self, tmp_path):
        raw = self.raw(tmp_path)
        (raw / "dataset_flickr8k.json").write_text(json.dumps({"images": [], "dataset": "coco"}))
        self.refuse(raw, tmp_path, "is of the data set 'coco', not 'flickr8k'")

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ("{", "is not JSON"),
            ("[]", "must hold a JSON object, not a list"),
            ('{"annotations": []}', "is not Karpathy's JSON: it has no list 'images'"),
        ],
    )
    def test_something_else(self, tmp_path, content, message):
        raw = self.raw(tmp_path)
        (raw / "dataset_flickr8k.json").write_text(content)
        self.refuse(raw, tmp_path, message)

    def test_it_is_not_there(self, tmp_path):
        self.refuse(original(tmp_path / "raw"), tmp_path, "has no dataset_flickr8k.json: it is in https://cs.stanford")


def photos(folder: Path, names: list[str]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).write_bytes(f"bytes of {name}".encode())
    return folder


class TestSelection:
    def names(self, count: int) -> list[str]:
        return [f"{(i * 7919) % 1000:03d}.jpg" for i in range(count)]

    def raw(self, tmp_path: Path, count: int = 40) -> Path:
        """Kaggle's layout without split lists, in an order that is not the alphabet's."""
        names = self.names(count)
        photos(tmp_path / "raw" / "Images", names)
        rows = [f"{name},Caption {k} ." for name in names for k in range(2)]
        (tmp_path / "raw" / "captions.txt").write_text("\n".join(["image,caption", *rows]))
        return tmp_path / "raw"

    def test_the_first_images_in_the_order_of_the_captions(self, tmp_path):
        raw = self.raw(tmp_path)
        prepared = prepare(raw, tmp_path / "out", first=25, split_fractions="train=0.8,test=0.2")
        assert set(splits_of(tmp_path / "out")) == set(self.names(25))
        assert set(prepared.splits) == {"train", "test"}
        assert prepared.notes == ["15 images after the first 25 left out"]

    def test_the_first_are_counted_among_those_that_are_there(self, tmp_path):
        raw = self.raw(tmp_path)
        (raw / "Images" / self.names(40)[3]).unlink()
        prepare(raw, tmp_path / "out", first=25, split_fractions="all=1")
        assert set(splits_of(tmp_path / "out")) == set(self.names(26)) - {self.names(40)[3]}

    def test_fewer_than_the_first(self, tmp_path):
        prepared = prepare(self.raw(tmp_path), tmp_path / "out", first=6000, split_fractions="train=0.5,test=0.5")
        assert prepared.notes == ["only 40 images with captions, fewer than the first 6,000"]

    def test_the_first_within_the_sets_own_splits(self, tmp_path):
        raw = original(tmp_path / "raw")
        prepare(raw, tmp_path / "out", first=3)
        assert splits_of(tmp_path / "out") == {"1_a.jpg": "train", "2_b.jpg": "train", "3_c.jpg": "dev"}

    def test_fractions_go_over_the_sets_own_splits(self, tmp_path):
        prepare(original(tmp_path / "raw"), tmp_path / "out", split_fractions="everything=1.0")
        assert set(splits_of(tmp_path / "out").values()) == {"everything"}

    def test_an_image_keeps_its_split_whatever_else_there_is(self, tmp_path):
        raw = self.raw(tmp_path)
        options = {"split_fractions": "train=0.6,dev=0.2,test=0.2"}
        prepare(raw, tmp_path / "all", **options)
        prepare(raw, tmp_path / "few", first=11, **options)
        whole = splits_of(tmp_path / "all")
        assert all(whole[name] == split for name, split in splits_of(tmp_path / "few").items())
        assert len(set(whole.values())) == 3

    def test_images_without_captions_and_captions_without_images(self, tmp_path):
        raw = self.raw(tmp_path, 6)
        photos(raw / "Images", ["lonely.jpg"])
        with open(raw / "captions.txt", "a") as file:
            file.write("\nstray.jpg,Nothing there .\nempty.jpg, \n")
        photos(raw / "Images", ["empty.jpg"])
        prepared = prepare(raw, tmp_path / "out", split_fractions="train=1")
        assert prepared.notes == [
            "1 empty caption left out",
            "2 images without captions left out",
            "1 caption id without an image: stray.jpg",
        ]
        assert set(splits_of(tmp_path / "out")) == set(self.names(6))

    def test_a_split_that_got_nothing_is_told(self, tmp_path):
        prepared = prepare(self.raw(tmp_path, 2), tmp_path / "out", split_fractions="train=0.999999,test=0.000001")
        assert prepared.notes == ["test: no image's id falls into it"]

    @settings(deadline=None)
    @given(st.sets(st.text(max_size=8), max_size=30), st.integers(1, 99))
    def test_every_name_in_one_split(self, names, percent):
        fractions = {"train": percent / 100, "test": 1 - percent / 100}
        splits = divide(names, fractions)
        assert sorted([*splits["train"], *splits["test"]]) == sorted(names)

    def test_shares_are_met_up_to_chance(self):
        splits = divide((f"{i}.jpg" for i in range(20_000)), {"train": 0.7, "dev": 0.1, "test": 0.2})
        assert [len(splits[split]) / 20_000 for split in splits] == pytest.approx([0.7, 0.1, 0.2], abs=0.015)

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("train", r"must be SPLIT=FRACTION,… \(train=0.8,test=0.2\), not 'train'"),
            ("train=most", "must be SPLIT=FRACTION"),
            ("train=0.8,test=0.3", "must sum to 1, not to 1.1"),
            ("train=1,test=0", "with a fraction above 0 and at most 1"),
            ("train=0.5,train=0.5", "needs each split once"),
            ("../up=1", "a split's name is letters, digits"),
            ("train=nan", "above 0 and at most 1"),
        ],
    )
    def test_fractions_that_are_none(self, text, message):
        with pytest.raises(ConfigError, match=message):
            Flickr8kConfig.create(raw="a", output="b", split_fractions=text)

    def test_photos_are_read_in_their_order(self, tmp_path):
        names = [f"{i:04d}.jpg" for i in range(300)]
        photos(tmp_path / "raw" / "Images", names)
        (tmp_path / "raw" / "captions.txt").write_text("image,caption\n" + "".join(f"{n},A .\n" for n in names))
        prepare(tmp_path / "raw", tmp_path / "out", split_fractions="train=1")
        rows = read_samples(tmp_path / "out")
        assert [row["image_id"] for row in rows] == names
        assert all(row["image"] == f"bytes of {row['image_id']}".encode() for row in rows)


class Refusing:
    """Of tests that ``prepare`` a data set."""

    def refuse(self, raw: Path, tmp_path: Path, message: str, error=DataError, **options) -> None:
        with pytest.raises(error, match=message):
            self.prepare(raw, tmp_path, **options)
        assert not (tmp_path / "out").exists()


class TestFlickr30k(Refusing):
    def raw(self, tmp_path: Path, folder: str = "flickr30k-images") -> Path:
        photos(tmp_path / "raw" / folder, LISTED)
        return tmp_path / "raw"

    def tokens(self, raw: Path) -> Path:
        lines = [f"{name}#{k}\tCaption {k} of {name} ." for name in LISTED for k in range(2)]
        (raw / "results_20130124.token").write_text("\n".join(lines) + "\n")
        return raw

    def lists(self, tmp_path: Path) -> tuple[str, ...]:
        (tmp_path / "train.txt").write_text("1_a\n2_b\n")
        (tmp_path / "val.txt").write_text("3_c.jpg\n")
        return f"train={tmp_path}/train.txt", f"dev={tmp_path}/val.txt"

    def prepare(self, raw: Path, tmp_path: Path, **options):
        return prepare_flickr30k(Flickr30kConfig.create(raw=str(raw), output=str(tmp_path / "out"), **options))

    @pytest.mark.parametrize(
        "folder", ["flickr30k-images", "flickr30k_images", "Images", "flickr30k_images/flickr30k_images"]
    )
    def test_karpathys(self, tmp_path, folder):
        raw = self.raw(tmp_path, folder)
        write_karpathy(raw, "flickr30k", KARPATHYS)
        self.prepare(raw, tmp_path)
        assert splits_of(tmp_path / "out") == {name: split.replace("val", "dev") for name, split in KARPATHYS}

    def test_the_token_file_with_lists(self, tmp_path):
        prepared = self.prepare(self.tokens(self.raw(tmp_path)), tmp_path, split_lists=self.lists(tmp_path))
        assert splits_of(tmp_path / "out") == {"1_a.jpg": "train", "2_b.jpg": "train", "3_c.jpg": "dev"}
        assert prepared.notes == ["1 image in no split left out"]

    def test_the_token_file_divided(self, tmp_path):
        self.prepare(self.tokens(self.raw(tmp_path)), tmp_path, split_fractions="train=1")
        assert len(splits_of(tmp_path / "out")) == 4

    def test_lists_go_over_karpathys_splits(self, tmp_path):
        raw = self.raw(tmp_path)
        write_karpathy(raw, "flickr30k", KARPATHYS)
        self.prepare(raw, tmp_path, split_lists=self.lists(tmp_path))
        assert splits_of(tmp_path / "out")["2_b.jpg"] == "train"

    def test_line_separators_within_a_caption_are_no_line_ends(self, tmp_path):
        raw = self.tokens(self.raw(tmp_path))
        with open(raw / "results_20130124.token", "a", newline="") as file:
            file.write("1_a.jpg#2\tA man\x85 with\u2028 a sign\x0b .\r\n")
        self.prepare(raw, tmp_path, split_fractions="train=1")
        assert read_samples(tmp_path / "out")[0]["captions"][2] == "A man\x85 with\u2028 a sign\x0b ."

    def kaggle(self, raw: Path, more: str = "") -> Path:
        lines = [f"{name}| {k}| Caption {k} of {name} ." for name in LISTED for k in (1, 0)]
        (raw / "results.csv").write_text("image_name| comment_number| comment\n" + "\n".join(lines) + f"\n{more}")
        return raw

    def test_kaggles_csv_and_its_broken_line(self, tmp_path):
        raw = self.kaggle(self.raw(tmp_path), '1_a.jpg| 2   A dog runs across the grass .\n1_a.jpg| 3| "Stop" | go .\n')
        prepared = self.prepare(raw, tmp_path, split_fractions="train=1")
        assert read_samples(tmp_path / "out")[0]["captions"] == [
            "Caption 0 of 1_a.jpg .",
            "Caption 1 of 1_a.jpg .",
            "A dog runs across the grass .",
            '"Stop" | go .',
        ]
        assert prepared.notes == ["results.csv: 1 line without the second |, read as number and caption"]

    def test_kaggles_csv_malformed(self, tmp_path):
        raw = self.kaggle(self.raw(tmp_path), "1_a.jpg, 2, A dog .\n")
        self.refuse(
            raw, tmp_path, r"results\.csv, line 10: expected NAME\.jpg\| k\| caption, not '1_a", split_fractions="a=1"
        )

    def test_another_header(self, tmp_path):
        raw = self.raw(tmp_path)
        (raw / "results.csv").write_text("image,caption\n")
        self.refuse(raw, tmp_path, "expected the header image_name.* not 'image,caption'", split_fractions="a=1")

    def test_no_splits(self, tmp_path):
        message = r"has captions but no splits: put dataset_flickr30k\.json .*--split-lists .*--split-fractions"
        self.refuse(self.tokens(self.raw(tmp_path)), tmp_path, message)

    def test_no_captions(self, tmp_path):
        self.refuse(self.raw(tmp_path), tmp_path, "has no captions: expected dataset_flickr30k.json, results_20130124.token")

    def test_no_images(self, tmp_path):
        (tmp_path / "raw").mkdir()
        self.refuse(tmp_path / "raw", tmp_path, "has no folder of images: .*Flickr30k is given out on request only")

    def test_no_folder(self, tmp_path):
        self.refuse(tmp_path / "raw", tmp_path, "no folder at .*fill in the form at https://shannon.cs.illinois.edu")

    def test_fetching_says_how_to_get_it(self, tmp_path):
        self.refuse(tmp_path / "raw", tmp_path, "given out on request only: fill in the form", ConfigError, fetch=True)

    def test_a_list_that_is_not_there(self, tmp_path):
        raw = self.tokens(self.raw(tmp_path))
        self.refuse(raw, tmp_path, "no file at 'nowhere.txt' for the train split", split_lists=("train=nowhere.txt",))

    def test_an_image_in_two_lists(self, tmp_path):
        (tmp_path / "test.txt").write_text("1_a.jpg\n")
        lists = (*self.lists(tmp_path), f"test={tmp_path}/test.txt")
        message = "'1_a.jpg' is listed in both the train and the test split"
        self.refuse(self.tokens(self.raw(tmp_path)), tmp_path, message, split_lists=lists)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"split_lists": ("train.txt",)}, r"must be SPLIT=FILE \(train=train.txt\), not 'train.txt'"),
            ({"split_lists": ("a=1", "a=2")}, "names the split 'a' twice"),
            ({"split_lists": ("a=1",), "split_fractions": "a=1"}, "both divide the images: give one"),
        ],
    )
    def test_options_that_do_not_go(self, tmp_path, options, message):
        self.refuse(tmp_path, tmp_path, message, ConfigError, **options)


def coco_folder(folder: Path, year: str = "2014", images: str = "") -> Path:
    """COCO's layout: two images in train, three in val, two captions each, in an order of the captions' own."""
    for part, ids in (("train", (25, 9)), ("val", (391895, 60623, 483108))):
        names = {i: f"COCO_{part}2014_{i:012d}.jpg" if year == "2014" else f"{i:012d}.jpg" for i in ids}
        photos(folder / images / f"{part}{year}", list(names.values()))
        write_coco(folder, f"{part}{year}", *coco_content(names))
    return folder


def coco_content(names: dict[int, str]) -> tuple[list[dict], list[dict]]:
    images = [{"license": 1, "file_name": name, "height": 3, "width": 4, "id": i} for i, name in sorted(names.items())]
    annotations = [{"image_id": i, "id": 10 * i + k, "caption": f"Caption {k} of {i}.\n"} for k in range(2) for i in names]
    return images, annotations


def write_coco(folder: Path, part: str, images: list[dict], annotations: list[dict]) -> None:
    (folder / "annotations").mkdir(exist_ok=True)
    content = {"info": {}, "licenses": [], "images": images, "annotations": annotations}
    (folder / "annotations" / f"captions_{part}.json").write_text(json.dumps(content))


class TestCoco(Refusing):
    def prepare(self, raw: Path, tmp_path: Path, **options):
        return prepare_coco(CocoConfig.create(raw=str(raw), output=str(tmp_path / "out"), **options))

    @pytest.mark.parametrize("images", ["", "images"])
    @pytest.mark.parametrize("year", ["2014", "2017"])
    def test_the_official_captions(self, tmp_path, year, images):
        prepared = self.prepare(coco_folder(tmp_path / "raw", year, images), tmp_path)
        rows = read_samples(tmp_path / "out")
        assert {coco_id(row["image_id"]): row["split"] for row in rows} == {
            9: "train",
            25: "train",
            391895: "dev",
            60623: "dev",
            483108: "dev",
        }
        for row in rows:
            assert row["image"] == f"bytes of {row['image_id']}".encode()
            assert row["captions"] == [f"Caption {k} of {coco_id(row['image_id'])}." for k in range(2)]
        assert prepared.notes == []

    def test_the_integer_id_in_sql(self, tmp_path):
        import duckdb

        self.prepare(coco_folder(tmp_path / "raw"), tmp_path)
        expression = r"regexp_extract(image_id, '(\d+)\.jpg$', 1)::BIGINT"
        rows = duckdb.sql(f"SELECT image_id, {expression} FROM '{tmp_path}/out/*.parquet'").fetchall()
        assert {number for _, number in rows} == {9, 25, 391895, 60623, 483108}
        assert all(coco_id(image_id) == number for image_id, number in rows)

    def test_the_first_in_the_order_of_the_captions(self, tmp_path):
        self.prepare(coco_folder(tmp_path / "raw"), tmp_path, first=3)
        assert set(map(coco_id, splits_of(tmp_path / "out"))) == {25, 9, 391895}

    def karpathys(self, tmp_path: Path) -> Path:
        raw = coco_folder(tmp_path / "raw")
        write_karpathy(raw, "coco", KARPATHYS_COCO)
        return raw

    @pytest.mark.parametrize("restval", ["train", "leave-out"])
    def test_karpathys_splits(self, tmp_path, restval):
        prepared = self.prepare(self.karpathys(tmp_path), tmp_path, splits="karpathy", restval=restval)
        expected = {name: {"restval": "train", "val": "dev"}.get(split, split) for name, split in KARPATHYS_COCO}
        if restval == "leave-out":
            del expected["COCO_val2014_000000060623.jpg"]
            assert prepared.notes == ["1 image in no split left out"]
        assert splits_of(tmp_path / "out") == expected

    def test_karpathys_alone_needs_no_choice(self, tmp_path):
        raw = self.karpathys(tmp_path)
        (raw / "dataset_coco.json").rename(raw / "annotations" / "dataset_coco.json")
        for part in ("train", "val"):
            (raw / "annotations" / f"captions_{part}2014.json").unlink()
        assert set(self.prepare(raw, tmp_path).splits) == {"train", "dev", "test"}

    def test_several_captions_need_a_choice(self, tmp_path):
        self.refuse(
            self.karpathys(tmp_path), tmp_path, "holds captions of 2014, karpathy: choose with --splits", ConfigError
        )
        assert set(self.prepare(tmp_path / "raw", tmp_path, splits=2014).splits) == {"train", "dev"}

    def test_one_part_alone(self, tmp_path):
        raw = coco_folder(tmp_path / "raw", "2017")
        (raw / "annotations" / "captions_train2017.json").unlink()
        prepared = self.prepare(raw, tmp_path)
        assert set(prepared.splits) == {"dev"}
        assert prepared.notes == ["there is no captions_train2017.json, and so no train split"]

    def test_what_cannot_be_used_is_noted(self, tmp_path):
        raw = coco_folder(tmp_path / "raw")
        names = {i: f"COCO_train2014_{i:012d}.jpg" for i in (25, 9, 30, 34)}
        photos(raw / "train2014", [names[34], "COCO_train2014_000000000036.jpg"])
        images, annotations = coco_content(names)
        annotations = [one for one in annotations if one["image_id"] != 34]
        annotations += [annotations[0], {"image_id": 77, "id": 770, "caption": "stray"}]
        annotations.append({"image_id": 9, "id": 99, "caption": " \n"})
        write_coco(raw, "train2014", [*images, images[0]], annotations)
        prepared = self.prepare(raw, tmp_path)
        assert prepared.notes == [
            "captions_train2014.json: 2 entries with a repeated id",
            "captions_train2014.json: 1 caption without an image in it",
            "1 empty caption left out",
            "train: 1 of 4 listed images missing",
            "train: 1 image without captions left out",
            "1 image in no split left out",
        ]
        assert prepared.splits["train"].captions == 4

    def test_no_captions(self, tmp_path):
        photos(tmp_path / "raw" / "train2014", ["COCO_train2014_000000000009.jpg"])
        self.refuse(tmp_path / "raw", tmp_path, "has no captions: expected annotations/captions_train2014.json and")

    def test_captions_of_another_year(self, tmp_path):
        raw = coco_folder(tmp_path / "raw")
        self.refuse(raw, tmp_path, "has no annotations/captions_train2017.json nor captions_val2017.json", splits="2017")

    def test_no_folder_of_images(self, tmp_path):
        raw = coco_folder(tmp_path / "raw")
        (raw / "val2014").rename(raw / "validation")
        self.refuse(raw, tmp_path, "has no folder val2014, nor images/val2014, whose images captions_val2014.json names")

    def test_no_folder(self, tmp_path):
        self.refuse(tmp_path / "nowhere", tmp_path, r"no folder at .*\(--fetch downloads COCO there\)")

    def test_no_karpathy(self, tmp_path):
        raw = coco_folder(tmp_path / "raw")
        self.refuse(raw, tmp_path, "has no dataset_coco.json: it is in https://cs.stanford.edu", splits="karpathy")

    def test_instances_are_no_captions(self, tmp_path):
        raw = coco_folder(tmp_path / "raw")
        images, _ = coco_content({9: "COCO_train2014_000000000009.jpg"})
        write_coco(raw, "train2014", images, [{"image_id": 9, "id": 1, "bbox": [1, 2, 3, 4], "category_id": 3}])
        self.refuse(raw, tmp_path, r"annotation 0: expected id, image_id and caption \('caption'\)")

    @pytest.mark.parametrize("key", ["images", "annotations"])
    def test_no_captions_file(self, tmp_path, key):
        raw = coco_folder(tmp_path / "raw")
        path = raw / "annotations" / "captions_train2014.json"
        path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != key}))
        self.refuse(raw, tmp_path, f"is not a COCO captions file: it has no list '{key}'")

    @pytest.mark.parametrize("name", ["dog.jpg", "COCO_train2014_000000000010.jpg", "9.png"])
    def test_names_that_do_not_hold_the_id(self, tmp_path, name):
        raw = coco_folder(tmp_path / "raw")
        write_coco(raw, "train2014", *coco_content({9: name}))
        self.refuse(raw, tmp_path, f"'{name}'")

    @pytest.mark.parametrize("folder", ["../elsewhere", ""])
    def test_karpathys_folders_are_cocos(self, tmp_path, folder):
        raw = self.karpathys(tmp_path)
        entries = karpathys_images(KARPATHYS_COCO, "coco")
        entries[0]["filepath"] = folder
        write_karpathy(raw, "coco", [], entries)
        self.refuse(raw, tmp_path, f"unknown filepath '{folder}': expected train2014 or val2014", splits="karpathy")

    def test_fetching_needs_a_choice(self, tmp_path):
        self.refuse(tmp_path / "raw", tmp_path, r"which COCO to download \(2014, 2017, karpathy\)", ConfigError, fetch=True)


ROWS = [
    {"file_name": "a/1.jpg", "caption": "One .", "split": "train"},
    {"file_name": "2.png", "caption": 'Two , with "quotes"\nand a break .', "split": "dev"},
    {"file_name": "a/1.jpg", "caption": "One again .", "split": "train"},
    {"file_name": "a/3.webp", "caption": "Three .", "split": "test"},
]


class TestFolder(Refusing):
    def raw(self, tmp_path: Path, rows: list[dict] | None = None, name: str = "metadata.csv") -> Path:
        raw = tmp_path / "raw"
        photos(raw / "a", ["1.jpg", "3.webp"])
        photos(raw, ["2.png"])
        self.write(raw / name, ROWS if rows is None else rows)
        return raw

    def write(self, path: Path, rows: list[dict]) -> None:
        if path.suffix == ".parquet":
            pq.write_table(pa.Table.from_pylist(rows), path)
            return
        buffer = io.StringIO(newline="")
        if ".json" in path.name:
            buffer.writelines(f"{json.dumps(row)}\n" for row in rows)
        else:
            writer = csv.DictWriter(buffer, rows[0], delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)
        data = buffer.getvalue().encode()
        path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)

    def prepare(self, raw: Path, tmp_path: Path, **options):
        return prepare_folder(FolderConfig.create(raw=str(raw), output=str(tmp_path / "out"), **options))

    @pytest.mark.parametrize("name", ["m.csv", "m.tsv", "m.jsonl", "m.parquet", "m.csv.gz", "m.jsonl.gz"])
    def test_one_row_a_caption(self, tmp_path, name):
        prepared = self.prepare(self.raw(tmp_path, name=name), tmp_path)
        rows = {row["image_id"]: row for row in read_samples(tmp_path / "out")}
        assert {key: (row["split"], row["captions"]) for key, row in rows.items()} == {
            "a/1.jpg": ("train", ["One .", "One again ."]),
            "2.png": ("dev", ['Two , with "quotes"\nand a break .']),
            "a/3.webp": ("test", ["Three ."]),
        }
        assert rows["a/1.jpg"]["image"] == b"bytes of 1.jpg"
        assert prepared.notes == []

    @pytest.mark.parametrize("name", ["m.jsonl", "m.parquet"])
    def test_a_list_of_captions(self, tmp_path, name):
        rows = [{"image": "a/1.jpg", "captions": ["One .", "Two ."], "split": "train"}]
        self.prepare(self.raw(tmp_path, rows, name), tmp_path)
        assert read_samples(tmp_path / "out")[0]["captions"] == ["One .", "Two ."]

    def test_named_columns_and_a_manifest_elsewhere(self, tmp_path):
        rows = [{"photo": str(tmp_path / "raw" / "2.png"), "de": "Eins .", "caption": "One .", "part": 1}]
        raw = self.raw(tmp_path)
        self.write(tmp_path / "mine.parquet", rows)
        manifest = str(tmp_path / "mine.parquet")
        self.prepare(raw, tmp_path, manifest=manifest, image_column="photo", caption_column="de", split_column="part")
        (row,) = read_samples(tmp_path / "out")
        assert (row["image_id"], row["captions"], row["split"]) == ("2.png", ["Eins ."], "1")

    def test_fractions(self, tmp_path):
        rows = [{"file_name": row["file_name"], "text": row["caption"]} for row in ROWS]
        self.prepare(self.raw(tmp_path, rows), tmp_path, split_fractions="all=1")
        assert splits_of(tmp_path / "out") == dict.fromkeys(("a/1.jpg", "2.png", "a/3.webp"), "all")

    def test_what_cannot_be_used_is_noted(self, tmp_path):
        rows = [
            *ROWS,
            {"file_name": "gone.jpg", "caption": "Gone .", "split": "dev"},
            {"file_name": "a/3.webp", "caption": "", "split": "test"},
            {"file_name": "none.jpg", "caption": "In no split .", "split": ""},
        ]
        raw = self.raw(tmp_path, rows)
        photos(raw, ["none.jpg", "unnamed.JPG", "notes.txt"])
        assert self.prepare(raw, tmp_path).notes == [
            "1 empty caption left out",
            "dev: 1 of 2 listed images missing",
            "2 images in no split left out",
        ]

    def test_bytes_in_the_manifest_are_not_read(self, tmp_path):
        rows = [row | {"thumbnail": b"\xff", "info": {"source": "web"}} for row in ROWS]
        self.prepare(self.raw(tmp_path, rows, "m.parquet"), tmp_path)
        assert len(splits_of(tmp_path / "out")) == 3

    def test_no_manifest(self, tmp_path):
        photos(tmp_path / "raw", ["1.jpg"])
        self.refuse(tmp_path / "raw", tmp_path, r"has no manifest \(\.csv, .*\): name it with --manifest")

    def test_several_manifests(self, tmp_path):
        raw = self.raw(tmp_path)
        self.write(raw / "other.jsonl", ROWS)
        self.refuse(raw, tmp_path, r"several tables \(metadata\.csv, other\.jsonl\): choose with --manifest", ConfigError)

    def test_a_manifest_that_is_not_there(self, tmp_path):
        self.refuse(self.raw(tmp_path), tmp_path, "no manifest at 'other.csv'", manifest="other.csv")

    def test_a_manifest_of_another_kind(self, tmp_path):
        self.refuse(
            self.raw(tmp_path), tmp_path, "'other.xlsx' is no manifest: expected", ConfigError, manifest="other.xlsx"
        )

    def test_no_split_column(self, tmp_path):
        rows = [{"file_name": "2.png", "caption": "Two ."}]
        message = "has no column 'split': name it with --split-column, or divide the images with --split-fractions"
        self.refuse(self.raw(tmp_path, rows), tmp_path, message, ConfigError)

    @pytest.mark.parametrize(
        ("rows", "options", "message"),
        [
            ([{"url": "a", "caption": "b"}], {}, "has the columns url, caption, but no file_name, filename.*--image-column"),
            ([{"file": "a", "image": "b", "text": "c"}], {}, "has the columns image, file: choose with --image-column"),
            ([{"file": "a", "alt": "b"}], {}, "but no caption, captions, text: name it with --caption-column"),
            (ROWS, {"caption_column": "de"}, "has the columns file_name, caption, split, but no 'de'"),
            (ROWS, {"split_column": "part"}, "but no 'part'"),
        ],
    )
    def test_columns_that_cannot_be_told(self, tmp_path, rows, options, message):
        self.refuse(self.raw(tmp_path, rows), tmp_path, message, ConfigError, **options)

    @pytest.mark.parametrize("path", ["../out.jpg", "/etc/passwd", "s3://bucket/1.jpg", "a/../../x.jpg"])
    def test_images_elsewhere(self, tmp_path, path):
        rows = [{"file_name": path, "caption": "One .", "split": "train"}]
        self.refuse(self.raw(tmp_path, rows), tmp_path, "metadata.csv, line 2: .* is not below")

    def test_a_row_without_an_image(self, tmp_path):
        rows = [{"file_name": None, "caption": "One .", "split": "train"}]
        self.refuse(self.raw(tmp_path, rows, "m.jsonl"), tmp_path, r"m\.jsonl, line 1: no image file \(None\)")

    def test_a_caption_that_is_no_text(self, tmp_path):
        rows = [{"file_name": "2.png", "caption": [1, 2], "split": "train"}]
        self.refuse(
            self.raw(tmp_path, rows, "m.parquet"), tmp_path, r"row 0: a caption must be text or a list.*not '\[1, 2\]'"
        )

    def test_a_split_that_cannot_be_a_files_name(self, tmp_path):
        rows = [{"file_name": "2.png", "caption": "Two .", "split": "../../up"}]
        self.refuse(self.raw(tmp_path, rows), tmp_path, "line 2: a split's name is letters, digits.*not '../../up'")

    def test_an_image_in_two_splits(self, tmp_path):
        rows = [*ROWS, {"file_name": "a/1.jpg", "caption": "One .", "split": "test"}]
        self.refuse(self.raw(tmp_path, rows), tmp_path, "'a/1.jpg' is in the test split here, and in the train split before")

    @pytest.mark.parametrize(
        ("name", "content", "message"),
        [
            ("m.csv", b"file_name,caption,split\n2.png,a , b,train\n", "line 2: 4 fields, not 3 as in the header"),
            ("m.csv", b'file_name,caption,split\n2.png,"open\n', "line 2: unexpected end of data"),
            ("m.csv", b"file_name,caption,split\n", "has no rows"),
            ("m.csv", b"file_name,caption\n2.png,\xff\n", "is not UTF-8"),
            ("m.csv.gz", b"file_name,caption\n", "is not gzip"),
            ("m.jsonl", b'{"file_name": \n', "line 1 is not JSON"),
            ("m.jsonl", b"[1]\n", r"line 1 is not a JSON object: '\[1\]'"),
            ("m.parquet", b"PAR1", "is not Parquet"),
        ],
    )
    def test_a_malformed_manifest(self, tmp_path, name, content, message):
        raw = tmp_path / "raw"
        photos(raw, ["2.png"])
        (raw / name).write_bytes(content)
        self.refuse(raw, tmp_path, message)


@pytest.mark.slow
def test_the_first_6000_of_the_real_flickr8k(flickr8k, tmp_path):
    prepared = prepare(flickr8k, tmp_path / "out", first=6000, split_fractions="train=0.8,test=0.2")
    table = pq.read_table(str(tmp_path / "out"), columns=["image_id", "split"])
    names = table["image_id"].to_pylist()
    assert len(names) == 6000 == len(set(names))
    assert prepared.splits["train"].images == pytest.approx(4800, abs=120)
    order = dict.fromkeys(line.split("#")[0] for line in (flickr8k / "Flickr8k.token.txt").read_text().splitlines())
    there = [name for name in order if (flickr8k / "Images" / name).exists()]
    assert set(names) == set(there[:6000])


@pytest.mark.slow
def test_the_real_flickr8k(flickr8k, tmp_path):
    prepared = prepare(flickr8k, tmp_path / "out")
    counts = {split: (of.images, of.captions) for split, of in prepared.splits.items()}
    notes = "\n".join(prepared.notes)
    assert counts == {"train": (6000, 30000), "dev": (1000, 5000)}
    assert "test: 1,000 of 1,000 listed images missing" in notes
    assert "91 images in no split left out" in notes
    assert "1 caption id without an image: 2258277193_586949ec62.jpg.1" in notes
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
        splits = [scene.split for scene in draw_scenes(ShapesConfig(output="unused", num_images=num_images, image_size=32))]
        assert tuple(splits.count(split) for split in ("train", "dev", "test")) == expected
        assert splits == sorted(splits, key=["train", "dev", "test"].index)

    def test_the_same_table_twice_has_the_same_digest(self, tmp_path):
        digests = {
            prepare_shapes(ShapesConfig(output=str(tmp_path / name), num_images=10, image_size=32)).digest for name in "ab"
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
