"""Messages of the command line in the form of Python: `learning_rate=1e-4` where a cure says `--learning_rate 1e-4`."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal, TextIO, get_args, get_origin

from yeonma.config.parse import Setting
from yeonma.config.yaml_text import read_value
from yeonma.errors import Problem, UserError

_OPTION = re.compile(
    r"""`[^`]*`                                  # a command or text of others stays as it is
    |(?<![\w-])--(?P<name>[a-z][a-z0-9_]*)
    (?:[ ](?P<value>'[^']*'|\[[^\]]*\]|[^\s,;()]+))?""",
    re.VERBOSE,
)
_AT_THE_END = re.compile(r"(?:(?<=[!-~])(?:으로|로|을|를|이|가|은|는|와|과|이나|나|의|라도|처럼))?[.:]*$")
"""What follows a value in a sentence, in Korean a particle too."""
_PATH_LIKE = re.compile(r"[./:\[\d]|^[A-Z_]+$")
"""What tells a value of text apart from the next word of a sentence."""
_NUMBER = re.compile(r"[-+]?\d[\d.]*(?:e[-+]?\d+)?")


class KeywordStream:
    """A text stream on which options become keywords, line by line as they are written."""

    def __init__(self, stream: TextIO, settings: Mapping[str, Setting]) -> None:
        self._stream, self._settings = stream, settings

    def write(self, text: str) -> int:
        self._stream.write(with_keywords(text, self._settings))
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def in_keyword_form(settings: Mapping[str, Setting]) -> Iterator[None]:
    """Within the block, a UserError names settings as keywords, in its places and its cures, and so do lines of
    progress and warnings."""
    streams = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (KeywordStream(stream, settings) for stream in streams)
    try:
        yield
    except UserError as error:
        raise UserError([keyword_form(problem, settings) for problem in error.problems]) from error
    finally:
        sys.stdout, sys.stderr = streams


def keyword_form(problem: Problem, settings: Mapping[str, Setting]) -> Problem:
    """The same problem with keywords in place of options. Options of other programs stay."""
    place = problem.place
    name, has_value, value = place.removeprefix("--").partition(" ")
    if place.startswith("--") and name in settings:
        place = f"{name}={_text(value)}" if has_value else name
    what, cure = (with_keywords(text, settings) for text in (problem.what, problem.cure))
    return Problem(what, place, cure, of_row=problem.of_row)


def with_keywords(text: str, settings: Mapping[str, Setting]) -> str:
    """`text` with `name=value` for each `--name value`, and `name` for an option without a value."""

    def replaced(match: re.Match[str]) -> str:
        name, written = match["name"], match["value"]
        if name is None or not (name == "config" or name in settings):
            return match[0]
        if written is None:
            return name
        ending = "" if written[0] in "'[" else _end_of(written)
        value = written.removesuffix(ending) if written != "..." else written
        literal = _literal(value, settings.get(name))
        if literal is None:
            return f"{name} {written}"
        return f"{name}={literal}{ending if written != '...' else ''}"

    return _OPTION.sub(replaced, text)


def _end_of(written: str) -> str:
    match = _AT_THE_END.search(written)
    return match[0] if match is not None else ""


def _literal(value: str, setting: Setting | None) -> str | None:
    """A value of the command line as Python writes it; None for a word that is no value of the setting."""
    if value == "...":
        return value
    members = (str,) if setting is None else setting.members
    choices = [choice for member in members if get_origin(member) is Literal for choice in get_args(member)]
    if value.startswith("'") or (value.startswith(("[", "{")) and str not in members):
        return _structure(value.strip("'"))
    if value in ("true", "false") and bool in members:
        return value.capitalize()
    if value in choices:
        return _text(value)
    if {int, float} & set(members) and _NUMBER.fullmatch(value):
        return value
    if str in members and (value in ("none", "latest") or _PATH_LIKE.search(value) or os.path.exists(value)):
        return _text(value)
    return None


def _structure(text: str) -> str:
    """A list or a mapping of YAML as Python writes it; other text in quotes."""
    try:
        value = read_value(text, "")
    except UserError:
        return text
    return repr(value) if isinstance(value, (list, dict)) else _text(text)


def _text(value: str) -> str:
    return json.dumps(value, ensure_ascii=False)
