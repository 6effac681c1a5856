"""SQL over an output: its views hold what is current, its answers come as a table, CSV or JSON."""

import csv
import datetime
import io
import json

import pyarrow as pa
import pytest

from capray.config import QueryConfig
from capray.errors import CaprayError, ConfigError, StorageError
from capray.output import Output
from capray.query import run_query
from capray.storage import write_atomic
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
        assert counts == {
            "captions": "3",
            "failures": "2",
            "runs": "2",
            "mean_tokens": "3.3",
            "images_per_second": "3.0",
        }
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
        ],
    )
    def test_bad_sql_names_the_views(self, local, sql, message):
        with pytest.raises(ConfigError, match=rf"(?s){message}.*\(views: captions, failures, failure_log\)"):
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

    def test_a_damaged_part(self, local):
        write_atomic(local.captions.join("part-run-3-00000.parquet"), b"PAR1 and no more")
        with pytest.raises(StorageError, match=r"reading .*part-run-3-00000\.parquet"):
            ask(local)
