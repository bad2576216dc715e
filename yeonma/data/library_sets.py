"""Data sets of the library `datasets`: folders that `save_to_disk` wrote, and data sets on the hub."""

from __future__ import annotations

import json
import re
from hashlib import sha256
from pathlib import Path

from yeonma.data.arrow_reader import one_line, open_table
from yeonma.data.readers import KNOWN_FILES
from yeonma.data.records import DataSet
from yeonma.errors import UserError, did_you_mean
from yeonma.files import file_hash


def is_saved(path: Path) -> bool:
    """Whether `save_to_disk` wrote this folder."""
    return any((path / name).is_file() for name in ("state.json", "dataset_dict.json"))


def saved_set(name: str, folder: Path, split: str) -> DataSet:
    """One split of a folder that `save_to_disk` wrote. Raises UserError if it is damaged or lacks the split."""
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
        problem = f"the saved data set cannot be read: {one_line(error)}"
        raise UserError(problem, place=name, cure="save it again with save_to_disk") from None
    return DataSet(name, identity, (open_table(table, name),))


def hub_set(data_path: str, split: str, revision: str | None) -> DataSet:
    """A data set on the hub, `name` or `name:config`. Raises UserError if it cannot be loaded."""
    import datasets
    from datasets.packaged_modules import _PACKAGED_DATASETS_MODULES

    name, _, config = data_path.partition(":")
    # `json`, `csv`, ... would read files of the working directory.
    if name in _PACKAGED_DATASETS_MODULES:
        raise UserError("no such file or folder", place=data_path, cure=f"give {KNOWN_FILES}")
    try:
        table = datasets.load_dataset(name, config or None, split=split, revision=revision)
    except Exception as error:
        user_error = hub_error(data_path, error)
        if user_error is None:
            raise
        raise user_error from None
    identity = _hash("hub", name, config, table._fingerprint)
    return DataSet(data_path, identity, (open_table(table, data_path),))


def needs_code(name: str, script: str) -> UserError:
    cure = "give its data files (.parquet, .jsonl, ...), or on the hub --data_revision refs/convert/parquet"
    problem = f"the data set needs its own Python code ({script}), which Yeonma never runs"
    return UserError(problem, place=name, cure=cure)


def hub_error(name: str, error: Exception) -> UserError | None:
    """The UserError for an exception of `datasets`; None if the exception may be a bug."""
    import datasets

    text = one_line(error)
    script = re.search(r"scripts are no longer supported, but found (\S+)", text)
    if script:
        return needs_code(name, script[1])
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
        text = f"{text} ({one_line(error.__cause__)})"
    return UserError(f"the data set cannot be loaded: {text}", place=name)


def _hash(*parts: str) -> str:
    return sha256("\0".join(parts).encode()).hexdigest()
