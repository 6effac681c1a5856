"""The command line: exit codes, one line for a mistake, settings from flags and YAML, photos captioned by name."""

import json
import os
import re
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import pyarrow.parquet as pq
import pytest

import capray
from capray.cli import app, run, settings_of
from capray.errors import CheckpointError, Interrupted
from capray.output import Output
from tests.conftest import image_bytes, write_photos
from tests.test_query import write_captions, write_job


@pytest.fixture(autouse=True)
def signals():
    """``run`` answers signals its own way; give the tests theirs back."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def call(capsys):
    """Runs a command line; its exit code, standard output and standard error."""

    def run_it(*arguments) -> tuple[int, str, str]:
        try:
            code = run([str(argument) for argument in arguments])
        except SystemExit as exit:
            code = exit.code
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        return code, out, err

    return run_it


@pytest.fixture
def jobs(monkeypatch):
    """The settings `train` is called with, the job itself left out; ``answer`` is what it does."""
    seen = types.SimpleNamespace(configs=[], answer=lambda: None)

    def train(config):
        seen.configs.append(config)
        seen.answer()
        return types.SimpleNamespace(best_epoch=3, best="/there/best", registered=None)

    fake = types.ModuleType("capray.training.job")
    fake.train = train
    monkeypatch.setitem(sys.modules, "capray.training.job", fake)
    return seen


def in_subprocess(*arguments, **options) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "capray", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, **options)


def commands() -> list[tuple[str, ...]]:
    """Every command that takes settings."""
    names = [(name,) for name in app if not name.startswith("-")]
    nested = [(*name, inner) for name in names for inner in app[name[0]] if not inner.startswith("-")]
    return [command for command in names + nested if settings_of(command)]


class TestHelp:
    @pytest.mark.parametrize("command", commands(), ids=" ".join)
    def test_every_setting_is_listed(self, call, monkeypatch, command):
        monkeypatch.setenv("COLUMNS", "200")
        code, out, _ = call(*command, "--help")
        assert code == 0
        listed = set(re.findall(r"--([a-z0-9-]+)", out))
        for name, field in settings_of(command).model_fields.items():
            assert name.replace("_", "-") in listed, name
            first_words = re.escape(" ".join(field.description.replace("`", "").split()[:3]))
            assert re.search(first_words.replace(r"\ ", r"\s+"), out.replace("`", "")), name
        assert "--config" in out
        assert not any(name.startswith("empty-") for name in listed)

    def test_the_commands(self, call):
        for arguments in ([], ["--help"]):
            code, out, _ = call(*arguments)
            assert code == 0
            assert len(commands()) == 18 and all(command[0] in out for command in commands())
        assert call("--version")[:2] == (0, f"{capray.__version__}\n")

    def test_help_is_quick(self):
        heavy = {"torch", "ray", "mlflow", "duckdb", "pyarrow", "torchvision", "nltk", "PIL", "fsspec", "numpy"}
        program = (
            "import atexit, sys; from capray.cli import run; "
            f"atexit.register(lambda: print('loaded:', sorted({heavy!r} & set(sys.modules)))); "
            "sys.exit(run(sys.argv[1:]))"
        )
        for arguments in (["--help"], ["caption", "--help"], ["query"]):
            done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True)
            assert done.returncode == (0 if "--help" in arguments else 2), done.stderr
            assert done.stdout.splitlines()[-1] == "loaded: []"


class TestMistakes:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["frobnicate"], 'Unknown command "frobnicate"'),
            (["train", "s", "o", "--lerning-rate", "1"], "--lerning-rate. Did you mean --learning-rate?"),
            (["train", "s", "o", "--learning-rate", "-1"], "learning-rate: input should be greater than 0, not '-1'"),
            (["train", "s", "o", "--learning-rate", "fast"], "learning-rate: .* not 'fast'"),
            (["train", "s", "o", "--cell", "rnn"], "cell: .*'lstm' or 'gru', not 'rnn'"),
            (
                ["train", "s", "o", "--beam-size", "2", "--n-best", "3"],
                "--n-best 3 is more than --beam-size 2: raise --beam-size",
            ),
            (["train", "s", "o", "--stage", "self_critical"], "--stage 'self_critical' needs --init-from, a captioner"),
            (["train", "s", "o", "--resize", "keep-aspect"], "--resize 'keep-aspect' .*: set --pool-grid"),
            (["query", "o", "--search", "dog", "--sample", "3"], "--search and --sample are two questions"),
            (["query", "o", "--out", "x.csv"], "--export needs --out"),
            (["prepare", "coco", "r", "o", "--fetch"], "--fetch needs --splits"),
            (["train", "s"], "--output is required"),
            (["train"], "something is missing: capray train SAMPLES OUTPUT"),
            (["train", "s", "o", "more"], "more"),
            (["train", "s", "o", "--encoder"], "--encoder requires an argument"),
            (["train", "s", "o", "--mean", "0.5", "0.5"], "--mean requires 3"),
            (["caption", "photo.jpg", "--model", "m"], "no photo at 'photo.jpg'"),
            (["caption", ".", "--model", "m"], "is no photo: an output is needed"),
            (["query", "nowhere"], "'nowhere' is no captioning output"),
            (["evaluate", "nowhere", "--references", "r"], "--split is required"),
            (["prepare", "shapes"], "something is missing: capray prepare shapes OUTPUT"),
            (["prepare", "shapes", "o", "--num-images", "9"], "--num-images: .* 10, not '9'"),
            (["--config", "x.yaml"], "a configuration file needs a job"),
            (["train", "--config", "x.yaml"], "cannot read the configuration 'x.yaml'"),
        ],
    )
    def test_one_line_and_exit_code_2(self, call, tmp_path, monkeypatch, arguments, message):
        monkeypatch.chdir(tmp_path)
        code, out, err = call(*arguments)
        assert (code, out) == (2, "")
        assert re.fullmatch(rf"capray: .*{message.replace('(', '[(]')}.*\n", err), err
        assert not list(tmp_path.iterdir())

    def test_a_fault_is_exit_code_1(self, call, tmp_path):
        code, out, err = call("prepare", "flickr8k", tmp_path / "nowhere", tmp_path / "out")
        assert (code, out) == (1, "")
        assert err == f"capray: no folder at '{tmp_path / 'nowhere'}' (--fetch downloads Flickr8k there)\n"

    def test_as_a_program(self, tmp_path):
        done = in_subprocess("query", tmp_path)
        assert (done.returncode, done.stdout) == (2, "")
        assert re.fullmatch(r"capray: '.*' is no captioning output.*\n", done.stderr)

    def test_a_bug_is_not_dressed_up(self, jobs):
        jobs.answer = lambda: 1 / 0
        with pytest.raises(ZeroDivisionError):
            run(["train", "s", "o"])


class TestEnds:
    def test_run_returns_its_exit_code(self, jobs, capsys):
        assert run(["train", "s", "o"]) == 0
        assert run(["--help"]) == 0

    @pytest.mark.parametrize(
        ("error", "code", "message"),
        [
            (CheckpointError("the model is damaged"), 1, "the model is damaged"),
            (KeyboardInterrupt(), 130, "interrupted"),
            (Interrupted("interrupted; go on", signal.SIGINT), 130, "interrupted; go on"),
            (Interrupted("terminated; go on", signal.SIGTERM), 143, "terminated; go on"),
        ],
    )
    def test_what_a_job_raises(self, call, jobs, error, code, message):
        def fail():
            raise error

        jobs.answer = fail
        assert call("train", "s", "o") == (code, "", f"capray: {message}\n")

    def test_sigterm(self, call, jobs):
        jobs.answer = lambda: os.kill(os.getpid(), signal.SIGTERM)
        code, _, err = call("train", "s", "o")
        assert code == 143
        assert err == "capray: terminated\n"

    def test_sigterm_where_only_what_ctrl_c_raises_gets_through(self, call, jobs):
        """As while Ray waits. What a job says then is told with the code of the signal."""

        def wait():
            try:
                os.kill(os.getpid(), signal.SIGTERM)
            except KeyboardInterrupt as error:
                raise Interrupted("stopped; go on") from error

        jobs.answer = wait
        assert call("train", "s", "o") == (143, "", "capray: stopped; go on\n")

    @pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
    def test_a_query_stops_for_a_signal(self, tmp_path, number, code):
        write_job(Output(str(tmp_path)))
        mark = tmp_path / "mark.csv"
        endless = "SELECT count(*) FROM range(1000000) a, range(1000000) b WHERE (a.range * b.range) % 7 = 3"
        sql = f"COPY (SELECT 1) TO '{mark}'; {endless}"
        process = subprocess.Popen([sys.executable, "-m", "capray", "query", str(tmp_path), sql], stderr=subprocess.PIPE)
        while not mark.exists() and process.poll() is None:
            time.sleep(0.05)
        time.sleep(0.5)
        process.send_signal(number)
        _, err = process.communicate(timeout=60)
        assert (process.returncode, err.count(b"\n")) == (code, 1), err

    def test_a_reader_that_has_enough(self, tmp_path):
        write_job(Output(str(tmp_path)))
        sql = "SELECT range, repeat('x', 100) FROM range(20000)"
        command = [sys.executable, "-m", "capray", "query", str(tmp_path), sql, "--format", "csv"]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == ""
        assert process.wait(60) == 141


class TestSettings:
    def test_flags_and_positions(self, call, jobs):
        code, out, _ = call(
            *["train", "s", "--epochs", "3", "o", "--mean", "0.1", "0.2", "0.3", "--no-repeat-ngram=2"],
            *["--allow-unk", "--pool-grid", "14", "--captions-per-image", "1", "--tracking-uri", "none"],
        )
        assert (code, out) == (0, "best epoch 3: /there/best\n")
        (config,) = jobs.configs
        assert (config.samples, config.output, config.epochs, config.mean) == ("s", "o", 3, (0.1, 0.2, 0.3))
        assert (config.no_repeat_ngram, config.allow_unk, config.pool_grid) == (2, True, 14)
        assert (config.captions_per_image, config.tracking_uri, config.beam_size) == ("1", "none", 5)

    def test_every_setting_by_name(self, call, jobs):
        assert call("train", "--output", "o", "--samples", "s")[0] == 0
        assert (jobs.configs[0].samples, jobs.configs[0].output) == ("s", "o")

    def test_a_flag_that_is_on_can_be_put_out(self, call, jobs):
        for arguments in (["--no-gate"], ["--gate=false"]):
            if call("train", "s", "o", *arguments)[0] == 0:
                break
        assert [config.gate for config in jobs.configs] == [False]

    def test_yaml_with_a_flag_over_it(self, call, tmp_path):
        recipe = tmp_path / "recipe.yaml"
        recipe.write_text(f"output: {tmp_path / 'shapes'}\nnum_images: 10\nimage_size: 32\nseed: 7\n")
        code, out, _ = call("prepare", "shapes", "--config", recipe, "--num-images", "20")
        assert code == 0
        assert out.splitlines() == [
            " train: 16 images, 80 captions",
            "   dev: 2 images, 10 captions",
            "  test: 2 images, 10 captions",
            f"wrote {tmp_path / 'shapes'}",
        ]
        assert call("prepare", "shapes", tmp_path / "flags", "--num-images=20", "--image-size=32", "--seed=7")[0] == 0
        for name in ("train-00000.parquet", "dev-00000.parquet", "test-00000.parquet"):
            assert pq.read_table(tmp_path / "shapes" / name).equals(pq.read_table(tmp_path / "flags" / name))

    def test_yaml_of_all_kinds_of_values(self, call, jobs, tmp_path):
        recipe = tmp_path / "recipe.yaml"
        recipe.write_text(
            "samples: s\noutput: o\nmean: [0.5, 0.25, 0.125]\ngate: false\npool_grid: 14\npatience: null\n"
            "learning_rate: 4.0e-4\nweights: imagenet\ncaptions_per_image: all\n"
        )
        for place in (["--config", recipe, "train"], ["train", f"--config={recipe}"]):
            assert call(*place, "--epochs", "2") == (0, "best epoch 3: /there/best\n", "")
        first, second = jobs.configs
        assert first == second
        assert (first.samples, first.mean, first.gate, first.pool_grid) == ("s", (0.5, 0.25, 0.125), False, 14)
        assert (first.patience, first.learning_rate, first.weights, first.epochs) == (None, 4e-4, "imagenet", 2)

    def test_a_position_goes_over_yaml(self, call, jobs, tmp_path):
        recipe = tmp_path / "recipe.yaml"
        recipe.write_text("samples: s\noutput: o\nmean: [0.5, 0.5, 0.5]\n")
        assert call("train", "other", "--mean", "0.1", "0.2", "0.3", "--config", recipe)[0] == 0
        (config,) = jobs.configs
        assert (config.samples, config.output, config.mean) == ("other", "o", (0.1, 0.2, 0.3))

    def test_one_commands_yaml_is_forgotten_by_the_next(self, call, jobs, tmp_path):
        recipe = tmp_path / "recipe.yaml"
        recipe.write_text("samples: s\noutput: o\nepochs: 9\n")
        assert call("train", "--config", recipe)[0] == 0
        assert call("train", "s", "o")[0] == 0
        assert [config.epochs for config in jobs.configs] == [9, 20]

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("num_imges: 10\n", "unknown key 'num_imges' in .*did you mean 'num_images'"),
            ("beam_size: 10\n", "unknown key 'beam_size' in"),
            ("num_images: ten\n", "num-images: .*'ten'"),
            ("num_images: [1, 2]\n", "num_images"),
            ("num_images: 5\n", "num-images: .*5"),
            ("- num_images\n", "must hold a mapping"),
            ("num_images: [\n", "is not YAML"),
        ],
    )
    def test_bad_yaml(self, call, tmp_path, text, message):
        recipe = tmp_path / "recipe.yaml"
        recipe.write_text(text)
        code, _, err = call("prepare", "shapes", tmp_path / "out", "--config", recipe)
        assert code == 2
        assert re.search(message, err)
        assert not (tmp_path / "out").exists()


class TestPhotos:
    def test_one_line_each(self, call, model, tmp_path):
        photos = write_photos(tmp_path / "two words", 2)
        code, out, err = call("caption", *photos, "--model", model, "--beam-size", "2", "--max-length", "6")
        assert (code, err) == (0, "")
        lines = [line.split("\t") for line in out.splitlines()]
        assert [path for path, _ in lines] == photos
        assert all(re.fullmatch(r"(word\d+( |$))+", text) and len(text.split()) <= 6 for _, text in lines)
        again = call("caption", "--model", model, "--beam-size", "2", "--max-length", "6", photos[1])
        assert again == (0, "\t".join(lines[1]) + "\n", "")

    def test_a_bad_photo_does_not_stop_the_others(self, call, model, tmp_path):
        photos = write_photos(tmp_path, 2)
        bad = tmp_path / "bad.jpg"
        bad.write_text("no photo")
        empty = tmp_path / "empty.png"
        empty.write_bytes(b"")
        code, out, err = call("caption", photos[0], bad, empty, photos[1], "--model", model, "--max-length", "6")
        assert code == 1
        assert [line.split("\t")[0] for line in out.splitlines()] == photos
        first, second, last = err.splitlines()
        assert first.startswith(f"capray: {bad}: not_an_image: ")
        assert second.startswith(f"capray: {empty}: truncated: ")
        assert last == "capray: 2 of 4 photos could not be captioned"

    def test_a_photo_without_a_suffix(self, call, model, tmp_path):
        photo = tmp_path / "photo"
        photo.write_bytes(image_bytes())
        code, out, _ = call("caption", photo, "--model", model, "--max-length", "6")
        assert code == 0
        assert out.startswith(f"{photo}\t")

    @pytest.mark.parametrize("name", ["list.csv", "LIST.TXT.GZ", "shard.tar", "SHARD.TAR", "a.parquet", "manifest.json"])
    def test_tables_tars_and_lists_are_no_photos(self, call, model, tmp_path, name):
        (tmp_path / name).write_bytes(b"")
        code, out, err = call("caption", tmp_path / name, "--model", model)
        assert (code, out) == (2, "") and "is no photo: an output is needed" in err

    def test_settings_of_tables_are_refused_for_photos(self, call, model, tmp_path):
        code, out, err = call("caption", *write_photos(tmp_path, 1), "--model", model, "--limit", "3", "--attention")
        assert (code, out) == (2, "") and err.startswith("capray: --attention, --limit: not for single photos")

    def test_a_photo_that_is_not_there_is_said_before_any_is_captioned(self, call, model, tmp_path):
        (photo,) = write_photos(tmp_path, 1)
        code, out, err = call("caption", photo, tmp_path / "gone.jpg", "--model", model)
        assert (code, out) == (2, "")
        assert err == f"capray: no photo at '{tmp_path / 'gone.jpg'}'\n"

    def test_a_model_that_is_none(self, call, tmp_path):
        (photo,) = write_photos(tmp_path / "photos", 1)
        code, out, err = call("caption", photo, "--model", tmp_path / "photos")
        assert (code, out) == (2, "")
        assert "not a captioner folder" in err

    def test_limits_hold_here_too(self, call, model, tmp_path):
        (photo,) = write_photos(tmp_path, 1)
        code, _, err = call("caption", photo, "--model", model, "--max-image-pixels", "100")
        assert code == 1
        assert "too_large" in err

    def test_on_s3(self, call, model, s3, tmp_path):
        import s3fs

        s3fs.S3FileSystem().pipe_file(f"{s3}/photo #1.png", image_bytes())
        code, out, _ = call("caption", f"{s3}/photo #1.png", "--model", model, "--max-length", "6")
        assert code == 0
        assert out.startswith(f"{s3}/photo #1.png\t")


class TestTables:
    @pytest.fixture
    def output(self, tmp_path, samples):
        output = Output(str(tmp_path / "out"))
        write_job(output)
        rows = pq.read_table(f"{samples}/test-00000.parquet").to_pylist()
        write_captions(output, {row["image_id"]: row["captions"][0] for row in rows})
        return output.root.path

    def test_query(self, call, output):
        code, out, _ = call("query", output, "SELECT count(*) AS n FROM captions", "--format", "json")
        assert (code, json.loads(out)) == (0, [{"n": 6}])
        assert "images_per_second" in call("query", output)[1]
        code, out, err = call("query", output, "SELEC")
        assert (code, out) == (2, "")
        assert "views: captions, failures, failure_log" in err

    def evaluate(self, call, output, samples, *flags):
        return call("evaluate", output, "--references", samples, "--split", "test", "--metrics", "bleu", *flags)

    def test_evaluate(self, call, output, samples):
        code, out, _ = self.evaluate(call, output, samples)
        assert code == 0
        assert out.splitlines()[0] == "split test: 6 of 6 images have a caption; 30 references"
        assert re.search(r"BLEU-4 +│ +1\.0000 │ 1\.0000 – 1\.0000", out)
        code, out, _ = self.evaluate(call, output, samples, "--json")
        assert (code, json.loads(out)["figures"]["bleu_4"]["value"]) == (0, 1.0)
        code, _, err = self.evaluate(call, output, samples, "spice")
        assert code == 2 and "spice" in err and "cider_d" in err

    def test_figures_withheld_are_a_fault(self, call, output, samples):
        next(Path(output, "captions").iterdir()).unlink()
        write_captions(Output(output), {"shapes-000054.png": "a dog"})
        code, out, err = self.evaluate(call, output, samples, "--json")
        assert (code, json.loads(out)["figures"], json.loads(out)["matched"]) == (1, {}, 1)
        assert "5 of 6 images" in err and "--allow-partial" in err
        assert self.evaluate(call, output, samples, "--allow-partial")[0] == 0

    def test_flickr8k(self, call, tmp_path):
        from tests.test_datasets import original

        raw = original(tmp_path / "raw", names=("1_a.jpg", "3_c.jpg", "4_d.jpg"))
        code, out, _ = call("prepare", "flickr8k", raw, tmp_path / "out")
        assert code == 0
        assert out.splitlines()[:2] == [" train: 1 image, 2 captions", "   dev: 1 image, 2 captions"]
        assert "  note: train: 1 of 2 listed images missing" in out.splitlines()

    def test_settings_of_the_other_data_sets(self, call, tmp_path):
        from tests.test_datasets import coco_folder, original

        raw = original(tmp_path / "raw")
        fractions = ("--first", "3", "--split-fractions", "train=0.999999,test=0.000001")
        code, out, _ = call("prepare", "flickr8k", raw, tmp_path / "first", *fractions)
        assert (code, out.splitlines()[0]) == (0, " train: 3 images, 6 captions")
        (raw / "Flickr8k.token.txt").rename(raw / "results_20130124.token")
        (raw / "Flicker8k_Dataset").rename(raw / "flickr30k-images")
        lists = [f"{split}={raw}/Flickr_8k.{split}Images.txt" for split in ("train", "dev")]
        code, out, _ = call("prepare", "flickr30k", raw, tmp_path / "30k", "--split-lists", *lists)
        assert (code, out.splitlines()[:2]) == (0, [" train: 2 images, 4 captions", "   dev: 1 image, 2 captions"])
        recipe = tmp_path / "coco.yaml"
        recipe.write_text("splits: 2017\n")
        code, out, _ = call("prepare", "coco", coco_folder(tmp_path / "c", "2017"), tmp_path / "coco", "--config", recipe)
        assert (code, out.splitlines()[0]) == (0, " train: 2 images, 4 captions")
        code, _, err = call("prepare", "folder", raw, tmp_path / "folder")
        assert code == 1 and "has no manifest" in err
