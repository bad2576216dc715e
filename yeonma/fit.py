"""A value as it was written, text or an object, fitted to its setting's type and range by jsonargparse."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from datetime import date
from types import NoneType
from typing import Literal, get_args, get_origin

from yeonma.errors import Problem, UserError, did_you_mean
from yeonma.ranges import Range
from yeonma.setting import Given, Setting, describe
from yeonma.yaml_text import read_value

NONE_WORDS = ("None", "null")
MOST_PARTS = 1000  # of a list or mapping that jsonargparse fits, in a time that grows with their square


class Misfit(Exception):
    """Why a value is not one of its setting's: `is out of range`."""


def fitter(known: Mapping[str, Setting]) -> Callable[[Setting, object], object]:
    """A function from a setting and what was written for it to its value. It raises Misfit."""
    from jsonargparse import ArgumentError, ArgumentParser

    parser = ArgumentParser(exit_on_error=False, default_env=False)
    for setting in known.values():
        parser.add_argument(f"--{setting.name}", type=setting.hint)

    def fit(setting: Setting, value: object) -> object:
        if setting.optional and (value is None or value in NONE_WORDS):
            return None
        if isinstance(value, str) and set(setting.members) <= {str, NoneType}:
            if not value and not setting.optional:
                raise Misfit("is empty")
            _check_texts(value)
            return value  # As it stands: a template may look like YAML, and is none.
        if isinstance(value, str) and {get_origin(member) for member in setting.members} & {list, dict}:
            value = _list_or_mapping(value, setting)
        if isinstance(value, list) and list[str] in setting.members:
            if all(isinstance(part, str) for part in value):
                _check_texts(value)
                return value
        if isinstance(value, (list, dict)) and len(value) > MOST_PARTS:
            raise Misfit(f"has more than {MOST_PARTS:,} parts")
        try:
            if value is None:  # jsonargparse takes None for "not given", whatever the type.
                raise Misfit("does not fit")
            fitted: object = parser.parse_object({setting.name: value}, defaults=False)[setting.name]
        except (
            ArgumentError,
            ValueError,
            OverflowError,
            RecursionError,
        ):  # The last three: monstrous values.
            raise Misfit("does not fit") from None
        _check_texts(fitted)
        for number in _numbers(fitted):
            if number not in (setting.range or Range()):
                raise Misfit("is out of range")
        return fitted

    return fit


def _list_or_mapping(text: str, setting: Setting) -> object:
    """The list or mapping that a text spells, or the text itself where the setting takes text too."""
    try:
        value = read_value(text, setting.name)
    except UserError as error:
        if text.startswith(("[", "{")):
            raise Misfit(f"does not fit ({error.problems[0].what})") from None
        value = text
    return value if isinstance(value, (list, dict)) else text


def _check_texts(value: object) -> None:
    """Raises Misfit for half a character: a byte of the command line that is no text, or an escape in YAML. What a
    run leaves behind could not be written with it."""
    if isinstance(value, dict):
        value = [*value, *value.values()]
    for part in value if isinstance(value, list) else [value]:
        if isinstance(part, str) and re.search("[\ud800-\udfff]", part):
            raise Misfit("is not UTF-8 text")


def _numbers(value: object) -> Iterator[float]:
    """The numbers in a value. Raises Misfit for a mapping with a key that is not text."""
    if isinstance(value, dict):
        if not all(isinstance(key, str) for key in value):
            raise Misfit("does not fit")
        value = list(value.values())
    for part in value if isinstance(value, list) else [value]:
        if isinstance(part, (int, float)) and not isinstance(part, bool):
            yield part


def misfit_problem(setting: Setting, written: Given, why: str) -> Problem:
    value = written.value
    if str in setting.members and isinstance(value, (bool, int, float, date)):
        return Problem(f"{shown(value)} is not text", written.place, "put it in quotes")
    cure = f"give {describe(setting)}"
    choices = [
        choice for member in setting.members if get_origin(member) is Literal for choice in get_args(member)
    ]
    meant = did_you_mean(value, choices) if isinstance(value, str) else ""
    return Problem(f"{shown(value)} {why}", written.place, f"{cure}; {meant}" if meant else cure)


def shown(value: object) -> str:
    """A value as messages show it, cut to 60 characters."""
    plain = not isinstance(value, str) or re.fullmatch(r"[-+.\w]+", value)
    text = str(value) if plain else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."
