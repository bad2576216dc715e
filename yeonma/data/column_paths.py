"""Values within a column as columns of their own: `answers.text`, `answers.text[0]`, `json(output)`.

`--columns` names them. Rows get them before a template or the recognition of columns reads the rows. A column that
really has such a name comes first.
"""

from __future__ import annotations

import json
import re
from collections.abc import Container, Iterable, Iterator, Mapping
from dataclasses import replace

from yeonma.data.columns import Columns
from yeonma.data.rows import Row, Rows
from yeonma.data.strict_json import kind_of
from yeonma.errors import UserError
from yeonma.messages import tr

_JSON = re.compile(r"json\((.+)\)", re.DOTALL)
_INDEX = re.compile(r"\[(\d{1,9})\]")
_MISSING = object()


def with_paths(rows: Rows, columns: Columns) -> Rows:
    """The rows with a column for every path in `columns` that begins with one of their columns.

    Reading raises UserError as `row_with_paths`.
    """
    paths = tuple(
        path
        for path in dict.fromkeys((columns or {}).values())
        if path not in rows.columns and _begins_in(path, rows.columns)
    )
    if not paths:
        return rows

    def read() -> Iterator[Row]:
        return (row_with_paths(row, paths) for row in rows)

    return replace(rows, columns=(*rows.columns, *paths), read=read)


def row_with_paths(row: Row, paths: Iterable[str]) -> Row:
    """The row with the values at these paths. Names of columns that it has, and paths that it lacks, add nothing.

    A list of exactly one text or number is that text or number.
    Raises UserError for a value that cannot be written as JSON where a path asks for that.
    """
    added: dict[str, object] = {}
    for path in paths:
        if path not in row.values and (value := _value_at(row, path)) is not _MISSING:
            added[path] = value
    return replace(row, values={**row.values, **added}) if added else row


def value_in(row: Row, path: str) -> object:
    """The value at a path such as `input.tools`; None if the row has none there."""
    value = _find(row.values, f".{path}")
    return None if value is _MISSING else value


def _begins_in(path: str, names: Container[str]) -> bool:
    name = _inner(path) or path
    return any(name[:end] in names for end in _ends(name)) and (name != path or name not in names)


def _inner(path: str) -> str | None:
    """`output` of `json(output)`."""
    match = _JSON.fullmatch(path)
    return match[1] if match else None


def _value_at(row: Row, path: str) -> object:
    inner = _inner(path)
    value = _find(row.values, f".{inner or path}")
    if value is _MISSING or value is None:
        return value
    if inner is not None:
        return _as_json(value, path, row.place)
    if isinstance(value, (list, tuple)) and len(value) == 1 and isinstance(value[0], (str, int, float)):
        return value[0]
    return value


def _find(value: object, path: str) -> object:
    """The value at `path` below `value`, or _MISSING. A step is `.name` or `[0]`; the longest name counts."""
    if not path:
        return value
    if index := _INDEX.match(path):
        if not isinstance(value, (list, tuple)) or int(index[1]) >= len(value):
            return _MISSING
        return _find(value[int(index[1])], path[index.end() :])
    name = path[1:]
    if path[0] != "." or not isinstance(value, Mapping):
        return _MISSING
    end = next((end for end in _ends(name) if name[:end] in value), None)
    return _MISSING if end is None else _find(value[name[:end]], name[end:])


def _ends(path: str) -> list[int]:
    """Where the first name of a path may end, the last place first."""
    return [len(path), *(number for number in range(len(path) - 1, 0, -1) if path[number] in ".[")]


def _as_json(value: object, path: str, place: str) -> str:
    """The value as JSON: no spaces between values, and no escapes for characters beyond ASCII."""
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"), default=_refused)
    except (TypeError, ValueError) as error:
        problem = tr('field "{path}" cannot be written as JSON: {error}', path=path, error=error.args[0])
        raise UserError(problem, place=place, cure=tr("write the value as text")) from None


def _refused(value: object) -> object:
    raise TypeError(tr("it holds {kind}", kind=kind_of(value)))
