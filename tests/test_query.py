"""SQL over an output: its views hold what is current, its answers come as a table, CSV or JSON."""

import csv
import datetime
import io
import json
import math
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from capray.config import QueryConfig
from capray.errors import CaprayError, ConfigError, StorageError
from capray.output import Output, open_duckdb
from capray.query.answers import run_query
from capray.storage import Location, write_atomic
from capray.tables import CAPTIONS, FAILURES, encode_parquet

START = datetime.datetime(2026, 1, 2, 3, 4, 5, tzinfo=datetime.UTC)


def write_job(output: Output, schema_version: int = 1) -> None:
    write_atomic(output.job, json.dumps({"schema_version": schema_version}).encode())


def write_captions(output: Output, rows: dict[str, str], run: str = "run-1", model_id: str = "m") -> None:
    """A part of captions by image id, a second apart."""
    fixed = {
        "log_prob": -2.0,
        "score": -0.5,
        "finished": True,
        "alternatives": [{"caption": "another", "log_prob": -3.0, "score": -0.75}],
        "width": 40,
        "height": 30,
        "sha256": b"\xab" * 32,
        "model_id": model_id,
        "run_id": run,
    }
    table = [
        fixed | {"image_id": name, "caption": text, "num_tokens": len(text.split()), "captioned_at": START + i * SECOND}
        for i, (name, text) in enumerate(rows.items())
    ]
    data = encode_parquet(pa.Table.from_pylist(table, schema=CAPTIONS))
    write_atomic(output.captions.join(f"part-{run}-00000.parquet"), data)


def write_failures(output: Output, rows: dict[str, str], run: str, at: datetime.datetime) -> None:
    table = [
        {"image_id": name, "error_type": kind, "message": f"{name} {kind}", "run_id": run, "failed_at": at}
        for name, kind in rows.items()
    ]
    data = encode_parquet(pa.Table.from_pylist(table, schema=FAILURES))
    write_atomic(output.failures.join(f"part-{run}-00000.parquet"), data)


SECOND = datetime.timedelta(seconds=1)


@pytest.fixture(params=["local", "s3"])
def output(request, tmp_path) -> Output:
    """Two runs: b failed and was captioned later, c failed twice, d once."""
    if request.param == "local":
        output = Output(str(tmp_path / "out"))
    else:
        output = Output(f"{request.getfixturevalue('s3')}/{tmp_path.name}")
    return fill(output)


@pytest.fixture
def local(tmp_path) -> Output:
    return fill(Output(str(tmp_path / "out")))


def fill(output: Output) -> Output:
    write_job(output)
    write_captions(output, {"a": "A man, with a \u201cdog\u201d.", "e": 'She says "no"'}, "run-1")
    write_failures(output, {"b": "denied", "c": "denied"}, "run-1", START)
    write_captions(output, {"b": "Two\nlines"}, "run-2")
    write_failures(output, {"c": "truncated", "d": "missing"}, "run-2", START + SECOND)
    return output


def ask(output: Output | str, sql: str | None = None, **settings) -> str:
    stream = io.StringIO()
    uri = output if isinstance(output, str) else output.root.uri
    run_query(QueryConfig(output=uri, sql=sql, **settings), stream)
    return stream.getvalue()


def records(output: Output, sql: str) -> list[dict]:
    return json.loads(ask(output, sql, format="json"))


class TestViews:
    def test_captions_and_the_log_hold_every_row(self, output):
        assert records(output, "SELECT image_id FROM captions ORDER BY 1") == [{"image_id": name} for name in "abe"]
        assert records(output, "SELECT count(*) AS n FROM failure_log") == [{"n": 4}]

    def test_a_failure_is_current_while_there_is_no_caption_and_only_the_latest(self, output):
        rows = records(output, "SELECT image_id, error_type, run_id FROM failures ORDER BY 1")
        assert rows == [
            {"image_id": "c", "error_type": "truncated", "run_id": "run-2"},
            {"image_id": "d", "error_type": "missing", "run_id": "run-2"},
        ]

    def test_the_latest_is_told_by_time_not_by_name(self, local):
        write_failures(local, {"c": "unreadable_storage"}, "run-0", START + 9 * SECOND)
        assert records(local, "SELECT error_type FROM failures WHERE image_id = 'c'") == [
            {"error_type": "unreadable_storage"}
        ]

    def test_an_output_before_its_first_part(self, tmp_path):
        output = Output(str(tmp_path))
        write_job(output)
        assert records(output, "SELECT (SELECT count(*) FROM captions) AS c, count(*) AS f FROM failures") == [
            {"c": 0, "f": 0}
        ]
        assert "image_id" in ask(output)

    def test_files_that_are_no_parts_are_not_read(self, local):
        write_atomic(local.captions.join("notes.parquet"), b"not Parquet")
        write_atomic(local.captions.join(".part-x.parquet.1234"), b"half written")
        assert records(local, "SELECT count(*) AS n FROM captions") == [{"n": 3}]


class TestFormats:
    def test_csv(self, local):
        text = ask(local, "SELECT image_id, caption, NULL AS nothing FROM captions ORDER BY 1", format="csv")
        assert list(csv.reader(io.StringIO(text))) == [
            ["image_id", "caption", "nothing"],
            ["a", "A man, with a \u201cdog\u201d.", ""],
            ["b", "Two\nlines", ""],
            ["e", 'She says "no"', ""],
        ]

    def test_json(self, local):
        text = ask(local, "SELECT image_id, caption, num_tokens, finished FROM captions ORDER BY 1", format="json")
        assert "\u201cdog\u201d" in text, "not escaped"
        assert json.loads(text)[0] == {
            "image_id": "a",
            "caption": "A man, with a \u201cdog\u201d.",
            "num_tokens": 5,
            "finished": True,
        }

    def test_a_table(self, local):
        text = ask(local, "SELECT image_id, error_type FROM failures ORDER BY 1")
        lines = text.splitlines()
        assert "image_id" in lines[1] and "error_type" in lines[1]
        assert [line.replace("\u2502", " ").split() for line in lines[3:5]] == [["c", "truncated"], ["d", "missing"]]

    @pytest.mark.parametrize("value", ["[red]x[/red]", ":dog:", "s3://b/:smile:/[1].jpg", "[/]"])
    def test_a_table_shows_values_as_they_are(self, local, value):
        assert value in ask(local, f"SELECT '{value}' AS v")

    @pytest.mark.parametrize("format", ["csv", "json", "table"])
    def test_every_column_can_be_shown(self, local, format):
        text = ask(local, "SELECT * FROM captions", format=format)
        if format != "table":
            assert "ab" * 32 in text, "bytes as hexadecimal"
            assert "2026-01-02 03:04:05+00:00" in text
        assert ask(local, "SELECT * FROM failure_log", format=format)

    def test_no_rows(self, local):
        sql = "SELECT image_id FROM captions WHERE false"
        assert ask(local, sql, format="csv") == "image_id\n"
        assert json.loads(ask(local, sql, format="json")) == []
        assert "image_id" in ask(local, sql)


class TestSummary:
    def test_counts_kinds_and_a_few_rows(self, output):
        text = ask(output, format="csv")
        lines = list(csv.reader(io.StringIO(text)))
        counts = dict(zip(lines[0], lines[1], strict=True))
        assert counts == {"captions": "3", "failures": "2", "runs": "2", "mean_tokens": "3.3", "images_per_second": "3.0"}
        assert lines[2] == ["error_type", "images", "example"]
        assert sorted(lines[3:5]) == [["missing", "1", "d missing"], ["truncated", "1", "c truncated"]]
        assert [line[0] for line in lines[5:]] == ["image_id", "a", "b", "e"]

    def test_without_failures(self, tmp_path):
        output = Output(str(tmp_path))
        write_job(output)
        write_captions(output, {f"{i}": "a dog" for i in range(9)})
        lines = list(csv.reader(io.StringIO(ask(output, format="csv"))))
        assert len(lines) == 2 + 1 + 5
        assert "error_type" not in ask(output)

    def test_with_failures_only(self, tmp_path):
        output = Output(str(tmp_path))
        write_job(output)
        write_failures(output, {"a": "missing"}, "run-1", START)
        lines = list(csv.reader(io.StringIO(ask(output, format="csv"))))
        assert lines[1] == ["0", "1", "1", "", ""]


class TestMistakes:
    @pytest.mark.parametrize(
        ("sql", "message"),
        [
            ("SELEC 1", "syntax error"),
            ("SELECT * FROM caption", "caption"),
            ("SELECT captoin FROM captions", "captoin"),
            ("SELECT caption::INT FROM captions", "Could not convert"),
            ("SELECT sum(caption) FROM captions", "No function matches"),
            ("SELECT strptime(caption, '%Y') FROM captions", "Could not parse"),
            ("SELECT regexp_matches(caption, '(') FROM captions", r"missing \)"),
            ("SELECT 9223372036854775807 + num_tokens::BIGINT FROM captions", "Overflow"),
            ("SELECT INTERVAL '1000000000 days'", "magnitude"),
            ("COMMIT", "no transaction"),
        ],
    )
    def test_bad_sql_names_the_views(self, local, sql, message):
        with pytest.raises(ConfigError, match=rf"(?s){message}.*\(views: captions, failures, failure_log, .*\)"):
            ask(local, sql)

    @pytest.mark.parametrize("sql", ["", ";", "-- nothing"])
    def test_no_statement_at_all(self, local, sql):
        with pytest.raises(ConfigError):
            ask(local, sql)

    def test_a_file_that_is_not_there(self, local):
        with pytest.raises(CaprayError, match=r"nowhere\.parquet"):
            ask(local, "SELECT * FROM 'nowhere.parquet'")

    def test_no_output(self, tmp_path):
        with pytest.raises(ConfigError, match=r"is no captioning output: it has no _capray/job\.json"):
            ask(str(tmp_path / "nowhere"))

    def test_a_newer_output(self, local):
        write_job(local, schema_version=99)
        with pytest.raises(ConfigError, match="schema version 99.*upgrade capray"):
            ask(local)

    @pytest.mark.parametrize(
        ("raised", "code"),
        [(PermissionError, 1), (FileNotFoundError, 1), (ValueError, 1), (OSError, 75), (ConnectionResetError, 75)],
    )
    def test_a_store_that_denies_or_does_not_answer(self, local, tmp_path, raised, code):
        class Denying(MemoryFileSystem):
            protocol = "denying"

            def glob(self, path, **options):
                return [path]

            def info(self, path, **options):
                return {"name": path, "size": 10, "type": "file"}

            def _open(self, path, *arguments, **options):
                raise raised(f"Not now: {path}")

        place = Location("denying://part.parquet", Denying(), "part.parquet")
        with (
            pytest.raises(StorageError, match=rf"reading denying://part\.parquet: {raised.__name__}: Not now") as error,
            open_duckdb(str(tmp_path), place) as connection,
        ):
            connection.execute("FROM read_parquet('denying://part.parquet')").fetchall()
        assert "Traceback" not in str(error.value) and error.value.exit_code == code

    def test_a_damaged_part(self, local):
        write_atomic(local.captions.join("part-run-3-00000.parquet"), b"PAR1 and no more")
        with pytest.raises(StorageError, match=r"reading .*part-run-3-00000\.parquet.*delete it"):
            ask(local)


BEACH = {
    "1.jpg": "a dog runs on the beach",
    "2.jpg": "two dogs on a beach",
    "3.jpg": "a man sits on a bench",
    "4.jpg": "a dog",
    "5.jpg": "a cat on a dog on a dog",
    "6.jpg": "people walking",
}


class TestSearch:
    @pytest.fixture
    def beach(self, tmp_path) -> Output:
        output = Output(str(tmp_path))
        write_job(output)
        write_captions(output, BEACH)
        return output

    def found(self, output, text, **settings) -> list[str]:
        return [row["image_id"] for row in json.loads(ask(output, search=text, format="json", **settings))]

    def test_all_words_come_before_some_and_inflections_count(self, beach):
        assert set(self.found(beach, "Dog on beach")[:2]) == {"1.jpg", "2.jpg"}
        assert self.found(beach, "beaches!") == ["2.jpg", "1.jpg"], "the shorter first"
        assert self.found(beach, "walks") == ["6.jpg"]
        assert self.found(beach, "zebra") == []

    def test_the_relevance_is_bm25(self, beach):
        """Against the formula, computed apart."""
        documents = {name: text.replace("dogs", "dog").split() for name, text in BEACH.items()}
        mean = sum(map(len, documents.values())) / len(documents)

        def relevance(words, terms):
            total = 0.0
            for term in terms:
                n = sum(term in other for other in documents.values())
                idf = math.log(1 + (len(documents) - n + 0.5) / (n + 0.5))
                tf = words.count(term)
                total += idf * tf * 2.2 / (tf + 1.2 * (0.25 + 0.75 * len(words) / mean))
            return total

        rows = json.loads(ask(beach, search="dogs beach", format="json"))
        expected = {name: relevance(words, ["dog", "beach"]) for name, words in documents.items()}
        assert {row["image_id"]: row["relevance"] for row in rows} == pytest.approx(
            {name: value for name, value in expected.items() if value}, abs=1e-3
        )
        assert [row["relevance"] for row in rows] == sorted((row["relevance"] for row in rows), reverse=True)

    def test_a_condition_and_a_limit(self, beach):
        assert self.found(beach, "dog", where="image_id < '2'") == ["1.jpg"]
        assert len(self.found(beach, "dog", limit=2)) == 2

    @pytest.mark.parametrize("text", ["", "?!", " "])
    def test_nothing_to_search_for(self, beach, text):
        with pytest.raises(ConfigError, match="holds no word"):
            self.found(beach, text)

    def test_signs_of_sql_are_words_like_others(self, beach):
        assert "4.jpg" in self.found(beach, "a'; DROP VIEW captions; --")
        assert self.found(beach, "%") == self.found(beach, '\\" $1') == []

    def test_a_sample_is_drawn_by_its_seed(self, beach):
        drawn = [ask(beach, sample=3, seed=seed, format="json") for seed in (0, 0, 1, 2, 3)]
        assert drawn[0] == drawn[1] and len(set(drawn)) > 1
        assert all(len(json.loads(text)) == 3 for text in drawn)
        assert len(json.loads(ask(beach, sample=99, where="num_tokens = 2", format="json"))) == 2


class TestViewsOfCommonQuestions:
    def test_words_and_captions_are_counted_by_images(self, tmp_path):
        output = Output(str(tmp_path))
        write_job(output)
        write_captions(output, {"1": "a dog a dog", "2": "a cat", "3": "a cat"})
        assert records(output, "FROM words") == [
            {"word": "a", "images": 3},
            {"word": "cat", "images": 2},
            {"word": "dog", "images": 1},
        ]
        assert records(output, "FROM caption_counts LIMIT 1") == [{"caption": "a cat", "images": 2}]

    def test_runs(self, local):
        rows = records(local, "SELECT run_id, captions, failures FROM runs")
        assert rows == [{"run_id": "run-1", "captions": 2, "failures": 2}, {"run_id": "run-2", "captions": 1, "failures": 2}]

    @pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet", "folder"])
    def test_a_table_is_joined_by_image_id(self, output, tmp_path, kind):
        table = pa.table({"image_id": ["a", "b", "x"], "shop": ["one's", "two", "three"]})
        path = tmp_path / f"shops.{kind}"
        if kind == "csv":
            path.write_text("image_id,shop\na,one's\nb,two\nx,three\n")
        elif kind == "jsonl":
            path.write_text("".join(json.dumps(row) + "\n" for row in table.to_pylist()))
        elif kind == "parquet":
            path.write_bytes(encode_parquet(table))
        else:
            path.mkdir()
            (path / "0.parquet").write_bytes(encode_parquet(table.slice(0, 1)))
            (path / "1.parquet").write_bytes(encode_parquet(table.slice(1)))
        text = ask(output, "SELECT image_id, shop FROM joined ORDER BY 1", join=str(path), format="json")
        assert json.loads(text) == [{"image_id": "a", "shop": "one's"}, {"image_id": "b", "shop": "two"}]
        assert "x" in ask(output, "SELECT image_id FROM source_table ANTI JOIN captions USING (image_id)", join=str(path))

    def test_a_table_without_ids(self, local, tmp_path):
        (tmp_path / "t.csv").write_text("id,shop\na,1\n")
        with pytest.raises(ConfigError, match="no column image_id to join by, but id, shop"):
            ask(local, "FROM joined", join=str(tmp_path / "t.csv"))

    def test_a_table_that_is_not_there(self, local, tmp_path):
        for name in ("t.csv", "t.parquet", "t"):
            with pytest.raises(CaprayError, match=name):
                ask(local, "FROM joined", join=str(tmp_path / name))


class TestExport:
    def test_every_format_holds_every_row_and_column(self, output, tmp_path):
        for kind in ("csv", "jsonl", "parquet"):
            out = tmp_path / "export" / f"captions.{kind}"
            assert ask(output, export=kind, out=str(out)) == f"wrote 3 rows to {out}\n"
        frame = pq.read_table(tmp_path / "export" / "captions.parquet")
        assert frame.schema.names == CAPTIONS.names and sorted(frame["image_id"].to_pylist()) == ["a", "b", "e"]
        rows = [json.loads(line) for line in (tmp_path / "export" / "captions.jsonl").read_text().splitlines()]
        assert {row["image_id"]: row["caption"] for row in rows}["b"] == "Two\nlines"
        assert rows[0]["sha256"] == "ab" * 32
        with open(tmp_path / "export" / "captions.csv", newline="") as file:
            assert {row["image_id"]: row["sha256"] for row in csv.DictReader(file)} == dict.fromkeys("abe", "ab" * 32)

    def test_the_answer_to_a_query_and_a_condition(self, local, tmp_path):
        out = str(tmp_path / "answer.csv")
        ask(local, "SELECT image_id FROM captions ORDER BY 1 DESC -- newest first\n;\n", export="csv", out=out)
        assert Path(out).read_text() == "image_id\ne\nb\na\n"
        assert "wrote 1 row " in ask(local, where="caption LIKE 'She%'", export="csv", out=out)
        assert len(Path(out).read_text().splitlines()) == 2

    def test_to_s3(self, local, s3):
        import s3fs

        ask(local, export="jsonl", out=f"{s3}/export/captions.jsonl")
        fs = s3fs.S3FileSystem(use_listings_cache=False)
        assert len(fs.cat_file(f"{s3}/export/captions.jsonl").splitlines()) == 3

    def test_cocos_results(self, tmp_path):
        output = Output(str(tmp_path / "out"))
        write_job(output)
        write_captions(output, {"s3://b/COCO_val2014_000000000042.jpg": "a dog", "7.png": "a cat", "val/9": "a man"})
        ask(output, export="coco", out=str(tmp_path / "results.json"))
        assert json.loads((tmp_path / "results.json").read_text()) == [
            {"image_id": 7, "caption": "a cat"},
            {"image_id": 9, "caption": "a man"},
            {"image_id": 42, "caption": "a dog"},
        ]

    def test_cocos_ids_from_a_carried_column(self, tmp_path):
        output = Output(str(tmp_path / "out"))
        write_job(output)
        write_captions(output, {"x.jpg": "a dog"})
        (part,) = (tmp_path / "out" / "captions").iterdir()
        table = pq.read_table(part)
        carried = pa.array([{"coco id": 5}], pa.struct([("coco id", pa.int64())]))
        part.write_bytes(encode_parquet(table.append_column("source", carried)))
        out = str(tmp_path / "results.json")
        ask(output, export="coco", out=out, coco_id="coco id")
        assert json.loads(Path(out).read_text()) == [{"image_id": 5, "caption": "a dog"}]

    @pytest.mark.parametrize(
        ("names", "settings", "message"),
        [
            (["x.jpg"], {}, "'x.jpg' has no integer id: name the carried column"),
            (["1.jpg", "b/1.png"], {}, "the integer id 1 would be that of"),
            (["1.jpg"], {"coco_id": "id"}, "no columns were carried along"),
            (["1.jpg"], {"sql": "SELECT caption FROM captions"}, "needs the columns image_id and caption, not caption"),
        ],
    )
    def test_what_coco_cannot_hold(self, tmp_path, names, settings, message):
        output = Output(str(tmp_path / "out"))
        write_job(output)
        write_captions(output, dict.fromkeys(names, "a dog"))
        with pytest.raises(ConfigError, match=message):
            ask(output, export="coco", out=str(tmp_path / "results.json"), **settings)
        assert not (tmp_path / "results.json").exists()

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"export": "csv"}, "export needs out"),
            ({"out": "x"}, "out needs export"),
            ({"sql": "SELECT 1", "search": "x"}, "search has no use beside a query"),
            ({"search": "x", "sample": 1}, "ask one"),
            ({"coco_id": "x"}, "coco_id goes with export coco"),
        ],
    )
    def test_settings_that_do_not_fit(self, settings, message):
        with pytest.raises(ConfigError, match=message):
            QueryConfig.create(output="o", **settings)
