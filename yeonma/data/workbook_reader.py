"""Excel workbooks (.xlsx): the rows of one sheet, with every cell as the text that people see.

Read by openpyxl, row by row. The texts that cells share are kept in memory.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import date, datetime, time, timedelta
from decimal import ROUND_HALF_UP, Decimal
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from yeonma.data.csv_reader import Header, header_of, unnamed_note
from yeonma.data.records import FileOptions, Record, Source, no_rows
from yeonma.errors import UserError, brief, did_you_mean, first_line
from yeonma.messages import tr
from yeonma.packages import install

_SEEN_ROWS = 100
"""Rows in which values without a column name are looked for."""
_DIGITS = 15
"""Of a number that Excel keeps and shows."""
_PLAIN_FORMAT = re.compile(r"(#,##)?0(?:\.(0+))?(%?)")
"""Number formats such as `0.00`, `#,##0` and `0%`."""
_HIDDEN_RETURN = "_x000D_"
"""How a workbook writes a carriage return in a text."""

Cell = str | None
"""The text of a cell; None for a formula's error, such as #N/A."""


def open_workbook(path: Path, name: str, options: FileOptions) -> Source:
    """The sheet that `options.part` names, else the first visible one. Its first row that is not empty is the header.

    Raises UserError if openpyxl is missing, the file is damaged, there is no such sheet, or the header is faulty.
    """
    with _workbook(path, name) as book:
        sheets = {sheet.title: sheet for sheet in book.worksheets}
        visible = [title for title, sheet in sheets.items() if sheet.sheet_state == "visible"] or [*sheets]
        title = visible[0] if options.part is None else options.part
        if title not in sheets:
            shown = ", ".join(f'"{brief(other)}"' for other in sheets)
            cure = did_you_mean(title, sheets) or tr("its sheets are {shown}", shown=shown)
            raise UserError(tr('no sheet "{title}"', title=brief(title)), place=name, cure=cure)
        number, cells = next(_filled_rows(sheets[title], name), (0, []))
        if not number:
            raise no_rows(name)
        header = header_of([cell or "" for cell in cells], name, _place(name, number))
        rows = islice(_filled_rows(sheets[title], name), 1, 1 + _SEEN_ROWS)
        notes = [
            *header.notes,
            *unnamed_note(name, header, ([cell or "" for cell in row] for _, row in rows)),
        ]
    others = [f'"{brief(other)}"' for other in visible if other != title]
    if others and options.part is None:
        notes.insert(
            0,
            tr(
                '{name}: the sheet "{title}" is read; not {others}',
                name=name,
                title=brief(title),
                others=", ".join(others[:10]),
            ),
        )
    return Source(partial(_rows, path, name, title, header), tuple(notes))


def _rows(path: Path, name: str, title: str, header: Header) -> Iterator[Record]:
    columns, empty = len(header.names), True
    with _workbook(path, name) as book:
        for number, cells in islice(_filled_rows(book[title], name), 1, None):
            empty = False
            padded = [*cells[:columns], *[""] * (columns - len(cells))]
            values = {column: cell for column, cell in zip(header.names, padded, strict=True) if column}
            yield _place(name, number), values
    if empty:
        raise UserError(tr("a header but no rows"), place=name, cure=tr("give a file with at least one row"))


def _place(name: str, number: int) -> str:
    return tr("{name} sheet row {number}", name=name, number=number)


@contextmanager
def _workbook(path: Path, name: str) -> Iterator[Any]:
    """The workbook, with formulas as the values that were last computed."""
    try:
        import openpyxl
    except ImportError:
        raise UserError(
            tr("reading .xlsx files needs openpyxl"), place=name, cure=install("openpyxl")
        ) from None
    with _faults_as_user_errors(name):
        book = openpyxl.load_workbook(path, read_only=True, data_only=True, keep_links=False)
    try:
        yield book
    finally:
        book.close()


@contextmanager
def _faults_as_user_errors(name: str) -> Iterator[None]:
    """Raises UserError for the errors of openpyxl, which are of many kinds for a damaged file, and drops warnings."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except (UserError, MemoryError, StopIteration):
        raise
    except Exception as error:
        cure = tr("open it in Excel or LibreOffice and save it again as .xlsx, without a password")
        problem = tr("not a readable .xlsx file: {value}", value=first_line(error) or type(error).__name__)
        raise UserError(problem, place=name, cure=cure) from None


def _filled_rows(sheet: Any, name: str) -> Iterator[tuple[int, list[Cell]]]:
    """The number in the sheet and the cells of every row that is not empty."""
    sheet.reset_dimensions()  # some programs write wrong ones
    rows = enumerate(sheet.iter_rows(), 1)
    while True:
        with _faults_as_user_errors(name):
            number, row = next(rows, (0, ()))
            cells = [_text(cell) for cell in row]
        if not number:
            return
        if any(cell is None or cell.strip() for cell in cells):
            yield number, cells


def _text(cell: Any) -> Cell:
    """A cell as text: numbers without a needless .0, dates in ISO 8601, TRUE and FALSE."""
    value = cell.value
    if isinstance(value, str):
        if cell.data_type == "e":
            return None
        return value.replace(_HIDDEN_RETURN, "\r") if _HIDDEN_RETURN in value else value
    if value is None:
        return ""
    if isinstance(value, bool):
        return "TRUE" if value else "FALSE"
    if isinstance(value, (int, float)):
        return _number_text(value, cell.number_format if cell.has_style else "General")
    return _time_text(value, cell.number_format)


def _number_text(value: int | float, number_format: str) -> str:
    """A number with the decimals, thousands and per cent of a plain format; in any other format, as it is kept."""
    plain = _PLAIN_FORMAT.fullmatch(number_format) if abs(value) < 10**_DIGITS else None
    if plain is None:
        whole = isinstance(value, int) or (value.is_integer() and abs(value) < 10**_DIGITS)
        return str(int(value)) if whole else str(Decimal(f"{value:.{_DIGITS}g}"))
    exact = Decimal(f"{value:.{_DIGITS}g}")
    thousands, decimals, percent = "," if plain[1] else "", len(plain[2] or ""), plain[3]
    shown = (exact * 100 if percent else exact).quantize(Decimal(1).scaleb(-decimals), ROUND_HALF_UP)
    return f"{shown:{thousands}f}{percent}"


def _time_text(value: date | time | timedelta, number_format: str) -> str:
    """A date or a time to the second; a date alone if its format shows no hours."""
    if isinstance(value, timedelta):
        seconds = round(value.total_seconds())
        return f"{seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02}"
    if isinstance(value, datetime):
        value = (value + timedelta(seconds=0.5)).replace(microsecond=0)
        if value.time() == time() and "h" not in number_format.lower():
            return value.date().isoformat()
        return value.isoformat()
    return value.replace(microsecond=0).isoformat() if isinstance(value, time) else value.isoformat()
