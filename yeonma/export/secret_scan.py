"""Finds secrets, and paths of this machine, in files that are about to be published.

It searches for known patterns, and so finds mistakes, not what somebody hides on purpose.
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
"""Patterns of common secrets, by their names in messages."""

SECRET_NAMES = re.compile(r"(?:TOKEN|KEY|SECRET|PASSWORD|PASSWD)$")
"""Environment variables whose values are searched for literally."""
MIN_SECRET_LENGTH = 12

# At least two parts, to exclude "/think" and "and/or"; the path of a URL follows a letter.
ABSOLUTE_PATH = re.compile(
    r"""file://[^\s"'`<>]+"""
    r"""|(?<![\w.:/~<\\-])/(?:[\w.@+=-]+/)+[\w.@+=-]+/?"""
    r"""|(?<![\w])[A-Za-z]:\\(?:[^\s"'`<>|\\]+\\)*[^\s"'`<>|\\]+"""
    r"""|(?<![\w\\])\\\\[\w.-]+\\[^\s"'`<>|]+"""
)
"""An absolute path of POSIX or Windows."""


def find_secrets(text: str, environment: Mapping[str, str]) -> Iterator[tuple[int, str]]:
    """Yields (position, name) of each secret in a text, also of values of environment variables that look secret."""
    for secret, pattern in SECRETS.items():
        for match in re.finditer(pattern, text):
            yield match.start(), secret
    for name, value in environment.items():
        if SECRET_NAMES.search(name) and len(value) >= MIN_SECRET_LENGTH:
            at = text.find(value)
            if at >= 0:
                yield at, f"the value of ${name}"


def find_problems(
    name: str, text: str, environment: Mapping[str, str], *, paths: bool = True
) -> list[Problem]:
    """Secrets, and with `paths` absolute paths, in a text file called `name`. Messages never repeat a secret.

    JSON files are searched string by string, so that escapes do not hide a path.
    """
    problems = [
        Problem(
            f"contains {secret}", f"{name}:{_line(text, at)}", "remove it, and revoke it where it is used"
        )
        for at, secret in find_secrets(text, environment)
    ]
    if not paths:
        return problems
    strings = _strings(_parsed(text), "") if name.endswith(".json") else [("", text)]
    for where, value in strings:
        for match in ABSOLUTE_PATH.finditer(value):
            place = f"{name}: {where}" if where else f"{name}:{_line(text, match.start())}"
            what = f"contains a path of this machine, {match.group()}"
            cure = "remove it, or send only its last part with --hide_paths true"
            problems.append(Problem(what, place, cure))
    return problems


def without_paths(name: str, text: str) -> str:
    """Shortens every absolute path in the text to its last part."""
    return _edited(name, text, lambda value: ABSOLUTE_PATH.sub(_last_part, value))


def replace_name(name: str, text: str, before: str, after: str) -> str:
    """Replaces a name by another where it stands as a whole."""
    whole = re.compile(rf"(?<![\w./\\-]){re.escape(before)}(?![\w/\\-]|\.\w)")
    return _edited(name, text, lambda value: whole.sub(lambda _: after, value))


def _edited(name: str, text: str, edit: Callable[[str], str]) -> str:
    """Edits a text, or each string of a JSON file. A JSON file in which nothing changes keeps its bytes."""
    if not name.endswith(".json"):
        return edit(text)
    before = _parsed(text)
    after = _mapped(before, edit)
    return text if after == before else json.dumps(after, ensure_ascii=False, indent=2) + "\n"


def _last_part(match: re.Match[str]) -> str:
    return re.split(r"[/\\]", match.group().rstrip("/\\"))[-1]


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):  # not JSON after all: one long string
        return text


def _strings(value: Any, where: str) -> Iterator[tuple[str, str]]:
    """Yields (place, text) of every string in a JSON value, keys included. Places look like `base.name`."""
    if isinstance(value, str):
        yield where or "the whole file", value
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _strings(item, f"{where}[{index}]")
    elif isinstance(value, dict):
        for key, item in value.items():
            yield f"{where}: a key" if where else "a key", key
            yield from _strings(item, f"{where}.{key}" if where else key)


def _mapped(value: Any, edit: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return edit(value)
    if isinstance(value, list):
        return [_mapped(item, edit) for item in value]
    if isinstance(value, dict):
        return {key: _mapped(item, edit) for key, item in value.items()}
    return value


def _line(text: str, at: int) -> int:
    return text.count("\n", 0, at) + 1
