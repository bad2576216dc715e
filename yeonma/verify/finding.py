"""What a check of an output folder found."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from yeonma.errors import Problem

Outcome = Literal["well", "differs", "not checked"]


@dataclass(frozen=True)
class Finding:
    """One check. `about` says in words what was found well, or why nothing was looked at."""

    check: str
    outcome: Outcome
    about: str
    problems: tuple[Problem, ...] = ()


def found(check: str, problems: Iterable[Problem], about: str) -> Finding:
    """A check that was made: well where there are no problems."""
    problems = tuple(problems)
    if not problems:
        return Finding(check, "well", about)
    count = "one difference" if len(problems) == 1 else f"{len(problems)} differences"
    return Finding(check, "differs", count, problems)


def not_checked(check: str, why: str) -> Finding:
    return Finding(check, "not checked", why)
