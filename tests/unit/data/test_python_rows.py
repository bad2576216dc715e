"""Rows that a Python call gives: every kind is read like a file of the same rows, and identified by its content."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from datetime import date, datetime, time, timedelta, timezone
from decimal import Decimal
from pathlib import Path
from typing import Any
from uuid import UUID

import datasets
import numpy as np
import pandas as pd
import pytest

from tests.tables import TABLE, jsonl
from yeonma.data.python_rows import FOLDER_VARIABLE, given, given_set, is_label
from yeonma.data.rows import Rows, glance, open_rows
from yeonma.errors import UserError

MIXED = [
    {
        "id": 1,
        "text": "a",
        "score": 0.5,
        "tags": ["x", "y"],
        "turns": [{"role": "user", "content": "q"}],
        "ok": True,
    },
    {"id": 2, "text": "두\n줄", "score": None, "tags": [], "turns": [], "ok": None},
]


def opened(
    data: Any, setting: str = "data_path", **options: Any
) -> tuple[Rows, list[dict[str, Any]], list[str]]:
    """The rows that `data` gives, their values and their places."""
    with given({setting: data}) as keywords:
        rows = open_rows(keywords[setting], **options)
        return rows, [dict(row.values) for row in rows], [row.place for row in rows]


def error_of(data: Any) -> str:
    with pytest.raises(UserError) as caught:
        opened(data)
    return str(caught.value)


def polars_frame(rows: list[dict[str, Any]]) -> Any:
    return pytest.importorskip("polars").DataFrame(rows)


KINDS: dict[str, Any] = {
    "list": list,
    "tuple": tuple,
    "pandas": pd.DataFrame,
    "datasets": datasets.Dataset.from_list,
    "polars": polars_frame,
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_gives_the_rows_of_a_file_with_their_places(tmp_path: Path, kind: str) -> None:
    rows, read, places = opened(KINDS[kind](TABLE))
    (tmp_path / "a.jsonl").write_text(jsonl(TABLE))
    assert read == [dict(row.values) for row in open_rows(str(tmp_path / "a.jsonl"))] == TABLE
    assert places == ["data_path row 1", "data_path row 2", "data_path row 3"]
    assert rows.columns == ("document", "title")
    assert opened(KINDS[kind](TABLE), "val_data_path")[2][0] == "val_data_path row 1"


@pytest.mark.parametrize("kind", KINDS)
def test_numbers_lists_and_missing_values_are_kept(kind: str) -> None:
    _, read, _ = opened(KINDS[kind](MIXED))
    assert read == MIXED


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_rows_have_one_identity_in_every_kind(kind: str) -> None:
    rows, _, _ = opened(KINDS[kind](TABLE))
    assert rows.identity == opened(TABLE)[0].identity
    assert len(rows.identity) == 64
    assert rows.identity != opened([*TABLE[:2], {**TABLE[2], "title": "other"}])[0].identity
    assert rows.identity != opened(TABLE[::-1])[0].identity


@pytest.mark.parametrize(
    ("kind", "word"),
    [
        ("list", "list"),
        ("pandas", "pandas DataFrame"),
        ("datasets", "datasets Dataset"),
        ("polars", "polars DataFrame"),
    ],
)
def test_the_label_says_what_was_given(kind: str, word: str) -> None:
    rows, _, _ = opened(KINDS[kind](TABLE))
    assert rows.name == f"<{word} of 3 rows, SHA-256 {rows.identity[:12]}>"
    assert is_label(rows.name)
    assert not is_label("rows.jsonl")


def test_more_rows_than_a_piece_keep_their_order() -> None:
    table = [{"number": number} for number in range(2500)]
    for kind in ("list", "pandas", "datasets"):
        assert opened(KINDS[kind](table))[1] == table


def test_values_of_polars_are_those_of_json() -> None:
    pl = pytest.importorskip("polars")
    frame = pl.DataFrame(
        {
            "gap": [1, None],
            "nan": [0.5, float("nan")],
            "day": [date(2024, 5, 1)] * 2,
            "price": [Decimal("1.50")] * 2,
            "turns": [[{"role": "user", "content": "q"}], []],
            "kind": pl.Series(["a", None], dtype=pl.Categorical),
            "large": pl.Series([2**63, 1], dtype=pl.UInt64),
        }
    )
    same = {"day": "2024-05-01", "price": "1.50"}
    assert opened(frame)[1] == [
        {
            **same,
            "gap": 1,
            "nan": 0.5,
            "turns": [{"role": "user", "content": "q"}],
            "kind": "a",
            "large": 2**63,
        },
        {**same, "gap": None, "nan": None, "turns": [], "kind": None, "large": 1},
    ]
    table = [{"number": number} for number in range(2500)]
    assert opened(pl.DataFrame(table))[1] == table
    assert opened(pl.DataFrame(TABLE))[0].identity == opened(pd.DataFrame(TABLE))[0].identity
    assert "give what its .collect() returns" in error_of(frame.lazy())
    assert "give a DataFrame: .to_frame()" in error_of(frame["kind"])


MISSING = [float("nan"), np.nan, np.float32("nan"), pd.NA, pd.NaT, None]


@pytest.mark.parametrize("value", MISSING, ids=repr)
def test_missing_values_become_null(value: object) -> None:
    for data in ([{"a": value, "b": [value]}], pd.DataFrame([{"a": value, "b": [value]}])):
        assert opened(data)[1] == [{"a": None, "b": [None]}]


@pytest.mark.parametrize(
    ("column", "expected"),
    [
        (pd.Series([1, None], dtype="Int64"), [1, None]),
        (pd.Series(["a", None], dtype="string"), ["a", None]),
        (pd.Series([True, None], dtype="boolean"), [True, None]),
        (pd.Series(["a", None], dtype="category"), ["a", None]),
        (pd.Series([1.0, None]), [1.0, None]),
        (pd.to_datetime(pd.Series(["2024-05-01", None])), ["2024-05-01T00:00:00", None]),
    ],
)
def test_missing_values_in_pandas_columns_become_null(column: Any, expected: list[object]) -> None:
    assert [row["a"] for row in opened(pd.DataFrame({"a": column}))[1]] == expected


class Text(str):
    pass


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (np.int64(3), 3),
        (np.float32(0.5), 0.5),
        (np.bool_(True), True),
        (np.str_("a"), "a"),
        (np.array([[1, 2], [3, 4]]), [[1, 2], [3, 4]]),
        (np.datetime64("2024-05-01"), "2024-05-01"),
        ((1, "a"), [1, "a"]),
        (Text("a"), "a"),
        (date(2024, 5, 1), "2024-05-01"),
        (datetime(2024, 5, 1, 13, 30, tzinfo=timezone.utc), "2024-05-01T13:30:00+00:00"),
        (time(13, 30), "13:30:00"),
        (timedelta(hours=1), "1:00:00"),
        (Decimal("1.50"), "1.50"),
        (UUID(int=1), "00000000-0000-0000-0000-000000000001"),
        (b"ab", {"bytes": "YWI="}),
        ("\ud83d", "\ud83d"),
        (10**30, 10**30),
    ],
    ids=repr,
)
def test_values_of_other_types_have_a_plain_form(value: object, expected: object) -> None:
    assert opened([{"a": value}])[1] == [{"a": expected}]


def test_class_labels_of_a_data_set_are_their_names() -> None:
    features = datasets.Features({"label": datasets.ClassLabel(names=["neg", "pos"])})
    assert opened(datasets.Dataset.from_dict({"label": [1, 0]}, features=features))[1] == [
        {"label": "pos"},
        {"label": "neg"},
    ]


def generator() -> Iterator[dict[str, Any]]:
    yield {"a": 1}


DEEP: list[Any] = []
DEEP.append(DEEP)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "data_path: no rows; give at least one row"),
        (3, "data_path: what is given is of type int; give a path, a list of dicts"),
        ({"a": [1]}, "data_path: what is given is of type dict"),
        (generator(), "data_path: what is given is of type generator"),
        ([{"a": 1}, "b.jsonl"], "data_path row 2: a row must be a dict, not text; give one path, or a folder of files"),
        ([[1]], 'data_path row 1: a row must be a dict, not a list; write {"column": "value", ...}'),
        ([{1: "a"}], "data_path row 1: a column must have a text as its name, not 1"),
        ([{"a": object()}], 'data_path row 1: column "a" holds a value of type object, which is no data'),
        ([{"a": float("inf")}], 'data_path row 1: column "a" holds infinity, which is no data'),
        ([{"a": {1: 2}}], 'data_path row 1: column "a" holds a dict with keys that are no text'),
        ([{"a": DEEP}], "data_path row 1: too deeply nested"),
        ([{"a": 10**5000}], "data_path row 1: a number with too many digits"),
        (pd.DataFrame([[1, 2]], columns=["a", "a"]), 'data_path: two columns are named "a"'),
        (pd.DataFrame({"a": [1]}, index=pd.Index([5], name="id")), "data_path: the index has a name (id), and is not"),
        (pd.Series([1]), "data_path: what is given is a pandas Series; give a DataFrame"),
        (datasets.DatasetDict(), 'data_path: what is given is a datasets DatasetDict; give one of its splits, such as'),
        (datasets.Dataset.from_list([{"a": 1}]).to_iterable_dataset(), "data_path: what is given is a datasets Iter"),
    ],
)  # fmt: skip
def test_what_is_no_data_is_an_error_with_its_place(data: Any, message: str) -> None:
    assert error_of(data).startswith(message)


def test_a_named_index_can_be_made_a_column() -> None:
    frame = pd.DataFrame({"a": ["x"]}, index=pd.Index([5], name="id"))
    assert opened(frame.reset_index())[1] == [{"id": 5, "a": "x"}]
    assert opened(pd.DataFrame({"a": [1, 2, 3]})[lambda frame: frame["a"] > 1])[1] == [{"a": 2}, {"a": 3}]


def test_rows_are_sliced_limited_and_glanced_at_like_those_of_files() -> None:
    table = [{"a": number} for number in range(10)]
    assert opened(table, split="train[2:4]")[1] == table[2:4]
    assert opened(table, split="train[-20%:]")[1] == table[8:]
    rows, read, places = opened(table, split="train[5:]", max_rows=2)
    assert (read, places) == (table[5:7], ["data_path row 6", "data_path row 7"])
    assert rows.identity != opened(table)[0].identity
    with given({"data_path": table}) as keywords:
        glanced = glance(keywords["data_path"])
        assert glanced is not None
        assert [row.values for row in glanced] == table


def test_paths_and_other_keywords_are_left_as_they_are(tmp_path: Path) -> None:
    keywords = {"data_path": tmp_path, "val_data_path": None, "batch_size": 3}
    with given(keywords) as unchanged:
        assert unchanged == keywords
        assert FOLDER_VARIABLE not in os.environ


def test_rows_of_two_settings_are_kept_apart() -> None:
    with given({"data_path": TABLE, "val_data_path": TABLE[:1]}) as keywords:
        train, held_out = open_rows(keywords["data_path"]), open_rows(keywords["val_data_path"])
        assert [len(list(rows)) for rows in (train, held_out)] == [3, 1]
        assert [next(iter(rows)).place for rows in (train, held_out)] == [
            "data_path row 1",
            "val_data_path row 1",
        ]


def test_after_the_call_nothing_is_left_and_the_label_is_an_error() -> None:
    with given({"data_path": TABLE}) as keywords:
        label, folder = keywords["data_path"], Path(os.environ[FOLDER_VARIABLE])
        assert json.loads(next(folder.iterdir()).read_text().splitlines()[0]) == TABLE[0]
        assert given_set(label) is not None
    assert not folder.exists()
    assert FOLDER_VARIABLE not in os.environ
    with pytest.raises(UserError) as caught:
        open_rows(label)
    assert str(caught.value) == (
        f"{label}: this data was given in Python, and lies in no file; call yeonma.sft or yeonma.dpo again with the "
        "same data, or write it to a file"
    )


def test_rows_are_read_as_they_were_when_they_were_given() -> None:
    table = [dict(row) for row in TABLE]
    with given({"data_path": table}) as keywords:
        rows = open_rows(keywords["data_path"])
        table[0]["title"] = "changed"
        assert [dict(row.values) for row in rows] == TABLE
