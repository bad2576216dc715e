"""Rows of files, folders, saved data sets, hub data sets and Python calls; the validation split.

Rows are streamed and can be read any number of times.
"""

from __future__ import annotations

import codecs
import hashlib
import io
import math
import re
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain, islice
from pathlib import Path

import numpy as np

from yeonma.data.arrow_reader import one_line
from yeonma.data.bundled_samples import sample_data
from yeonma.data.data_folder import DataFile, files_of
from yeonma.data.library_sets import check_on_hub, hub_set, is_saved, no_splits, saved_set
from yeonma.data.python_rows import given_set
from yeonma.data.readers import ENDINGS, ending_of, is_text, open_file
from yeonma.data.records import DataSet, FileOptions, Source
from yeonma.data.splits import SplitSlice, parse_split, sliced
from yeonma.errors import Problem, UserError, brief, did_you_mean, system_reason
from yeonma.files import file_hash, user_path
from yeonma.messages import counted, tr

ROWS_FOR_COLUMNS = 1000
MOST_NOTES = 5
_DELIMITER_NAMES = {"tab": "\t", "\\t": "\t"}
# Endings that mean a file, never a data set on the hub.
_OTHER_ENDINGS = (".txt", ".gz", ".zip", ".zst", ".xls", ".ods", ".bz2", ".xz", ".py", ".yaml")


@dataclass(frozen=True, slots=True)
class Row:
    """One record of the data set."""

    number: int
    """Position in the data set, from 1, counted across the files of a folder."""
    values: Mapping[str, object]
    place: str
    """`train.jsonl:41` (the line on which the row begins) for text files, `train.parquet row 41` for others."""
    fault: Problem | None = None
    """Why the record cannot be read; then it has no values. Only where bad rows are skipped."""


@dataclass(frozen=True)
class Rows:
    """A data set that can be read any number of times. Memory does not grow with the number of rows.

    Reading raises UserError at a faulty row.
    """

    name: str
    identity: str
    """Hexadecimal SHA-256 of the content: of the files' bytes, or of a hub data set's fingerprint."""
    columns: tuple[str, ...]
    """In order of appearance in the first 1,000 rows and in the first row of each file."""
    read: Callable[[], Iterator[Row]]
    notes: tuple[str, ...] = ()
    """Lines for the user about how the data is read."""

    def __iter__(self) -> Iterator[Row]:
        return self.read()


def open_rows(
    data_path: str,
    *,
    split: str = "train",
    revision: str | None = None,
    encoding: str = "utf-8",
    delimiter: str | None = None,
    max_rows: int | None = None,
    skip_bad: bool = False,
) -> Rows:
    """The rows of a file, a folder of files, a `save_to_disk` folder, a bundled sample (`sample:news_en`) or a hub data
    set (`name`, `name:config`), or those that were given in Python.

    An existing path is local; a name that looks like a path but does not exist is an error; any other name is looked up
    on the hub. A local path may be followed by `:` and the part to read. `split` may be sliced, also where there are no
    splits. `revision` applies to hub data sets, `encoding` to text files, `delimiter` to CSV and TSV files. At most
    `max_rows` rows are read, from the first on. With `skip_bad`, a faulty record behind which reading can go on is a
    row with a `fault`.

    Raises:
        UserError: nothing is there, or the file, its encoding or one of its first rows is faulty.
    """
    if (data := given_set(data_path)) is not None:
        return _rows(_slice_of(data, split), max_rows)
    path, part = _local_path(data_path)
    options = _options(encoding, part, delimiter, skip_bad)
    if path is None:
        return _rows(hub_set(data_path, split, revision, skip_bad=skip_bad), max_rows)
    with _read_errors_as_user_errors(data_path):
        if is_saved(path):
            return _rows(saved_set(data_path, path, split, skip_bad=skip_bad), max_rows)
        return _rows(_file_set(data_path, path, parse_split(split), options), max_rows)


def glance(
    data_path: str,
    *,
    split: str = "train",
    encoding: str = "utf-8",
    delimiter: str | None = None,
    max_rows: int | None = None,
    skip_bad: bool = False,
) -> Rows | None:
    """Like `open_rows` for a file or a folder of files, but without `identity`, which takes reading all of the data.

    Returns None for data that the library `datasets` reads, after a check that the hub can be reached, and for slices
    that depend on the number of rows. Raises UserError as `open_rows`.
    """
    if (data := given_set(data_path)) is not None:
        return _rows(_slice_of(data, split), max_rows)
    path, part = _local_path(data_path)
    options = _options(encoding, part, delimiter, skip_bad)
    if path is None:
        check_on_hub(data_path)
        return None
    if is_saved(path):
        return None
    parts = parse_split(split)
    if any(part.needs_count for part in parts):
        return None
    with _read_errors_as_user_errors(data_path):
        return _rows(_file_set(data_path, path, parts, options, identified=False), max_rows)


@contextmanager
def naming_skip(bad_rows: str) -> Iterator[None]:
    """Adds the way out to a UserError about bad rows among good ones: once, at its end. `bad_rows`: the setting."""
    try:
        yield
    except UserError as error:
        if bad_rows == "skip" or not any(problem.of_row for problem in error.problems):
            raise
        way_out = Problem(
            tr("bad rows stop the run"), "bad_rows", tr("--bad_rows skip leaves them out and counts them")
        )
        raise UserError([*error.problems, way_out]) from error.__cause__


def of_rows(problems: Iterable[Problem], places: Container[str]) -> list[Problem]:
    """The problems. Those at the places of rows are marked as `of_row`."""
    return [replace(problem, of_row=problem.place in places) for problem in problems]


@contextmanager
def _read_errors_as_user_errors(name: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        problem = tr(
            "cannot be read: {value}", value=system_reason(error) if error.errno else one_line(error)
        )
        raise UserError(problem, place=name, cure=tr("check the file, or write it again")) from None


def draw_validation(count: int, val_set_size: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Split positions from 0 to `count` - 1 into (training, validation), both sorted, int64.

    `val_set_size` is a count if at least 1, else a fraction of `count`, rounded to at least one row. The split depends
    only on the arguments: it sorts raw PCG64 numbers, which are the same in all versions of NumPy.

    Raises:
        UserError: `val_set_size` is neither, or no row is left for training.
    """
    if not math.isfinite(val_set_size) or val_set_size < 0 or (val_set_size > 1 and val_set_size % 1):
        cure = tr("give a count (1 or more) or a fraction (below 1)")
        raise UserError(
            tr("{val_set_size} is not a number of rows", val_set_size=val_set_size),
            place="--val_set_size",
            cure=cure,
        )
    held_out = int(val_set_size) if val_set_size >= 1 else math.floor(count * val_set_size + 0.5)
    if val_set_size > 0:
        held_out = max(held_out, 1)
    if held_out >= count:
        problem = counted(
            held_out,
            "validation row of {count} leaves nothing to train",
            "validation rows of {count} leave nothing to train",
            count=count,
        )
        raise UserError(problem, place="--val_set_size", cure=tr("hold out fewer rows"))
    keys = np.random.PCG64(seed % 2**64).random_raw(count)
    order = np.argsort(keys, kind="stable").astype(np.int64)
    return np.sort(order[held_out:]), np.sort(order[:held_out])


# Paths


def _local_path(data_path: str) -> tuple[Path | None, str | None]:
    """The path if it exists, and the part that is named behind it; None for what may be a name on the hub.

    Raises UserError if it looks like a file but does not exist, and if it cannot be opened.
    """
    if not data_path.strip():
        raise UserError(
            tr("no data given"), place="--data_path", cure=tr("give a file, a folder or a data set")
        )
    if (sample := sample_data(data_path)) is not None:
        return sample, None
    if (path := _existing(data_path)) is not None:
        return path, None
    before, colon, part = data_path.partition(":")
    while colon:
        if part and (path := _existing(before)) is not None:
            return path, part
        name, colon, part = part.partition(":")
        before = f"{before}:{name}"
    if _looks_like_a_path(data_path):
        raise _no_such_file(data_path, user_path(data_path))
    return None, None


def _existing(written: str) -> Path | None:
    path = user_path(written)
    try:
        path.stat()
    except FileNotFoundError:
        return None
    except OSError as error:
        cure = tr("give a file or folder that you can read")
        raise UserError(
            tr("cannot be opened: {error}", error=system_reason(error)), place=written, cure=cure
        ) from None
    return path


def _looks_like_a_path(data_path: str) -> bool:
    before_part = data_path.partition(":")[0]
    has_file_ending = any(
        name.lower().endswith((*ENDINGS, *_OTHER_ENDINGS)) for name in (data_path, before_part)
    )
    repository = re.fullmatch(r"[A-Za-z0-9._-]+(/[A-Za-z0-9._-]+)?(:.+)?", data_path)
    return has_file_ending or data_path.startswith((".", "/", "~")) or not repository


def _no_such_file(name: str, path: Path) -> UserError:
    near = [other.name for other in path.parent.iterdir()] if path.parent.is_dir() else []
    cure = did_you_mean(path.name, near) or tr("check its name")
    return UserError(tr("no such file or folder"), place=name, cure=cure)


# Sources -> rows


def _rows(data: DataSet, max_rows: int | None) -> Rows:
    sources = data.sources

    def read() -> Iterator[Row]:
        records = islice(chain.from_iterable(source.read() for source in sources), max_rows)
        for number, (place, values) in enumerate(records, 1):
            if isinstance(values, Problem):
                yield Row(number, {}, place, values)
            else:
                yield Row(number, values, place)

    most = min(ROWS_FOR_COLUMNS, max_rows or ROWS_FOR_COLUMNS)
    columns: dict[str, None] = {}
    rows_read = 0
    for source in sources:
        rows_of_source = 0
        try:
            for _, values in islice(source.read(), max(most - rows_read, 1)):
                columns.update(dict.fromkeys(() if isinstance(values, Problem) else values))
                rows_of_source += 1
        except UserError:
            if rows_of_source == 0:
                raise
            # Reported when the rows are read, with the faults of the rows before it.
        rows_read += rows_of_source
    if rows_read == 0:
        raise UserError(tr("no rows"), place=data.name, cure=tr("give data, or a slice of it, that has rows"))
    notes = [*data.notes, *(note for source in sources for note in source.notes)]
    if len(notes) > MOST_NOTES:
        notes = [
            *notes[:MOST_NOTES],
            tr(
                "{name}: and {lines}",
                name=data.name,
                lines=counted(len(notes) - MOST_NOTES, "more such line"),
            ),
        ]
    identity = data.identity
    if identity and max_rows is not None:
        identity = _hash("first rows", str(max_rows), identity)
    return Rows(data.name, identity, tuple(columns), read, tuple(notes))


def _slice_of(data: DataSet, split: str) -> DataSet:
    """The slice of a data set without splits."""
    parts = parse_split(split)
    if len(parts) > 1:
        raise no_splits(data.name)
    if parts[0].is_whole:
        return data
    identity = _hash("slices", data.identity, repr(replace(parts[0], name="")))
    return replace(data, identity=identity, sources=(sliced(data.sources, parts[0]),))


def _file_set(
    data_path: str, path: Path, parts: Sequence[SplitSlice], options: FileOptions, *, identified: bool = True
) -> DataSet:
    """The files at a path; of a folder, those of the splits that `parts` name. Not `identified`: without identity."""
    name = data_path if options.part is None else data_path.removesuffix(f":{options.part}")
    config = None
    if path.is_dir():
        config, options = options.part, replace(options, part=None)
    elif len(parts) > 1:
        raise no_splits(name)
    sources: list[Source] = []
    notes: list[str] = []
    hashes: list[str] = []
    for part in parts:
        found = files_of(name, path, part.name, config)
        opened = [open_file(file.path, file.name, options) for file in found.files]
        sources += opened if part.is_whole else [sliced(opened, part)]
        notes += found.notes
        if identified:
            hashes.append(_identity_of(found.files, options))
    if len(parts) == 1 and parts[0].is_whole:
        return DataSet(data_path, "".join(hashes), tuple(sources), tuple(notes))
    bounds = [repr(replace(part, name="")) for part in parts]
    identity = _hash("slices", *hashes, *bounds) if identified else ""
    return DataSet(data_path, identity, tuple(sources), tuple(dict.fromkeys(notes)))


def _identity_of(files: Sequence[DataFile], options: FileOptions) -> str:
    ending = ending_of(files[0].path)
    encoding = options.encoding if is_text(ending) else ""
    given = {"part": options.part, "delimiter": options.delimiter}
    choices = [f"{name} {value}" for name, value in given.items() if value is not None]
    return _hash(ending, encoding, *choices, *[file_hash(file.path) for file in files])


def _options(encoding: str, part: str | None, delimiter: str | None, skip_bad: bool) -> FileOptions:
    known = None if delimiter is None else _known_delimiter(delimiter)
    return FileOptions(encoding=_known_encoding(encoding), part=part, delimiter=known, skip_bad=skip_bad)


def _known_delimiter(written: str) -> str:
    delimiter = _DELIMITER_NAMES.get(written, written)
    if len(delimiter) != 1 or delimiter in '"\0\r\n':
        cure = tr("give one character, such as ; or |, or tab")
        raise UserError(
            tr('"{written}" cannot separate columns', written=brief(written)), place="--delimiter", cure=cure
        )
    return delimiter


def _known_encoding(encoding: str) -> str:
    """Python's name for the encoding; `utf-8` also for its variant with a byte order mark."""
    try:
        io.TextIOWrapper(io.BytesIO(), encoding=encoding)
        return codecs.lookup(encoding).name.replace("utf-8-sig", "utf-8")
    except (LookupError, ValueError):
        common = ("utf-8", "cp949", "euc-kr", "utf-16", "latin-1", "shift_jis", "gb18030")
        cure = did_you_mean(encoding, common) or tr("give a name such as utf-8, cp949 or utf-16")
        raise UserError(
            tr('unknown text encoding "{encoding}"', encoding=encoding), place="--encoding", cure=cure
        ) from None


def _hash(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()
