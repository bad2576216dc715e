"""The data sets that `data_path` names: one path, or a list of paths and entries with settings of their own."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

from yeonma.config.settings import DataSettings
from yeonma.errors import Problem, UserError, brief, did_you_mean
from yeonma.messages import counted, tr

MOST_DATA_SETS = 100
MOST_REPEATS = 10_000


@dataclass(frozen=True)
class DataSetSettings:
    """One data set: how it is read, and its part in a mixture. The names are those of entries in `data_path`."""

    path: str
    name: str
    """What messages and metrics call it: unique in a mixture."""
    split: str
    revision: str | None
    encoding: str
    delimiter: str | None
    columns: dict[str, str] | None
    template: str | None
    limit: int | None
    val_set_size: float
    val_path: str | None
    val_split: str | None
    weight: Fraction | None = None
    """Its share of each step's rows, relative to the other weights; None without weights."""
    repeats: int = 1
    """How often an epoch has its rows."""
    share: Fraction | None = None
    """The share of each step's units that are its own; None for the data sets that share the rest, and whose rows an
    epoch has once."""


_KINDS: dict[str, tuple[tuple[type, ...], str]] = {
    "path": ((str,), tr("a path")),
    "split": ((str,), tr("a split, such as train[:1000]")),
    "revision": ((str,), tr("a branch, tag or commit")),
    "encoding": ((str,), tr("an encoding, such as cp949")),
    "delimiter": ((str,), tr("one character, or tab")),
    "columns": ((dict,), tr("a mapping such as {{document: body}}")),
    "template": ((str,), tr("a template's name, its file, or its text")),
    "limit": ((int,), tr("a number of rows")),
    "val_set_size": ((int, float), tr("a count, or a fraction below 1")),
    "val_path": ((str,), tr("a path")),
    "val_split": ((str,), tr("a split, such as validation")),
    "weight": ((int, float), tr("a number above 0")),
    "repeats": ((int,), tr("a whole number of at least 1")),
    "share": ((int, float), tr("a fraction between 0 and 1")),
}
"""Key of an entry -> the types of its value, and their description."""
KEYS = tuple(_KINDS)


def is_entry(item: object) -> bool:
    """Whether a mapping is an entry of `data_path` and not a row: it has a `path`, and no key that entries lack."""
    return isinstance(item, Mapping) and "path" in item and set(item) <= set(KEYS)


def data_sets(data: DataSettings) -> tuple[DataSetSettings, ...]:
    """The data sets of a run, with the settings of the run where an entry has none of its own.

    Raises UserError with all problems of the entries.
    """
    paths = data.data_path if isinstance(data.data_path, list) else [data.data_path]
    problems: list[Problem] = []
    if not paths:
        raise UserError(tr("the list is empty"), place="data_path", cure=tr("give at least one path"))
    if len(paths) > MOST_DATA_SETS:
        raise UserError(
            tr("more than {most_data_sets} data sets", most_data_sets=MOST_DATA_SETS),
            place="data_path",
            cure=tr("join some of them"),
        )
    held_out = _validation_paths(data, len(paths), problems)
    sets = []
    for number, item in enumerate(paths, 1):
        place = f"data_path[{number}]" if isinstance(data.data_path, list) else ""
        entry = _entry(item, place, problems)
        if entry is not None:
            sets.append(_with_defaults(entry, data, held_out[number - 1], place, problems))
    sets += _replayed(data, problems)
    weighted = [one for one in sets if one.weight is not None]
    _check_shares(sets, data, problems)
    if weighted and any(one.repeats > 1 for one in sets):
        cure = tr("give either weights, or repeats")
        problems.append(Problem(tr("some data sets have a weight, and some have repeats"), "data_path", cure))
    if problems:
        raise UserError(problems)
    if weighted:
        sets = [
            replace(one, weight=Fraction(1)) if one.weight is None and one.share is None else one
            for one in sets
        ]
    return tuple(_with_unique_names(sets))


def _replayed(data: DataSettings, problems: list[Problem]) -> list[DataSetSettings]:
    """The data set that `replay` names, as if it were the last entry of `data_path`, with `replay_share` as its
    `share`; none without `replay`."""
    if data.replay is None:
        if data.replay_share != DataSettings.replay_share:
            cure = tr("give the rows with --replay, or leave it out")
            problems.append(Problem(tr("there are no rows to replay"), "replay_share", cure))
        return []
    item = dict(data.replay) if isinstance(data.replay, Mapping) else {"path": data.replay}
    for key in sorted({"share", "weight", "repeats"} & set(item)):
        problems.append(Problem(tr("it has a {key}", key=key), "replay", tr("give --replay_share instead")))
        del item[key]
    entry = _entry({**item, "share": data.replay_share}, "replay", problems)
    return [] if entry is None else [_with_defaults(entry, data, None, "replay", problems)]


def _check_shares(sets: Sequence[DataSetSettings], data: DataSettings, problems: list[Problem]) -> None:
    """Adds the problems of data sets that have a share of all examples."""
    place = "data_path" if data.replay is None else "replay_share"
    shares = [one.share for one in sets if one.share is not None]
    if shares and sum(shares) >= 1:
        cure = tr("let the shares be less than 1 together")
        problems.append(Problem(tr("the shares leave no examples to the other data sets"), place, cure))
    elif shares and len(shares) == len(sets):
        cure = tr("give at least one data set without a share, or give weights instead")
        problems.append(
            Problem(tr("every data set has a share, so that none says how long an epoch is"), place, cure)
        )
    for one in sets:
        if one.share is not None and (one.weight is not None or one.repeats > 1):
            cure = tr("give only its share")
            problems.append(Problem(tr("it has a share, and a weight or repeats as well"), one.path, cure))


def _validation_paths(data: DataSettings, count: int, problems: list[Problem]) -> Sequence[str | None]:
    """`val_data_path` for each data set."""
    given = data.val_data_path
    if given is None:
        return [None] * count
    paths: list[Any] = given if isinstance(given, list) else [given]
    wrong = [path for path in paths if path is not None and not isinstance(path, str)]
    if len(paths) == count and not wrong:
        return paths
    problem = (
        tr("not a path: {wrong}", wrong=brief(str(wrong[0])))
        if wrong
        else tr(
            "{paths} for {data_sets}",
            paths=counted(len(paths), "path"),
            data_sets=counted(count, "data set"),
        )
    )
    cure = tr("give one for each data set in a list, or `val_path` in the entries of data_path")
    problems.append(Problem(problem, "val_data_path", cure if count > 1 else tr("give one path")))
    return [None] * count


def _entry(item: object, place: str, problems: list[Problem]) -> dict[str, Any] | None:
    """The keys of an entry; None, after a problem, for what is none."""
    if isinstance(item, (str, os.PathLike)):
        item = {"path": os.fspath(item)}
    if not isinstance(item, Mapping):
        cure = tr("give a path, or an entry such as {{path: chats.jsonl, weight: 2}}")
        problems.append(
            Problem(tr("neither a path nor an entry: {item}", item=brief(str(item))), place, cure)
        )
        return None
    count = len(problems)
    for key in item:
        if key not in _KINDS:
            cure = did_you_mean(str(key), KEYS) or tr("the keys are {keys}", keys=", ".join(KEYS))
            problems.append(Problem(tr('unknown key "{key}"', key=brief(str(key))), place, cure))
    if not item.get("path"):
        problems.append(Problem(tr("it has no path"), place, tr("write path: and the file's name")))
    values = {key: value for key, value in item.items() if key in _KINDS and value is not None}
    for key, value in values.items():
        kinds, words = _KINDS[key]
        if not isinstance(value, kinds) or isinstance(value, bool) or not _is_good(key, value):
            problems.append(
                Problem(
                    tr("{value} is not valid", value=brief(str(value))),
                    f"{place}.{key}",
                    tr("give {values}", values=words),
                )
            )
    return values if len(problems) == count else None


def _is_good(key: str, value: Any) -> bool:
    if isinstance(value, str):
        return not any("\ud800" <= char <= "\udfff" for char in value)
    if key == "columns":
        return all(isinstance(text, str) for pair in value.items() for text in pair)
    if key == "val_set_size":
        return bool(math.isfinite(value) and value >= 0 and (value < 1 or value % 1 == 0))
    if key == "repeats":
        return 1 <= int(value) <= MOST_REPEATS
    if key == "share":
        return bool(1e-6 <= value <= 1 - 1e-6)
    if key == "weight":
        return bool(1e-6 <= value <= 1e6)
    return int(value) >= 1


def _with_defaults(
    entry: Mapping[str, Any], data: DataSettings, val_path: str | None, place: str, problems: list[Problem]
) -> DataSetSettings:
    share = entry.get("share")
    if share is not None:  # it stands beside the task's data sets, and is read by its own keys alone
        data, val_path = DataSettings(data_path=data.data_path), None
    names = ("val_set_size", "val_path", "val_split")
    given = {name: entry[name] for name in names if name in entry}
    if not given:  # an entry that says how to validate overrides the settings of the run
        of_run = {"val_set_size": data.val_set_size, "val_path": val_path, "val_split": data.val_split}
        given = {name: value for name, value in of_run.items() if value}
    if len(given) > 1:
        first, second = (
            name if place else name.replace("val_path", "val_data_path") for name in [*given][:2]
        )
        where = f"{place}.{first}" if place and first in entry else first
        problems.append(
            Problem(
                tr("{first} and {second} are both given", first=first, second=second),
                where,
                tr("give only one of them"),
            )
        )
    weight = entry.get("weight")
    return DataSetSettings(
        path=entry["path"],
        name=entry["path"],
        split=entry.get("split", data.data_split),
        revision=entry.get("revision", data.data_revision),
        encoding=entry.get("encoding", data.encoding),
        delimiter=entry.get("delimiter", data.delimiter),
        columns=entry.get("columns", data.columns),
        template=entry.get("template", data.template),
        limit=entry.get("limit", data.max_rows),
        val_set_size=given.get("val_set_size", 0),
        val_path=given.get("val_path"),
        val_split=given.get("val_split"),
        weight=None if weight is None else Fraction(str(weight)),
        repeats=entry.get("repeats", 1),
        share=None if share is None else Fraction(str(share)),
    )


def _with_unique_names(sets: Sequence[DataSetSettings]) -> list[DataSetSettings]:
    """The last part of each path where that is unique, else the path; with its split or a number if need be."""
    if len(sets) == 1:
        return list(sets)
    for name_of in (
        lambda one: one.path.rstrip("/\\").replace("\\", "/").rpartition("/")[2],
        lambda one: one.path,
        lambda one: f"{one.path} {one.split}",
    ):
        names = [name_of(one) for one in sets]
        if len(set(names)) == len(names):
            return [replace(one, name=name) for one, name in zip(sets, names, strict=True)]
    seen: Counter[str] = Counter()
    numbered = []
    for one in sets:
        seen[one.path] += 1
        numbered.append(replace(one, name=f"{one.path} ({seen[one.path]})"))
    return numbered


@contextmanager
def problems_of_set(one: DataSetSettings, *, is_named: bool) -> Iterator[None]:
    """Names the data set in problems whose place does not name it, such as a setting or a line of a template.

    `is_named`: whether there are several data sets, so that a name is needed.
    """
    try:
        yield
    except UserError as error:
        if not is_named:
            raise
        starts = (one.name, one.path, one.path.replace("\\", "/").rpartition("/")[2])
        raise UserError(
            [
                problem
                if problem.place.startswith(starts)
                else replace(problem, place=f"{one.name}: {problem.place.removeprefix('--')}".rstrip(": "))
                for problem in error.problems
            ]
        ) from error


def of_data_set(name: str, number: int) -> str:
    """What run.json calls a value of the data set with this number, from 1."""
    return f"{name} of data set {number}"
