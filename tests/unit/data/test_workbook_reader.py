"""Excel workbooks: cells as people see them, the sheet that is read, empty rows, damaged files."""

from __future__ import annotations

import io
import sys
import zipfile
from datetime import date, datetime, time, timedelta
from typing import Any

import pytest

from tests.tables import TABLE, Write, error_of, table_as, values, workbook
from yeonma.data.rows import open_rows
from yeonma.packages import install

SEEN: list[tuple[Any, str | None]] = [
    ("text  ", "text  "),
    ("두\n줄", "두\n줄"),
    ("a_x000D_\nb", "a\r\nb"),
    (3, "3"),
    (3.0, "3"),
    (-0.5, "-0.5"),
    (0.1 + 0.2, "0.3"),
    (1234567.891, "1234567.891"),
    (123456789012345, "123456789012345"),
    (1e300, "1E+300"),
    ((0.256, "0%"), "26%"),
    ((0.256, "0.0%"), "25.6%"),
    ((1234567.5, "#,##0"), "1,234,568"),
    ((2.675, "0.00"), "2.68"),
    ((4, "0.00"), "4.00"),
    ((0.5, "# ?/?"), "0.5"),
    (True, "TRUE"),
    (False, "FALSE"),
    (date(2024, 5, 1), "2024-05-01"),
    (datetime(2024, 5, 1, 13, 30), "2024-05-01T13:30:00"),
    ((datetime(2024, 5, 1), "yyyy-mm-dd hh:mm"), "2024-05-01T00:00:00"),
    ((datetime(2024, 5, 1), "dd/mm/yy"), "2024-05-01"),
    (time(13, 30, 5), "13:30:05"),
    (timedelta(hours=30, minutes=1), "30:01:00"),
    ("#N/A", None),
    (None, ""),
]


@pytest.mark.parametrize(("cell", "text"), SEEN, ids=[str(cell) for cell, _ in SEEN])
def test_a_cell_is_the_text_that_people_see(write: Write, cell: object, text: str | None) -> None:
    rows = open_rows(write("a.xlsx", workbook({"Sheet1": [["a", "b"], [cell, "x"]]})))
    assert values(rows) == [{"a": text, "b": "x"}]


def with_formula(cached: str) -> bytes:
    """A workbook whose cell A2 is a formula with the value that Excel computed."""
    source, sink = io.BytesIO(workbook({"Sheet1": [["a", "b"], [1, "x"]]})), io.BytesIO()
    with zipfile.ZipFile(source) as book, zipfile.ZipFile(sink, "w") as changed:
        for name in book.namelist():
            content = book.read(name)
            if name == "xl/worksheets/sheet1.xml":
                assert b"<v>1</v>" in content
                content = content.replace(b"<v>1</v>", f"<f>2+2</f><v>{cached}</v>".encode())
            changed.writestr(name, content)
    return sink.getvalue()


def test_a_formula_is_its_computed_value(write: Write) -> None:
    assert values(open_rows(write("a.xlsx", with_formula("4")))) == [{"a": "4", "b": "x"}]


def test_the_first_visible_sheet_is_read_and_others_are_told(write: Write) -> None:
    content = workbook({"Articles": [["a"], ["x"]], "Old": [["b"], ["y"]], "팁": [["c"], ["z"]]})
    path = write("a.xlsx", content)
    assert values(open_rows(path)) == [{"a": "x"}]
    assert open_rows(path).notes == (f'{path}: the sheet "Articles" is read; not "Old", "팁"',)
    named = open_rows(f"{path}:Old")
    assert (values(named), named.notes) == ([{"b": "y"}], ())
    assert next(iter(named)).place == f"{path} sheet row 2"
    assert named.identity != open_rows(path).identity
    assert error_of(f"{path}:old").endswith('a.xlsx: no sheet "old"; did you mean "Old"?')
    assert error_of(f"{path}:x").endswith('a.xlsx: no sheet "x"; its sheets are "Articles", "Old", "팁"')


def test_a_hidden_sheet_is_not_the_first(write: Write) -> None:
    import openpyxl

    book = openpyxl.load_workbook(io.BytesIO(workbook({"Hidden": [["a"], [1]], "Shown": [["b"], [2]]})))
    book["Hidden"].sheet_state = "hidden"
    book.save(path := write("a.xlsx", b""))
    rows = open_rows(path)
    assert (values(rows), rows.notes) == ([{"b": "2"}], ())


def test_empty_rows_and_columns_are_skipped_and_rows_keep_their_number_in_the_sheet(write: Write) -> None:
    sheet = [[], ["a", " b ", None, None], [], ["1"], [None, " "], [None, "2", None, None], []]
    path = write("a.xlsx", workbook({"Sheet1": sheet}))
    rows = open_rows(path)
    assert [(row.number, row.place.removeprefix(path), row.values) for row in rows] == [
        (1, " sheet row 4", {"a": "1", "b": ""}),
        (2, " sheet row 6", {"a": "", "b": "2"}),
    ]
    assert rows.notes == (f'{path}: blanks around column names are left out: " b "',)


def test_values_without_a_column_name_are_told(write: Write) -> None:
    path = write("a.xlsx", workbook({"Sheet1": [["a"], ["1", None, "x"]]}))
    assert values(open_rows(path)) == [{"a": "1"}]
    assert open_rows(path).notes == (f"{path}: columns without a name are not read: column 3",)


def test_faulty_headers_and_empty_sheets_are_errors(write: Write) -> None:
    for sheet, message in (
        ([], "a.xlsx: no rows"),
        ([["a", "b"]], "a.xlsx: a header but no rows"),
        ([["a", "b", "a"], [1, 2, 3]], 'a.xlsx sheet row 1: the header has "a" twice'),
    ):
        assert error_of(write("a.xlsx", workbook({"Sheet1": sheet}))).startswith(message)


def test_damaged_workbooks_are_errors(write: Write) -> None:
    content = table_as("xlsx", TABLE)
    for damaged in (b"", b"no zip", content[: len(content) // 2], zip_of("a.txt")):
        message = error_of(write("a.xlsx", damaged))
        assert message.startswith("a.xlsx: not a readable .xlsx file: ")
        assert "save it again as .xlsx" in message
    rows = sheet_of(b"<sheetData><row><c t='s'><v>99</v></c></row></sheetData>")
    assert error_of(write("a.xlsx", rows)).startswith("a.xlsx: not a readable .xlsx file: ")


def zip_of(name: str) -> bytes:
    sink = io.BytesIO()
    with zipfile.ZipFile(sink, "w") as archive:
        archive.writestr(name, "")
    return sink.getvalue()


def sheet_of(data: bytes) -> bytes:
    """A workbook with this sheet data."""
    source, sink = io.BytesIO(workbook({"Sheet1": [["a"], ["x"]]})), io.BytesIO()
    with zipfile.ZipFile(source) as book, zipfile.ZipFile(sink, "w") as changed:
        for name in book.namelist():
            content = book.read(name)
            if name == "xl/worksheets/sheet1.xml":
                start, end = (
                    content.index(b"<sheetData"),
                    content.index(b"</sheetData>") + len(b"</sheetData>"),
                )
                content = content[:start] + data + content[end:]
            changed.writestr(name, content)
    return sink.getvalue()


def test_without_openpyxl_the_error_says_what_to_install(
    write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write("a.xlsx", table_as("xlsx", TABLE))
    monkeypatch.setitem(sys.modules, "openpyxl", None)
    assert error_of(path) == f"a.xlsx: reading .xlsx files needs openpyxl; {install('openpyxl')}"
