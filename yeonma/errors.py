"""Errors that a user can fix: what is wrong, where, and how to cure it. All other exceptions pass unchanged."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from difflib import get_close_matches

Log = Callable[[str], None]
"""Takes a line of progress or a warning for the user, without its line end."""


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong. `place` is a file, `file:line`, `file:line:column` or the name of a setting."""

    what: str
    place: str = ""
    cure: str = ""
    of_row: bool = field(default=False, compare=False)
    """Whether it is the fault of one row among good ones, so that a run could leave that row out."""

    def __str__(self) -> str:
        text = f"{self.place}: {self.what}" if self.place else self.what
        return f"{text}; {self.cure}" if self.cure else text


LOST = 69
"""Exit status of a process that ends because another process of the run died: EX_UNAVAILABLE of sysexits.h."""


class ProcessLost(Exception):
    """Another process of the run has died. The message says which."""


class UserError(Exception):
    """A mistake in the data, the template, the settings or a folder. `yeonma` prints it and exits with status 2."""

    def __init__(self, what: str | Iterable[Problem], *, place: str = "", cure: str = "") -> None:
        self.problems = (Problem(what, place, cure),) if isinstance(what, str) else tuple(what)
        super().__init__("\n".join(str(problem) for problem in self.problems))


def gather(*checks: Callable[[], object]) -> None:
    """Runs every check, even after one has failed, and raises one UserError with the problems of all."""
    problems: list[Problem] = []
    for check in checks:
        try:
            check()
        except UserError as error:
            problems += error.problems
    if problems:
        raise UserError(problems)


def brief(text: str, limit: int = 100) -> str:
    """Shortens text from a file for a message."""
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`did you mean "title"?`, or an empty string if nothing known resembles `word`.

    What differs only in capitals and blanks comes first.
    """

    def plain(text: str) -> str:
        return "".join(text.split()).casefold()

    names = list(known)
    same = [name for name in names if plain(name) == plain(word)]
    close = same or get_close_matches(word, names, n=1, cutoff=0.6)
    return f'did you mean "{close[0]}"?' if close else ""


def first_line(error: Exception) -> str:
    """The first line of another library's error, shortened to fit into a message."""
    return (str(error).strip().splitlines() or [""])[0][:120]
