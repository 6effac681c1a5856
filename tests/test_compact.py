"""A compacted copy holds the same rows, sorted, or is no output at all."""

import json
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from capray.config import CompactConfig
from capray.errors import CaprayError, ConfigError, DataError, OutputConflictError, StorageError
from capray.output import Output, require_output
from capray.output import compact as compaction
from capray.output.compact import MARKER, compact
from capray.storage import exists, iter_files, write_atomic
from capray.tables import captions_schema, encode_parquet
from tests.test_plan import write_captions, write_failures

JOB = {"schema_version": 1, "model_id": "m", "precision": "fp32", "decoding": {"beam_size": 3}}


def write_output(uri: str, num_parts: int = 4) -> Output:
    """Ids dealt to parts, out of order, and a log of failures."""
    output = Output(uri)
    for number in range(num_parts):
        ids = [f"/photos/ä{(i * 7 + number) % 25:02d}-{number}.jpg" for i in range(25)]
        write_captions(output, ids, number=number, caption=f"é {number}")
    write_failures(output, [("lost", "denied"), ("bad", "truncated")], number=0)
    write_failures(output, [("lost", "missing"), ("/photos/ä00-0.jpg", "denied")], number=1)
    write_atomic(output.runs.join("run-1.json"), b'{"status": "complete"}')
    write_atomic(output.job, json.dumps(JOB).encode())
    return output


def rows_of(output: Output, folder: str) -> list[dict]:
    """All rows of the parts, in the order of the parts."""
    files = output.parts(getattr(output, folder))
    return [row for file in files for row in pq.read_table(file.path, filesystem=file.fs).to_pylist()]


def unordered(rows: list[dict]) -> list[str]:
    return sorted(map(repr, rows))


def names_in(folder: Path) -> list[str]:
    return [os.path.relpath(entry.path, folder) for entry in iter_files(Output(str(folder)).root)]


def check_copy(old: Output, new: Output) -> None:
    assert unordered(rows_of(new, "captions")) == unordered(rows_of(old, "captions"))
    assert unordered(rows_of(new, "failures")) == unordered(rows_of(old, "failures"))
    ids = [row["image_id"] for row in rows_of(new, "captions")]
    assert ids == sorted(ids, key=str.encode)
    order = [(row["image_id"], row["failed_at"]) for row in rows_of(new, "failures")]
    assert order == sorted(order)
    assert new.read_job() == old.read_job()
    schema = pq.read_schema(old.parts(old.captions)[0].path, filesystem=old.root.fs)
    for file in new.parts(new.captions):
        assert pq.read_schema(file.path, filesystem=file.fs).equals(schema, check_metadata=True)


def test_the_copy_holds_the_same_rows_sorted_in_larger_parts(tmp_path: Path) -> None:
    old = write_output(str(tmp_path / "old"))
    result = compact(CompactConfig(output=str(tmp_path / "old"), new=str(tmp_path / "new"), part_rows=60))
    new = require_output(str(tmp_path / "new"))
    check_copy(old, new)
    assert (result.captions, result.failures, result.parts_before, result.parts) == (100, 4, 6, 3)
    assert [len(pq.read_table(file.path)) for file in new.parts(new.captions)] == [60, 40]
    assert (tmp_path / "new/_capray/runs/run-1.json").read_bytes() == b'{"status": "complete"}'
    assert not exists(new.private.join(MARKER))
    assert "100 captions and 4 rows of the failure log: 6 parts" in result.text()


def test_optional_columns_are_copied_too(tmp_path: Path) -> None:
    old = Output(str(tmp_path / "old"))
    kept = pa.struct(
        [("n", pa.int64()), ("tags", pa.list_(pa.field("element", pa.string()))), ("kind", pa.dictionary("int32", "utf8"))]
    )
    write_captions(old, ["b", "a", "c"])
    (part,) = old.parts(old.captions)
    table = pq.read_table(part.path)
    extra = {
        "source": [{"n": 1, "tags": None, "kind": "x"}, None, {"n": None, "tags": [None], "kind": None}],
        "tokens": [["x"], [], ["y", "z"]],
        "attention": [[[0.1, 0.9]], [], [[0.5, 0.5], [0.0, 1.0]]],
    }
    schema = captions_schema(kept, attention=True)
    columns = {name: table[name] if name in table.column_names else extra[name] for name in schema.names}
    table = pa.table([pa.array(v, f.type) if isinstance(v, list) else v for f, v in zip(schema, columns.values())], schema)
    write_atomic(part, encode_parquet(table))
    write_atomic(old.job, json.dumps(JOB).encode())
    compact(CompactConfig(output=str(tmp_path / "old"), new=str(tmp_path / "new")))
    new = require_output(str(tmp_path / "new"))
    check_copy(old, new)
    (copied,) = new.parts(new.captions)
    assert pq.read_table(copied.path).equals(table.sort_by("image_id"))


def test_null_lists_are_not_taken_for_empty_ones(tmp_path: Path) -> None:
    kept = pa.struct([("tags", pa.list_(pa.field("element", pa.string())))])
    digests = []
    for number, value in enumerate([None, {"tags": None}, {"tags": []}, {"tags": [None]}, {"tags": ["NULL"]}]):
        output = Output(str(tmp_path / str(number)))
        write_captions(output, ["a"])
        (part,) = output.parts(output.captions)
        schema = captions_schema(kept)
        table = pq.read_table(part.path)
        table = pa.table([*table.columns, pa.array([value], kept)], schema=schema)
        write_atomic(part, encode_parquet(table))
        with output.connect() as connection:
            digests.append(compaction._digest(connection, "captions", schema))
    assert len(set(digests)) == len(digests)


def test_an_output_without_a_row_is_copied(tmp_path: Path) -> None:
    old = Output(str(tmp_path / "old"))
    write_atomic(old.job, json.dumps(JOB).encode())
    result = compact(CompactConfig(output=str(tmp_path / "old"), new=str(tmp_path / "new")))
    assert result.parts == 0
    assert require_output(str(tmp_path / "new")).read_job() == JOB


def test_a_part_is_cut_by_its_bytes_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = write_output(str(tmp_path / "old"))
    monkeypatch.setattr(compaction, "MAX_PART_BYTES", 1)
    monkeypatch.setattr(compaction, "_BATCH_ROWS", 30)
    compact(CompactConfig(output=str(tmp_path / "old"), new=str(tmp_path / "new")))
    new = require_output(str(tmp_path / "new"))
    check_copy(old, new)
    assert len(new.parts(new.captions)) > 1


class Killed(BaseException):
    pass


@pytest.mark.parametrize("before", [True, False])
def test_whatever_write_it_dies_at_the_copy_is_whole_or_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: bool
) -> None:
    old = write_output(str(tmp_path / "old"))
    config = CompactConfig(output=str(tmp_path / "old"), new=str(tmp_path / "new"), part_rows=60)
    new = Output(config.new)
    written: list[str] = []
    dies_at = 0

    def write(location, data, scratch=None):
        written.append(location.uri)
        if len(written) == dies_at and before:
            # What a write that is killed leaves behind.
            os.makedirs(scratch.path, exist_ok=True)
            Path(scratch.path, f".{os.path.basename(location.path)}.0123456789abcdef").write_bytes(data[:10])
            raise Killed
        write_atomic(location, data, scratch)
        if len(written) == dies_at:
            raise Killed

    monkeypatch.setattr(compaction, "write_atomic", write)
    while True:
        dies_at += 1
        written.clear()
        try:
            compact(config)
            break
        except Killed:
            if exists(new.job):
                assert not before and written[-1] == new.job.uri
                check_copy(old, require_output(config.new))
                break
            with pytest.raises(ConfigError, match="no captioning output"):
                require_output(config.new)
    # The marker, two parts of captions, one of failures, a run, and job.json at the end.
    assert dies_at == (7 if before else 6)
    assert written[-1] == new.job.uri
    check_copy(old, require_output(config.new))
    assert len([name for name in names_in(tmp_path / "new") if name.endswith(".parquet")]) == 3


def test_a_copy_that_lost_rows_is_no_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_output(str(tmp_path / "old"))

    def write(location, data, scratch=None):
        if "captions" in location.path:
            data = encode_parquet(pq.read_table(pa.BufferReader(data)).slice(1))
        write_atomic(location, data, scratch)

    monkeypatch.setattr(compaction, "write_atomic", write)
    with pytest.raises(StorageError, match="does not hold the rows"):
        compact(CompactConfig(output=str(tmp_path / "old"), new=str(tmp_path / "new")))
    assert not exists(Output(str(tmp_path / "new")).job)


def test_an_output_that_changed_meanwhile_is_not_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = write_output(str(tmp_path / "old"))

    def write(location, data, scratch=None):
        write_atomic(location, data, scratch)
        write_captions(old, ["late"], run="run-2")

    monkeypatch.setattr(compaction, "write_atomic", write)
    with pytest.raises(ConfigError, match="has changed"):
        compact(CompactConfig(output=str(tmp_path / "old"), new=str(tmp_path / "new")))
    assert not exists(Output(str(tmp_path / "new")).job)


@pytest.mark.parametrize("new", ["old", "old/", "old/captions/new", ".", "link", "old/../old"])
def test_in_place_is_refused_with_the_reason(tmp_path: Path, new: str) -> None:
    write_output(str(tmp_path / "old"))
    (tmp_path / "link").symlink_to(tmp_path / "old")
    before = names_in(tmp_path / "old")
    with pytest.raises(ConfigError, match="in place: readers would see"):
        compact(CompactConfig(output=str(tmp_path / "old"), new=os.path.join(tmp_path, new)))
    assert names_in(tmp_path / "old") == before


def _lease(tmp_path: Path) -> None:
    (tmp_path / "old/_capray/lease.json").write_text("{}")


def _doubled(tmp_path: Path) -> None:
    write_captions(Output(str(tmp_path / "old")), ["/photos/ä03-0.jpg"], number=9)


def _other_schema(tmp_path: Path) -> None:
    file = tmp_path / "old/captions/part-run-1-00002.parquet"
    pq.write_table(pq.read_table(file).drop_columns("uri"), file)


def _truncated(tmp_path: Path) -> None:
    file = tmp_path / "old/captions/part-run-1-00002.parquet"
    file.write_bytes(file.read_bytes()[:-20])


def _spoilt(tmp_path: Path) -> None:
    file = tmp_path / "old/captions/part-run-1-00002.parquet"
    data = file.read_bytes()
    file.write_bytes(data[:4] + bytes(len(data) // 2) + data[4 + len(data) // 2 :])


def _no_output(tmp_path: Path) -> None:
    (tmp_path / "old/_capray/job.json").unlink()


def _full(tmp_path: Path) -> None:
    (tmp_path / "new").mkdir()
    (tmp_path / "new/precious.txt").write_text("x")


def _an_output(tmp_path: Path) -> None:
    write_output(str(tmp_path / "new"))


def _a_file(tmp_path: Path) -> None:
    (tmp_path / "new").write_text("x")


def _copy_of_another(tmp_path: Path) -> None:
    (tmp_path / "new/_capray").mkdir(parents=True)
    mark = {"output": "/other", "run_id": "r", "runs": []}
    (tmp_path / "new/_capray" / MARKER).write_text(json.dumps(mark))


def _a_stranger_in_the_copy(tmp_path: Path) -> None:
    (tmp_path / "new/_capray").mkdir(parents=True)
    mark = {"output": os.path.realpath(tmp_path / "old"), "run_id": "r", "runs": []}
    (tmp_path / "new/_capray" / MARKER).write_text(json.dumps(mark))
    write_captions(Output(str(tmp_path / "new")), ["precious"], run="other")


@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        (_lease, ConfigError, "a run is writing .*wait for it to end"),
        (_doubled, ConfigError, "1 caption .*capray caption again removes"),
        (_other_schema, ConfigError, "part-run-1-00002.parquet' has another schema"),
        (_truncated, DataError, "part-run-1-00002.parquet' is damaged.*delete it"),
        (_spoilt, CaprayError, "part-run-1-00002|damaged"),
        (_no_output, ConfigError, "no captioning output"),
        (_full, OutputConflictError, "holds 'precious.txt'"),
        (_an_output, OutputConflictError, "captioning output already"),
        (_a_file, OutputConflictError, "is a file"),
        (_copy_of_another, OutputConflictError, "copy of '/other'"),
        (_a_stranger_in_the_copy, OutputConflictError, "part-other-00000"),
    ],
)
def test_refusals_change_nothing(tmp_path: Path, spoil, error: type[CaprayError], message: str) -> None:
    write_output(str(tmp_path / "old"))
    spoil(tmp_path)
    before = names_in(tmp_path)
    with pytest.raises(error, match=message):
        compact(CompactConfig(output=str(tmp_path / "old"), new=str(tmp_path / "new")))
    assert names_in(tmp_path) == before


def test_on_s3(s3: str) -> None:
    old = write_output(f"{s3}/compaction/old")
    config = CompactConfig(output=f"{s3}/compaction/old/", new=f"{s3}/compaction/new", part_rows=60)
    compact(config)
    check_copy(old, require_output(config.new))
    with pytest.raises(ConfigError, match="in place"):
        compact(CompactConfig(output=config.output, new=f"{s3}/compaction/old/copy"))
    with pytest.raises(OutputConflictError, match="already"):
        compact(config)
