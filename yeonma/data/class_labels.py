"""Class labels of the library `datasets`: numbers in an Arrow table whose names stand in its metadata."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from yeonma.errors import Problem, UserError, brief
from yeonma.messages import tr

METADATA_KEY = b"huggingface"
MOST_NAMES = 5

Naming = Callable[[Any], Any]
"""A value -> the value with names in place of class numbers. Raises NamelessLabel."""


class NamelessLabel(Exception):
    """A class number without a name. The message says so."""


def namings_of(metadata: Mapping[bytes, bytes] | None, name: str) -> dict[str, Naming]:
    """Column -> its naming, for the columns of a table with this schema metadata that hold class labels.

    Raises UserError, with the table's `name`, if the metadata is damaged.
    """
    if not metadata or METADATA_KEY not in metadata:
        return {}
    try:
        features = json.loads(metadata[METADATA_KEY]).get("info", {}).get("features") or {}
        namings = {str(column): _naming(feature) for column, feature in features.items()}
    except (ValueError, TypeError, AttributeError, KeyError, RecursionError) as error:
        problem = tr("damaged metadata of the library datasets ({error})", error=brief(str(error)))
        raise UserError(problem, place=name, cure=tr("write the file again")) from None
    return {column: naming for column, naming in namings.items() if naming is not None}


def named(
    values: dict[str, object], namings: Mapping[str, Naming], place: str
) -> dict[str, object] | Problem:
    """A row with names in place of class numbers, or the problem, at `place`, of a number without a name."""
    for column, naming in namings.items():
        try:
            values[column] = naming(values.get(column))
        except NamelessLabel as fault:
            cure = tr("write null where there is no label, or the text itself")
            what = tr('column "{column}": {fault}', column=brief(column), fault=fault.args[0])
            return Problem(what, place, cure)
    return values


def notes_of_classes(metadata: Mapping[bytes, bytes] | None, name: str) -> tuple[str, ...]:
    """A line that names the columns whose class numbers are read as names; none if there are none."""
    columns = [f'"{brief(column)}"' for column in namings_of(metadata, name)]
    if not columns:
        return ()
    shown = ", ".join(columns[:10])
    return (tr("{name}: class labels are read as their names: {columns}", name=name, columns=shown),)


def _naming(feature: Any) -> Naming | None:
    """The naming of a feature as `datasets` describes it; None if it has no class labels."""
    if isinstance(feature, list):  # a list, as earlier versions wrote it
        return _of_entries(_naming(feature[0]))
    if not isinstance(feature, Mapping):
        return None
    kind = feature.get("_type")
    if kind == "ClassLabel":
        return partial(_class_name, list(feature.get("names") or []))
    if kind == "Sequence" and isinstance(feature["feature"], Mapping) and "_type" not in feature["feature"]:
        inner = {key: _of_entries(_naming(value)) for key, value in feature["feature"].items()}
        return _of_fields(inner)
    if kind is not None:
        return _of_entries(_naming(feature["feature"])) if "feature" in feature else None
    return _of_fields({key: _naming(value) for key, value in feature.items()})


def _of_entries(naming: Naming | None) -> Naming | None:
    def name_all(value: Any) -> Any:
        return [naming(entry) for entry in value] if isinstance(value, list) and naming else value

    return name_all if naming else None


def _of_fields(namings: Mapping[str, Naming | None]) -> Naming | None:
    used = {key: naming for key, naming in namings.items() if naming is not None}

    def name_fields(value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        return {key: used[key](entry) if key in used else entry for key, entry in value.items()}

    return name_fields if used else None


def _class_name(names: list[Any], value: Any) -> Any:
    if not isinstance(value, int) or isinstance(value, bool):  # null, or text already
        return value
    if 0 <= value < len(names):
        return str(names[value])
    shown = ", ".join([str(name) for name in names[:MOST_NAMES]] + ["..."] * (len(names) > MOST_NAMES))
    if value == -1:
        raise NamelessLabel(tr("the class label {value} stands for a missing label", value=value))
    if not names:
        raise NamelessLabel(tr("the class label {value} has no name; the names are missing", value=value))
    raise NamelessLabel(
        tr("the class label {value} has no name; the names are {names}", value=value, names=brief(shown))
    )
