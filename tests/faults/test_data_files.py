"""Faults of files that people bring, by their numbers in the list of faults, through complete runs."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import datasets
import pyarrow as pa
import pytest

from tests.faults.conftest import Accepted, Refused, Write
from tests.tables import arrow_bytes, jsonl, table_as, workbook

ROWS = [{"document": "a b", "title": "t"}, {"document": "c; d", "title": "u"}]
TEMPLATE = "{document}\n{title}"
TEXTS = [("a b\n", "t<|endoftext|>"), ("c; d\n", "u<|endoftext|>")]
CSV = 'document;title\n"a b";t\n"c; d";u\n'

FILES: dict[str, tuple[str, Callable[[], str | bytes]]] = {
    "Excel": ("a.xlsx", lambda: workbook({"Sheet1": [["document", "title"], ["a b", "t"], ["c; d", "u"]]})),
    "semicolons": ("a.csv", lambda: CSV),
    "a sep= line": ("a.csv", lambda: f"\ufeffsep=;\r\n{CSV}"),
    "empty columns and rows": ("a.csv", lambda: "document,title,,\na b,t,,\n,,,\nc; d,u,,\n"),
    "blanks in the header": ("a.csv", lambda: " document ,title \na b,t\nc; d,u\n"),
    ".gz": ("a.jsonl.gz", lambda: gzip.compress(jsonl(ROWS).encode())),
    ".zst": ("a.csv.zst", lambda: table_as("csv.zst", ROWS)),
    ".ndjson": ("a.ndjson", lambda: jsonl(ROWS)),
    "lines in .json": ("a.json", lambda: jsonl(ROWS)),
    "objects over lines": ("a.jsonl", lambda: "\n".join(json.dumps(row, indent=1) for row in ROWS)),
}


@pytest.mark.parametrize("name", FILES)
def test_fault_104_files_of_other_programs_are_read(write: Write, accepted: Accepted, name: str) -> None:
    file, content = FILES[name]
    assert accepted(write(file, content()), template=TEMPLATE).texts == TEXTS


def test_fault_104_capitals_in_the_header_get_a_suggestion(write: Write, refused: Refused) -> None:
    lines = refused(write("a.csv", "DOCUMENT,Title\nx,y\n"), template=TEMPLATE)
    assert [line.partition("; ")[2] for line in lines] == [
        'did you mean "DOCUMENT"?',
        'did you mean "Title"?',
    ]


@pytest.mark.parametrize("kind", ["parquet", "saved"])
def test_fault_119_class_labels_are_their_names(tmp_path: Path, accepted: Accepted, kind: str) -> None:
    features = {"document": datasets.Value("string"), "title": datasets.ClassLabel(names=["neg", "pos"])}
    table = datasets.Dataset.from_dict(
        {"document": ["good", "bad"], "title": [1, 0]}, features=datasets.Features(features)
    )
    path = tmp_path / f"a.{kind}"
    if kind == "saved":
        table.save_to_disk(str(path))
    else:
        table.to_parquet(str(path))
    assert accepted(path, template=TEMPLATE).texts == [
        ("good\n", "pos<|endoftext|>"),
        ("bad\n", "neg<|endoftext|>"),
    ]


SHAPES: dict[str, tuple[str, Callable[[], str | bytes]]] = {
    "an object around a list": ("a.json", lambda: json.dumps({"version": "1", "data": ROWS})),
    "columns of lists": ("a.json", lambda: json.dumps({"document": ["a b", "c; d"], "title": ["t", "u"]})),
    "an Arrow file": ("a.arrow", lambda: arrow_bytes(pa.Table.from_pylist(ROWS), pa.ipc.new_file)),
    "an Arrow stream": ("a.arrow", lambda: arrow_bytes(pa.Table.from_pylist(ROWS), pa.ipc.new_stream)),
}


@pytest.mark.parametrize("name", SHAPES)
def test_fault_120_other_shapes_are_read(write: Write, accepted: Accepted, name: str) -> None:
    file, content = SHAPES[name]
    assert accepted(write(file, content()), template=TEMPLATE).texts == TEXTS


def test_fault_120_the_cure_for_several_lists_works(
    write: Write, refused: Refused, accepted: Accepted
) -> None:
    data = write("a.json", json.dumps({"train": ROWS, "test": ROWS[:1]}))
    (line,) = refused(data, template=TEMPLATE)
    assert (
        line
        == 'a.json: several keys hold lists of objects: "train", "test"; name the one to read: a.json:train'
    )
    assert accepted(Path(f"{data}:train"), template=TEMPLATE).texts == TEXTS


def test_fault_120_a_clone_from_the_hub_is_read_by_its_splits(
    write: Write, tmp_path: Path, refused: Refused, accepted: Accepted
) -> None:
    configs = "".join(
        f"- config_name: {name}\n  data_files:\n  - split: train\n    path: {name}/*.jsonl\n" for name in "ab"
    )
    write("set/README.md", f"---\nconfigs:\n{configs}---\n")
    write("set/a/one.jsonl", jsonl(ROWS))
    write("set/b/one.jsonl", jsonl(ROWS[:1]))
    assert refused(tmp_path / "set", template=TEMPLATE) == ["set: several configs: a, b; name one: set:a"]
    assert accepted(tmp_path / "set:a", template=TEMPLATE).texts == TEXTS
    assert refused(tmp_path / "set:a", data_split="test", template=TEMPLATE) == [
        'set: no split "test"; it has train; choose one with --data_split'
    ]
