"""The shapes of JSON files: lines, objects over several lines, an object around the rows, columns of lists."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.tables import TABLE, Write, error_of, jsonl, values
from yeonma.data.rows import open_rows
from yeonma.data.text_file import CHUNK

NUMBERS = [{"text": "a", "label": 0}, {"text": "b", "label": 1}, {"text": "c", "label": 1}]
COLUMNS = {"text": ["a", "b", "c"], "label": [0, 1, 1]}
LONG = [{"document": f'{number} \\ "한' * (number % 700), "title": number} for number in range(3000)]


def lines_of(path: str) -> list[str]:
    """The places of the rows, without the path."""
    return [row.place.removeprefix(path) for row in open_rows(path)]


# Objects one after another


def test_lines_in_a_json_file_are_read_with_their_line_numbers(write: Write) -> None:
    path = write("a.json", "\n" + jsonl(TABLE[:2]) + "\n" + jsonl(TABLE[2:]))
    rows = open_rows(path)
    assert values(rows) == TABLE
    assert rows.notes == ()
    assert lines_of(path) == [":2", ":3", ":5"]


def test_a_faulty_line_in_a_json_file_of_lines_has_its_place(write: Write) -> None:
    message = error_of(write("a.json", jsonl(TABLE) + '{"document": 1,, "title": 2}\n{"document": NaN}\n'))
    assert [line.partition(": ")[0] for line in message.splitlines()] == ["a.json:4:16", "a.json:5:14"]


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.ndjson"])
def test_objects_over_several_lines_are_read_with_the_line_they_begin_on(write: Write, name: str) -> None:
    path = write(name, "\n".join(json.dumps(row, indent=2, ensure_ascii=False) for row in TABLE))
    rows = open_rows(path)
    assert values(rows) == TABLE
    assert rows.notes == ()
    assert lines_of(path) == [":1", ":5", ":9"]


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_objects_over_several_lines_across_chunk_borders_are_read(write: Write, name: str) -> None:
    text = "\n".join(json.dumps(row, indent=2, ensure_ascii=False) for row in LONG)
    assert len(text) > 4 * CHUNK
    assert values(open_rows(write(name, text))) == LONG


def test_a_fault_in_an_object_over_several_lines_has_its_place(write: Write) -> None:
    good = json.dumps(TABLE[0], indent=2)
    bad = '{\n  "document": "x",\n  "title": NaN\n}'
    assert (
        error_of(write("a.json", f"{good}\n{bad}\n"))
        == "a.json:7:12: NaN is not JSON; write null or a number"
    )
    assert error_of(write("a.json", f"{good},\n{good}")).startswith(
        "a.json:4:2: text after the object; write a list"
    )
    assert error_of(write("a.json", f"{good} {good}")).startswith("a.json:4:3: a second object on the line")
    cut = error_of(write("a.json", f'{good}\n{{\n "document":'))
    assert cut.startswith("a.json:6:13: not JSON: expecting value: the file is truncated")


def test_a_cut_first_line_of_a_jsonl_file_is_reported_as_a_line(write: Write) -> None:
    message = error_of(write("a.jsonl", '{"a": [1,\n{"a": 2}\n'))
    assert message.startswith("a.jsonl:1:")
    assert message.endswith("the line ends before its object; write one object a line")


def test_one_object_is_one_row(write: Write) -> None:
    nested = {"document": "x", "tags": ["a", "b"], "title": "y", "source": {"name": "z"}}
    for text in (json.dumps(nested), json.dumps(nested, indent=1)):
        for name in ("a.json", "a.jsonl"):
            assert values(open_rows(write(name, text))) == [nested]


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]},
        {"conversations": [{"from": "human", "value": "q"}], "tools": [{"name": "search"}]},
    ],
)
def test_an_object_with_turns_is_one_row(write: Write, row: dict[str, object]) -> None:
    assert values(open_rows(write("a.json", json.dumps(row, indent=1)))) == [row]


# An object around the rows


def test_the_only_list_of_objects_is_read_and_told(write: Write) -> None:
    for around in ({}, {"version": "1.0", "info": {"rows": [1]}, "tags": ["news"]}):
        for text in (json.dumps({**around, "data": TABLE}), json.dumps({"data": TABLE, **around}, indent=1)):
            path = write("a.json", text)
            rows = open_rows(path)
            assert values(rows) == TABLE
            assert rows.notes == (f'{path}: the rows are the list under the key "data"',)


def test_rows_in_an_object_have_their_lines(write: Write) -> None:
    path = write("a.json", '{"version": 1,\n "data": [\n  {"a": 1},\n\n  {"a":\n 2}, {"a": 3}\n]}\n')
    assert lines_of(path) == [":3", ":5", ":6"]
    message = error_of(write("a.json", '{"version": 1,\n "data": [\n  {"a": 1},\n  {"a": 1, "a": 2}\n]}\n'))
    assert message == 'a.json:4:12: the key "a" appears twice in one object; keep one'


def test_a_list_in_an_object_across_chunk_borders_is_read(write: Write) -> None:
    text = json.dumps({"comment": "x" * CHUNK, "rows": LONG, "more": "y" * CHUNK}, ensure_ascii=False)
    assert values(open_rows(write("a.json", text))) == LONG


def test_several_lists_of_objects_are_an_error_whose_cure_works(write: Write) -> None:
    path = write("a.json", json.dumps({"train": TABLE[:2], "test": TABLE[2:], "labels": ["x"]}))
    assert error_of(path).startswith(
        'a.json: several keys hold lists of objects: "train", "test"; name the one'
    )
    assert error_of(path).endswith("a.json:train")
    train, test = open_rows(f"{path}:train"), open_rows(f"{path}:test")
    assert (values(train), values(test)) == (TABLE[:2], TABLE[2:])
    assert train.identity != test.identity
    assert next(iter(test)).place == f"{path}:1"


def test_a_key_that_holds_no_list_is_an_error(write: Write) -> None:
    path = write("a.json", json.dumps({"train": TABLE, "test": TABLE, "version": "1"}))
    assert error_of(f"{path}:tests").endswith('no list under the key "tests"; did you mean "test"?')
    assert error_of(f"{path}:version").endswith(
        'no list under the key "version"; its lists are "train", "test"'
    )
    for text, what in ((json.dumps(TABLE), "a list"), (jsonl(TABLE), "one object a line")):
        assert f'it holds {what}, so it has no key "train"' in error_of(write("b.json", text) + ":train")
    assert error_of(path.replace("a.json", "c.json:train")).startswith("c.json:train: no such file")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"data": [{"a": 1}, 2]}', "a.json:1: a row must be an object, not a number"),
        ('{"data": [2, {"a": 1}]}', "a.json:1: a row must be an object, not a number"),
        ('{"data": [{"a": 1} {"a": 2}]}', 'a.json:1:20: not JSON: expecting "," or "]" after a row'),
        (
            '{"data": [{"a": 1}]',
            'a.json:1:20: not JSON: expecting "," or "}" after a value: the file is truncated',
        ),
        (
            '{"data": [{"a": 1}',
            'a.json:1:19: not JSON: expecting "," or "]" after a row: the file is truncated',
        ),
        (
            '{"data": [{"a": 1}],\n}',
            "a.json:2:1: not JSON: expecting property name enclosed in double quotes",
        ),
        ('{"data" [{"a": 1}]}', "a.json:1:9: not JSON: expecting ':' delimiter"),
        (
            '{"data": [], "data": [{"a": 1}]}',
            'a.json:1:14: the key "data" appears twice in one object; keep one',
        ),
        ('{"data": [{"a": 1}], "b": NaN}', "a.json:1:27: NaN is not JSON"),
        ('{"data": [{"a": 1}]}]', "a.json:1:21: text after the object"),
        ('{"data": []}', "a.json: no rows"),
    ],
)
def test_an_invalid_object_around_rows_is_reported_with_its_position(
    write: Write, text: str, message: str
) -> None:
    assert error_of(write("a.json", text)).startswith(message)


# Columns


def test_columns_of_lists_are_rows(write: Write) -> None:
    for text in (json.dumps(COLUMNS), json.dumps(COLUMNS, indent=2)):
        path = write("a.json", text)
        rows = open_rows(path)
        assert values(rows) == NUMBERS
        assert rows.columns == ("text", "label")
        assert rows.notes == (f"{path}: its lists are columns",)
        assert lines_of(path) == [" row 1", " row 2", " row 3"]


def test_columns_of_numbered_values_as_pandas_writes_them_are_rows(write: Write) -> None:
    import pandas as pd

    path = write("a.json", pd.DataFrame(NUMBERS).to_json())
    assert '"text":{"0":"a"' in Path(path).read_text()
    assert values(open_rows(path)) == NUMBERS


def test_turn_lists_in_a_column_are_rows(write: Write) -> None:
    turns = [[{"role": "user", "content": str(number)}] for number in range(3)]
    rows = open_rows(write("a.json", json.dumps({"id": [1, 2, 3], "messages": turns})))
    assert values(rows) == [{"id": number + 1, "messages": turns[number]} for number in range(3)]


def test_objects_in_a_column_are_cells(write: Write) -> None:
    table = {"question": ["a", "b"], "answers": [{"text": "x"}, {"text": "y"}]}
    assert values(open_rows(write("a.json", json.dumps(table)))) == [
        {"question": "a", "answers": {"text": "x"}},
        {"question": "b", "answers": {"text": "y"}},
    ]


def test_columns_of_different_lengths_are_an_error(write: Write) -> None:
    message = error_of(write("a.json", json.dumps({"text": ["a", "b"], "label": [1]})))
    assert message.startswith(
        'a.json: columns of different lengths: "text" 2, "label" 1; make them equally long'
    )
    assert error_of(write("a.json", '{"text": [], "label": []}')).startswith("a.json: no rows")
    wide = {str(number): [1] for number in range(101)}
    assert error_of(write("a.json", json.dumps(wide))).startswith("a.json: more than 100 columns of lists")


def test_columns_across_chunk_borders_are_read_value_by_value(write: Write) -> None:
    table = {"title": [row["title"] for row in LONG], "document": [row["document"] for row in LONG]}
    for indent in (None, 1):
        path = write("a.json", json.dumps(table, ensure_ascii=False, indent=indent))
        assert values(open_rows(path)) == [
            {"title": row["title"], "document": row["document"]} for row in LONG
        ]


@pytest.mark.parametrize("before_border", [0, 1, 5, 12, 13])
def test_a_number_at_a_chunk_border_is_read_whole(write: Write, before_border: int) -> None:
    head = '{"a": ["'
    text = f'{head}{"x" * (CHUNK - len(head) - 2 - before_border)}",1234567890123,9]}}'
    assert text[CHUNK - before_border - 1 : CHUNK] == ",1234567890123"[: before_border + 1]
    assert [row["a"] for row in values(open_rows(write("a.json", text)))][1:] == [1234567890123, 9]


def as_columns(table: list[dict[str, str]]) -> str:
    return json.dumps({name: [row[name] for row in table] for name in table[0]})


def in_an_object(table: list[dict[str, str]]) -> str:
    return json.dumps({"version": 1, "data": table})


def as_objects(table: list[dict[str, str]]) -> str:
    return "\n".join(json.dumps(row, indent=1) for row in table)


@pytest.mark.parametrize("text_of", [as_columns, in_an_object, as_objects])
def test_memory_does_not_grow_with_the_number_of_rows(
    write: Write, text_of: Callable[[list[dict[str, str]]], str]
) -> None:
    peaks = []
    for count in (2_000, 16_000):
        table = [{"document": f"row {number} " * 20, "title": "t"} for number in range(count)]
        path = write(f"{count}.json", text_of(table))
        del table
        tracemalloc.start()
        assert sum(1 for _ in open_rows(path)) == count
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < peaks[0] + 1_500_000
