"""Rows of Parquet files and of Arrow tables, as they are stored."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from yeonma.data.class_labels import Naming, named, namings_of, notes_of_classes
from yeonma.data.records import FileOptions, Record, Source, no_rows
from yeonma.data.text_file import WRITE_AGAIN
from yeonma.data.words import row_place
from yeonma.errors import Problem, UserError, brief
from yeonma.messages import counted, tr

ROWS_A_BATCH = 256
_UNREADABLE = (ValueError, OverflowError, KeyError)
"""What Arrow raises for values that Python cannot represent; KeyError for a time zone that is not known."""
_ARROW_FILE = b"ARROW1"
"""The first bytes of Arrow's file format. Its stream format has none of its own."""


def open_parquet(path: Path, name: str, options: FileOptions) -> Source:
    """A Parquet file. Raises UserError if its end, where its columns are listed, is damaged."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            metadata, count = file.schema_arrow.metadata, file.metadata.num_rows
    except (pa.ArrowException, OSError) as error:
        raise _unreadable("Parquet", error, name) from None
    read = partial(_parquet_rows, path, name, options.skip_bad)
    return Source(read, notes_of_classes(metadata, name), count)


def open_arrow(path: Path, name: str, options: FileOptions) -> Source:
    """An Arrow file, in the file format or the stream format of Arrow IPC. Raises UserError if its head is damaged."""
    import pyarrow as pa

    try:
        with _arrow_batches(path) as (schema, _):
            read = partial(_arrow_rows, path, name, options.skip_bad)
            return Source(read, notes_of_classes(schema.metadata, name))
    except (pa.ArrowException, OSError) as error:
        raise _unreadable("Arrow", error, name) from None


def open_table(table: Any, name: str, *, rows_before: int = 0, skip_bad: bool = False) -> Source:
    """A `datasets.Dataset`, as it is stored, without decoding. Its places begin behind `rows_before`."""
    notes = notes_of_classes(table.data.schema.metadata, name)
    return Source(partial(_table_rows, table, name, rows_before, skip_bad), notes, table.num_rows)


def _parquet_rows(path: Path, name: str, skip_bad: bool) -> Iterator[Record]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            expected, read = file.metadata.num_rows, 0
            if expected == 0:
                raise no_rows(name)

            def counting() -> Iterator[Any]:
                nonlocal read
                for batch in file.iter_batches(ROWS_A_BATCH):
                    read += batch.num_rows
                    yield batch

            yield from _batch_rows(counting(), name, skip_bad)
            if read != expected:
                problem = tr(
                    "only {read} of the {rows} in its metadata can be read",
                    read=read,
                    rows=counted(expected, "row"),
                )
                raise UserError(problem, place=name, cure=WRITE_AGAIN)
    except (pa.ArrowException, OSError) as error:
        raise _unreadable("Parquet", error, name) from None


def _arrow_rows(path: Path, name: str, skip_bad: bool) -> Iterator[Record]:
    import pyarrow as pa

    empty = True
    try:
        with _arrow_batches(path) as (_, batches):
            pieces = (
                batch.slice(start, ROWS_A_BATCH)
                for batch in _valid(batches)
                for start in range(0, batch.num_rows, ROWS_A_BATCH)
            )
            for row in _batch_rows(pieces, name, skip_bad):
                empty = False
                yield row
    except (pa.ArrowException, OSError) as error:
        raise _unreadable("Arrow", error, name) from None
    if empty:
        raise no_rows(name)


@contextmanager
def _arrow_batches(path: Path) -> Iterator[tuple[Any, Iterator[Any]]]:
    """The schema and the record batches of a file. Raises Arrow's exceptions."""
    import pyarrow as pa

    with pa.memory_map(str(path)) as file:
        is_file_format = file.read(len(_ARROW_FILE)) == _ARROW_FILE
        file.seek(0)
        if is_file_format:
            reader = pa.ipc.open_file(file)
            yield reader.schema, (reader.get_batch(number) for number in range(reader.num_record_batches))
        else:
            stream = pa.ipc.open_stream(file)
            yield stream.schema, iter(stream)


def _unreadable(what: str, error: Exception, name: str) -> UserError:
    return UserError(
        tr("not a readable {what} file: {error}", what=what, error=one_line(error)),
        place=name,
        cure=WRITE_AGAIN,
    )


def _table_rows(table: Any, name: str, rows_before: int, skip_bad: bool) -> Iterator[Record]:
    import pyarrow as pa

    try:
        batches = _valid(table.with_format("arrow").iter(ROWS_A_BATCH))
        yield from _batch_rows(batches, name, skip_bad, rows_before)
    except pa.ArrowException as error:
        problem = tr("the data set cannot be read: {error}", error=one_line(error))
        raise UserError(problem, place=name, cure=WRITE_AGAIN) from None


def _valid(batches: Iterable[Any]) -> Iterator[Any]:
    """The batches, each checked: Arrow takes files into memory as they are, and a damaged offset ends the process."""
    for batch in batches:
        batch.validate(full=True)
        yield batch


def _batch_rows(batches: Iterator[Any], name: str, skip_bad: bool, rows_before: int = 0) -> Iterator[Record]:
    """Rows of Arrow tables or record batches, numbered from `rows_before` + 1, with names in place of class numbers."""
    number = rows_before
    namings: dict[str, Naming] | None = None
    for batch in batches:
        if namings is None:
            namings = namings_of(batch.schema.metadata, name)
        duplicates = sorted(column for column, times in Counter(batch.schema.names).items() if times > 1)
        if duplicates:
            problem = tr('two columns are named "{duplicates}"', duplicates=brief(duplicates[0]))
            raise UserError(problem, place=name, cure=tr("give each column a unique name"))
        try:
            rows = batch.to_pylist()
        except _UNREADABLE:
            place = tr(
                "{name} rows {first}-{last}", name=name, first=number + 1, last=number + batch.num_rows
            )
            raise _unreadable_column(batch, place) from None
        if namings:
            yield from _named_rows(rows, namings, name, number, skip_bad)
        else:
            for at, values in enumerate(rows, number + 1):
                yield row_place(name, at), values
        number += len(rows)


def _named_rows(
    rows: Sequence[dict[str, object]], namings: dict[str, Naming], name: str, rows_before: int, skip_bad: bool
) -> Iterator[Record]:
    for number, values in enumerate(rows, rows_before + 1):
        place = row_place(name, number)
        record = named(values, namings, place)
        if isinstance(record, Problem) and not skip_bad:
            raise UserError([replace(record, of_row=number > rows_before + 1)])
        yield place, record


def _unreadable_column(batch: Any, place: str) -> UserError:
    """The error for the first column with values that Python cannot represent, such as a date after the year 9999."""
    for column in batch.schema.names:
        try:
            batch.column(column).to_pylist()
        except UnicodeDecodeError as error:
            problem = tr(
                'text that is not UTF-8 in column "{column}" ({reason})', column=column, reason=error.reason
            )
            return UserError(problem, place=place, cure=tr("write the file again with UTF-8 text"))
        except _UNREADABLE as error:
            cure = tr("store them as text, or leave the column out")
            problem = tr(
                'unreadable values in column "{column}" ({error})', column=column, error=one_line(error)
            )
            return UserError(problem, place=place, cure=cure)
    raise AssertionError("every column can be read")


def one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:500] or type(error).__name__
