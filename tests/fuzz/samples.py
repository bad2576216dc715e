"""What the cases are made from: the bundled samples, and small tables of every form that data comes in."""

from __future__ import annotations

import gzip
import io
import json
from collections.abc import Callable
from datetime import date, datetime, timedelta
from decimal import Decimal
from functools import cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from hypothesis import strategies as st

import yeonma
from tests.fuzz.mutate import (
    Draw,
    damaged_bytes,
    damaged_json,
    damaged_text,
    damaged_value,
    dumped,
    file_bytes,
)
from tests.tables import table_as
from yeonma.data.template import BUILT_IN

SAMPLES = Path(yeonma.__file__).parent / "samples"
BUILT_IN_TEMPLATES = {
    name: (Path(yeonma.__file__).parent / "data" / "templates" / f"{name}.txt").read_text(encoding="utf-8")
    for name in sorted(BUILT_IN)
}
SAMPLE_TEMPLATE = (SAMPLES / "title_en.txt").read_text(encoding="utf-8")


def _first_rows(name: str, count: int = 4) -> list[dict[str, Any]]:
    lines = (SAMPLES / name).read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in sorted(lines, key=len)[:count]]


_PROMPT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Storm closes\nharbour?"}]
_SHAREGPT = [
    {"from": "human", "value": "안녕"},
    {"from": "gpt", "value": "네"},
    {"from": "human", "value": "뭐?"},
]
TABLES: dict[str, list[dict[str, Any]]] = {
    **{path.stem: _first_rows(path.name) for path in sorted(SAMPLES.glob("*.jsonl"))},
    "messages": [
        {"messages": [*_PROMPT, {"role": "assistant", "content": "Yes."}]},
        {"messages": [*_PROMPT[1:], {"role": "assistant", "content": [{"type": "text", "text": "No."}]}] * 2},
        {
            "messages": [*_PROMPT[1:], {"role": "assistant", "content": "4", "weight": 0.5}],
            "system": "Be true.",
        },
    ],
    "conversations": [{"conversations": [*_SHAREGPT, {"from": "gpt", "value": "응"}], "id": 7}],
    "alpaca": [
        {"instruction": "Translate.", "input": "물", "output": "water"},
        {"instruction": "Say hello.", "input": "", "output": "hello"},
    ],
    "orca": [{"id": "1", "system_prompt": "", "question": "2+2?", "response": "4"}],
    "prompt-completion": [
        {"prompt": "Once upon a", "completion": " time"},
        {"prompt": "b", "completion": "c"},
    ],
    "alpaca-turns": [
        {
            "instruction": "And a pear?",
            "input": "",
            "output": "배",
            "system": "Be kind.",
            "history": [["a", "b"]],
        },
        {"instruction": "Say hello.", "output": "hello", "history": []},
    ],
    "prompt-completion-turns": [
        {"prompt": _PROMPT, "completion": [{"role": "assistant", "content": "Yes.", "train": True}]},
        {"prompt": "And now?", "completion": {"role": "assistant", "content": "No."}},
    ],
    "text": [{"text": "한 줄의 글.\nAnother line."}, {"text": "x", "url": "y"}],
}
"""Name -> a few rows. All but the first four are also the name of a built-in template or one of its columns."""

# fmt: off
NAMES = (
   
    *("document", "title", "messages", "conversations", "role", "content", "from", "value", "instruction", "input"),
    *("output", "question", "response", "system", "system_prompt", "prompt", "completion", "type", "text", "answer"),
    *("history", "tools", "tool_calls", "reasoning_content", "weight", "name", "function", "arguments"),
)
# fmt: on
FLAT = [
    name
    for name, rows in TABLES.items()
    if all(isinstance(value, (str, int)) for row in rows for value in row.values())
]

KINDS = ("jsonl", "json", "csv", "tsv", "parquet", "ndjson", "arrow", "xlsx")
# fmt: off
CSV_TOKENS = (
    ",", '"', '""', "\n", "\r", "\r\n", "\t", ";", "|", "sep=;\n", "'", '","', '"\n"', "document", "title",
    "\ufeff", "\0", "\\",
)
# fmt: on


@st.composite
def data_files(draw: Draw, max_byte_edits: int = 4) -> tuple[str, bytes]:
    """Name and content of one data file, damaged in its values, its tokens or its bytes."""
    kind = draw(st.sampled_from(KINDS))
    name = draw(st.sampled_from(FLAT if kind in ("csv", "tsv", "xlsx", "arrow") else sorted(TABLES)))
    rows = draw(st.lists(st.sampled_from(TABLES[name]), min_size=1, max_size=4))
    if kind in ("jsonl", "ndjson"):
        indent = draw(st.sampled_from((None, None, 1)))
        content = b"\n".join([draw(damaged_json(row, NAMES, indent=indent)) for row in rows]) + b"\n"
    elif kind == "json":
        shape = draw(st.sampled_from(JSON_SHAPES))(rows)
        content = draw(damaged_json(shape, NAMES, indent=draw(st.sampled_from((None, 1)))))
    elif kind == "parquet":
        content = draw(parquet_files(rows))
    elif kind in ("arrow", "xlsx"):
        content = _content_of(kind, json.dumps(rows))
    else:
        content = file_bytes(draw(damaged_text(table_as(kind, rows).decode(), CSV_TOKENS)))
    if draw(st.booleans()):
        content = draw(
            damaged_bytes(content, [_content_of(kind, json.dumps(TABLES[FLAT[0]]))], max_byte_edits)
        )
    packed = draw(st.sampled_from(("", "", "", ".gz", ".zst")))
    if packed and kind not in ("parquet", "arrow", "xlsx"):
        kind += packed
        content = (
            gzip.compress(content, mtime=0)
            if packed == ".gz"
            else pa.compress(content, codec="zstd", asbytes=True)
        )
        if draw(st.integers(0, 3)) == 0:
            content = draw(
                damaged_bytes(content, [_content_of(kind, json.dumps(TABLES[FLAT[0]]))], max_byte_edits)
            )
    return f"rows.{kind}", content


@cache
def _content_of(kind: str, rows: str) -> bytes:
    """`table_as` of rows as JSON. A workbook contains the time at which it was made, so each is made once."""
    return table_as(kind, json.loads(rows))


def _columns_of(rows: list[dict[str, Any]]) -> dict[str, list[Any]]:
    return {name: [row.get(name) for row in rows] for name in rows[0]}


JSON_SHAPES: tuple[Callable[[list[dict[str, Any]]], Any], ...] = (
    lambda rows: rows,
    lambda rows: {"version": "1", "data": rows},
    lambda rows: {"train": rows, "test": rows[:1]},
    _columns_of,
    lambda rows: {
        name: {str(at): cell for at, cell in enumerate(cells)} for name, cells in _columns_of(rows).items()
    },
)
"""Rows -> what a .json file may hold."""


@st.composite
def parquet_files(draw: Draw, rows: list[dict[str, Any]]) -> bytes:
    """Rows with damaged values where Arrow has one type for them, or columns of types that hold no text."""
    if draw(st.integers(0, 2)) == 0:
        names = draw(st.lists(st.sampled_from(sorted(COLUMNS)), min_size=1, max_size=3))
        columns = [COLUMNS[name] for name in names]
        titles = draw(st.lists(st.sampled_from(NAMES[:4]), min_size=len(names), max_size=len(names)))
        table = pa.Table.from_arrays([column.slice(0, 2) for column in columns], names=titles)
    else:
        values = draw(damaged_value(rows, NAMES))
        try:
            table = pa.Table.from_pylist(values)
        except (
            pa.ArrowException,
            AttributeError,
            TypeError,
            ValueError,
            OverflowError,
        ):  # no one type for a column
            table = pa.Table.from_pylist(TABLES[FLAT[0]])
    if draw(st.integers(0, 9)) == 0:
        table = table.slice(0, 0)
    sink = io.BytesIO()
    compression = draw(st.sampled_from(("none", "snappy", "zstd")))
    try:
        pq.write_table(table, sink, compression=compression, use_dictionary=draw(st.booleans()))
    except (pa.ArrowException, UnicodeError):  # a form that Arrow has and parquet has not
        return table_as("parquet", TABLES[FLAT[0]])
    return sink.getvalue()


def _broken_text() -> pa.Array:
    """Two texts whose bytes are not UTF-8."""
    offsets, content = pa.py_buffer(b"\0\0\0\0\2\0\0\0\4\0\0\0"), pa.py_buffer(b"\xff\xfeab")
    return pa.Array.from_buffers(pa.string(), 2, [None, offsets, content])


COLUMNS: dict[str, pa.Array] = {
    "text": pa.array(["a b", "c"]),
    "large text": pa.array(["a", None], pa.large_string()),
    "not UTF-8": _broken_text(),
    "bytes": pa.array([b"a", b"\xff"]),
    "fixed bytes": pa.array([b"ab", b"cd"], pa.binary(2)),
    "nulls": pa.nulls(2),
    "whole numbers": pa.array([1, 2**63 - 1]),
    "unsigned": pa.array([1, 2**64 - 1], pa.uint64()),
    "halves": pa.array([1, 2], pa.float16()),
    "not numbers": pa.array([float("nan"), float("inf")]),
    "decimals": pa.array([Decimal("1.5"), None], pa.decimal128(38, 10)),
    "days": pa.array([date(2024, 1, 1), None]),
    "late days": pa.array([2**31 - 1, -(2**31)], pa.int32()).cast(pa.date32()),
    "moments": pa.array([datetime(2024, 1, 1), None], pa.timestamp("us")),
    "late moments": pa.array([2**62, -(2**62)], pa.int64()).cast(pa.timestamp("s")),
    "exact moments": pa.array([1, 10**18 + 1], pa.int64()).cast(pa.timestamp("ns")),
    "moments nowhere": pa.array([1, 2], pa.int64()).cast(pa.timestamp("us", tz="Nowhere/City")),
    "moments off": pa.array([1, 2], pa.int64()).cast(pa.timestamp("us", tz="+99:99")),
    "spans": pa.array([timedelta(1), None], pa.duration("us")),
    "long spans": pa.array([2**62, -(2**62)], pa.int64()).cast(pa.duration("s")),
    "times": pa.array([1, 2], pa.int64()).cast(pa.time64("ns")),
    "late times": pa.array([2**62, -1], pa.int64()).cast(pa.time64("us")),
    "lists": pa.array([[1, 2], []]),
    "objects": pa.array([{"role": "user", "content": "a"}, None]),
    "turns": pa.array([_PROMPT, _PROMPT[:1]]),
    "maps": pa.array([[("a", 1), ("a", 2)], []], pa.map_(pa.string(), pa.int64())),
    "doubled names": pa.StructArray.from_arrays([pa.array([1, 2]), pa.array([3, 4])], names=["a", "a"]),
    "choices": pa.array(["a", "b"]).dictionary_encode(),
    "views": pa.array(["a", "b"], pa.string_view()),
}


@st.composite
def rows_as_json(draw: Draw) -> str:
    """One row as `--row` takes it."""
    row = draw(st.sampled_from([row for rows in TABLES.values() for row in rows]))
    if draw(st.booleans()):
        return str(draw(damaged_json(row, NAMES)).decode("utf-8", "surrogateescape"))
    return str(draw(dumped(draw(damaged_value(row, NAMES)))))
