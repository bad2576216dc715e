"""Rows of files, folders, saved data sets and hub data sets; the validation split.

Rows are streamed and can be read any number of times.
"""

from __future__ import annotations

import codecs
import hashlib
import io
import json
import math
import re
import stat
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from yeonma.data.readers import csv_rows, json_rows, jsonl_rows, no_rows
from yeonma.errors import UserError, brief, did_you_mean
from yeonma.files import file_hash, user_path

ROWS_FOR_COLUMNS = 1000
ROWS_A_BATCH = 256
ENDINGS = (".jsonl", ".json", ".csv", ".tsv", ".parquet")
KNOWN_ENDINGS = ", ".join(ENDINGS)
# Endings that mean a file, never a data set on the hub.
_OTHER_ENDINGS = (".txt", ".gz", ".zip", ".zst", ".xlsx", ".xls", ".arrow", ".py", ".ndjson", ".yaml")
# Files about the data, often next to it.
_SIDE_FILES = ("dataset_info.json", "dataset_infos.json")
_SPLIT_WORD = re.compile(r"(?:\A|[-_.])(train|test|validation|valid|val|dev|eval)(?:[-_.]|\Z)")


@dataclass(frozen=True, slots=True)
class Row:
    """One record of the data set."""

    number: int
    """Position in the data set, from 1, counted across the files of a folder."""
    values: Mapping[str, object]
    place: str
    """`train.jsonl:41` (the line on which the row begins) for text files, `train.parquet row 41` for others."""


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

    def __iter__(self) -> Iterator[Row]:
        return self.read()


PlacedValues = tuple[str, Mapping[str, object]]
"""The place and the values of a row."""
OpenSource = Callable[[], Iterator[PlacedValues]]


def open_rows(
    data_path: str, *, split: str = "train", revision: str | None = None, encoding: str = "utf-8"
) -> Rows:
    """The rows of a file, a folder of files, a `save_to_disk` folder or a hub data set (`name`, `name:config`).

    An existing path is local; a name that looks like a path but does not exist is an error; any other name is looked up
    on the hub. `split` and `revision` apply to saved and hub data sets, `encoding` to text files.

    Raises:
        UserError: nothing is there, or the file, its encoding or one of its first rows is faulty.
    """
    path, encoding = _local_path(data_path), _known_encoding(encoding)
    if path is None:
        return _hub_rows(data_path, split, revision)
    with _read_errors_as_user_errors(data_path):
        if _is_saved(path):
            return _saved_rows(data_path, path, split)
        files = _files_of(data_path, path)
        return _file_rows(data_path, files, encoding, _identity_of(files, encoding))


def glance(data_path: str, *, encoding: str = "utf-8") -> Rows | None:
    """Like `open_rows` for a file or a folder of files, but without `identity`, which takes reading all of the data.

    Returns None for data that the library `datasets` reads. Raises UserError as `open_rows`.
    """
    path, encoding = _local_path(data_path), _known_encoding(encoding)
    if path is None or _is_saved(path):
        return None
    with _read_errors_as_user_errors(data_path):
        return _file_rows(data_path, _files_of(data_path, path), encoding, identity="")


def _is_saved(path: Path) -> bool:
    return any((path / name).is_file() for name in ("state.json", "dataset_dict.json"))


@contextmanager
def _read_errors_as_user_errors(name: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        problem = f"cannot be read: {error.strerror or _one_line(error)}"
        raise UserError(problem, place=name, cure="check the file, or write it again") from None


def draw_validation(count: int, val_set_size: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Split positions from 0 to `count` - 1 into (training, validation), both sorted, int64.

    `val_set_size` is a count if at least 1, else a fraction of `count`, rounded to at least one row. The split depends
    only on the arguments: it sorts raw PCG64 numbers, which are the same in all versions of NumPy.

    Raises:
        UserError: `val_set_size` is neither, or no row is left for training.
    """
    if not math.isfinite(val_set_size) or val_set_size < 0 or (val_set_size > 1 and val_set_size % 1):
        cure = "give a count (1 or more) or a fraction (below 1)"
        raise UserError(f"{val_set_size} is not a number of rows", place="--val_set_size", cure=cure)
    held_out = int(val_set_size) if val_set_size >= 1 else math.floor(count * val_set_size + 0.5)
    if val_set_size > 0:
        held_out = max(held_out, 1)
    if held_out >= count:
        problem = f"{held_out} validation rows of {count} leave nothing to train"
        raise UserError(problem, place="--val_set_size", cure="hold out fewer rows")
    keys = np.random.PCG64(seed % 2**64).random_raw(count)
    order = np.argsort(keys, kind="stable").astype(np.int64)
    return np.sort(order[held_out:]), np.sort(order[:held_out])


# Paths -> data files


def _local_path(data_path: str) -> Path | None:
    """The path if it exists; None for what may be a name on the hub.

    Raises UserError if it looks like a file but does not exist, and if it cannot be opened.
    """
    if not data_path.strip():
        raise UserError("no data given", place="--data_path", cure="give a file, a folder or a data set")
    path = user_path(data_path)
    try:
        path.stat()
    except FileNotFoundError:
        if _looks_like_a_path(data_path):
            raise _no_such_file(data_path, path) from None
        return None
    except OSError as error:
        cure = "give a file or folder that you can read"
        raise UserError(f"cannot be opened: {error}", place=data_path, cure=cure) from None
    return path


def _files_of(name: str, path: Path) -> list[tuple[Path, str]]:
    """The file, or the data files directly in a folder, sorted. A file comes with its name for messages.

    Raises UserError unless they are regular files of one format and one split, and for data sets that run Python code.
    """
    if not path.is_dir():
        return _checked(name, [(path, name)])
    inside = sorted(file for file in path.iterdir() if not file.name.startswith("."))
    files = [file for file in inside if file.suffix.lower() in ENDINGS and file.name not in _SIDE_FILES]
    scripts = [file for file in inside if file.suffix == ".py"]
    if path / f"{path.resolve().name}.py" in scripts or (scripts and not files):
        raise _needs_code(name, scripts[0].name)
    if not files:
        below = sorted({file.parent.name for kind in ENDINGS for file in path.glob(f"*/*{kind}")})
        cure = f"give a {KNOWN_ENDINGS} file or a folder of such files"
        cure = f"give the folder inside it: {', '.join(below)}" if below else cure
        raise UserError("a folder without data files", place=name, cure=cure)
    endings = sorted({file.suffix.lower() for file in files})
    if len(endings) > 1:
        cure = "keep one format in a folder, or give one file"
        raise UserError(f"files of several formats: {', '.join(endings)}", place=name, cure=cure)
    splits = sorted({word[1] for file in files if (word := _SPLIT_WORD.search(file.stem.lower()))})
    if len(splits) > 1:
        cure = "give one file, or a folder for each split"
        raise UserError(f"files of several splits: {', '.join(splits)}", place=name, cure=cure)
    return _checked(name, [(file, f"{name.rstrip('/')}/{file.name}") for file in files])


def _needs_code(name: str, script: str) -> UserError:
    cure = "give its data files (.parquet, .jsonl, ...), or on the hub --data_revision refs/convert/parquet"
    problem = f"the data set needs its own Python code ({script}), which Yeonma never runs"
    return UserError(problem, place=name, cure=cure)


def _checked(name: str, files: Sequence[tuple[Path, str]]) -> list[tuple[Path, str]]:
    for path, shown in files:
        ending = path.suffix.lower()
        if not stat.S_ISREG(path.stat().st_mode):
            raise UserError("not a regular file", place=shown, cure=f"give a {KNOWN_ENDINGS} file")
        if ending == ".py":
            raise _needs_code(name, shown)
        if ending not in ENDINGS:
            cure = f"give a {KNOWN_ENDINGS} file, or a folder of such files"
            problem = f"{path.suffix} files cannot be read" if ending else "the file has no ending"
            raise UserError(problem, place=shown, cure=cure)
    return list(files)


def _looks_like_a_path(data_path: str) -> bool:
    has_file_ending = data_path.lower().endswith((*ENDINGS, *_OTHER_ENDINGS))
    repository = re.fullmatch(r"[A-Za-z0-9._-]+(/[A-Za-z0-9._-]+)?(:.+)?", data_path)
    return has_file_ending or data_path.startswith((".", "/", "~")) or not repository


def _no_such_file(name: str, path: Path) -> UserError:
    near = [other.name for other in path.parent.iterdir()] if path.parent.is_dir() else []
    cure = did_you_mean(path.name, near) or "check its name"
    return UserError("no such file or folder", place=name, cure=cure)


# Sources -> rows


def _rows(name: str, identity: str, sources: Sequence[OpenSource]) -> Rows:
    def read() -> Iterator[Row]:
        number = 0
        for source in sources:
            for place, values in source():
                number += 1
                yield Row(number, values, place)

    columns: dict[str, None] = {}
    rows_read = 0
    for source in sources:
        rows_of_source = 0
        try:
            for _, values in islice(source(), max(ROWS_FOR_COLUMNS - rows_read, 1)):
                columns.update(dict.fromkeys(values))
                rows_of_source += 1
        except UserError:
            if rows_of_source == 0:
                raise
            # Reported when the rows are read, with the faults of the rows before it.
        rows_read += rows_of_source
    return Rows(name, identity, tuple(columns), read)


def _hash(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


# Files


def _numbered_lines(
    rows: Callable[..., Iterator[tuple[int, dict[str, object]]]], path: Path, name: str, encoding: str
) -> Iterator[PlacedValues]:
    for line, values in rows(path, name, encoding):
        yield f"{name}:{line}", values


def _parquet_rows(path: Path, name: str, encoding: str) -> Iterator[PlacedValues]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            expected, read = file.metadata.num_rows, 0
            if expected == 0:
                raise no_rows(name)
            for row in _batch_rows(file.iter_batches(ROWS_A_BATCH), name):
                read += 1
                yield row
            if read != expected:
                problem = f"only {read} of the {expected} rows in its metadata can be read"
                raise UserError(problem, place=name, cure="write the file again")
    except (pa.ArrowException, OSError) as error:
        problem = f"not a readable Parquet file: {_one_line(error)}"
        raise UserError(problem, place=name, cure="write the file again") from None


def _batch_rows(batches: Iterator[Any], name: str) -> Iterator[PlacedValues]:
    """Rows of Arrow tables or record batches, numbered from 1."""
    number = 0
    for batch in batches:
        duplicates = sorted(column for column, times in Counter(batch.schema.names).items() if times > 1)
        if duplicates:
            problem = f'two columns are named "{brief(duplicates[0])}"'
            raise UserError(problem, place=name, cure="give each column a unique name")
        try:
            rows = batch.to_pylist()
        except (ValueError, OverflowError):
            place = f"{name} rows {number + 1}-{number + batch.num_rows}"
            raise _unreadable_column(batch, place) from None
        for values in rows:
            number += 1
            yield f"{name} row {number}", values


def _unreadable_column(batch: Any, place: str) -> UserError:
    """The error for the first column with values that Python cannot represent, such as a date after the year 9999."""
    for column in batch.schema.names:
        try:
            batch.column(column).to_pylist()
        except UnicodeDecodeError as error:
            problem = f'text that is not UTF-8 in column "{column}" ({error.reason})'
            return UserError(problem, place=place, cure="write the file again with UTF-8 text")
        except (ValueError, OverflowError) as error:
            cure = "store them as text, or leave the column out"
            problem = f'unreadable values in column "{column}" ({_one_line(error)})'
            return UserError(problem, place=place, cure=cure)
    raise AssertionError("every column can be read")


_READERS: tuple[Callable[[Path, str, str], Iterator[PlacedValues]], ...] = (
    partial(_numbered_lines, jsonl_rows),
    partial(_numbered_lines, json_rows),
    partial(_numbered_lines, csv_rows),
    partial(_numbered_lines, partial(csv_rows, delimiter="\t")),
    _parquet_rows,
)
READERS_BY_ENDING = dict(zip(ENDINGS, _READERS, strict=True))


def _known_encoding(encoding: str) -> str:
    """Python's name for the encoding; `utf-8` also for its variant with a byte order mark."""
    try:
        io.TextIOWrapper(io.BytesIO(), encoding=encoding)
        return codecs.lookup(encoding).name.replace("utf-8-sig", "utf-8")
    except (LookupError, ValueError):
        common = ("utf-8", "cp949", "euc-kr", "utf-16", "latin-1", "shift_jis", "gb18030")
        cure = did_you_mean(encoding, common) or "give a name such as utf-8, cp949 or utf-16"
        raise UserError(f'unknown text encoding "{encoding}"', place="--encoding", cure=cure) from None


def _file_rows(name: str, files: Sequence[tuple[Path, str]], encoding: str, identity: str) -> Rows:
    read = READERS_BY_ENDING[files[0][0].suffix.lower()]
    return _rows(name, identity, [partial(read, path, shown, encoding) for path, shown in files])


def _identity_of(files: Sequence[tuple[Path, str]], encoding: str) -> str:
    ending = files[0][0].suffix.lower()
    return _hash(ending, "" if ending == ".parquet" else encoding, *[file_hash(path) for path, _ in files])


# Data sets of the library `datasets`


def _saved_rows(name: str, folder: Path, split: str) -> Rows:
    """The rows of one split in a folder that `save_to_disk` wrote."""
    listing = folder / "dataset_dict.json"
    try:
        if listing.exists():
            splits = json.loads(listing.read_text("utf-8"))["splits"]
            if split not in splits:
                cure = did_you_mean(split, splits) or "choose one with --data_split"
                raise UserError(f'no split "{split}"; it has {", ".join(splits)}', place=name, cure=cure)
            folder = folder / split
        files = [
            folder / part["filename"]
            for part in json.loads((folder / "state.json").read_text("utf-8"))["_data_files"]
        ]
        identity = _hash("save_to_disk", *(file_hash(file) for file in files))
        import datasets

        table = datasets.load_from_disk(str(folder), keep_in_memory=False)
    except (OSError, ValueError, KeyError, TypeError) as error:
        problem = f"the saved data set cannot be read: {_one_line(error)}"
        raise UserError(problem, place=name, cure="save it again with save_to_disk") from None
    return _table_rows(name, identity, table)


def _table_rows(name: str, identity: str, table: Any) -> Rows:
    """Rows of a `datasets.Dataset` as they are stored, without decoding."""
    if table.num_rows == 0:
        raise no_rows(name)

    def source() -> Iterator[PlacedValues]:
        return _batch_rows(table.with_format("arrow").iter(ROWS_A_BATCH), name)

    return _rows(name, identity, [source])


def _hub_rows(data_path: str, split: str, revision: str | None) -> Rows:
    import datasets
    from datasets.packaged_modules import _PACKAGED_DATASETS_MODULES

    name, _, config = data_path.partition(":")
    # `json`, `csv`, ... would read files of the working directory.
    if name in _PACKAGED_DATASETS_MODULES:
        raise UserError("no such file or folder", place=data_path, cure=f"give a {KNOWN_ENDINGS} file")
    try:
        table = datasets.load_dataset(name, config or None, split=split, revision=revision)
    except Exception as error:
        user_error = _hub_error(data_path, error)
        if user_error is None:
            raise
        raise user_error from None
    return _table_rows(data_path, _hash("hub", name, config, table._fingerprint), table)


def _hub_error(name: str, error: Exception) -> UserError | None:
    """The UserError for an exception of `datasets`; None if the exception may be a bug."""
    import datasets

    text = _one_line(error)
    script = re.search(r"scripts are no longer supported, but found (\S+)", text)
    if script:
        return _needs_code(name, script[1])
    if isinstance(error, FileNotFoundError):
        cure = "check the name; log in with `hf auth login` if it is private or gated"
        return UserError(f"no such file, and no such data set on the hub: {text}", place=name, cure=cure)
    if "Unknown split" in text:
        return UserError(text, place=name, cure="choose one with --data_split")
    if "onfig" in text and isinstance(error, ValueError):
        return UserError(text, place=name, cure="choose one with --data_path name:config")
    if isinstance(error, OSError) or type(error).__module__.startswith("httpx"):
        cure = "check the connection, or download the data set and give its files"
        return UserError(f"no such local file, and the hub cannot be reached: {text}", place=name, cure=cure)
    if not isinstance(error, (ValueError, datasets.exceptions.DatasetsError)):
        return None
    if error.__cause__ is not None:
        text = f"{text} ({_one_line(error.__cause__)})"
    return UserError(f"the data set cannot be loaded: {text}", place=name)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:500] or type(error).__name__
