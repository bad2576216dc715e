"""JSON files, streamed: one object a line, a list of objects, an object around such a list, columns of lists.

Line and column of every fault count from 1; columns count characters.
"""

from __future__ import annotations

from collections.abc import Container, Iterator
from dataclasses import dataclass, replace
from functools import partial

from yeonma.data.records import FileOptions, Record, Source, no_rows
from yeonma.data.strict_json import SPACE, Fault, kind_of, parse
from yeonma.data.text_file import CHUNK, WRITE_AGAIN, TextFile, is_stray, place_after
from yeonma.data.words import row_place, with_more
from yeonma.errors import Problem, UserError, brief, did_you_mean
from yeonma.messages import tr

MAX_PROBLEMS = 10
MAX_COLUMNS = 100
"""Columns of lists are read side by side, each through a file of its own."""
OBJECT, LINES = tr('write {{"column": "value", ...}}'), tr("write one object a line")  # cures


def open_json_lines(file: TextFile, options: FileOptions) -> Source:
    """A file with one object a line. If its first object spans lines, objects follow one another as in `open_json`."""
    if _begins_with_a_long_object(file):
        return _open_objects(file, options)
    return _open_lines(file, options)


def open_json(file: TextFile, options: FileOptions) -> Source:
    """A list of objects; objects one after another; an object with one list of objects; or columns of lists.

    `options.part` names the key of the list in an object with several.
    """
    window = _Window(file)
    start = window.next_character()
    if not start:
        raise no_rows(file.name)
    if start == "{":
        return _open_objects(file, options)
    if start != "[":
        raise window.error(
            tr("a .json file must hold a list of objects: [{{...}}, ...]"), cure=tr("write such a list")
        )
    if options.part is not None:
        raise _no_parts(file.name, options.part, tr("a list"))
    return Source(partial(_list_rows, file, options))


# Objects


@dataclass(frozen=True)
class _Position:
    """A position in a file: characters before it, and its line and column."""

    offset: int = 0
    line: int = 1
    column: int = 1


@dataclass(frozen=True)
class _List:
    """A list under a key of an object: where it begins, and what it holds."""

    start: _Position
    length: int
    first_object: dict[str, object] | None

    @property
    def holds_objects(self) -> bool:
        return self.first_object is not None

    @property
    def holds_turns(self) -> bool:
        keys = self.first_object or {}
        return any(turn <= keys.keys() for turn in ({"role", "content"}, {"from", "value"}))


def _begins_with_a_long_object(file: TextFile) -> bool:
    """Whether the first object has several lines; False too if it is faulty, so that its line is reported."""
    line = next((line for line in file.raw_lines() if line and not line.isspace()), "")
    if not line.lstrip(SPACE).startswith("{") or not line.endswith(("\n", "\r")):
        return False
    try:
        _row_of_line(line)
        return False
    except Fault as fault:
        if not fault.cut:
            return False
    window = _Window(file)
    window.next_character()
    try:
        _lists_by_key(window)
    except UserError:
        return False
    return True


def _open_objects(file: TextFile, options: FileOptions) -> Source:
    """A file that begins with an object: several one after another, or one whose lists may be the rows."""
    window = _Window(file)
    window.next_character()
    first_line = window.line
    lists = _lists_by_key(window)
    last_line = window.line
    following = window.next_character()
    if following and following != "{":
        raise window.error(
            tr("text after the object"), cure=tr("write a list of objects: [{{...}}, {{...}}]")
        )
    if following and first_line == last_line < window.line:
        return _open_lines(file, options)
    if following and options.part is not None:
        raise _no_parts(file.name, options.part, tr("several objects"))
    return Source(partial(_object_rows, file)) if following else _open_one_object(file, lists, options)


def _open_one_object(file: TextFile, by_key: dict[str, _List | None], options: FileOptions) -> Source:
    name, part = file.name, options.part
    lists = {key: entry for key, entry in by_key.items() if entry is not None}
    tables = {key: entry for key, entry in lists.items() if entry.holds_objects}
    if part is not None:
        if part not in lists:
            cure = did_you_mean(part, lists) or tr("its lists are {lists}", lists=_shown(lists) or tr("none"))
            raise UserError(tr('no list under the key "{part}"', part=brief(part)), place=name, cure=cure)
        return Source(partial(_list_rows, file, options, lists[part].start))
    if any(entry.holds_turns for entry in lists.values()):
        return Source(partial(_object_rows, file))
    all_lists, lengths = len(lists) == len(by_key), {entry.length for entry in lists.values()}
    if all_lists and len(lengths) == 1 and len(tables) < len(lists):  # cells may be objects
        return _open_columns(file, lists)
    if len(tables) > 1:
        cure = tr("name the one to read: {name}:{tables}", name=name, tables=next(iter(tables)))
        raise UserError(
            tr("several keys hold lists of objects: {tables}", tables=_shown(tables)), place=name, cure=cure
        )
    if tables:
        ((key, entry),) = tables.items()
        note = tr('{name}: the rows are the list under the key "{key}"', name=name, key=brief(key))
        return Source(partial(_list_rows, file, options, entry.start), (note,))
    if not lists or not all_lists:
        return Source(partial(_object_rows, file))
    return _open_columns(file, lists)


def _open_columns(file: TextFile, lists: dict[str, _List]) -> Source:
    name, lengths = file.name, {entry.length for entry in lists.values()}
    if len(lengths) > 1:
        shown = ", ".join(f'"{brief(key)}" {entry.length:,}' for key, entry in list(lists.items())[:10])
        cure = tr("make them equally long, or write one object a line")
        raise UserError(tr("columns of different lengths: {shown}", shown=shown), place=name, cure=cure)
    if len(lists) > MAX_COLUMNS:
        raise UserError(
            tr("more than {max_columns} columns of lists", max_columns=MAX_COLUMNS), place=name, cure=LINES
        )
    if lengths == {0}:
        raise no_rows(name)
    starts = {key: entry.start for key, entry in lists.items()}
    return Source(partial(_rows_of_columns, file, starts), (tr("{name}: its lists are columns", name=name),))


def _shown(keys: dict[str, _List]) -> str:
    return with_more((f'"{brief(key)}"' for key in keys), 10)


def _no_parts(name: str, part: str, what: str) -> UserError:
    problem = tr('it holds {what}, so it has no key "{part}"', what=what, part=brief(part))
    return UserError(problem, place=name, cure=tr("give {name} without :{part}", name=name, part=brief(part)))


# Rows


def _open_lines(file: TextFile, options: FileOptions) -> Source:
    if options.part is not None:
        raise _no_parts(file.name, options.part, tr("one object a line"))
    return Source(partial(_rows_of_lines_without_stop if options.skip_bad else _rows_of_lines, file))


def _rows_of_lines(file: TextFile) -> Iterator[Record]:
    """One object a line; blank lines are skipped.

    After the first faulty line, the others are only checked; the UserError lists up to ten problems.
    """
    name = file.name
    problems: list[Problem] = []
    empty, has_good = True, False
    try:
        for number, line in enumerate(file.lines(), 1):
            if line.isspace() or not line:
                continue
            if empty:
                _check_is_no_list(line, name, number)
            empty = False
            try:
                row = _row_of_line(line)
            except Fault as fault:
                problems.append(_line_problem(fault, name, number, complete=line.endswith(("\n", "\r"))))
                if fault.cut or len(problems) == MAX_PROBLEMS:
                    break
                continue
            has_good = True
            if not problems:
                yield f"{name}:{number}", row
    except UserError as error:
        problems += error.problems
        has_good = False  # the file cannot be read on
    if problems:
        raise UserError([replace(problem, of_row=has_good) for problem in problems])
    if empty:
        raise no_rows(name)


def _rows_of_lines_without_stop(file: TextFile) -> Iterator[Record]:
    """Like `_rows_of_lines`, with the problem of every faulty line in its place."""
    name, empty = file.name, True
    for number, line in enumerate(file.raw_lines(), 1):
        if line.isspace() or not line:
            continue
        if empty:
            _check_is_no_list(line, name, number)
        empty = False
        place = f"{name}:{number}"
        if is_stray(line):
            yield place, file.stray_character(line, number, 1)
            continue
        try:
            yield place, _row_of_line(line)
        except Fault as fault:
            yield place, _line_problem(fault, name, number, complete=line.endswith(("\n", "\r")))
    if empty:
        raise no_rows(name)


def _check_is_no_list(line: str, name: str, number: int) -> None:
    if line.lstrip(SPACE).startswith("["):
        cure = tr("name the file .json, or write one object a line")
        raise UserError(tr("a JSON list in a .jsonl file"), place=f"{name}:{number}", cure=cure)


def _list_rows(file: TextFile, options: FileOptions, start: _Position | None = None) -> Iterator[Record]:
    """The objects of the list at `start`; without it, of the list that is the whole file."""
    window, name, empty = _Window(file, start or _Position()), file.name, True
    window.next_character()
    for line, value in _entries(window):
        empty = False
        place = f"{name}:{line}"
        if isinstance(value, dict):
            yield place, value
            continue
        problem = Problem(
            tr("a row must be an object, not {value}", value=kind_of(value)), place, OBJECT, of_row=True
        )
        if not options.skip_bad:
            raise UserError([problem])
        yield place, problem
    if empty:
        raise no_rows(name)
    if start is None and window.next_character():
        raise window.error(tr("text after the list"), cure=tr("a .json file must hold one list"))


def _object_rows(file: TextFile) -> Iterator[Record]:
    """Objects one after another, over any number of lines."""
    window, last_line = _Window(file), 0
    while start := window.next_character():
        if start != "{":
            raise window.error(
                tr("text after the object"), cure=tr("write a list of objects: [{{...}}, {{...}}]")
            )
        if window.line == last_line:
            raise window.error(tr("a second object on the line"), cure=LINES)
        line, value = window.line, window.take_value()
        assert isinstance(value, dict)
        yield f"{file.name}:{line}", value
        last_line = window.line


def _rows_of_columns(file: TextFile, starts: dict[str, _Position]) -> Iterator[Record]:
    """One row for each position of the lists that begin at `starts`."""
    columns = [_entries(_Window(file, start)) for start in starts.values()]
    for number, cells in enumerate(zip(*columns, strict=True), 1):
        yield row_place(file.name, number), {key: cell for key, (_, cell) in zip(starts, cells, strict=True)}


def _row_of_line(line: str) -> dict[str, object]:
    at = 0 if line[0] == "{" else len(line) - len(line.lstrip(SPACE))
    value, end = parse(line, at)
    if not isinstance(value, dict):
        raise Fault(tr("a row must be an object, not {value}", value=kind_of(value)), at, OBJECT)
    extra = line[end:].lstrip(SPACE)
    if extra:
        problem = tr("a second object on the line") if extra[0] == "{" else tr("text after the object")
        raise Fault(problem, len(line) - len(extra), LINES)
    return value


def _line_problem(fault: Fault, name: str, number: int, *, complete: bool) -> Problem:
    place = f"{name}:{number}:{fault.at + 1}"
    if not fault.cut:
        return Problem(fault.problem, place, fault.cure)
    if complete:
        return Problem(tr("{problem}: the line ends before its object", problem=fault.problem), place, LINES)
    return Problem(tr("{problem}: the last line is truncated", problem=fault.problem), place, WRITE_AGAIN)


# A window over the text


class _Window:
    """A window that slides along a text file. The text before `at` is dropped when more is read."""

    def __init__(self, file: TextFile, start: _Position | None = None) -> None:
        start = start or _Position()
        self._file = file
        self._chunks = file.chunks()
        self._text, self._ended = "", False
        self._before = 0  # characters before the text
        self.at, self.line, self._column = 0, start.line, start.column
        while self._before + len(self._text) < start.offset and not self._ended:
            self._before += len(self._text)
            self._text = next(self._chunks, "")
            self._ended = not self._text
        self.at = start.offset - self._before

    @property
    def name(self) -> str:
        return self._file.name

    @property
    def position(self) -> _Position:
        return _Position(self._before + self.at, self.line, self._column)

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
                    problem = tr("{problem}: the file is truncated", problem=fault.problem)
                    raise self.error(problem, fault.at, WRITE_AGAIN) from None
                raise self.error(fault.problem, fault.at, fault.cure) from None
            if end == len(self._text) and not self._ended:  # a number may go on in the next chunk
                self._fill()
                continue
            self.move(end)
            return value

    def error(self, problem: str, at: int | None = None, cure: str = "") -> UserError:
        line, column = self._place(self.at if at is None else at)
        return UserError(problem, place=f"{self.name}:{line}:{column}", cure=cure)

    def _fill(self) -> None:
        """Double the unread text, by at least one chunk, so that a long row takes few attempts."""
        self._text = self._text[self.at :]
        self._before += self.at
        self.at, size = 0, max(CHUNK, 2 * len(self._text))
        parts = [self._text]
        while size > sum(map(len, parts)) and not self._ended:
            parts.append(next(self._chunks, ""))
            self._ended = not parts[-1]
        self._text = "".join(parts)
        self._file.check(self._text, self.line, self._column)

    def _place(self, at: int) -> tuple[int, int]:
        return place_after(self.line, self._column, self._text[self.at : at])


def _entries(window: _Window) -> Iterator[tuple[int, object]]:
    """The entries of the list at the window, or the values of an object, with their lines.

    Afterwards, the window is behind them.
    """
    closing = "}" if window.next_character() == "{" else "]"
    window.move(window.at + 1)
    if window.next_character() == closing:
        window.move(window.at + 1)
        return
    separator = ","
    while separator == ",":
        if closing == "}":
            _take_key(window, ())
        window.next_character()
        yield window.line, window.take_value()
        separator = _separator(window, closing, of_rows=True)


def _lists_by_key(window: _Window) -> dict[str, _List | None]:
    """The keys of the object at the window, with their lists; None for other values. Moves behind the object."""
    by_key: dict[str, _List | None] = {}
    window.move(window.at + 1)
    if window.next_character() == "}":
        window.move(window.at + 1)
        return by_key
    separator = ","
    while separator == ",":
        key = _take_key(window, by_key)
        by_key[key] = _list_at(window) if window.next_character() == "[" else _numbered_values_at(window)
        separator = _separator(window, "}", of_rows=False)
    return by_key


def _list_at(window: _Window) -> _List:
    start, length, first_object = window.position, 0, None
    for _, value in _entries(window):
        if first_object is None and isinstance(value, dict):
            first_object = value
        length += 1
    return _List(start, length, first_object)


def _numbered_values_at(window: _Window) -> _List | None:
    """The values of an object with the keys 0, 1, ..., as pandas writes columns; None for any other value."""
    start, value = window.position, window.take_value()
    if not isinstance(value, dict) or not value or any(key != str(at) for at, key in enumerate(value)):
        return None
    return _List(start, len(value), None)


def _take_key(window: _Window, known: Container[str]) -> str:
    """The key at the window, which moves behind its colon. Raises UserError for one of the `known` keys."""
    if window.next_character() != '"':
        cure = tr('write "column": "value", in double quotes, and no comma after the last one')
        raise _cut_or(window, tr("not JSON: expecting property name enclosed in double quotes"), cure)
    before = window.position
    key = str(window.take_value())
    if key in known:
        place = f"{window.name}:{before.line}:{before.column}"
        raise UserError(
            tr('the key "{key}" appears twice in one object', key=brief(key)),
            place=place,
            cure=tr("keep one"),
        )
    if window.next_character() != ":":
        raise _cut_or(window, tr("not JSON: expecting ':' delimiter"), tr('write "column": "value"'))
    window.move(window.at + 1)
    return key


def _separator(window: _Window, closing: str, *, of_rows: bool) -> str:
    """The comma or the closing bracket after an entry; the window moves behind it."""
    separator = window.next_character()
    if separator not in (",", closing):
        if of_rows:
            problem = tr('not JSON: expecting "," or "{closing}" after a row', closing=closing)
            cure = tr("put a comma between two rows, and {closing} after the last one", closing=closing)
        else:
            problem = tr('not JSON: expecting "," or "{closing}" after a value', closing=closing)
            cure = tr("put a comma between two values, and {closing} after the last one", closing=closing)
        raise _cut_or(window, problem, cure)
    window.move(window.at + 1)
    return separator


def _cut_or(window: _Window, problem: str, cure: str) -> UserError:
    """The error at the window; at the end of the file, that it is truncated."""
    if window.next_character():
        return window.error(problem, cure=cure)
    return window.error(tr("{problem}: the file is truncated", problem=problem), cure=WRITE_AGAIN)
