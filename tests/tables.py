"""Small tables in every form, and the errors that reading them ends with."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path

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
    if kind == "jsonl":
        return jsonl(table).encode()
    if kind == "json":
        return json.dumps(table, indent=2).encode()
    if kind == "parquet":
        sink = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(table), sink)
        return sink.getvalue()
    text = io.StringIO()
    writer = csv.DictWriter(text, table[0], delimiter="," if kind == "csv" else "\t")
    writer.writeheader()
    writer.writerows(table)
    return text.getvalue().encode()


def values(rows: Rows) -> list[dict[str, object]]:
    return [dict(row.values) for row in rows]


def error_of(data_path: str, **settings: str) -> str:
    """The message that opening or reading the rows ends with, without the folder of a full path."""
    with pytest.raises(UserError) as caught:
        list(open_rows(data_path, **settings))
    path, message = Path(data_path), str(caught.value)
    return message.replace(f"{path.parent}{os.sep}", "") if path.is_absolute() else message
