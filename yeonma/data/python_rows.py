"""Rows that a Python call gives instead of a path: a list of dicts, a DataFrame, a `datasets.Dataset`.

For the time of the call they lie in a temporary file, one JSON object a line, so that all processes of the call can
read them any number of times. Their identity is the SHA-256 of that file. pandas and polars are not imported here.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import tempfile
from base64 import b64encode
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import date, time, timedelta
from decimal import Decimal
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any
from uuid import UUID

from yeonma.config.data_sets import is_entry
from yeonma.data.arrow_reader import open_table
from yeonma.data.records import DataSet, Record, Source
from yeonma.data.strict_json import kind_of
from yeonma.data.words import row_place
from yeonma.errors import Problem, UserError, brief, system_reason
from yeonma.messages import tr

SETTINGS = ("data_path", "val_data_path")
"""The settings that take rows."""
ROW = "row"
"""The setting that takes one row, as JSON on the command line and also as a dict here."""
FOLDER_VARIABLE = "YEONMA_GIVEN_ROWS"
"""The environment variable with the folder of the files, for the processes that a call starts."""
ROWS_A_PIECE = 1000
_LABEL = re.compile(r"<[^<>]+ of \d+ rows?, SHA-256 ([0-9a-f]{12})>")
_WHAT = tr("give a path, a list of dicts, a pandas or polars DataFrame, or a datasets.Dataset")


_PATHS = (str, os.PathLike, type(None))


class NotData(Exception):
    """A value that JSON has no form for. The message says what it is."""


@contextmanager
def given(keywords: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The keywords of a call, with a label in place of rows, and one row as JSON. `given_set` opens a label within the
    block.

    A list of paths, of entries (`{"path": ..., "weight": 2}`) and of rows in other forms than a list is a mixture of
    data sets. Raises UserError for what is neither a path nor rows, and for rows that are no data.
    """
    if isinstance(row := keywords.get(ROW), Mapping):
        keywords = {**keywords, ROW: json.dumps(_row(row, ROW))}
    settings = [name for name in SETTINGS if not isinstance(keywords.get(name), _PATHS)]
    if not settings:
        yield dict(keywords)
        return
    folder, before = tempfile.mkdtemp(prefix="yeonma-"), os.environ.get(FOLDER_VARIABLE)
    try:
        labels = {name: _with_labels(keywords[name], name, Path(folder)) for name in settings}
        os.environ[FOLDER_VARIABLE] = folder
        yield {**keywords, **labels}
    finally:
        if before is None:
            os.environ.pop(FOLDER_VARIABLE, None)
        else:
            os.environ[FOLDER_VARIABLE] = before
        shutil.rmtree(folder, ignore_errors=True)


def _with_labels(value: Any, setting: str, folder: Path) -> Any:
    """The value of a setting with labels in place of rows."""
    if not isinstance(value, (list, tuple)) or not value or not all(map(_is_data_set, value)):
        return _write(value, setting, folder)
    sets: list[Any] = []
    for number, item in enumerate(value, 1):
        path = item["path"] if isinstance(item, Mapping) else item
        if isinstance(path, os.PathLike):
            path = os.fspath(path)
        elif not isinstance(path, _PATHS):
            path = _write(path, f"{setting}[{number}]", folder)
        sets.append({**item, "path": path} if isinstance(item, Mapping) else path)
    return sets


def _is_data_set(item: object) -> bool:
    """Whether an item of a list is a data set, and not a row."""
    if isinstance(item, Mapping):
        return is_entry(item)
    return isinstance(item, _PATHS) or _kind_of(item) is not None


def is_label(data_path: str) -> bool:
    """Whether this stands for rows that were given in Python, such as `<list of 120 rows, SHA-256 1f0e9d2c3b4a>`."""
    return _LABEL.fullmatch(data_path) is not None


def given_set(data_path: str) -> DataSet | None:
    """The rows for which a label stands; None for what is no label. Raises UserError if their call has ended."""
    match = _LABEL.fullmatch(data_path)
    if match is None:
        return None
    folder = os.environ.get(FOLDER_VARIABLE)
    paths = sorted(Path(folder).glob(f"*-{match[1]}*.jsonl")) if folder else []
    if not paths:
        cure = tr("call yeonma.sft or yeonma.dpo again with the same data, or write it to a file")
        raise UserError(tr("this data was given in Python, and lies in no file"), place=data_path, cure=cure)
    setting, _, digest = paths[0].stem.partition("-")
    return DataSet(data_path, digest, (Source(partial(_read, paths[0], setting)),))


def _read(path: Path, setting: str) -> Iterator[Record]:
    with path.open(encoding="ascii") as lines:
        for number, line in enumerate(lines, 1):
            yield row_place(setting, number), json.loads(line)


def _write(data: Any, setting: str, folder: Path) -> str:
    """Writes rows into a file in `folder`. Returns the label that stands for them."""
    kind, rows = _rows_of(data, setting)
    digest, count = sha256(), 0
    temporary = folder / setting
    try:
        with temporary.open("wb") as file:
            for count, values in enumerate(rows, 1):
                line = _line(values, row_place(setting, count))
                digest.update(line)
                file.write(line)
        temporary.rename(folder / f"{setting}-{digest.hexdigest()}.jsonl")
    except OSError as error:
        problem = tr("the rows cannot be written to a temporary file: {value}", value=system_reason(error))
        raise UserError(
            problem, place=setting, cure=tr("make room, or choose its folder with TMPDIR")
        ) from None
    if count == 0:
        raise UserError(tr("no rows"), place=setting, cure=tr("give at least one row"))
    return f"<{kind} of {count} row{'s' * (count > 1)}, SHA-256 {digest.hexdigest()[:12]}>"


def _line(values: Any, place: str) -> bytes:
    try:
        return f"{json.dumps(_row(values, place), sort_keys=True)}\n".encode("ascii")
    except RecursionError:
        raise UserError(tr("too deeply nested"), place=place, cure=tr("nest it less deeply")) from None
    except ValueError:  # Python writes whole numbers of up to 4300 digits
        raise UserError(
            tr("a number with too many digits"), place=place, cure=tr("write it as text")
        ) from None


# Kinds of data


def is_table(data: object) -> bool:
    """Whether this is a DataFrame or a data set of the library `datasets`, by the name of its class."""
    return _kind_of(data) is not None


def rows_of_table(data: Any, place: str) -> Iterator[dict[str, Any]]:
    """The rows of a table as JSON has them. Raises UserError for a kind of table that has none, and for rows that are
    no data."""
    _, rows = _rows_of(data, place)
    return (_row(values, f"{place} {number}") for number, values in enumerate(rows, 1))


def _rows_of(data: Any, setting: str) -> tuple[str, Iterable[Any]]:
    """What the data is, for the label, and its rows. Raises UserError for anything else."""
    if (kind := _kind_of(data)) is not None:
        if kind in _CURES:
            raise UserError(tr("what is given is a {kind}", kind=kind), place=setting, cure=_CURES[kind])
        return kind, _READERS[kind](data, setting)
    if isinstance(data, (list, tuple)):
        return "list", data
    raise UserError(
        tr("what is given is of type {name}", name=type(data).__name__), place=setting, cure=_WHAT
    )


def _kind_of(data: object) -> str | None:
    """The kind of table, by the name of its class; None for anything else."""
    kinds = (f"{base.__module__.partition('.')[0]} {base.__name__}" for base in type(data).__mro__)
    return next((kind for kind in kinds if kind in _READERS or kind in _CURES), None)


def _pandas_rows(frame: Any, setting: str) -> Iterator[dict[str, Any]]:
    names = _column_names(frame.columns, setting)
    if any(name is not None for name in frame.index.names):
        shown = ", ".join(str(name) for name in frame.index.names)
        cure = tr("make it columns with .reset_index(), or drop it with .reset_index(drop=True)")
        raise UserError(
            tr("the index has a name ({shown}), and is not read", shown=brief(shown)),
            place=setting,
            cure=cure,
        )
    for start in range(0, len(frame), ROWS_A_PIECE):
        piece = frame.iloc[start : start + ROWS_A_PIECE]
        columns = [piece.iloc[:, at].tolist() for at in range(len(names))]
        yield from (dict(zip(names, cells, strict=True)) for cells in zip(*columns, strict=True))


def _polars_rows(frame: Any, setting: str) -> Iterator[dict[str, Any]]:
    for piece in frame.iter_slices(ROWS_A_PIECE):
        yield from piece.to_dicts()


def _dataset_rows(table: Any, setting: str) -> Iterator[Mapping[str, object]]:
    for _, values in open_table(table, setting).read():
        assert not isinstance(values, Problem)
        yield values


def _column_names(columns: Iterable[Any], setting: str) -> list[str]:
    names = [str(column) for column in columns]
    twice = [name for name, times in Counter(names).items() if times > 1]
    if twice:
        problem = tr('two columns are named "{twice}"', twice=brief(twice[0]))
        raise UserError(problem, place=setting, cure=tr("give each column a unique name"))
    return names


_READERS: dict[str, Callable[[Any, str], Iterable[Any]]] = {
    "pandas DataFrame": _pandas_rows,
    "polars DataFrame": _polars_rows,
    "datasets Dataset": _dataset_rows,
}
"""Package and class -> its rows."""
_CURES = {
    "datasets DatasetDict": tr('give one of its splits, such as dataset["train"]'),
    "datasets IterableDataset": tr("give a list of its rows, or save it to a file"),
    "datasets IterableDatasetDict": tr("give a list of the rows of one split, or save it to a file"),
    "polars LazyFrame": tr("give what its .collect() returns"),
    "pandas Series": tr("give a DataFrame: .to_frame()"),
    "polars Series": tr("give a DataFrame: .to_frame()"),
}


# Values


def _row(values: Any, place: str) -> dict[str, Any]:
    """A row as JSON has it. Raises UserError at `place` for anything else."""
    if not isinstance(values, Mapping):
        cure = (
            tr("give one path, or a folder of files")
            if isinstance(values, str)
            else tr('write {{"column": "value", ...}}')
        )
        raise UserError(
            tr("a row must be a dict, not {values}", values=kind_of(values)), place=place, cure=cure
        )
    row = {}
    for column, value in values.items():
        if not isinstance(column, str):
            problem = tr("a column must have a text as its name, not {column}", column=brief(repr(column)))
            raise UserError(problem, place=place, cure=tr("name the columns with texts"))
        try:
            row[column] = plain(value)
        except NotData as fault:
            problem = tr(
                'column "{column}" holds {fault}, which is no data', column=brief(column), fault=fault.args[0]
            )
            raise UserError(
                problem, place=place, cure=tr("leave the column out, or write text instead")
            ) from None
    return row


def plain(value: Any) -> Any:
    """A value as JSON has it: null for NaN, NA and NaT, ISO 8601 for dates and times. Raises NotData."""
    if value is None or type(value) in (str, bool, int):
        return value
    if type(value).__name__ in ("NAType", "NaTType"):
        return None
    if isinstance(value, float):
        if math.isinf(value):
            raise NotData(tr("infinity"))
        return None if math.isnan(value) else float(value)
    for kinds, convert in _CONVERSIONS:
        if isinstance(value, kinds):
            return convert(value)
    for method in ("tolist", "to_list"):  # of NumPy's arrays and scalars; of polars' Series
        if callable(getattr(value, method, None)):
            return plain(getattr(value, method)())
    raise NotData(tr("a value of type {name}", name=type(value).__name__))


def _plain_mapping(value: Mapping[Any, Any]) -> dict[str, Any]:
    if not all(isinstance(key, str) for key in value):
        raise NotData(tr("a dict with keys that are no text"))
    return {str(key): plain(entry) for key, entry in value.items()}


_CONVERSIONS: tuple[tuple[tuple[type, ...], Callable[[Any], Any]], ...] = (
    ((str,), str),
    ((int,), int),
    ((Mapping,), _plain_mapping),
    ((list, tuple), lambda value: [plain(entry) for entry in value]),
    ((date, time), lambda value: value.isoformat()),
    ((timedelta, Decimal, UUID), str),
    ((bytes, bytearray), lambda value: {"bytes": b64encode(value).decode("ascii")}),
)
