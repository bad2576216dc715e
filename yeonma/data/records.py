"""What readers yield: the records of a file or a table, each with its place."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from yeonma.errors import Problem, UserError
from yeonma.messages import tr

Record = tuple[str, Mapping[str, object] | Problem]
"""The place of a record, such as `train.jsonl:41`, and its values; with `skip_bad`, or what is wrong with it."""


@dataclass(frozen=True, kw_only=True)
class FileOptions:
    """How files are read."""

    encoding: str = "utf-8"
    """Of text files."""
    part: str | None = None
    """Which part of a file is read: a key of a JSON object, or a sheet of a workbook."""
    delimiter: str | None = None
    """What separates the columns of CSV and TSV files; None for what their ending or their header says."""
    skip_bad: bool = False
    """Whether a faulty record, behind which reading can go on, is yielded as its Problem, not raised as UserError."""


@dataclass(frozen=True)
class Source:
    """A file or a table. Its records can be read any number of times, with about one of them in memory."""

    read: Callable[[], Iterator[Record]]
    """Raises UserError, with a place, at the first record that cannot be read, unless `skip_bad` lets it pass."""
    notes: tuple[str, ...] = ()
    """Lines for the user about how it is read."""
    count: int | None = None
    """The number of records, where it is known without reading them."""


@dataclass(frozen=True)
class DataSet:
    """Sources that are read one after another."""

    name: str
    identity: str
    """Hexadecimal SHA-256 of the content."""
    sources: tuple[Source, ...]
    notes: tuple[str, ...] = ()
    """Lines for the user about how it was found. Those of the sources come in addition."""


def no_rows(name: str) -> UserError:
    return UserError(tr("no rows"), place=name, cure=tr("give a file with at least one row"))
