"""Data files by their ending -> sources."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from yeonma.data.arrow_reader import open_arrow, open_parquet
from yeonma.data.csv_reader import open_csv
from yeonma.data.json_reader import open_json, open_json_lines
from yeonma.data.records import FileOptions, Source
from yeonma.data.text_file import COMPRESSIONS, TextFile
from yeonma.data.workbook_reader import open_workbook
from yeonma.errors import UserError, brief
from yeonma.messages import tr

_TEXT: dict[str, Callable[[TextFile, FileOptions], Source]] = {
    ".jsonl": open_json_lines,
    ".ndjson": open_json_lines,
    ".json": open_json,
    ".csv": open_csv,
    ".tsv": partial(open_csv, delimiter="\t"),
}
_BINARY: dict[str, Callable[[Path, str, FileOptions], Source]] = {
    ".parquet": open_parquet,
    ".arrow": open_arrow,
    ".xlsx": open_workbook,
}
ENDINGS = (*_TEXT, *_BINARY, *(f"{text}{packed}" for text in _TEXT for packed in COMPRESSIONS))
KNOWN_FILES = tr(
    "a .jsonl, .ndjson, .json, .csv or .tsv file (also with .gz or .zst), or a .parquet, .arrow or .xlsx file"
)
"""What can be read, for messages."""
GIVE_FILES = tr("give {known_files}", known_files=KNOWN_FILES)
_WITH_PARTS = (".jsonl", ".ndjson", ".json", ".xlsx")


def ending_of(path: Path) -> str:
    """The ending by which a file is read, such as `.csv` or `.csv.gz`; empty if it is not a data file's."""
    before, last = ["", "", *(suffix.lower() for suffix in path.suffixes)][-2:]
    ending = f"{before}{last}" if last in COMPRESSIONS else last
    return ending if ending in ENDINGS else ""


def is_text(ending: str) -> bool:
    """Whether files with this ending are text in an encoding."""
    return ending not in _BINARY


def open_file(path: Path, name: str, options: FileOptions) -> Source:
    """A file with one of the known endings; messages call it `name`. Raises UserError if its beginning is faulty."""
    ending = ending_of(path)
    for packed in COMPRESSIONS:
        ending = ending.removesuffix(packed)
    if options.part is not None and ending not in _WITH_PARTS:
        cure = tr("only a key of a .json file or a sheet of an .xlsx file can follow a colon")
        raise UserError(
            tr('a {ending} file has no part "{part}"', ending=ending, part=brief(options.part)),
            place=name,
            cure=cure,
        )
    if ending in _BINARY:
        return _BINARY[ending](path, name, options)
    return _TEXT[ending](TextFile(path, name, options.encoding), options)
