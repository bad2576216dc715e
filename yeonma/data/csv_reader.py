"""CSV (RFC 4180) and TSV files with a header, streamed.

An empty cell is empty text. A row's line is the one it begins on; line breaks in quoted cells count.
"""

from __future__ import annotations

import csv
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice

from yeonma.data.records import FileOptions, Record, Source, no_rows
from yeonma.data.text_file import WRITE_AGAIN, TextFile, place_after
from yeonma.errors import Problem, UserError, brief
from yeonma.messages import counted, tr

MAX_PROBLEMS = 10
MAX_HEADER_LINES = 20
DELIMITERS = (",", ";", "\t", "|")
"""What may separate the columns of a file whose ending promises another delimiter."""
_SEP_LINE = re.compile(r'"?sep=(.)"?[\r\n]*', re.IGNORECASE)
"""The line that Excel reads before the header."""
_SEEN_ROWS = 100
"""Rows in which values without a column name are looked for."""


@dataclass(frozen=True)
class Header:
    """The columns of a table. A column without a name has an empty one, and is not read."""

    names: tuple[str, ...]
    notes: tuple[str, ...]

    def fitted(self, cells: list[str]) -> list[str] | None:
        """The cells of a row that has more or fewer of them than the header, if only empty ones are at stake."""
        columns = len(self.names)
        if any(self.names[len(cells) :]) or any(map(str.strip, cells[columns:])):
            return None
        return [*cells[:columns], *[""] * (columns - len(cells))]


@dataclass(frozen=True)
class _Layout:
    """How a file is divided into cells, and its columns."""

    delimiter: str
    lines_before: int
    """Lines before the header that are no data."""
    header: Header


def open_csv(file: TextFile, options: FileOptions, delimiter: str = ",") -> Source:
    """A file whose cells are separated by `delimiter`, unless its header or `options` say otherwise."""
    head = list(islice(file.lines(), MAX_HEADER_LINES))
    declared = _SEP_LINE.fullmatch(head[0]) if head else None
    lines_before = 1 if declared else 0
    found = declared[1] if declared else _found_delimiter(head, delimiter)
    notes = []
    if options.delimiter is None and found != delimiter:
        notes.append(
            tr("{file}: columns are separated by a tab", file=file.name)
            if found == chr(9)
            else tr("{file}: columns are separated by {found}", file=file.name, found=found)
        )
    delimiter = options.delimiter or found
    line, cells = next(_records(file, delimiter, lines_before), (1, []))
    if not cells:
        raise no_rows(file.name)
    header = header_of(cells, file.name, f"{file.name}:{line}")
    layout = _Layout(delimiter, lines_before, header)
    notes += [*header.notes, *_unnamed(file, layout)]
    return Source(partial(_rows, file, layout, options.skip_bad), tuple(notes))


def header_of(cells: Sequence[str], name: str, place: str) -> Header:
    """The header in these cells, at `place` of the file `name`. Blanks around names are dropped if they stay distinct.

    Raises UserError for equal names, and if no column has one.
    """
    notes: list[str] = []
    stripped = [cell.strip() for cell in cells]
    if stripped != list(cells) and not _twice(stripped):
        padded = [
            f'"{brief(cell)}"' for cell, short in zip(cells, stripped, strict=True) if short != cell and short
        ]
        if padded:
            notes.append(
                tr(
                    "{name}: blanks around column names are left out: {padded}",
                    name=name,
                    padded=", ".join(padded[:MAX_PROBLEMS]),
                )
            )
        cells = stripped
    problems = [
        Problem(
            tr('the header has "{column}" twice', column=brief(column)),
            place,
            tr("give each column a unique name"),
        )
        for column in _twice(cells)[:MAX_PROBLEMS]
    ]
    if not any(cells):
        problems = [
            Problem(
                tr("no column has a name"), place, tr("write the names of the columns into the first row")
            )
        ]
    if problems:
        raise UserError(problems)
    return Header(tuple(cells), tuple(notes))


def unnamed_note(name: str, header: Header, rows: Iterable[Sequence[str]]) -> list[str]:
    """A line about columns without a name that have values in these rows; none if there are none."""
    unnamed = {
        number
        for cells in rows
        for number, cell in enumerate(cells, 1)
        if not (header.names[number - 1] if number <= len(header.names) else "") and cell.strip()
    }
    if not unnamed:
        return []
    if len(unnamed) == 1:
        return [
            tr("{name}: columns without a name are not read: column {first}", name=name, first=min(unnamed))
        ]
    return [
        tr(
            "{name}: columns without a name are not read: {count}, the first is {first}",
            name=name,
            count=len(unnamed),
            first=min(unnamed),
        )
    ]


def _twice(names: Sequence[str]) -> list[str]:
    return sorted(column for column, times in Counter(names).items() if times > 1 and column)


def _unnamed(file: TextFile, layout: _Layout) -> list[str]:
    if all(layout.header.names):
        return []
    seen: list[list[str]] = []
    try:
        records = _records(file, layout.delimiter, layout.lines_before)
        seen.extend(cells for _, cells in islice(records, 1, 1 + _SEEN_ROWS))
    except UserError:  # raised when the rows are read
        pass
    return unnamed_note(file.name, layout.header, (cells[: len(layout.header.names)] for cells in seen))


def _found_delimiter(head: Sequence[str], own: str) -> str:
    """The only other delimiter that divides the header, if the file's own one does not; else the own one."""
    if _divides(head, own):
        return own
    others = [delimiter for delimiter in DELIMITERS if delimiter != own and _divides(head, delimiter)]
    return others[0] if len(others) == 1 else own


def _divides(head: Sequence[str], delimiter: str) -> bool:
    """Whether the first record of these lines has several cells."""
    lines = (line for line in head if not line.isspace())
    try:
        return len(next(csv.reader(lines, delimiter=delimiter, strict=True), [])) > 1
    except csv.Error:
        return False


def _rows(file: TextFile, layout: _Layout, skip_bad: bool) -> Iterator[Record]:
    """Empty rows are skipped. The UserError of wrong rows lists up to ten of them; `skip_bad`: see `FileOptions`."""
    name, header = file.name, layout.header
    names, columns, all_named = header.names, len(header.names), all(header.names)
    problems: list[Problem] = []
    empty, has_good = True, False
    for line, cells in islice(_records(file, layout.delimiter, layout.lines_before), 1, None):
        if not cells[0].strip() and not any(map(str.strip, cells)):
            continue
        empty = False
        if len(cells) != columns:
            fitted = header.fitted(cells)
            if fitted is None:
                problem = tr(
                    "{cells}; the header has {columns}", cells=counted(len(cells), "cell"), columns=columns
                )
                cure = tr("put cells with commas or line breaks in quotes")
                wrong = Problem(problem, f"{name}:{line}", cure)
                if skip_bad:
                    yield wrong.place, wrong
                    continue
                problems.append(wrong)
                if len(problems) == MAX_PROBLEMS:
                    break
                continue
            cells = fitted
        has_good = True
        if problems:
            continue
        if all_named:
            yield f"{name}:{line}", dict(zip(names, cells, strict=True))
        else:
            yield (
                f"{name}:{line}",
                {column: cell for column, cell in zip(names, cells, strict=True) if column},
            )
    if problems:
        raise UserError([replace(problem, of_row=has_good) for problem in problems])
    if empty:
        raise UserError(tr("a header but no rows"), place=name, cure=tr("give a file with at least one row"))


def _records(file: TextFile, delimiter: str, lines_before: int) -> Iterator[tuple[int, list[str]]]:
    """Line and cells of each record behind the first lines; blank lines are skipped.

    Raises UserError for wrong quotes, at the line that opened them.
    """
    csv.field_size_limit(2**31 - 1)  # a row may be long; the module's own limit is 128 KiB a cell
    record: list[str] = []  # the lines of the current record, for the place of an error

    def lines() -> Iterator[str]:
        for line in islice(file.lines(), lines_before, None):
            record.append(line)
            yield line

    reader = csv.reader(lines(), delimiter=delimiter, strict=True)
    while True:
        start = lines_before + reader.line_num + 1
        record.clear()
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            problem = _quote_problem("".join(record), file.name, start, delimiter, error)
            raise UserError([problem]) from None
        if len(cells) > 1 or (cells and not cells[0].isspace()):
            yield start, cells


def _quote_problem(text: str, name: str, start: int, delimiter: str, error: csv.Error) -> Problem:
    """The problem of a quoted cell that the csv module rejected. `text` is the record so far, from line `start`."""
    at = 0
    while at < len(text):
        if text[at] != '"':  # an unquoted cell: up to the next delimiter or the end of the line
            while at < len(text) and text[at] not in delimiter + "\r\n":
                at += 1
        else:
            opened = at
            closing = text.find('"', at + 1)
            while closing >= 0 and text[closing + 1 : closing + 2] == '"':
                closing = text.find('"', closing + 2)
            if closing < 0 or text[closing + 1 : closing + 2] not in (delimiter, "\r", "\n", ""):
                break
            at = closing + 1
        at += 1
    else:
        return Problem(str(error), f"{name}:{start}", WRITE_AGAIN)
    line, column = place_after(start, 1, text[:opened])
    problem = tr("a quote that is never closed")
    if closing >= 0:
        end_line, end_column = place_after(start, 1, text[: closing + 1])
        problem = tr(
            "a quoted cell with text after its closing quote, at {end_line}:{end_column}",
            end_line=end_line,
            end_column=end_column,
        )
    return Problem(problem, f"{name}:{line}:{column}", tr('close it, and write " inside a quoted cell as ""'))
