"""The data files that a path names: one, those of a folder, or none if it is a name on the hub. Nothing is read yet."""

from __future__ import annotations

import re
import stat
from collections.abc import Sequence
from pathlib import Path

from yeonma.errors import UserError, did_you_mean
from yeonma.files import user_path

ENDINGS = (".jsonl", ".json", ".csv", ".tsv", ".parquet")
KNOWN_ENDINGS = ", ".join(ENDINGS)
# Endings that mean a file, never a data set on the hub.
OTHER_ENDINGS = (".txt", ".gz", ".zip", ".zst", ".xlsx", ".xls", ".arrow", ".py", ".ndjson", ".yaml")
# Files about the data, often beside it.
SIDE_FILES = ("dataset_info.json", "dataset_infos.json")
_SPLIT_WORD = re.compile(r"(?:\A|[-_.])(train|test|validation|valid|val|dev|eval)(?:[-_.]|\Z)")


def local_path(data_path: str) -> Path | None:
    """The path if it exists; None for what may be a name on the hub.

    Raises UserError for a missing file, by its looks, and for a path that cannot be opened.
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


def files_of(name: str, path: Path) -> list[tuple[Path, str]]:
    """The file, or the data files directly in a folder, sorted, each with its name in messages.

    Raises UserError unless they are regular files of one format and one split, and for data sets that run Python code.
    """
    if not path.is_dir():
        return _checked(name, [(path, name)])
    inside = sorted(file for file in path.iterdir() if not file.name.startswith("."))
    files = [file for file in inside if file.suffix.lower() in ENDINGS and file.name not in SIDE_FILES]
    scripts = [file for file in inside if file.suffix == ".py"]
    if path / f"{path.resolve().name}.py" in scripts or (scripts and not files):
        raise wants_to_run_code(name, scripts[0].name)
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


def wants_to_run_code(name: str, script: str) -> UserError:
    cure = "give its data files (.parquet, .jsonl, ...), or on the hub --data_revision refs/convert/parquet"
    problem = f"the data set needs its own Python code ({script}), which Yeonma never runs"
    return UserError(problem, place=name, cure=cure)


def _checked(name: str, files: Sequence[tuple[Path, str]]) -> list[tuple[Path, str]]:
    for path, shown in files:
        ending = path.suffix.lower()
        if not stat.S_ISREG(path.stat().st_mode):
            raise UserError("not a regular file", place=shown, cure=f"give a {KNOWN_ENDINGS} file")
        if ending == ".py":
            raise wants_to_run_code(name, shown)
        if ending not in ENDINGS:
            cure = f"give a {KNOWN_ENDINGS} file, or a folder of such files"
            problem = f"{path.suffix} files cannot be read" if ending else "the file has no ending"
            raise UserError(problem, place=shown, cure=cure)
    return list(files)


def _looks_like_a_path(data_path: str) -> bool:
    known = data_path.lower().endswith((*ENDINGS, *OTHER_ENDINGS))
    repository = re.fullmatch(r"[A-Za-z0-9._-]+(/[A-Za-z0-9._-]+)?(:.+)?", data_path)
    return known or data_path.startswith((".", "/", "~")) or not repository


def _no_such_file(name: str, path: Path) -> UserError:
    near = [other.name for other in path.parent.iterdir()] if path.parent.is_dir() else []
    cure = did_you_mean(path.name, near) or "check its name"
    return UserError("no such file or folder", place=name, cure=cure)
