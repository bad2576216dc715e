"""What must not leave this machine in a file: secrets, and paths that say where and whose it is.

A search by known forms. It finds slips, not what somebody hides.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from yeonma.errors import Problem

SECRETS = {
    "a Hugging Face token": r"\bhf_[A-Za-z0-9]{30,}",
    "a GitHub token": r"\b(?:gh[pousr]_[A-Za-z0-9]{36,}|github_pat_[A-Za-z0-9_]{50,})",
    "an API key (sk-)": r"\bsk-[A-Za-z0-9_-]{20,}",
    "an AWS access key": r"\b(?:AKIA|ASIA)[A-Z0-9]{16}\b",
    "a Google API key": r"\bAIza[A-Za-z0-9_-]{35}",
    "a Slack token": r"\bxox[abprs]-[A-Za-z0-9-]{10,}",
    "a private key": r"-----BEGIN [A-Z ]*PRIVATE KEY-----",
    "a password in a URL": r"\b[a-z][a-z0-9+.-]*://[^\s/:@\"']+:[^\s/:@\"']+@",
}
"""Forms in which secrets are given out, by what they are called in messages."""

SECRET_NAMES = re.compile(r"(?:TOKEN|KEY|SECRET|PASSWORD|PASSWD)$")
"""Environment variables whose values are looked for as they are."""
SHORTEST_SECRET = 12

# At least two parts, so that "/think" and "and/or" are none; a URL's own path follows a letter.
ABSOLUTE = re.compile(
    r"""file://[^\s"'`<>]+"""
    r"""|(?<![\w.:/~<\\-])/(?:[\w.@+=-]+/)+[\w.@+=-]+/?"""
    r"""|(?<![\w])[A-Za-z]:\\(?:[^\s"'`<>|\\]+\\)*[^\s"'`<>|\\]+"""
    r"""|(?<![\w\\])\\\\[\w.-]+\\[^\s"'`<>|]+"""
)
"""A path that begins at a root, of POSIX or of Windows."""


def secrets(text: str, environment: Mapping[str, str]) -> Iterator[tuple[int, str]]:
    """(position, what it is) of each secret in a text. The values of secret-looking environment variables count."""
    for what, form in SECRETS.items():
        for found in re.finditer(form, text):
            yield found.start(), what
    for name, value in environment.items():
        if SECRET_NAMES.search(name) and len(value) >= SHORTEST_SECRET:
            at = text.find(value)
            if at >= 0:
                yield at, f"the value of ${name}"


def problems(name: str, text: str, environment: Mapping[str, str], *, paths: bool = True) -> list[Problem]:
    """What a text file holds that must not be sent; `name` is its name in messages. A secret itself is not repeated.

    Of JSON the strings are looked at, so that a path is seen as it is meant. Lines are those of the file.
    """
    found = [
        Problem(
            f"it holds {what}",
            f"{name}:{_line(text, at)}",
            "take it out, and have it replaced where it counts",
        )
        for at, what in secrets(text, environment)
    ]
    if not paths:
        return found
    cure = "take it out, or send only its last part with --hide_paths true"
    if not name.endswith(".json"):
        return found + [
            Problem(
                f"it holds a path of this machine, {each.group()}",
                f"{name}:{_line(text, each.start())}",
                cure,
            )
            for each in ABSOLUTE.finditer(text)
        ]
    for where, value in _strings(_parsed(text), ""):
        found += [
            Problem(f"it holds a path of this machine, {each.group()}", f"{name}: {where}", cure)
            for each in ABSOLUTE.finditer(value)
        ]
    return found


def without_paths(name: str, text: str) -> str:
    """The text with the last part alone of every absolute path."""
    return _edited(name, text, lambda value: ABSOLUTE.sub(_last_part, value))


def renamed(name: str, text: str, before: str, after: str) -> str:
    """The text with one name, where it stands as a whole, in place of another."""
    whole = re.compile(rf"(?<![\w./\\-]){re.escape(before)}(?![\w/\\-]|\.\w)")
    return _edited(name, text, lambda value: whole.sub(lambda _: after, value))


def _edited(name: str, text: str, edit: Callable[[str], str]) -> str:
    """Of JSON, each string is edited by itself, and the rest is written as it was where nothing changed."""
    if not name.endswith(".json"):
        return edit(text)
    before = _parsed(text)
    after = _mapped(before, edit)
    return text if after == before else json.dumps(after, ensure_ascii=False, indent=2) + "\n"


def _last_part(found: re.Match[str]) -> str:
    return re.split(r"[/\\]", found.group().rstrip("/\\"))[-1]


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):  # no JSON after all: one long string
        return text


def _strings(value: Any, where: str) -> Iterator[tuple[str, str]]:
    """(place, text) of every string in a JSON value, keys included; a place is like `base.name`."""
    if isinstance(value, str):
        yield where or "the whole file", value
    elif isinstance(value, list):
        for number, each in enumerate(value):
            yield from _strings(each, f"{where}[{number}]")
    elif isinstance(value, dict):
        for key, each in value.items():
            yield f"{where}: a key" if where else "a key", key
            yield from _strings(each, f"{where}.{key}" if where else key)


def _mapped(value: Any, edit: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return edit(value)
    if isinstance(value, list):
        return [_mapped(each, edit) for each in value]
    if isinstance(value, dict):
        return {key: _mapped(each, edit) for key, each in value.items()}
    return value


def _line(text: str, at: int) -> int:
    return text.count("\n", 0, at) + 1
