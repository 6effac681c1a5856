"""The captioning job with a real captioner: exactly once, resumable, one bad image costing one row.

What Ray has a part in runs on Ray; the rest with the same actor in this process (``LocalExecutor``).
"""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import s3fs
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from capray.captioning.actor import CaptioningActor
from capray.captioning.job import caption
from capray.config import CaptionConfig, EvaluateConfig
from capray.errors import CaprayError, ConfigError, OutputConflictError, StorageError
from capray.evaluation import evaluate
from capray.tables import CAPTIONS, FAILURES
from tests.conftest import image_bytes, make_model, write_photos, write_tar
from tests.local_executor import LocalExecutor
from tests.oracle import check_exactly_once, read_parts

pytestmark = [pytest.mark.usefixtures("ray_cluster"), pytest.mark.timeout(300)]


def config_of(source, output, model, **settings) -> CaptionConfig:
    settings = {"num_actors": 1, "batch_size": 4, "beam_size": 2, "max_length": 6, "second_look_seconds": 1, **settings}
    return CaptionConfig(input=str(source), output=str(output), model=model, **settings)


def run(source, output, model, **settings):
    return caption(config_of(source, output, model, **settings), LocalExecutor(CaptioningActor))


def run_on_ray(source, output, model, **settings):
    return caption(config_of(source, output, model, **settings))


@pytest.fixture
def photos(tmp_path):
    return set(write_photos(tmp_path / "photos", 10))


def bad_images(folder: Path) -> dict[str, str]:
    """Bad images in ``folder``, by path, with the kind each should fail as."""
    jpeg = image_bytes(Image.effect_noise((200, 200), 50).convert("RGB"), "JPEG")
    files = {
        "truncated.jpg": (jpeg[: len(jpeg) // 2], "truncated"),
        "zero bytes.jpg": (b"", "truncated"),
        "text#1.jpg": (b"this is no image", "not_an_image"),
        "drawing%2F.jpg": (b"%!PS-Adobe-3.0", "unsupported_format"),
        "gro\u00df.png": (image_bytes(Image.new("RGB", (300, 300))), "too_large"),
    }
    for name, (data, _) in files.items():
        (folder / name).write_bytes(data)
    return {str(folder / name): kind for name, (_, kind) in files.items()}


def test_a_folder_with_bad_images(tmp_path, photos, model):
    bad = bad_images(tmp_path / "photos")
    (tmp_path / "photos" / ".hidden").write_bytes(b"left out")
    output = tmp_path / "out"
    summary = run_on_ray(tmp_path / "photos", output, model, max_image_pixels=80_000)

    captions = check_exactly_once(str(output), photos | set(bad), failed=bad)
    assert set(captions) == photos
    failures = {row["image_id"]: row["error_type"] for row in read_parts(str(output), "failures")}
    assert failures == bad
    assert (summary.images, summary.captions, summary.hidden_files, summary.status) == (15, 10, 1, "complete")
    assert summary.current_failures == {"too_large": 1, "truncated": 2, "not_an_image": 1, "unsupported_format": 1}
    for table, schema in (("captions", CAPTIONS), ("failures", FAILURES)):
        for file in (output / table).iterdir():
            assert pq.read_schema(file).equals(schema, check_metadata=True)
    record = json.loads((output / "_capray" / "runs" / f"{summary.run_id}.json").read_text())
    assert (record["status"], record["captions"]) == ("complete", 10)
    assert not list((output / "_capray" / "tmp").iterdir())
    assert not (output / "_capray" / "lease.json").exists()

    again = run(tmp_path / "photos", output, model, max_image_pixels=80_000)
    assert (again.captions, again.failures, again.captioned_before) == (0, {}, 10)

    (tmp_path / "photos" / "zero bytes.jpg").write_bytes(image_bytes())
    new = write_photos(tmp_path / "photos" / "more", 2, seed=1)
    third = run(tmp_path / "photos", output, model, retry_failed=())
    assert third.captions == 4, "two new ones, the mended one, and the one no longer too large"
    still = {path: kind for path, kind in bad.items() if not path.endswith(("zero bytes.jpg", ".png"))}
    assert set(check_exactly_once(str(output), photos | set(bad) | set(new), failed=still)) >= set(new)
    assert third.current_failures == {"truncated": 1, "not_an_image": 1, "unsupported_format": 1}


def test_a_row_says_all_there_is_to_say(tmp_path, photos, model):
    run(tmp_path / "photos", tmp_path / "out", model, n_best=2)
    row = read_parts(str(tmp_path / "out"), "captions")[0]
    assert row["uri"] == row["image_id"]
    assert (row["width"], row["height"]) == (40, 40)
    assert len(row["alternatives"]) == 1
    assert row["score"] >= row["alternatives"][0]["score"]
    assert row["score"] == pytest.approx(row["log_prob"] / row["num_tokens"] ** 0.9, rel=1e-4)
    assert len(row["model_id"]) == 64


def test_the_samples_of_a_split_and_columns_of_a_table(tmp_path, samples, model):
    summary = run(samples, tmp_path / "split", model, split="test")
    ids = pq.read_table(f"{samples}/test-00000.parquet")["image_id"].to_pylist()
    assert set(check_exactly_once(str(tmp_path / "split"), set(ids))) == set(ids)
    assert summary.images == 6

    photos = write_photos(tmp_path / "photos", 3)
    table = pa.table({"url": [*photos, photos[0], str(tmp_path / "gone.jpg"), None], "key": ["a", "b", "c", "a", "d", "e"]})
    pq.write_table(table, tmp_path / "list.parquet")
    summary = run(tmp_path / "list.parquet", tmp_path / "uris", model, id_column="key")
    assert summary.duplicates == 1
    assert set(check_exactly_once(str(tmp_path / "uris"), set("abcde"), failed=dict.fromkeys("de", "missing"))) == set("abc")
    assert summary.current_failures == {"missing": 2}


def test_s3_in_and_out_gives_the_same_captions(tmp_path, photos, model, s3):
    fs = s3fs.S3FileSystem(use_listings_cache=False)
    for path in photos:
        fs.put_file(path, f"{s3}/photos/{Path(path).name}")
    fs.pipe_file(f"{s3}/photos/empty.jpg", b"")
    fs.pipe_file(f"{s3}/photos/a b#c%2Fd.jpg", image_bytes())
    for file in Path(model).iterdir():
        fs.put_file(str(file), f"{s3}/model/{file.name}")
    run(tmp_path / "photos", tmp_path / "local", model)
    summary = run(f"{s3}/photos", f"{s3}/out", f"{s3}/model")

    assert summary.current_failures == {"truncated": 1}
    fs.get(f"{s3}/out", str(tmp_path / "fetched"), recursive=True)
    local = {Path(key).name: text for key, text in check_exactly_once(str(tmp_path / "local"), photos).items()}
    remote = {row["image_id"]: row["caption"] for row in read_parts(str(tmp_path / "fetched"), "captions")}
    assert f"{s3}/photos/a b#c%2Fd.jpg" in remote
    assert {key.rsplit("/", 1)[1]: text for key, text in remote.items() if "photo-" in key} == local
    again = run(f"{s3}/photos", f"{s3}/out", f"{s3}/model")
    assert (again.captions, again.captioned_before) == (0, 11)
    assert not fs.exists(f"{s3}/out/_capray/lease.json")


def test_images_that_kill_their_process_cost_a_row_each(tmp_path, model):
    photos = set(write_photos(tmp_path / "photos", 40))
    decoding, captioning, starved = (tmp_path / "photos" / f"photo-{i:04d}-a.png" for i in (7, 23, 31))
    mark = PngInfo()
    mark.add_text("note", "KILLS-THE-DECODER")
    decoding.write_bytes(image_bytes(pnginfo=mark))
    captioning.write_bytes(image_bytes(Image.new("RGB", (32, 32), (255, 0, 255))))
    starved.write_bytes(image_bytes(Image.new("RGB", (32, 32), (0, 255, 255))))
    summary = run_on_ray(tmp_path / "photos", tmp_path / "out", model)
    crashing = {str(decoding): "crashed", str(captioning): "crashed", str(starved): "captioning_error"}
    captions = check_exactly_once(str(tmp_path / "out"), photos | crashing.keys(), failed=crashing)
    assert set(captions) == photos
    failures = {row["image_id"]: row for row in read_parts(str(tmp_path / "out"), "failures")}
    assert {image_id: row["error_type"] for image_id, row in failures.items()} == crashing
    assert failures[str(decoding)]["message"] == "decoding killed its process by SIGABRT"
    assert failures[str(captioning)]["message"] == "captioning killed its process by SIGABRT"
    assert summary.passes == 2


def test_tar_shards_and_a_folder_into_one_output(tmp_path, photos, model):
    shards = tmp_path / "shards"
    shards.mkdir()
    wanted = set(photos)
    for shard in range(2):
        path = shards / f"{shard:05d}.tar"
        images = {f"{i:03d}.jpg": Path(photo).read_bytes() for i, photo in enumerate(sorted(photos)[:6])}
        write_tar(path, images | {name.replace("jpg", "txt"): b"a caption" for name in images})
        wanted |= {f"{path}#{name}" for name in images}
    limited = run(shards, tmp_path / "out", model, also=(str(tmp_path / "photos"),), limit=4)
    assert limited.captions >= 4
    assert limited.left > 0
    summary = run(shards, tmp_path / "out", model, also=(str(tmp_path / "photos"),))
    rows = read_parts(str(tmp_path / "out"), "captions")
    assert len(rows) == len({row["image_id"] for row in rows}) == 22
    assert {row["image_id"] for row in rows} == wanted
    assert summary.current_failures == {}
    by_id = {row["image_id"]: row["caption"] for row in rows}
    assert all(by_id[f"{shards}/00000.tar#{i:03d}.jpg"] == by_id[sorted(photos)[i]] for i in range(6))
    assert run(shards, tmp_path / "out", model, also=(str(tmp_path / "photos"),)).captions == 0


def test_a_tar_that_cannot_be_read_is_a_fault_and_all_else_is_done(tmp_path, photos, model):
    write_tar(tmp_path / "shards" / "a.tar", {"x.jpg": image_bytes()})
    (tmp_path / "shards" / "b.tar").write_bytes(b"no tar" * 1000)
    with pytest.raises(CaprayError, match=r"1 file or folder of the input cannot be read: .*b\.tar"):
        run(tmp_path / "shards", tmp_path / "out", model)
    assert len(read_parts(str(tmp_path / "out"), "captions")) == 1


def test_a_manifest_with_kept_columns_and_attention(tmp_path, photos, model):
    names = sorted(photos)
    lines = ["path,who,when", *(f'{name},"photographer {i}, the",{2000 + i}' for i, name in enumerate(names))]
    (tmp_path / "list.csv").write_text("\n".join(lines) + "\n")
    run(tmp_path / "list.csv", tmp_path / "out", model, keep=("who", "when"), attention=True)
    rows = {row["image_id"]: row for row in read_parts(str(tmp_path / "out"), "captions")}
    assert rows[names[3]]["source"] == {"who": "photographer 3, the", "when": "2003"}
    for row in rows.values():
        assert len(row["tokens"]) == len(row["attention"]) == row["num_tokens"]
        assert " ".join(token for token in row["tokens"] if token != "<end>") == row["caption"]
        assert all(sum(weights) == pytest.approx(1, abs=1e-3) for weights in row["attention"])
    with pytest.raises(OutputConflictError, match="--keep"):
        run(tmp_path / "list.csv", tmp_path / "out", model, attention=True)


def test_shards_share_the_work_exactly(tmp_path, photos, model):
    parts = []
    for i in (1, 2):
        run(tmp_path / "photos", tmp_path / f"out{i}", model, shard=f"{i}/2")
        parts.append({row["image_id"] for row in read_parts(str(tmp_path / f"out{i}"), "captions")})
    assert parts[0] | parts[1] == photos
    assert not parts[0] & parts[1]
    with pytest.raises(OutputConflictError, match="shard: 1/2 -> 2/2"):
        run(tmp_path / "photos", tmp_path / "out1", model, shard="2/2")


def test_too_many_bad_images_stop_the_job(tmp_path, model):
    folder = tmp_path / "photos"
    write_photos(folder, 100)
    for i in range(150):
        (folder / f"text-{i}.jpg").write_text("no image")
    with pytest.raises(CaprayError, match=r"images failed, above --max-bad-images 0\.4: not an image"):
        run(folder, tmp_path / "out", model, batch_size=16, max_bad_images=0.4)
    assert read_parts(str(tmp_path / "out"), "failures"), "what was done is kept"


class TestRefusals:
    def test_another_model(self, tmp_path, photos, model):
        run(tmp_path / "photos", tmp_path / "out", model)
        other = make_model(tmp_path / "other", seed=1)
        with pytest.raises(OutputConflictError, match="was written by model"):
            run(tmp_path / "photos", tmp_path / "out", other)
        with pytest.raises(OutputConflictError, match="--beam-size: 2 -> 3"):
            run(tmp_path / "photos", tmp_path / "out", model, beam_size=3)

    def test_output_inside_the_input(self, tmp_path, photos, model):
        with pytest.raises(ConfigError, match="lies inside the input"):
            run(tmp_path / "photos", tmp_path / "photos" / "out", model)
        with pytest.raises(ConfigError, match="lies inside the input"):
            run(tmp_path / "photos", tmp_path / "photos", model)

    def test_output_where_a_glob_would_find_it(self, tmp_path, photos, model):
        data = tmp_path / "data"
        data.mkdir()
        pq.write_table(pa.table({"uri": sorted(photos)[:2]}), data / "x.parquet")
        (tmp_path / "link").symlink_to(data)
        for glob, output in (
            ("data/**/*.parquet", "data/captions"),
            ("data/**", "data/a/b"),
            ("data/*/*/part-*", "data/out"),
            ("d[a]ta/*/*/*", "data/out"),
            ("link/**/*.parquet", "data/out"),
            ("data/**/*.parquet", "link/out"),
        ):
            with pytest.raises(ConfigError, match="lies inside the input"):
                run(tmp_path / glob, tmp_path / output, model)
        run(data / "*.parquet", data / "captions", model)
        assert len(read_parts(str(data / "captions"), "captions")) == 2

    def test_output_below_a_file(self, tmp_path, photos, model):
        (tmp_path / "gone").symlink_to(tmp_path / "nowhere")
        for output in (Path(min(photos)) / "a" / "b", tmp_path / "gone"):
            with pytest.raises(ConfigError, match="is a file, or a link to nowhere"):
                run(tmp_path / "photos", output, model)

    def test_a_place_without_a_name(self):
        for places in ({"input": "", "output": "x"}, {"input": "x", "output": ""}, {"input": "x", "also": ("",)}):
            with pytest.raises(ConfigError, match="'' names nothing"):
                CaptionConfig.create(places)

    def test_an_output_that_holds_other_things(self, tmp_path, photos, model):
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "thesis.txt").write_text("mine")
        with pytest.raises(OutputConflictError, match="holds 'thesis.txt' and no captioning job"):
            run(tmp_path / "photos", tmp_path / "out", model)
        (tmp_path / "home" / "documents").mkdir(parents=True)
        with pytest.raises(OutputConflictError, match="holds 'documents' and no captioning job"):
            run(tmp_path / "photos", tmp_path / "home", model)

    def test_empty_and_missing_inputs(self, tmp_path, model, s3):
        (tmp_path / "empty").mkdir()
        with pytest.raises(ConfigError, match="no images at"):
            run(tmp_path / "empty", tmp_path / "out", model)
        with pytest.raises(ConfigError, match="nothing at"):
            run(tmp_path / "nowhere", tmp_path / "out", model)
        with pytest.raises(CaprayError, match="no images at|not found|not exist"):
            run("s3://capray-no-such-bucket/x", tmp_path / "out", model)
        with pytest.raises(ConfigError, match="img2dataset"):
            run("https://example.org/photos", tmp_path / "out", model)

    def test_a_split_without_images(self, tmp_path, samples, model):
        with pytest.raises(ConfigError, match="no images at .* in split 'nope'"):
            run(samples, tmp_path / "out", model, split="nope")

    def test_columns_that_are_not_there(self, tmp_path, samples, model):
        with pytest.raises(ConfigError, match="no column 'picture'; its columns: image_id, image, captions, split"):
            run(samples, tmp_path / "out", model, image_column="picture")
        with pytest.raises(ConfigError, match="holds string, not encoded image bytes"):
            run(samples, tmp_path / "out", model, image_column="split")


def test_when_everything_fails_the_job_stops(tmp_path, model):
    folder = tmp_path / "texts"
    folder.mkdir()
    for i in range(300):
        (folder / f"{i}.jpg").write_text("no image")
    with pytest.raises(CaprayError, match="images all failed, .* as not_an_image: not an image"):
        run(folder, tmp_path / "out", model, batch_size=16)
    (record,) = (tmp_path / "out" / "_capray" / "runs").glob("*.json")
    assert json.loads(record.read_text())["status"] == "failed"
    assert "the first" in record.with_suffix(".traceback.txt").read_text()


def wait_for(condition, seconds=120):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.05)


def parts_of(output: Path) -> int:
    return len(list(output.glob("captions/*.parquet")))


def actor_pids() -> set[int]:
    found = subprocess.run(["pgrep", "-f", "ray::MapWorker.*CaptioningActor"], capture_output=True, text=True)
    return {int(pid) for pid in found.stdout.split()}


def test_an_actor_killed_in_the_middle_loses_nothing(tmp_path, model):
    photos = set(write_photos(tmp_path / "photos", 48))
    output = tmp_path / "out"
    killed: set[int] = set()

    def kill():
        wait_for(lambda: parts_of(output) >= 1)
        for pid in actor_pids():
            os.kill(pid, signal.SIGKILL)
            killed.add(pid)

    killer = threading.Thread(target=kill)
    killer.start()
    settings = {"batch_size": 2, "part_rows": 4, "beam_size": 40, "max_length": 100, "attention": True}
    summary = run_on_ray(tmp_path / "photos", output, model, **settings)
    killer.join()
    assert killed
    assert summary.status == "complete"
    assert set(check_exactly_once(str(output), photos)) == photos
    assert all(row["attention"] for row in read_parts(str(output), "captions"))


def start_cli(*arguments: str) -> subprocess.Popen:
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    command = [sys.executable, "-m", "capray", *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)


@pytest.mark.slow
def test_a_driver_told_to_stop_publishes_what_it_holds_and_is_taken_up_again(tmp_path, model):
    photos = set(write_photos(tmp_path / "photos", 28))
    output = tmp_path / "out"
    settings = ["--batch-size", "2", "--beam-size", "40", "--max-length", "100", "--num-actors", "1"]
    command = ["caption", tmp_path / "photos", output, "--model", model, *settings]
    first = start_cli(*command, "--part-rows", "4")
    wait_for(lambda: parts_of(output) >= 2 or first.poll() is not None)
    first.terminate()
    text, _ = first.communicate(timeout=60)
    assert first.returncode == 128 + signal.SIGTERM, text
    before = len(read_parts(str(output), "captions"))
    assert 0 < before < 28, text
    assert "run the same command again" in text
    assert "Traceback" not in text

    summary = run(tmp_path / "photos", output, model, batch_size=2, beam_size=40, max_length=100)
    assert summary.captioned_before == before
    assert summary.captions == 28 - before
    assert set(check_exactly_once(str(output), photos)) == photos


def test_samples_captioned_and_scored_on_s3(samples, model, s3):
    fs = s3fs.S3FileSystem()
    for file in Path(samples).iterdir():
        fs.put_file(str(file), f"{s3}/scored/samples/{file.name}")
    run(f"{s3}/scored/samples", f"{s3}/scored/out", model, split="dev")
    config = EvaluateConfig(output=f"{s3}/scored/out", references=f"{s3}/scored/samples", split="dev", metrics=("bleu",))
    evaluation = evaluate(config)
    assert (evaluation.matched, evaluation.references, evaluation.withheld) == (6, 30, None)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of a megabyte."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("needs the right to mount a file system")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def test_a_full_disk_ends_the_job_with_one_message_and_keeps_what_is_there(tmp_path, model, small_disk):
    photos = set(write_photos(tmp_path / "photos", 24))
    output, filler = small_disk / "out", small_disk / "filler"

    def fill(block):
        if parts_of(output) and not filler.exists():
            with filler.open("wb", buffering=0) as file, suppress(OSError):
                while True:
                    file.write(b"x" * 512)

    config = config_of(tmp_path / "photos", output, model, part_rows=4)
    with pytest.raises(StorageError, match="No space left"):
        caption(config, LocalExecutor(CaptioningActor, after_block=fill))
    kept = {row["image_id"] for row in read_parts(str(output), "captions")}
    assert 0 < len(kept) < 24

    filler.unlink()
    summary = run(tmp_path / "photos", output, model)
    assert summary.captioned_before == len(kept)
    assert set(check_exactly_once(str(output), photos)) == photos


def test_a_model_that_gives_no_finite_probability_ends_the_job(tmp_path, photos):
    import torch

    from capray.model.checkpoint import load_captioner, save_captioner

    captioner, _ = load_captioner(make_model(tmp_path / "sound", seed=0))
    with torch.no_grad():
        captioner.decoder.output.weight.sign_().mul_(3e38)
        captioner.decoder.output.bias.fill_(3e38)
    save_captioner(captioner, str(tmp_path / "nan"))
    with pytest.raises(CaprayError, match="in 20 attempts, 20 of them as captioning_error: the model gave no finite"):
        run(tmp_path / "photos", tmp_path / "out", str(tmp_path / "nan"))
