"""Errors that a user can fix: what is wrong, where, and how to cure it. All other exceptions pass unchanged."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches

from yeonma.messages import counted, later, tr
from yeonma.shown import one_line, traceback_text

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
        """One line, whatever the parts hold: escaped, and long parts are cut in their middle."""
        what, place, cure = one_line(self.what, 1200), one_line(self.place, 500), one_line(self.cure, 600)
        text = f"{place}: {what}" if place else what
        return f"{text}; {cure}" if cure else text


MOST_OF_A_MESSAGE = 20_000
"""Characters of all problems of a UserError together, with what `yeonma` prints before each."""
_BEFORE_A_LINE = len("yeonma: ") + 1
LOST = 69
"""Exit status of a process that ends because another process of the run died: EX_UNAVAILABLE of sysexits.h."""


class ProcessLost(Exception):
    """Another process of the run has died. The message says which."""


class RunFailed(RuntimeError):
    """A run in several processes has failed, and one of them has printed why."""

    def _render_traceback_(self) -> list[str]:
        """As that of UserError."""
        return [f"yeonma: {one_line(str(self))}"]


class UserError(Exception):
    """A mistake in the data, the template, the settings or a folder. `yeonma` prints it and exits with status 2."""

    def __init__(self, what: str | Iterable[Problem], *, place: str = "", cure: str = "") -> None:
        self.problems = (Problem(what, place, cure),) if isinstance(what, str) else tuple(what)
        super().__init__("\n".join(_within_bounds(self.problems)))

    def _render_traceback_(self) -> list[str]:
        """What a notebook shows instead of a traceback, which IPython asks for: the message alone. YEONMA_DEBUG=1 adds
        the traceback, as on the command line."""
        debug = os.environ.get("YEONMA_DEBUG") == "1"
        return [traceback_text(self)] if debug else [f"yeonma: {line}" for line in str(self).split("\n")]


def _within_bounds(problems: Sequence[Problem]) -> list[str]:
    """A line for each problem, as far as a message may go, and how many more there are."""
    lines: list[str] = []
    room = MOST_OF_A_MESSAGE - 100
    for number, problem in enumerate(problems):
        line = str(problem)
        room -= len(line) + _BEFORE_A_LINE
        if room < 0:
            return [
                *lines,
                tr("... and {problems}", problems=counted(len(problems) - number, "more problem")),
            ]
        lines.append(line)
    return lines


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
    return tr('did you mean "{close}"?', close=close[0]) if close else ""


def either(cure: str, other: str) -> str:
    """Two cures, of which either helps."""
    return tr("{cure}, or {other}", cure=cure, other=other)


_SYSTEM_REASONS = {
    errno.EACCES: later("Permission denied"),
    errno.EADDRINUSE: later("Address already in use"),
    errno.EADDRNOTAVAIL: later("Cannot assign requested address"),
    errno.EBUSY: later("Device or resource busy"),
    errno.ECONNREFUSED: later("Connection refused"),
    errno.ECONNRESET: later("Connection reset by peer"),
    errno.EDQUOT: later("Disk quota exceeded"),
    errno.EEXIST: later("File exists"),
    errno.EFBIG: later("File too large"),
    errno.EINVAL: later("Invalid argument"),
    errno.EIO: later("Input/output error"),
    errno.EISDIR: later("Is a directory"),
    errno.ELOOP: later("Too many levels of symbolic links"),
    errno.EMFILE: later("Too many open files"),
    errno.ENAMETOOLONG: later("File name too long"),
    errno.ENFILE: later("Too many open files in system"),
    errno.ENODEV: later("No such device"),
    errno.ENOENT: later("No such file or directory"),
    errno.ENOLCK: later("No locks available"),
    errno.ENOMEM: later("Cannot allocate memory"),
    errno.ENOSPC: later("No space left on device"),
    errno.ENOSYS: later("Function not implemented"),
    errno.ENOTDIR: later("Not a directory"),
    errno.ENOTEMPTY: later("Directory not empty"),
    errno.ENXIO: later("No such device or address"),
    errno.EOPNOTSUPP: later("Operation not supported"),
    errno.EPERM: later("Operation not permitted"),
    errno.EPIPE: later("Broken pipe"),
    errno.EROFS: later("Read-only file system"),
    errno.ESTALE: later("Stale file handle"),
    errno.ETIMEDOUT: later("Connection timed out"),
}
"""What Linux says of the usual error numbers."""


def system_reason(error: BaseException | int) -> str:
    """What the system says of an error of its own, or of its number, without the path: `No such file or directory`, in
    the language of help. The text of any other error as it is."""
    number = error if isinstance(error, int) else getattr(error, "errno", None)
    if number in _SYSTEM_REASONS:
        return tr(_SYSTEM_REASONS[number])
    if isinstance(error, int):
        return os.strerror(error)
    return getattr(error, "strerror", None) or str(error)


def first_line(error: Exception) -> str:
    """The first line of another library's error, shortened to fit into a message."""
    return (str(error).strip().splitlines() or [""])[0][:120]
