"""Errors that a user can mend: what is wrong, where, and the cure. Nothing else is caught and reworded."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from difflib import get_close_matches

Log = Callable[[str], None]
"""Takes a line of progress or a warning for the user, without its line end."""


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong. `place` is a file, `file:line`, `file:line:column` or a setting's name."""

    what: str
    place: str = ""
    cure: str = ""

    def __str__(self) -> str:
        text = f"{self.place}: {self.what}" if self.place else self.what
        return f"{text}; {self.cure}" if self.cure else text


LOST = 69
"""Exit status of a process that ended because another of its run was lost: sysexits' EX_UNAVAILABLE."""


class ProcessLost(Exception):
    """Another process of the run is gone; says which."""


class UserError(Exception):
    """A mistake in the data, the template, the settings or a folder. `yeonma` prints it and exits with status 2."""

    def __init__(self, what: str | Iterable[Problem], *, place: str = "", cure: str = "") -> None:
        self.problems = (Problem(what, place, cure),) if isinstance(what, str) else tuple(what)
        super().__init__("\n".join(str(problem) for problem in self.problems))


def gather(*checks: Callable[[], object]) -> None:
    """Make every check, whatever the others find, and raise one UserError with the problems of all."""
    problems: list[Problem] = []
    for check in checks:
        try:
            check()
        except UserError as error:
            problems += error.problems
    if problems:
        raise UserError(problems)


def brief(text: str, most: int = 100) -> str:
    """A name from a file as messages show it: cut where it is longer than a message should be."""
    return text if len(text) <= most else f"{text[: most - 3]}..."


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`did you mean "title"?`, or an empty string where nothing known looks like `word`."""
    close = get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f'did you mean "{close[0]}"?' if close else ""


def first_line(error: Exception) -> str:
    """Of what another library says, so much as a line of ours can hold."""
    return (str(error).strip().splitlines() or [""])[0][:120]
