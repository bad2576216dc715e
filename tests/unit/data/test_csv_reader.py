"""CSV as spreadsheets write it: other delimiters, the sep= line, empty columns and rows, blanks in the header."""

from __future__ import annotations

import csv
import io

import pytest

from tests.tables import TABLE, Write, error_of, values
from yeonma.data.rows import glance, open_rows
from yeonma.errors import did_you_mean


def table_with(delimiter: str) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, TABLE[0], delimiter=delimiter)
    writer.writeheader()
    writer.writerows(TABLE)
    return text.getvalue()


SHOWN = {";": ";", "\t": "a tab", "|": "|", ",": ","}


@pytest.mark.parametrize("name", ["a.csv", "a.tsv"])
@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
def test_the_only_delimiter_of_the_header_is_found_and_told(write: Write, name: str, delimiter: str) -> None:
    path = write(name, "\ufeff" + table_with(delimiter))
    rows = open_rows(path)
    assert values(rows) == TABLE
    own = delimiter == ("," if name == "a.csv" else "\t")
    assert rows.notes == (() if own else (f"{path}: columns are separated by {SHOWN[delimiter]}",))


@pytest.mark.parametrize(
    ("text", "columns"),
    [
        ("a;b,c\nx,y\n", ("a;b", "c")),  # the ending's own delimiter comes first
        ("a;b|c\nx\n", ("a;b|c",)),  # two others divide it
        ("a\nx;y\n", ("a",)),  # only the header counts
        ('"a;b"\nx\n', ("a;b",)),
        ('"a,x";b\nx;y\n', ("a,x", "b")),
        ('"a\n1";"b"\nx;y\n', ("a\n1", "b")),
        ("\n  \na;b\nx;y\n", ("a", "b")),
    ],
)
def test_the_header_decides_which_delimiter_is_taken(
    write: Write, text: str, columns: tuple[str, ...]
) -> None:
    assert open_rows(write("a.csv", text)).columns == columns


@pytest.mark.parametrize(
    ("line", "delimiter"),
    [("sep=;", ";"), ('"sep=|"', "|"), ("SEP=,\r", ","), ("sep=\t", "\t"), ("sep=:", ":")],
)
def test_excels_sep_line_is_followed_and_is_no_row(write: Write, line: str, delimiter: str) -> None:
    path = write("a.csv", f"{line}\n{table_with(delimiter)}")
    rows = open_rows(path)
    assert values(rows) == TABLE
    assert [row.place for row in rows] == [f"{path}:3", f"{path}:5", f"{path}:6"]
    assert error_of(write("a.csv", f"{line}\na{delimiter}b\n1\n")).startswith(
        "a.csv:3: 1 cell; the header has 2"
    )


def test_a_given_delimiter_is_taken_whatever_the_header_says(write: Write) -> None:
    path = write("a.csv", "a;b,c\n1;2,3\n")
    assert values(open_rows(path, delimiter=";")) == [{"a": "1", "b,c": "2,3"}]
    assert open_rows(path, delimiter=";").notes == ()
    assert open_rows(path, delimiter=";").identity != open_rows(path).identity
    assert glance(path, delimiter=";").columns == ("a", "b,c")
    for written in ("tab", "\\t", "\t"):
        assert values(open_rows(write("b.csv", "a\tb,c\n1\t2\n"), delimiter=written)) == [
            {"a": "1", "b,c": "2"}
        ]
    assert values(open_rows(write("c.csv", "sep=;\na,b;c\n1,2\n"), delimiter=",")) == [{"a": "1", "b;c": "2"}]
    for written, shown in (("", ""), (";;", ";;"), ('"', '"'), ("\n", "\\n")):
        message = error_of(path, delimiter=written)
        assert message.startswith(f'--delimiter: "{shown}" cannot separate columns; give one character')


def test_empty_columns_at_the_end_and_empty_rows_are_skipped(write: Write) -> None:
    path = write("a.csv", "a,b,,\n1,2,,\n,,,\n , ,\t,\n3,4,,\n5,6\n,,\n")
    rows = open_rows(path)
    assert [(row.number, row.place.removeprefix(path), row.values) for row in rows] == [
        (1, ":2", {"a": "1", "b": "2"}),
        (2, ":5", {"a": "3", "b": "4"}),
        (3, ":6", {"a": "5", "b": "6"}),
    ]
    assert rows.notes == ()
    assert values(open_rows(write("a.csv", "a,b\n1,2,,\n3,,\n"))) == [
        {"a": "1", "b": "2"},
        {"a": "3", "b": ""},
    ]
    assert error_of(write("a.csv", "a,b\n1,2,,x\n")).startswith("a.csv:2: 4 cells; the header has 2")
    assert error_of(write("a.csv", "a,b,\n1\n")).startswith("a.csv:2: 1 cell; the header has 3")
    assert error_of(write("a.csv", "a,b\n,\n , \n")).startswith("a.csv: a header but no rows")


def test_values_without_a_column_name_are_told(write: Write) -> None:
    path = write("a.csv", ",a,,\n0,x,,\n1,y,,\n")
    rows = open_rows(path)
    assert values(rows) == [{"a": "x"}, {"a": "y"}]
    assert rows.notes == (f"{path}: columns without a name are not read: column 1",)
    assert open_rows(write("a.csv", ",a,,\n0,x,,\n1,y,,z\n")).notes == (
        f"{path}: columns without a name are not read: 2, the first is 1",
    )


def test_blanks_around_column_names_are_left_out_and_told(write: Write) -> None:
    path = write("a.csv", " instruction,output \t, ,both words\nx,y,,z\n")
    rows = open_rows(path)
    assert values(rows) == [{"instruction": "x", "output": "y", "both words": "z"}]
    assert rows.notes == (f'{path}: blanks around column names are left out: " instruction", "output \t"',)


def test_blanks_that_distinguish_columns_stay(write: Write) -> None:
    rows = open_rows(write("a.csv", "a, a,b \n1,2,3\n"))
    assert values(rows) == [{"a": "1", " a": "2", "b ": "3"}]
    assert rows.notes == ()


def test_a_header_without_names_is_an_error(write: Write) -> None:
    assert error_of(write("a.csv", ",,\n1,2,3\n")).startswith("a.csv:1: no column has a name")


def test_a_fault_behind_the_first_rows_is_raised_when_it_is_reached(write: Write) -> None:
    rows = open_rows(write("a.csv", 'a,\n1,\n2,"x\n'))
    assert rows.columns == ("a",)
    assert error_of(write("a.csv", 'a,\n1,\n2,"x\n')) == (
        'a.csv:3:3: a quote that is never closed; close it, and write " inside a quoted cell as ""'
    )


@pytest.mark.parametrize(
    "column", ["Instruction", "INSTRUCTION", "instruction ", " Instruction", "inst ruction"]
)
def test_a_column_that_differs_in_capitals_or_blanks_is_suggested(column: str) -> None:
    assert did_you_mean("instruction", [column, "output"]) == f'did you mean "{column}"?'
