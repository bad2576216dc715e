"""Data sets of the library `datasets`: folders that `save_to_disk` wrote, and data sets on the hub."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

from yeonma.data.arrow_reader import one_line, open_table
from yeonma.data.readers import GIVE_FILES
from yeonma.data.records import DataSet
from yeonma.data.splits import SplitSlice, parse_split
from yeonma.errors import UserError, brief, did_you_mean
from yeonma.files import file_hash
from yeonma.hub import check_reachable
from yeonma.messages import tr


def is_saved(path: Path) -> bool:
    """Whether `save_to_disk` wrote this folder."""
    return any((path / name).is_file() for name in ("state.json", "dataset_dict.json"))


def saved_set(name: str, folder: Path, split: str, *, skip_bad: bool = False) -> DataSet:
    """Splits, or slices of them, of a folder that `save_to_disk` wrote.

    Raises UserError if it is damaged or lacks a split.
    """
    try:
        parts = _parts(name, folder, split)
        hashes = [_hash_of(folder / part.name if part.name else folder) for part in parts]
        import datasets

        tables = [
            datasets.load_from_disk(str(folder / part.name if part.name else folder), keep_in_memory=False)
            for part in parts
        ]
    except (OSError, ValueError, KeyError, TypeError) as error:
        problem = tr("the saved data set cannot be read: {error}", error=one_line(error))
        raise UserError(problem, place=name, cure=tr("save it again with save_to_disk")) from None
    sources = []
    for table, part in zip(tables, parts, strict=True):
        start, stop = part.bounds(table.num_rows)
        if start < stop:
            rows = table if part.is_whole else table.select(range(start, stop))
            sources.append(open_table(rows, name, rows_before=start, skip_bad=skip_bad))
    if len(parts) == 1 and parts[0].is_whole:
        return DataSet(name, hashes[0], tuple(sources))
    return DataSet(name, _hash("slices", *hashes, *map(repr, parts)), tuple(sources))


def _parts(name: str, folder: Path, split: str) -> tuple[SplitSlice, ...]:
    """The parts to read. Their names are those of folders; a data set without splits has empty ones."""
    listing = folder / "dataset_dict.json"
    if not listing.exists():
        parts = parse_split(split)
        if len(parts) > 1:
            raise no_splits(name)
        return (replace(parts[0], name=""),)
    splits = json.loads(listing.read_text("utf-8"))["splits"]
    if split in splits:
        return (SplitSlice(split),)
    parts = parse_split(split)
    for part in parts:
        if part.name not in splits:
            raise unknown_split(name, part.name, splits)
    return parts


def _hash_of(folder: Path) -> str:
    state = json.loads((folder / "state.json").read_text("utf-8"))
    return _hash("save_to_disk", *(file_hash(folder / part["filename"]) for part in state["_data_files"]))


def unknown_split(name: str, split: str, splits: Sequence[str]) -> UserError:
    cure = did_you_mean(split, splits) or tr("choose one with --data_split")
    shown = ", ".join(brief(other) for other in splits[:20])
    return UserError(
        tr('no split "{split}"; it has {shown}', split=brief(split), shown=shown), place=name, cure=cure
    )


def no_splits(name: str) -> UserError:
    cure = tr("give one slice with --data_split, such as train[:1000]")
    return UserError(tr("it has no splits that could be joined"), place=name, cure=cure)


def check_on_hub(data_path: str) -> None:
    """Raises UserError if neither the hub can be reached nor the data set was downloaded before."""
    check_reachable(data_path.partition(":")[0], "dataset", place=data_path)


def hub_set(data_path: str, split: str, revision: str | None, *, skip_bad: bool = False) -> DataSet:
    """A data set on the hub, `name` or `name:config`. Raises UserError if it cannot be loaded."""
    import datasets
    from datasets.packaged_modules import _PACKAGED_DATASETS_MODULES

    name, _, config = data_path.partition(":")
    # `json`, `csv`, ... would read files of the working directory.
    if name in _PACKAGED_DATASETS_MODULES:
        raise UserError(
            tr("no such file or folder"),
            place=data_path,
            cure=GIVE_FILES,
        )
    check_on_hub(data_path)
    try:
        table = datasets.load_dataset(name, config or None, split=split, revision=revision)
    except Exception as error:
        user_error = hub_error(data_path, error)
        if user_error is None:
            raise
        raise user_error from None
    identity = _hash("hub", name, config, table._fingerprint)
    return DataSet(data_path, identity, (open_table(table, data_path, skip_bad=skip_bad),))


def needs_code(name: str, script: str) -> UserError:
    cure = tr(
        "give its data files (.parquet, .jsonl, ...), or on the hub --data_revision refs/convert/parquet"
    )
    problem = tr("the data set needs its own Python code ({script}), which Yeonma never runs", script=script)
    return UserError(problem, place=name, cure=cure)


def hub_error(name: str, error: Exception) -> UserError | None:
    """The UserError for an exception of `datasets`; None if the exception may be a bug."""
    import datasets

    text = one_line(error)
    script = re.search(r"scripts are no longer supported, but found (\S+)", text)
    if script:
        return needs_code(name, script[1])
    if isinstance(error, FileNotFoundError):
        cure = tr("check the name; log in with `hf auth login` if it is private or gated")
        return UserError(
            tr("no such file, and no such data set on the hub: {text}", text=text), place=name, cure=cure
        )
    if "Unknown split" in text:
        return UserError(text, place=name, cure=tr("choose one with --data_split"))
    if "onfig" in text and isinstance(error, ValueError):
        return UserError(text, place=name, cure=tr("choose one with --data_path name:config"))
    if isinstance(error, OSError) or type(error).__module__.startswith("httpx"):
        cure = tr("check the connection, or download the data set and give its files")
        return UserError(
            tr("no such local file, and the hub cannot be reached: {text}", text=text), place=name, cure=cure
        )
    if not isinstance(error, (ValueError, datasets.exceptions.DatasetsError)):
        return None
    if error.__cause__ is not None:
        text = f"{text} ({one_line(error.__cause__)})"
    return UserError(tr("the data set cannot be loaded: {text}", text=text), place=name)


def _hash(*parts: str) -> str:
    return sha256("\0".join(parts).encode()).hexdigest()
