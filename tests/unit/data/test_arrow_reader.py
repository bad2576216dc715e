"""Parquet and Arrow files: both formats of Arrow IPC, places, damage."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pytest

from tests.tables import TABLE, Write, arrow_bytes, error_of, values
from yeonma.data.rows import open_rows

FORMATS = {"stream": pa.ipc.new_stream, "file": pa.ipc.new_file}


@pytest.mark.parametrize("form", list(FORMATS.values()), ids=list(FORMATS))
@pytest.mark.parametrize("batch_rows", [1, 1000, None])
def test_both_arrow_formats_give_the_same_rows(
    write: Write, form: Callable[..., Any], batch_rows: int | None
) -> None:
    table = [{"text": f"row {number}", "label": number} for number in range(1500)]
    path = write("a.arrow", arrow_bytes(pa.Table.from_pylist(table), form, batch_rows))
    rows = open_rows(path)
    assert values(rows) == values(rows) == table
    assert [row.place for row in rows][:2] == [f"{path} row 1", f"{path} row 2"]
    assert list(rows)[-1].place == f"{path} row 1500"


@pytest.mark.parametrize("form", list(FORMATS.values()), ids=list(FORMATS))
def test_damaged_and_empty_arrow_files_are_errors(write: Write, form: Callable[..., Any]) -> None:
    content = arrow_bytes(pa.Table.from_pylist(TABLE * 100), form, 100)
    for damaged in (content[:-300], content[:40], b"no arrow", b"ARROW1 and more of something else", b""):
        message = error_of(write("a.arrow", damaged))
        assert message.startswith("a.arrow: not a readable Arrow file: ")
        assert message.endswith("; write the file again")
    empty = arrow_bytes(pa.table({"a": pa.array([], pa.string())}), form)
    assert error_of(write("a.arrow", empty)).startswith("a.arrow: no rows")


def test_text_kept_once_in_a_dictionary_is_read_as_text(write: Write) -> None:
    column = pa.array(["neg", "pos", None, "pos"]).dictionary_encode()
    path = write("a.arrow", arrow_bytes(pa.table({"label": column}), pa.ipc.new_file))
    assert [row["label"] for row in values(open_rows(path))] == ["neg", "pos", None, "pos"]


# Class labels

FEATURES = datasets.Features(
    {
        "text": datasets.Value("string"),
        "label": datasets.ClassLabel(names=["neg", "pos"]),
        "tags": datasets.List(datasets.ClassLabel(names=["a", "b", "c"])),
        "source": {"kind": datasets.ClassLabel(names=["web", "book"]), "year": datasets.Value("int64")},
        "marks": [{"kind": datasets.ClassLabel(names=["x", "y"])}],
    }
)
NUMBERED = [
    {"text": "good", "label": 1, "tags": [0, 2], "source": {"kind": 1, "year": 1}, "marks": [{"kind": 1}]},
    {"text": "bad", "label": 0, "tags": [], "source": {"kind": 0, "year": 2}, "marks": []},
    {"text": "?", "label": None, "tags": None, "source": None, "marks": None},
]
NAMED = [
    {
        "text": "good",
        "label": "pos",
        "tags": ["a", "c"],
        "source": {"kind": "book", "year": 1},
        "marks": [{"kind": "y"}],
    },
    {"text": "bad", "label": "neg", "tags": [], "source": {"kind": "web", "year": 2}, "marks": []},
    {"text": "?", "label": None, "tags": None, "source": {"kind": None, "year": None}, "marks": None},
]


def labelled_files(folder: Path, table: datasets.Dataset) -> dict[str, str]:
    """The table as Parquet, as an Arrow stream, and as `save_to_disk` writes it."""
    paths = {kind: str(folder / f"a.{kind}") for kind in ("parquet", "arrow")}
    table.to_parquet(paths["parquet"])
    Path(paths["arrow"]).write_bytes(arrow_bytes(table.data.table, pa.ipc.new_stream))
    table.save_to_disk(str(folder / "saved"))
    return {**paths, "saved": str(folder / "saved")}


@pytest.mark.parametrize("kind", ["parquet", "arrow", "saved"])
def test_class_labels_are_their_names(tmp_path: Path, kind: str) -> None:
    path = labelled_files(tmp_path, datasets.Dataset.from_list(NUMBERED, features=FEATURES))[kind]
    rows = open_rows(path)
    read = values(rows)
    assert read[:2] == NAMED[:2]
    assert (read[2]["label"], read[2]["text"]) == (None, "?")
    note = f'{path}: class labels are read as their names: "label", "tags", "source", "marks"'
    assert rows.notes == (note,)


@pytest.mark.parametrize("kind", ["parquet", "arrow", "saved"])
@pytest.mark.parametrize("number", [-1, 2])
def test_a_class_label_without_a_name_is_an_error_with_its_place(
    tmp_path: Path, kind: str, number: int
) -> None:
    features = datasets.Features({"label": FEATURES["label"]})
    column = pa.table({"label": [0, 1, number]}).replace_schema_metadata(features.arrow_schema.metadata)
    table = datasets.Dataset(column)
    assert table.features == features
    message = error_of(labelled_files(tmp_path, table)[kind])
    why = "stands for a missing label" if number == -1 else "has no name; the names are neg, pos"
    assert f' row 3: column "label": the class label {number} {why}' in message


def with_metadata(features: object) -> bytes:
    table = pa.table({"label": [0, 1]})
    metadata = (
        features if isinstance(features, bytes) else json.dumps({"info": {"features": features}}).encode()
    )
    return arrow_bytes(table.replace_schema_metadata({b"huggingface": metadata}), pa.ipc.new_stream)


def test_lists_as_earlier_versions_described_them_are_known(write: Write) -> None:
    names = {"_type": "ClassLabel", "names": ["a", "b"]}
    table = pa.table({"old": [[0, 1]], "older": [[1]], "fields": [{"x": [1, 0], "y": [5]}]})
    features = {
        "old": {"_type": "Sequence", "feature": names},
        "older": [names],
        "fields": {"_type": "Sequence", "feature": {"x": names, "y": {"_type": "Value", "dtype": "int64"}}},
    }
    metadata = {b"huggingface": json.dumps({"info": {"features": features}})}
    path = write("a.arrow", arrow_bytes(table.replace_schema_metadata(metadata), pa.ipc.new_stream))
    assert values(open_rows(path)) == [
        {"old": ["a", "b"], "older": ["b"], "fields": {"x": ["b", "a"], "y": [5]}}
    ]


def test_class_labels_whose_names_are_missing_and_damaged_metadata_are_errors(write: Write) -> None:
    message = error_of(write("a.arrow", with_metadata({"label": {"_type": "ClassLabel"}})))
    assert message.startswith(
        'a.arrow row 1: column "label": the class label 0 has no name; the names are missing'
    )
    for damaged in (b"no json", b"[1]", {"label": {"_type": "Sequence"}}, b'{"info": 3}'):
        message = error_of(write("a.arrow", with_metadata(damaged)))
        assert message.startswith("a.arrow: damaged metadata of the library datasets (")
    for other in ({"label": {"_type": "Value", "dtype": "int64"}}, {}, b"{}", {"label": None}):
        assert values(open_rows(write("a.arrow", with_metadata(other)))) == [{"label": 0}, {"label": 1}]
