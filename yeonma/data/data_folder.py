"""The data files of a path: the file itself, or those of one format and one split in a folder."""

from __future__ import annotations

import re
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from yeonma.data.library_sets import needs_code
from yeonma.data.readers import ENDINGS, KNOWN_FILES, ending_of
from yeonma.errors import UserError

# Files about the data, often next to it.
_SIDE_FILES = ("dataset_info.json", "dataset_infos.json")
_SPLIT_WORD = re.compile(r"(?:\A|[-_.])(train|test|validation|valid|val|dev|eval)(?:[-_.]|\Z)")
# Other tools' endings -> what to do with such a file.
_CURES = {
    ".xls": "save it as .xlsx",
    ".ods": "save it as .xlsx",
    ".zip": "unpack it",
    ".bz2": "unpack it",
    ".xz": "unpack it",
    ".gz": "unpack it; a text file may stay packed if its name says so, as in rows.jsonl.gz",
    ".zst": "unpack it; a text file may stay packed if its name says so, as in rows.jsonl.zst",
}


@dataclass(frozen=True)
class DataFile:
    """A file, and its name in messages."""

    path: Path
    name: str


def files_of(name: str, path: Path) -> list[DataFile]:
    """The file, or the data files directly in a folder, sorted.

    Raises UserError unless they are regular files of one format and one split, and for data sets that run Python code.
    """
    if not path.is_dir():
        return _checked([DataFile(path, name)])
    inside = sorted(file for file in path.iterdir() if not file.name.startswith("."))
    files = [file for file in inside if ending_of(file) and file.name not in _SIDE_FILES]
    scripts = [file for file in inside if file.suffix == ".py"]
    if path / f"{path.resolve().name}.py" in scripts or (scripts and not files):
        raise needs_code(name, scripts[0].name)
    if not files:
        below = sorted({file.parent.name for kind in ENDINGS for file in path.glob(f"*/*{kind}")})
        cure = f"give {KNOWN_FILES}, or a folder of such files"
        cure = f"give the folder inside it: {', '.join(below)}" if below else cure
        raise UserError("a folder without data files", place=name, cure=cure)
    endings = sorted({ending_of(file) for file in files})
    if len(endings) > 1:
        cure = "keep one format in a folder, or give one file"
        raise UserError(f"files of several formats: {', '.join(endings)}", place=name, cure=cure)
    splits = sorted({word[1] for file in files if (word := _SPLIT_WORD.search(file.stem.lower()))})
    if len(splits) > 1:
        cure = "give one file, or a folder for each split"
        raise UserError(f"files of several splits: {', '.join(splits)}", place=name, cure=cure)
    return _checked([DataFile(file, f"{name.rstrip('/')}/{file.name}") for file in files])


def _checked(files: Sequence[DataFile]) -> list[DataFile]:
    for file in files:
        if not stat.S_ISREG(file.path.stat().st_mode):
            raise UserError("not a regular file", place=file.name, cure=f"give {KNOWN_FILES}")
        ending = file.path.suffix.lower()
        if ending == ".py":
            raise needs_code(file.name, file.name)
        if not ending_of(file.path):
            cure = _CURES.get(ending, f"give {KNOWN_FILES}, or a folder of such files")
            problem = f"{ending} files cannot be read" if ending else "the file has no ending"
            raise UserError(problem, place=file.name, cure=cure)
    return list(files)
