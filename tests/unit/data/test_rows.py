"""All data formats give the same rows, and errors say where the problem is and how to fix it."""

from __future__ import annotations

import io
import os
import tracemalloc
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.tables import TABLE, Write, error_of, jsonl, table_as, values
from yeonma.data.library_sets import hub_error
from yeonma.data.rows import draw_validation, glance, open_rows
from yeonma.errors import UserError

# Formats

FORMATS = [
    *("jsonl", "ndjson", "json", "csv", "tsv", "parquet", "arrow", "xlsx"),
    *("jsonl.gz", "json.gz", "csv.gz", "jsonl.zst", "tsv.zst"),
]


@pytest.mark.parametrize("kind", FORMATS)
def test_every_file_format_gives_the_same_rows_on_every_read(write: Write, kind: str) -> None:
    rows = open_rows(write(f"a.{kind}", table_as(kind, TABLE)))
    assert values(rows) == values(rows) == TABLE
    assert [row.number for row in rows] == [1, 2, 3]
    assert rows.columns == ("document", "title")


def test_row_place_is_the_line_on_which_the_row_begins(write: Write) -> None:
    path = write("a.jsonl", "\n" + jsonl(TABLE[:1]) + "  \r\n" + jsonl(TABLE[1:]))
    assert [row.place for row in open_rows(path)] == [f"{path}:{line}" for line in (2, 4, 5)]
    path = write("a.csv", 'document,title\r\n"one\r\ntwo\r\n",a\r\n\r\nthree,b\r\n')
    assert [row.place for row in open_rows(path)] == [f"{path}:2", f"{path}:6"]
    path = write("a.json", '[\n  {"a": 1},\n\n  {"a":\n 2}, {"a": 3}\n]\n')
    assert [row.place for row in open_rows(path)] == [f"{path}:2", f"{path}:4", f"{path}:5"]
    path = write("a.parquet", table_as("parquet", TABLE))
    assert [row.place for row in open_rows(path)] == [f"{path} row {row}" for row in (1, 2, 3)]


def test_columns_are_the_union_in_order_of_appearance(write: Write) -> None:
    path = write("a.jsonl", '{"b": 1}\n{"a": 1, "b": 2}\n{"c": null}\n')
    assert open_rows(path).columns == ("b", "a", "c")


def test_empty_csv_cells_are_empty_text_and_unnamed_columns_are_skipped(write: Write) -> None:
    rows = open_rows(write("a.csv", ",document,title\n0,,x\n1, ,\n"))
    assert values(rows) == [{"document": "", "title": "x"}, {"document": " ", "title": ""}]
    assert rows.columns == ("document", "title")


def test_numbers_and_nested_values_are_read_unchanged(write: Write) -> None:
    row = {"id": 7, "score": 0.5, "tags": ["a", None], "messages": [{"role": "user", "content": "q"}]}
    for kind in ("jsonl", "json", "parquet"):
        assert values(open_rows(write(f"a.{kind}", table_as(kind, [row])))) == [row]


def test_folder_is_read_file_by_file_with_continuous_row_numbers(write: Write, tmp_path: Path) -> None:
    write("data/b.jsonl", jsonl(TABLE[1:]))
    write("data/a.jsonl", jsonl([{"id": 1, **TABLE[0]}]))
    write("data/README.md", "no data")
    write("data/.hidden.csv", "no data")
    write("data/dataset_info.json", "{}")
    folder = str(tmp_path / "data")
    rows = list(open_rows(folder + "/"))
    assert [(row.number, row.place) for row in rows] == [
        (1, f"{folder}/a.jsonl:1"),
        (2, f"{folder}/b.jsonl:1"),
        (3, f"{folder}/b.jsonl:2"),
    ]
    assert open_rows(folder).columns == ("id", "document", "title")


def test_a_glance_gives_the_same_rows_without_an_identity(write: Write, tmp_path: Path) -> None:
    for kind in ("jsonl", "csv", "parquet"):
        whole = open_rows(path := write(f"a.{kind}", table_as(kind, TABLE)))
        glanced = glance(path)
        assert glanced is not None
        assert (list(glanced), glanced.columns, glanced.identity) == (list(whole), whole.columns, "")
    datasets.Dataset.from_list(TABLE).save_to_disk(str(tmp_path / "saved"))
    assert glance(str(tmp_path / "saved")) is None


def test_an_unreadable_row_is_reported_when_it_is_reached(write: Write) -> None:
    rows = open_rows(write("a.jsonl", jsonl(TABLE) + '{"document": NaN}\n'))
    assert rows.columns == ("document", "title")
    read = iter(rows)
    assert [next(read).values for _ in TABLE] == TABLE
    with pytest.raises(UserError, match="NaN is not JSON"):
        next(read)


def test_a_saved_data_set_gives_its_rows_and_split(tmp_path: Path) -> None:
    one = datasets.Dataset.from_list(TABLE)
    one.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict(train=one, test=one.select([2])).save_to_disk(str(tmp_path / "two"))
    assert values(open_rows(str(tmp_path / "one"))) == TABLE
    assert values(open_rows(str(tmp_path / "two"))) == TABLE
    test = open_rows(str(tmp_path / "two"), split="test")
    assert [(row.number, row.place) for row in test] == [(1, f"{tmp_path / 'two'} row 1")]
    assert (
        test.identity
        != open_rows(str(tmp_path / "two")).identity
        == open_rows(str(tmp_path / "one")).identity
    )
    assert error_of(str(tmp_path / "two"), split="tests") == (
        'two: no split "tests"; it has train, test; did you mean "test"?'
    )
    arrow = next((tmp_path / "one").glob("*.arrow"))
    arrow.write_bytes(arrow.read_bytes()[:200])
    assert "cannot be read" in error_of(str(tmp_path / "one"))


def test_identity_depends_on_content_encoding_and_format_but_not_on_the_name(write: Write) -> None:
    first = open_rows(write("a.jsonl", jsonl(TABLE))).identity
    assert len(first) == 64
    assert open_rows(write("b.jsonl", jsonl(TABLE)), encoding="UTF8").identity == first
    others = {
        open_rows(write("a.jsonl", jsonl(TABLE) + "\n")).identity,
        open_rows(write("ascii.jsonl", jsonl(TABLE, ascii_only=True))).identity,
        open_rows(write("ascii.jsonl", jsonl(TABLE, ascii_only=True)), encoding="cp949").identity,
        open_rows(write("a.json", table_as("json", TABLE))).identity,
        open_rows(write("a.csv", "a\tb\n1\t2\n")).identity,
        open_rows(write("a.tsv", "a\tb\n1\t2\n")).identity,
    }
    assert len(others | {first}) == 7


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "parquet", "arrow", "jsonl.gz", "csv.zst"])
def test_memory_does_not_grow_with_the_number_of_rows(write: Write, kind: str) -> None:
    peaks = []
    for count in (2_000, 16_000):
        table = [{"document": f"row {number} " * 20, "title": "t"} for number in range(count)]
        path = write(f"{count}.{kind}", table_as(kind, table))
        del table
        rows = open_rows(path)
        tracemalloc.start()
        assert sum(1 for _ in rows) == count
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < peaks[0] + 1_000_000


# Paths


def test_a_missing_file_is_an_error_with_a_suggestion(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write("train.jsonl", jsonl(TABLE))
    monkeypatch.chdir(tmp_path)
    assert error_of(str(tmp_path / "trian.jsonl")) == (
        'trian.jsonl: no such file or folder; did you mean "train.jsonl"?'
    )
    for name in (
        "./data",
        "../data",
        "a/b/c",
        "no.csv",
        "no.csv:part",
        "s3://bucket/rows.jsonl",
        "/nowhere/at/all",
        "~/nothing-there",
        "two words",
        "자료",
    ):
        assert "no such file or folder" in error_of(name)


def test_path_that_is_not_a_data_file_is_an_error(write: Write, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jsonl")
    assert error_of(str(tmp_path / "pipe.jsonl")).startswith("pipe.jsonl: not a regular file")
    assert error_of(write("a.xls", "x")) == "a.xls: .xls files cannot be read; save it as .xlsx"
    assert error_of(write("a.tar.gz", "x")).startswith("a.tar.gz: .gz files cannot be read; unpack it")
    assert error_of(write("a.parquet.gz", "x")).startswith("a.parquet.gz: .gz files cannot be read")
    assert error_of(write("a.csv", "a\n1\n") + ":b").startswith(
        'a.csv: a .csv file has no part "b"; only a key'
    )
    assert error_of(write("a.parquet", "PAR1 no")).startswith("a.parquet: not a readable Parquet file")
    assert "cannot be opened" in error_of(write("a.jsonl", jsonl(TABLE)) + "/b.jsonl")
    assert error_of(" ").startswith("--data_path: no data given")


def test_a_folder_without_usable_data_is_an_error(write: Write, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert error_of(str(tmp_path / "empty")).startswith("empty: a folder without data files")
    write("mixed/a.csv", "a\n1\n")
    write("mixed/b.jsonl", jsonl(TABLE))
    assert error_of(str(tmp_path / "mixed")).startswith("mixed: files of several formats: .csv, .jsonl")
    write("split/train-0.jsonl", jsonl(TABLE))
    write("split/test.jsonl", jsonl(TABLE))
    assert error_of(str(tmp_path / "split"), split="dev").startswith(
        'split: no split "dev"; it has test, train'
    )
    assert "give the folder inside it: mixed, split" in error_of(str(tmp_path))


def test_data_set_with_its_own_python_code_is_an_error(write: Write, tmp_path: Path) -> None:
    script = write("news/news.py", "raise SystemExit('ran')")
    write("news/train.jsonl", jsonl(TABLE))
    write("other/load.py", "raise SystemExit('ran')")
    for path in (str(tmp_path / "news"), str(tmp_path / "other"), script):
        assert "the data set needs its own Python code" in error_of(path)
    text = "Dataset scripts are no longer supported, but found news.py"
    assert str(hub_error("a/news", RuntimeError(text))).startswith(
        "a/news: the data set needs its own Python code (news.py), which Yeonma never runs; give its data files"
    )


def test_a_parquet_file_without_rows_is_an_error(write: Write) -> None:
    pq.write_table(pa.table({"a": pa.array([], pa.string())}), (path := write("a.parquet", "")))
    assert error_of(path).startswith("a.parquet: no rows")


def test_parquet_with_duplicate_columns_or_invalid_utf8_is_an_error(write: Write) -> None:
    pq.write_table(pa.table([["x"], ["y"]], names=["a", "a"]), (path := write("a.parquet", "")))
    assert error_of(path).startswith('a.parquet: two columns are named "a"')
    text = pa.Array.from_buffers(
        pa.string(), 1, [None, pa.py_buffer(b"\0\0\0\0\2\0\0\0"), pa.py_buffer(b"\xff\xff")]
    )
    pq.write_table(pa.table({"a": text}), path)
    assert error_of(path).startswith('a.parquet rows 1-1: text that is not UTF-8 in column "a"')


@pytest.mark.parametrize(
    "column",
    [
        pa.array([2**31 - 1], pa.int32()).cast(pa.date32()),  # a date after the year 9999
        pa.array([2**62], pa.int64()).cast(pa.duration("s")),
        pa.array([1], pa.int64()).cast(pa.timestamp("us", tz="Nowhere/City")),
        pa.StructArray.from_arrays([pa.array([1]), pa.array([2])], names=["x", "x"]),
    ],
)
def test_parquet_values_that_python_cannot_represent_are_an_error(write: Write, column: pa.Array) -> None:
    pq.write_table(pa.table({"a": ["x"], "b": column}), (path := write("a.parquet", "")))
    assert error_of(path).startswith('a.parquet rows 1-1: unreadable values in column "b" (')


def test_parquet_with_a_wrong_row_count_in_its_footer_is_an_error(write: Write) -> None:
    content = table_as("parquet", TABLE[:2])
    # Thrift's encoding of the number 2, which is the row count in the footer
    positions = [at for at in range(len(content)) if content.startswith(b"\x16\x04", at)]
    damaged = (content[:at] + b"\x16\x06" + content[at + 2 :] for at in positions)
    miscounted = [
        content for content in damaged if pq.ParquetFile(io.BytesIO(content)).metadata.num_rows == 3
    ]
    assert len(miscounted) == 1
    message = error_of(write("a.parquet", miscounted[0]))
    assert message == "a.parquet: only 2 of the 3 rows in its metadata can be read; write the file again"


def test_hub_exceptions_become_user_errors_with_a_fix() -> None:
    for error, expected in [
        (datasets.exceptions.DatasetNotFoundError("Dataset 'a/b' doesn't exist"), "check the name"),
        (ValueError("Unknown split \"x\". Should be one of ['train']."), "--data_split"),
        (
            ValueError("Config name is missing.\nPlease pick one among ['ko']"),
            "['ko']; choose one with --data_path name:config",
        ),
        (ConnectionError("Couldn't reach the Hub"), "check the connection"),
        (
            datasets.exceptions.DatasetGenerationError("An error occurred"),
            "cannot be loaded: An error occurred",
        ),
    ]:
        message = str(hub_error("a/b", error))
        assert message.startswith("a/b: ")
        assert expected in message
        assert "\n" not in message
    assert hub_error("a/b", RuntimeError("a bug")) is None


def test_unreachable_hub_is_an_error_with_a_fix() -> None:
    message = error_of("nobody/nothing:small", revision="v1")
    assert message.startswith("nobody/nothing:small: no such file or folder, and the hub cannot be reached (")
    assert "; give a path of this machine" in message


def test_name_of_a_file_format_is_not_looked_up_on_the_hub() -> None:
    assert error_of("json").startswith("json: no such file or folder")


# Validation rows


@pytest.mark.parametrize(
    ("size", "drawn"), [(0, 0), (1, 1), (30, 30), (0.25, 25), (0.001, 1), (0.994, 99), (99, 99)]
)
def test_validation_split_contains_every_row_exactly_once(size: float, drawn: int) -> None:
    train, validation = draw_validation(100, size, seed=42)
    assert len(validation) == drawn
    assert sorted([*train, *validation]) == list(range(100))
    assert (np.diff(train) > 0).all()
    assert (np.diff(validation) > 0).all()


def test_validation_split_is_deterministic_and_uniform_over_seeds() -> None:
    assert (
        draw_validation(20, 4, 42)[1].tolist() == draw_validation(20, 0.2, 42)[1].tolist() == [4, 8, 15, 17]
    )
    assert draw_validation(20, 4, 43)[1].tolist() != draw_validation(20, 4, 42)[1].tolist()
    counts = np.zeros(10)
    for seed in range(1000):
        counts[draw_validation(10, 3, seed)[1]] += 1
    assert np.abs(counts - 300).max() < 75  # five standard deviations


@pytest.mark.parametrize("size", [-1, 1.5, float("nan"), float("inf"), 10, 11, 0.96])
def test_invalid_validation_size_is_an_error(size: float) -> None:
    with pytest.raises(UserError, match=r"--val_set_size: "):
        draw_validation(10, size, 0)
