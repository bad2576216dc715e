"""The outcome of one check of an output folder."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from yeonma.errors import Problem

Outcome = Literal["well", "differs", "not checked"]
"""These words are part of the JSON that `yeonma verify --json` prints."""


@dataclass(frozen=True)
class Finding:
    """One check. `about` says what was checked, or why nothing was."""

    check: str
    outcome: Outcome
    about: str
    problems: tuple[Problem, ...] = ()


def checked(check: str, problems: Iterable[Problem], about: str) -> Finding:
    """A check that ran. It passed if there are no problems."""
    problems = tuple(problems)
    if not problems:
        return Finding(check, "well", about)
    count = "one difference" if len(problems) == 1 else f"{len(problems)} differences"
    return Finding(check, "differs", count, problems)


def not_checked(check: str, reason: str) -> Finding:
    return Finding(check, "not checked", reason)
