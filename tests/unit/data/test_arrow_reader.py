"""Parquet and Arrow files: both formats of Arrow IPC, places, damage."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from tests.tables import TABLE, Write, arrow_bytes, error_of, values
from yeonma.data.rows import open_rows


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write(name: str, content: str | bytes) -> str:
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return str(path)

    return write


FORMATS = {"stream": pa.ipc.new_stream, "file": pa.ipc.new_file}


@pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("batch_rows", [1, 1000, None])
def test_both_arrow_formats_give_the_same_rows(
    write: Write, form: Callable[..., Any], batch_rows: int | None
) -> None:
    table = [{"text": f"row {number}", "label": number} for number in range(1500)]
    path = write("a.arrow", arrow_bytes(pa.Table.from_pylist(table), form, batch_rows))
    rows = open_rows(path)
    assert values(rows) == values(rows) == table
    assert [row.place for row in rows][:2] == [f"{path} row 1", f"{path} row 2"]
    assert list(rows)[-1].place == f"{path} row 1500"


@pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS)
def test_damaged_and_empty_arrow_files_are_errors(write: Write, form: Callable[..., Any]) -> None:
    content = arrow_bytes(pa.Table.from_pylist(TABLE * 100), form, 100)
    for damaged in (content[:-300], content[:40], b"no arrow", b"ARROW1 and more of something else", b""):
        message = error_of(write("a.arrow", damaged))
        assert message.startswith("a.arrow: not a readable Arrow file: ")
        assert message.endswith("; write the file again")
    empty = arrow_bytes(pa.table({"a": pa.array([], pa.string())}), form)
    assert error_of(write("a.arrow", empty)).startswith("a.arrow: no rows")


def test_text_kept_once_in_a_dictionary_is_read_as_text(write: Write) -> None:
    column = pa.array(["neg", "pos", None, "pos"]).dictionary_encode()
    path = write("a.arrow", arrow_bytes(pa.table({"label": column}), pa.ipc.new_file))
    assert [row["label"] for row in values(open_rows(path))] == ["neg", "pos", None, "pos"]
