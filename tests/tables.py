"""Small tables in every form, and the errors that reading them ends with."""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from yeonma.data.rows import Rows, open_rows
from yeonma.errors import UserError

TABLE = [
    {"document": "첫 기사\n둘째 줄", "title": "제목 1"},
    {"document": 'He said "no", twice', "title": "b"},
    {"document": "쉼표, 그리고 {중괄호}", "title": "😀"},
]

Write = Callable[[str, str | bytes], str]


def jsonl(table: Iterable[dict[str, object]], *, ascii_only: bool = False) -> str:
    return "".join(json.dumps(row, ensure_ascii=ascii_only) + "\n" for row in table)


def table_as(kind: str, table: list[dict[str, str]]) -> bytes:
    """The content of a file with the ending `kind`, such as `csv` or `csv.gz`."""
    if kind.endswith(".gz"):
        return gzip.compress(table_as(kind.removesuffix(".gz"), table), mtime=0)
    if kind.endswith(".zst"):
        return pa.compress(table_as(kind.removesuffix(".zst"), table), codec="zstd", asbytes=True)
    if kind in ("jsonl", "ndjson"):
        return jsonl(table).encode()
    if kind == "xlsx":
        columns = columns_of(table)
        return workbook({"Sheet1": [columns, *([row.get(name) for name in columns] for row in table)]})
    if kind == "arrow":
        return arrow_bytes(pa.Table.from_pylist(table), pa.ipc.new_stream)
    if kind == "json":
        return json.dumps(table, indent=2).encode()
    if kind == "parquet":
        sink = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(table), sink)
        return sink.getvalue()
    text = io.StringIO()
    writer = csv.DictWriter(text, columns_of(table), delimiter="," if kind == "csv" else "\t")
    writer.writeheader()
    writer.writerows(table)
    return text.getvalue().encode()


def columns_of(table: list[dict[str, str]]) -> list[str]:
    """The names of all rows, in the order in which they come first."""
    return list(dict.fromkeys(name for row in table for name in row))


def arrow_bytes(table: pa.Table, form: Callable[..., Any], batch_rows: int | None = None) -> bytes:
    """A table in Arrow's stream format (`pa.ipc.new_stream`) or file format (`pa.ipc.new_file`)."""
    sink = io.BytesIO()
    with form(sink, table.schema) as writer:
        writer.write_table(table, batch_rows)
    return sink.getvalue()


def workbook(sheets: dict[str, list[list[Any]]]) -> bytes:
    """An .xlsx file. `sheets`: the rows of each sheet; a cell is a value, or a value with its number format."""
    import openpyxl

    book = openpyxl.Workbook()
    book.remove(book.active)
    for title, rows in sheets.items():
        sheet = book.create_sheet(title)
        for number, row in enumerate(rows, 1):
            for column, cell in enumerate(row, 1):
                value, number_format = cell if isinstance(cell, tuple) else (cell, None)
                written = sheet.cell(number, column, value)
                if number_format is not None:
                    written.number_format = number_format
    sink = io.BytesIO()
    book.save(sink)
    return sink.getvalue()


def values(rows: Rows) -> list[dict[str, object]]:
    return [dict(row.values) for row in rows]


def error_of(data_path: str, **settings: str) -> str:
    """The message that opening or reading the rows ends with, without the folder of a full path."""
    with pytest.raises(UserError) as caught:
        list(open_rows(data_path, **settings))
    path, message = Path(data_path), str(caught.value)
    return message.replace(f"{path.parent}{os.sep}", "") if path.is_absolute() else message
