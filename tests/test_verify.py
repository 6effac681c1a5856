"""Each way an output can break the promise is caught and named; a whole one has no problems."""

import hashlib
import json
import os
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from capray.config import CompactConfig, VerifyConfig
from capray.errors import ConfigError
from capray.output import Output
from capray.output import verify as verification
from capray.output.compact import compact
from capray.output.verify import Verification, verify
from capray.storage import write_atomic
from capray.tables import CAPTIONS, FAILURES, encode_parquet
from tests.conftest import write_tar
from tests.test_plan import START, write_captions, write_failures

JOB = {"schema_version": 1, "model_id": "m", "precision": "fp32", "decoding": {"beam_size": 3}, "shard": None}
PART = "captions/part-run-1-00001.parquet"


def write_job(output: Output, **changes) -> None:
    write_atomic(output.job, json.dumps(JOB | changes).encode())


def photos(folder: Path, count: int = 12) -> list[str]:
    """Files that differ, to be listed as images; their paths."""
    folder.mkdir(parents=True)
    paths = [folder / f"{i:03d}.jpg" for i in range(count)]
    for path in paths:
        path.write_bytes(b"\xff\xd8\xff" + path.name.encode())
    return [str(path) for path in paths]


def add_captions(output: Output, paths: list[str], number: int, digests: list[bytes] | None = None) -> None:
    """A part of captions with the digests of what lies at the paths."""
    write_captions(output, paths, number=number)
    file = output.captions.join(f"part-run-1-{number:05d}.parquet")
    table = pq.read_table(file.path, filesystem=file.fs)
    digests = digests or [hashlib.sha256(Path(path).read_bytes()).digest() for path in paths]
    columns = {name: table[name] for name in CAPTIONS.names}
    columns |= {"uri": pa.array(paths), "sha256": pa.array(digests, pa.binary(32))}
    write_atomic(file, encode_parquet(pa.table(columns, schema=CAPTIONS)))


def write_output(folder: Path, paths: list[str], **job) -> Output:
    """Three parts of captions, the last two paths failed."""
    output = Output(str(folder))
    for number in range(3):
        add_captions(output, paths[:-2][number::3], number)
    write_failures(output, [(path, "not_an_image") for path in paths[-2:]])
    write_job(output, **job)
    return output


@pytest.fixture
def out(tmp_path: Path) -> Path:
    write_output(tmp_path / "out", photos(tmp_path / "photos"))
    return tmp_path / "out"


def run(out: Path, *others: Path, against: bool = True, check_bytes: int = 0, **settings) -> Verification:
    return verify(
        VerifyConfig(
            output=str(out),
            also=tuple(map(str, others)),
            against=(str(out.parent / "photos"),) if against else (),
            check_bytes=check_bytes,
            **settings,
        )
    )


def rewrite(file: Path, **columns) -> None:
    table = pq.read_table(file)
    for name, value in columns.items():
        table = table.set_column(table.column_names.index(name), table.schema.field(name), value)
    pq.write_table(table, file)


def test_a_whole_output_has_no_problems(out: Path) -> None:
    result = run(out, check_bytes=100)
    assert result.problems == result.notes == result.not_checked == []
    assert result.counts == {
        "caption_rows": 10,
        "failure_rows": 2,
        "parts": 4,
        "ids_captioned_twice": 0,
        "ids_failed": 2,
        "ids_wanted": 12,
        "ids_missing": 0,
        "ids_not_in_source": 0,
        "rows_repeated_in_source": 0,
        "images_read_again": 10,
        "images_same": 10,
    }
    assert "no problems" in result.text()
    assert json.loads(result.json())["counts"] == result.counts
    assert result.peak_memory_bytes > 2**20


def test_a_compacted_copy_has_no_problems(out: Path) -> None:
    compact(CompactConfig(output=str(out), new=str(out.parent / "new")))
    result = run(out.parent / "new", check_bytes=100)
    assert result.problems == result.notes == []
    assert result.counts["parts"] == 2


def test_what_was_not_checked_is_said(out: Path) -> None:
    text = run(out, against=False).text()
    assert "not checked: that every image of the source" in text
    assert "not checked: the bytes" in text


def test_the_settings_choose_what_is_wanted(out: Path) -> None:
    (out / PART).unlink()
    assert run(out, include=("00[03]*",)).problems == []
    assert len(run(out, include=("001*",)).problems) == 1


def _dropped(out: Path) -> None:
    (out / PART).unlink()


def _doubled(out: Path) -> None:
    (out / "captions/part-run-2-00000.parquet").write_bytes((out / PART).read_bytes())


def _truncated(out: Path) -> None:
    (out / PART).write_bytes((out / PART).read_bytes()[:-30])


def _spoilt_page(out: Path) -> None:
    """Of a column that no query reads."""
    place = pq.read_metadata(out / PART).row_group(0).column(2)
    data = bytearray((out / PART).read_bytes())
    start = place.dictionary_page_offset or place.data_page_offset
    data[start : start + place.total_compressed_size] = bytes(place.total_compressed_size)
    (out / PART).write_bytes(data)


def _not_utf8(out: Path) -> None:
    table = pq.read_table(out / PART)
    values = [b"\xff\xfe"] * len(table)
    array = pa.array(values, pa.binary())
    spoilt = pa.StringArray.from_buffers(len(values), array.buffers()[1], array.buffers()[2])
    rewrite(out / PART, caption=spoilt)


def _another_schema(out: Path) -> None:
    table = pq.read_table(out / PART)
    pq.write_table(table.set_column(4, "score", table["score"].cast("float64")), out / PART)


def _another_version(out: Path) -> None:
    table = pq.read_table(out / PART)
    pq.write_table(table.replace_schema_metadata({"capray_schema_version": "7"}), out / PART)


def _without_column(out: Path) -> None:
    pq.write_table(pq.read_table(out / PART).drop_columns("sha256"), out / PART)


def _null(out: Path) -> None:
    table = pq.read_table(out / PART)
    fields = [field.with_nullable(True) for field in table.schema]
    table = table.cast(pa.schema(fields, table.schema.metadata))
    table = table.set_column(2, fields[2], pa.array([None, *table["caption"].to_pylist()[1:]]))
    pq.write_table(table, out / PART)


def _another_model(out: Path) -> None:
    count = pq.read_metadata(out / PART).num_rows
    rewrite(out / PART, model_id=pa.array(["m"] * (count - 1) + ["other"]))


def _unknown_kind(out: Path) -> None:
    write_failures(Output(str(out)), [("x", "bad_luck")], number=1)


def _changed_bytes(out: Path) -> None:
    (out.parent / "photos/004.jpg").write_bytes(b"other")


def _lost_image(out: Path) -> None:
    (out.parent / "photos/004.jpg").unlink()


def _kept_columns(out: Path) -> None:
    write_job(Output(str(out)), kept_columns={"n": "int64"})


def _job(out: Path) -> None:
    (out / "_capray/job.json").write_text("{")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_dropped, "3 ids of the source have neither a caption nor a failure: .*photos/001.jpg, .*004.jpg, .*007.jpg$"),
        (_doubled, "3 ids have more than one caption: .*001.jpg .*part-run-1-00001.parquet and .*part-run-2-00000.parquet"),
        (_truncated, "part-run-1-00001.parquet cannot be read"),
        (_spoilt_page, "part-run-1-00001.parquet cannot be read"),
        (_not_utf8, "part-run-1-00001.parquet cannot be read: .*UTF8"),
        (_another_schema, "part-run-1-00001.parquet has another schema than .*score: double"),
        (_another_version, "part-run-1-00001.parquet has another schema than .*metadata"),
        (_without_column, "part-run-1-00001.parquet has another schema than .*sha256 is missing"),
        (_null, "part-run-1-00001.parquet has 1 row without caption"),
        (_another_model, "1 caption of .* by model 'other', job.json names 'm': .*part-run-1-00001.parquet"),
        (_unknown_kind, "1 failure has an unknown error_type, 'bad_luck'"),
        (_changed_bytes, "the bytes of .*004.jpg .* are not those that were captioned"),
        (_lost_image, "the image of .*004.jpg cannot be read again: missing"),
        (_kept_columns, "carries the columns \\[\\], job.json says \\['n'\\]"),
        (_job, "job.json is damaged"),
    ],
)
def test_what_is_wrong_is_named(out: Path, spoil, message: str) -> None:
    spoil(out)
    result = run(out, check_bytes=100)
    assert any(re.search(message, problem) for problem in result.problems), result.problems
    assert f"problem: {result.problems[0]}" in result.text()
    assert "no problems" not in result.text()


def test_all_problems_are_collected(out: Path) -> None:
    _truncated(out)
    _changed_bytes(out)
    add_captions(Output(str(out)), [str(out.parent / "photos/000.jpg")], 7)
    problems = "\n".join(run(out, check_bytes=100).problems)
    assert "cannot be read" in problems
    assert "3 ids of the source" in problems
    assert "1 id has more than one caption" in problems


def test_a_part_without_the_needed_columns_does_not_end_it(out: Path) -> None:
    pq.write_table(pq.read_table(out / PART).drop_columns("image_id"), out / PART)
    result = run(out)
    assert any("image_id is missing" in problem for problem in result.problems)
    assert any("3 ids of the source" in problem for problem in result.problems)


def test_every_part_with_the_same_wrong_schema_is_wrong(out: Path) -> None:
    for file in (out / "captions").iterdir():
        pq.write_table(pq.read_table(file).drop_columns("width"), file)
    assert run(out).problems == ["captions have not the schema of captions (width is missing)"]


def test_examples_are_few(tmp_path: Path) -> None:
    paths = photos(tmp_path / "photos", 40)
    output = Output(str(tmp_path / "out"))
    add_captions(output, paths[:2], 0)
    write_job(output)
    (problem,) = run(tmp_path / "out").problems
    assert problem.startswith("38 ids") and problem.endswith(" …") and problem.count(".jpg") == verification.NUM_EXAMPLES


def shards(tmp_path: Path) -> tuple[Path, Path]:
    paths = photos(tmp_path / "photos", 20)
    write_output(tmp_path / "a", paths[:10], shard="1/2")
    write_output(tmp_path / "b", paths[10:], shard="2/2")
    return tmp_path / "a", tmp_path / "b"


def test_shards_are_verified_together(tmp_path: Path) -> None:
    first, second = shards(tmp_path)
    result = run(first, second)
    assert result.problems == result.notes == []
    assert result.counts["ids_wanted"] == 20
    alone = run(first)
    assert alone.notes == ["shards not among the outputs: 2/2"]
    assert len(alone.problems) == 1 and alone.problems[0].startswith("10 ids")


def test_shards_that_overlap_are_named(tmp_path: Path) -> None:
    first, second = shards(tmp_path)
    stray = str(tmp_path / "photos/000.jpg")
    add_captions(Output(str(second)), [stray], 7)
    (problem,) = run(first, second).problems
    assert problem == (
        f"1 id has more than one caption: {stray} ({first}/captions/part-run-1-00000.parquet and "
        f"{second}/captions/part-run-1-00007.parquet)"
    )


def test_an_id_that_failed_in_one_shard_and_is_captioned_in_another_is_a_note(tmp_path: Path) -> None:
    first, second = shards(tmp_path)
    write_failures(Output(str(second)), [(str(tmp_path / "photos/000.jpg"), "denied")], number=5)
    write_failures(Output(str(first)), [(str(tmp_path / "photos/001.jpg"), "denied")], number=5)
    result = run(first, second)
    assert result.problems == []
    assert result.notes == ["1 id failed in one output and captioned in another"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_id": "n"}, "model_id of .*b is 'n', of .*a 'm'"),
        ({"precision": "bf16"}, "precision of .*b is 'bf16', of .*a 'fp32'"),
        ({"decoding": {"beam_size": 5}}, "beam_size of .*b is 5, of .*a 3"),
    ],
)
def test_outputs_of_different_work_are_named(tmp_path: Path, change: dict, message: str) -> None:
    first, second = shards(tmp_path)
    write_job(Output(str(second)), shard="2/2", **change)
    assert any(re.search(message, problem) for problem in run(first, second).problems)


def test_an_output_is_named_once(out: Path) -> None:
    with pytest.raises(ConfigError, match="name it once"):
        run(out, out / "../out")


def test_no_output_is_a_mistake(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no captioning output"):
        verify(VerifyConfig(output=str(tmp_path)))


def test_what_is_no_fault_is_noted(out: Path) -> None:
    output = Output(str(out))
    write_atomic(output.private.join("lease.json"), b"{}")
    write_atomic(output.runs.join("run-1.json"), b'{"status": "failed"}')
    write_captions(output, ["elsewhere"], number=9)
    result = run(out)
    assert result.problems == []
    assert [note.rpartition(str(out))[2] or note for note in result.notes] == [
        " has a lease: a run is writing it, or was killed",
        " is failed, not complete",
        "1 id of the outputs not in the source",
    ]


def make_tar(path: Path, count: int) -> list[str]:
    """A tar of images and other members; the images' URIs."""
    members = {}
    for i in range(count):
        members |= {f"{i:03d}.jpg": b"\xff\xd8\xff" + str(i).encode(), f"{i:03d}.txt": b"words"}
    write_tar(path, members)
    return [f"{path}#{i:03d}.jpg" for i in range(count)]


def test_the_members_of_tars_are_wanted_and_read_again(tmp_path: Path) -> None:
    uris = make_tar(tmp_path / "photos/a.tar", 5)
    output = Output(str(tmp_path / "out"))
    digests = [hashlib.sha256(b"\xff\xd8\xff" + str(i).encode()).digest() for i in range(5)]
    add_captions(output, uris, 0, digests)
    write_job(output)
    result = run(tmp_path / "out", check_bytes=10)
    assert result.problems == []
    assert (result.counts["ids_wanted"], result.counts["images_same"]) == (5, 5)

    make_tar(tmp_path / "photos/a.tar", 4)
    digests[1] = b"\2" * 32
    add_captions(output, uris[1:], 0, digests[1:])
    problems = "\n".join(run(tmp_path / "out", check_bytes=10).problems)
    assert "1 id of the source" in problems and uris[0] in problems
    assert f"the image of {uris[4]} cannot be read again: it is not there" in problems
    assert f"the bytes of {uris[1]}" in problems


def test_ids_that_share_an_image_are_all_read_again(tmp_path: Path) -> None:
    """A list may give one image several ids; once only the first of them was compared, and the others never."""
    (uri,) = photos(tmp_path / "photos", 1)
    (member,) = make_tar(tmp_path / "tars/a.tar", 1)
    output = Output(str(tmp_path / "out"))
    of_file, of_member = Path(uri).read_bytes(), b"\xff\xd8\xff0"
    rows = [(uri, of_file), (uri, b"other"), (member, of_member), (member, b"another")]
    add_captions(output, [uri for uri, _ in rows], 0, [hashlib.sha256(data).digest() for _, data in rows])
    file = Path(output.captions.path) / "part-run-1-00000.parquet"
    rewrite(file, image_id=pa.array(["a", "b", "c", "d"]))
    write_job(output)
    result = run(tmp_path / "out", against=False, check_bytes=10)
    assert (result.counts["images_read_again"], result.counts["images_same"]) == (4, 2)
    assert sorted(problem[:14] for problem in result.problems) == ["the bytes of b", "the bytes of d"]


def test_a_source_that_cannot_be_read_is_a_problem(tmp_path: Path) -> None:
    uris = make_tar(tmp_path / "photos/a.tar", 2)
    (tmp_path / "photos/b.tar").write_bytes(b"no tar" * 1000)
    output = Output(str(tmp_path / "out"))
    add_captions(output, uris, 0, [b"\1" * 32] * 2)
    write_job(output)
    (problem,) = run(tmp_path / "out").problems
    assert "b.tar" in problem and "cannot be listed whole" in problem


def test_rows_of_tables_count(tmp_path: Path) -> None:
    os.makedirs(tmp_path / "photos")
    table = pa.table({"image_id": ["a", "b", "b", "c"], "image": [b"x"] * 4})
    pq.write_table(table, tmp_path / "photos/t.parquet")
    output = Output(str(tmp_path / "out"))
    add_captions(output, ["a", "b"], 0, [hashlib.sha256(b"x").digest(), b"\2" * 32])
    write_job(output)
    result = run(tmp_path / "out", check_bytes=5)
    missing, other = result.problems
    assert missing == "1 id of the source has neither a caption nor a failure: c"
    assert other.startswith("the bytes of b at")
    assert result.notes == ["1 row of the source with a repeated image id"]
    assert (result.counts["images_read_again"], result.counts["images_same"]) == (2, 1)


def test_on_s3(s3: str) -> None:
    output = Output(f"{s3}/verification/out")
    uris = [f"{s3}/verification/photos/{i}.jpg" for i in range(3)]
    for uri in uris:
        output.root.fs.pipe_file(uri, uri.encode())
    add_captions(output, uris, 0, [hashlib.sha256(uri.encode()).digest() for uri in uris])
    write_job(output)
    config = VerifyConfig(output=output.root.uri, against=(f"{s3}/verification/photos",), check_bytes=3)
    assert verify(config).problems == []
    part = output.captions.join("part-run-1-00000.parquet")
    part.fs.pipe_file(part.path, part.fs.cat_file(part.path)[:-9])
    problems = verify(config).problems
    assert "cannot be read" in problems[0] and problems[1].startswith("3 ids of the source")


def test_the_failures_of_a_table_have_its_schema(out: Path) -> None:
    file = out / "failures/part-run-1-00001.parquet"
    row = {"image_id": "x", "error_type": "denied", "message": "m", "run_id": "r", "failed_at": START}
    table = pa.Table.from_pylist([row], schema=FAILURES)
    pq.write_table(table.drop_columns("message"), file)
    assert any("part-run-1-00001" in problem and "message is missing" in problem for problem in run(out).problems)
