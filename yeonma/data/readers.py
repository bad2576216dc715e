"""Strict streaming readers of text files: JSON lines, a JSON list, CSV and TSV.

A reader yields (line number, column -> value), row by row, with about one row in memory. Faults raise UserError with
file, line and column. Lines and columns count from 1; columns count characters.
"""

from __future__ import annotations

import codecs
import csv
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from yeonma.data.strict_json import SPACE, Fault, kind_of, parse
from yeonma.errors import Problem, UserError, brief

NumberedRow = tuple[int, dict[str, object]]

CHUNK = 1 << 18  # characters, or bytes where bytes are read
MAX_PROBLEMS = 10
NUL, BOM = "\0", "\ufeff"
# Joined files leave a byte order mark at the beginning of a line. Within a text it is an invisible space, which gives a
# warning later.
_STRAY = re.compile(f"{NUL}|(?:\\A|(?<=[\n\r])){BOM}")
OBJECT, WRITE_AGAIN = 'write {"column": "value", ...}', "write the file again"  # cures


def text_lines(path: Path, name: str, encoding: str) -> Iterator[str]:
    """The file's lines with their line ends, without a byte order mark at the start."""
    try:
        with path.open(encoding=_codec(encoding), newline="") as file:
            for number, line in enumerate(file, 1):
                if number == 1:
                    line = line.removeprefix(BOM)
                if NUL in line or (not line.isascii() and line[0] == BOM):
                    raise UserError([_stray_character(path, name, encoding, line, number, 1)])
                yield line
    except UnicodeError:
        raise UserError([_wrong_bytes(path, name, encoding)]) from None


def jsonl_rows(path: Path, name: str, encoding: str) -> Iterator[NumberedRow]:
    """Rows of a file with one JSON object per line; blank lines are skipped.

    After the first faulty line, the others are only checked; the UserError lists up to ten problems.
    """
    problems: list[Problem] = []
    empty = True
    try:
        for number, line in enumerate(text_lines(path, name, encoding), 1):
            if line.isspace() or not line:
                continue
            if empty and line.lstrip(SPACE).startswith("["):
                cure = "name the file .json, or write one object a line"
                raise UserError("a JSON list in a .jsonl file", place=f"{name}:{number}", cure=cure)
            empty = False
            try:
                row = _row_of_line(line)
            except Fault as fault:
                problems.append(_line_problem(fault, name, number, complete=line.endswith(("\n", "\r"))))
                if fault.cut or len(problems) == MAX_PROBLEMS:
                    break
                continue
            if not problems:
                yield number, row
    except UserError as error:
        problems += error.problems
    if problems:
        raise UserError(problems)
    if empty:
        raise no_rows(name)


def json_rows(path: Path, name: str, encoding: str) -> Iterator[NumberedRow]:
    """Rows of a file that holds one JSON list of objects, read element by element."""
    window = _Window(path, name, encoding)
    start = window.next_character()
    if not start:
        raise no_rows(name)
    if start != "[":
        cure = "name the file .jsonl if each line is an object" if start == "{" else "write such a list"
        raise window.error("a .json file must hold a list of objects: [{...}, ...]", cure=cure)
    window.move(window.at + 1)
    if window.next_character() == "]":
        raise no_rows(name)
    separator = ","
    while separator == ",":
        window.next_character()
        line, value = window.line, window.take_value()
        if not isinstance(value, dict):
            problem = f"a row must be an object, not {kind_of(value)}"
            raise UserError(problem, place=f"{name}:{line}", cure=OBJECT)
        yield line, value
        separator = window.next_character()
        if separator not in (",", "]"):
            problem = 'not JSON: expecting "," or "]" after a row'
            if separator:
                raise window.error(problem, cure="put a comma between two rows, and ] after the last one")
            raise window.error(f"{problem}: the file is truncated", cure=WRITE_AGAIN)
        window.move(window.at + 1)
    if window.next_character():
        raise window.error("text after the list", cure="a .json file must hold one list")


def csv_rows(path: Path, name: str, encoding: str, delimiter: str = ",") -> Iterator[NumberedRow]:
    """Rows of a CSV (RFC 4180) or TSV file with a header.

    An empty cell is empty text; columns without a name and blank lines are skipped. A row's line is the one it begins
    on; line breaks in quoted cells count.
    """
    records = _records(path, name, encoding, delimiter)
    start, header = next(records, (1, []))
    if not header:
        raise no_rows(name)
    duplicates = sorted(column for column, times in Counter(header).items() if times > 1)
    if duplicates:
        problems = [
            Problem(
                f'the header has "{brief(column)}" twice', f"{name}:{start}", "give each column a unique name"
            )
            for column in duplicates[:MAX_PROBLEMS]
        ]
        raise UserError(problems)
    columns = len(header)
    problems = []
    empty = True
    for line, cells in records:
        empty = False
        if len(cells) != columns:
            problem = f"{len(cells)} cells; the header has {columns}"
            cure = "put cells with commas or line breaks in quotes"
            problems.append(Problem(problem, f"{name}:{line}", cure))
            if len(problems) == MAX_PROBLEMS:
                break
        elif not problems:
            yield line, {column: cell for column, cell in zip(header, cells, strict=True) if column}
    if problems:
        raise UserError(problems)
    if empty:
        raise UserError("a header but no rows", place=name, cure="give a file with at least one row")


def no_rows(name: str) -> UserError:
    return UserError("no rows", place=name, cure="give a file with at least one row")


# Text


def _codec(encoding: str) -> str:
    return "utf-8-sig" if encoding == "utf-8" else encoding


def _place_after(line: int, column: int, text: str) -> tuple[int, int]:
    """Line and column after `text`, which begins at `line` and `column`."""
    breaks = text.count("\n")
    return (line + breaks, len(text) - text.rfind("\n")) if breaks else (line, column + len(text))


def _stray_character(path: Path, name: str, encoding: str, text: str, line: int, column: int) -> Problem:
    """The first NUL or byte order mark of `text`, which begins at `line` and `column`."""
    match = _STRAY.search(text)
    assert match is not None
    line, column = _place_after(line, column, text[: match.start()])
    place = f"{name}:{line}:{column}"
    if match[0] == BOM:
        cure = "remove it; joining files leaves such marks"
        return Problem("a byte order mark (U+FEFF) in the middle of the file", place, cure)
    suggestion = _unicode_suggestion(path)
    cure = f"if that is the file's encoding, give {suggestion}" if suggestion else "remove it"
    return Problem("a NUL character (U+0000)", place, cure)


def _wrong_bytes(path: Path, name: str, encoding: str) -> Problem:
    """The place of the first bytes that are not text in `encoding`. Reads the file again; errors may be slow."""
    decoder = codecs.getincrementaldecoder(_codec(encoding))()
    line, column, offset = 1, 1, 0
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            state = decoder.getstate()
            try:
                line, column = _place_after(line, column, decoder.decode(chunk))
            except UnicodeError:
                break
            offset += len(chunk)
    if not chunk:
        problem = f"the file ends inside a {encoding} character: its last line is truncated"
        return Problem(problem, f"{name}:{line}:{column}", WRITE_AGAIN)
    decoder.setstate(state)
    for byte in chunk:
        try:
            line, column = _place_after(line, column, decoder.decode(bytes([byte])))
        except UnicodeError:
            break
        offset += 1
    return Problem(f"not {encoding} text", f"{name}:{line}:{column}", _encoding_cure(path, encoding, offset))


def _encoding_cure(path: Path, encoding: str, offset: int) -> str:
    """A suggestion for `--encoding`. Only a message guesses the encoding; reading never does."""
    suggestion = _unicode_suggestion(path)
    with path.open("rb") as file:
        file.seek(max(offset - 1000, 0))
        before, after = file.read(min(offset, 1000)), file.read(1000)
    line = before[before.rfind(b"\n") + 1 :] + after.split(b"\n")[0]
    for candidate in ("utf-8", "cp949"):
        text = line.decode(candidate, "replace")
        korean = sum("가" <= character <= "힣" for character in text)
        if not suggestion and candidate != encoding and korean > 10 * text.count("\ufffd"):
            suggestion = f"--encoding {candidate}"
    if suggestion:
        return f"if that is the file's encoding, give {suggestion}"
    return "give the file's encoding, such as --encoding cp949, or save it as UTF-8"


def _unicode_suggestion(path: Path) -> str:
    """The option for UTF-16 or UTF-32 if the file's first bytes look like it, else an empty string."""
    with path.open("rb") as file:
        head = file.read(1000)
    if head.startswith((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)):
        return "--encoding utf-32"
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "--encoding utf-16"
    even, odd = head[::2].count(0), head[1::2].count(0)
    if even + odd <= len(head) // 10:
        return ""
    return "--encoding utf-16-le" if odd > even else "--encoding utf-16-be"


# JSON


def _row_of_line(line: str) -> dict[str, object]:
    at = 0 if line[0] == "{" else len(line) - len(line.lstrip(SPACE))
    value, end = parse(line, at)
    if not isinstance(value, dict):
        raise Fault(f"a row must be an object, not {kind_of(value)}", at, OBJECT)
    extra = line[end:].lstrip(SPACE)
    if extra:
        problem = "a second object on the line" if extra[0] == "{" else "text after the object"
        raise Fault(problem, len(line) - len(extra), "write one object a line")
    return value


def _line_problem(fault: Fault, name: str, number: int, *, complete: bool) -> Problem:
    place = f"{name}:{number}:{fault.at + 1}"
    if not fault.cut:
        return Problem(fault.problem, place, fault.cure)
    if complete:
        return Problem(f"{fault.problem}: the line ends before its object", place, "write one object a line")
    return Problem(f"{fault.problem}: the last line is truncated", place, WRITE_AGAIN)


class _Window:
    """A window that slides along a text file. The text before `at` is dropped when more is read."""

    def __init__(self, path: Path, name: str, encoding: str) -> None:
        self._path, self._name, self._encoding = path, name, encoding
        self._chunks = self._read()
        self._text, self._ended = "", False
        self.at, self.line, self._column = 0, 1, 1

    def _read(self) -> Iterator[str]:
        try:
            with self._path.open(encoding=_codec(self._encoding), newline="") as file:
                yield file.read(CHUNK).removeprefix(BOM)
                while chunk := file.read(CHUNK):
                    yield chunk
        except UnicodeError:
            raise UserError([_wrong_bytes(self._path, self._name, self._encoding)]) from None

    def _fill(self) -> None:
        """Double the unread text, by at least one chunk, so that a long row takes few attempts."""
        self._text = self._text[self.at :]
        self.at, size = 0, max(CHUNK, 2 * len(self._text))
        parts = [self._text]
        while size > sum(map(len, parts)) and not self._ended:
            parts.append(next(self._chunks, ""))
            self._ended = not parts[-1]
        self._text = "".join(parts)
        if _STRAY.search(self._text):
            source = self._path, self._name, self._encoding
            raise UserError([_stray_character(*source, self._text, self.line, self._column)])

    def move(self, at: int) -> None:
        self.line, self._column = self._place(at)
        self.at = at

    def next_character(self) -> str:
        """Move over white space to the next character; an empty string at the end of the file."""
        while True:
            at = self.at
            while at < len(self._text) and self._text[at] in SPACE:
                at += 1
            self.move(at)
            if at < len(self._text):
                return self._text[at]
            if self._ended:
                return ""
            self._fill()

    def take_value(self) -> object:
        while True:
            try:
                value, end = parse(self._text, self.at)
            except Fault as fault:
                if fault.cut and not self._ended:
                    self._fill()
                    continue
                if fault.cut:
                    raise self.error(
                        f"{fault.problem}: the file is truncated", fault.at, WRITE_AGAIN
                    ) from None
                raise self.error(fault.problem, fault.at, fault.cure) from None
            self.move(end)
            return value

    def error(self, problem: str, at: int | None = None, cure: str = "") -> UserError:
        line, column = self._place(self.at if at is None else at)
        return UserError(problem, place=f"{self._name}:{line}:{column}", cure=cure)

    def _place(self, at: int) -> tuple[int, int]:
        return _place_after(self.line, self._column, self._text[self.at : at])


# CSV


def _records(path: Path, name: str, encoding: str, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """Line and cells of each record. Raises UserError for wrong quotes, at the line that opened them."""
    csv.field_size_limit(2**31 - 1)  # a row may be long; the module's own limit is 128 KiB a cell
    record: list[str] = []  # the lines of the current record, for the place of an error

    def lines() -> Iterator[str]:
        for line in text_lines(path, name, encoding):
            record.append(line)
            yield line

    reader = csv.reader(lines(), delimiter=delimiter, strict=True)
    while True:
        start = reader.line_num + 1
        record.clear()
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise UserError([_quote_problem("".join(record), name, start, delimiter, error)]) from None
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
    line, column = _place_after(start, 1, text[:opened])
    problem = "a quote that is never closed"
    if closing >= 0:
        end_line, end_column = _place_after(start, 1, text[: closing + 1])
        problem = f"a quoted cell with text after its closing quote, at {end_line}:{end_column}"
    return Problem(problem, f"{name}:{line}:{column}", 'close it, and write " inside a quoted cell as ""')
