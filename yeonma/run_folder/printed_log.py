"""log.txt: the lines that a run printed, with their times, over all calls that continued it.

It is for people. No check compares it, it is in no manifest, and a disk that cannot take it ends no training.
"""

from __future__ import annotations

import os
import sys
from contextlib import ExitStack, suppress
from datetime import datetime
from io import FileIO
from pathlib import Path
from types import TracebackType

from yeonma.errors import Log, UserError
from yeonma.files import open_regular, write_all
from yeonma.messages import later, tr
from yeonma.shown import MOST_OF_A_LINE, one_line
from yeonma.streams import copied

MOST_KEPT = 1_000_000
"""Bytes that stay of earlier calls."""
MOST_WRITTEN = 4_000_000
"""Bytes that one call adds."""
NO_MORE = tr("this log ends here, because it has become long; metrics.jsonl has every step")
EARLIER_CUT = tr("earlier lines are left out")
FAILED = later("failed: {problem}")
ENDED_BY = later("ended by {name}: {error}")
"""The last lines of a call that did not come to its end, by which others tell it from one that was stopped."""


class PrintedLog:
    """Keeps the lines that are printed within its `with` block. `open` writes those before it, too."""

    def __init__(self) -> None:
        self._file: FileIO | None = None
        self._waiting: list[str] = []
        self._size = 0
        self._contexts = ExitStack()

    def also(self, log: Log) -> Log:
        """A Log that prints a line and keeps it."""

        def print_and_keep(line: str) -> None:
            log(line)
            self.keep(line)

        return print_and_keep

    def keep(self, line: str) -> None:
        """Adds a line with the time."""
        text = f"{datetime.now():%Y-%m-%d %H:%M:%S}  {one_line(line, MOST_OF_A_LINE)}\n"
        if self._size > MOST_WRITTEN:
            return
        self._size += len(text.encode())
        if self._size > MOST_WRITTEN:
            text = f"{NO_MORE}\n"
        self._waiting.append(text)
        if self._file is not None:
            self._write()

    def open(self, path: Path) -> None:
        """Appends to a file from now on. Does nothing if it cannot be opened, or if it is what this process prints
        into."""
        with suppress(OSError, UserError):
            _shorten(path)
            file = open(path, "ab", buffering=0, opener=open_regular)  # noqa: SIM115 (closed by __exit__)
            self._contexts.callback(file.close)
            if not _is_output(file):
                self._file = file
                self._write()

    def _write(self) -> None:
        assert self._file is not None
        text, self._waiting = "".join(self._waiting), []
        with suppress(OSError):
            write_all(self._file, text.encode())

    def __enter__(self) -> PrintedLog:
        self._contexts.enter_context(copied(self.keep))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, UserError):
            for problem in error.problems:
                self.keep(tr(FAILED, problem=str(problem)))
        elif error is not None and not getattr(error, "printed", False):
            self.keep(tr(ENDED_BY, name=type(error).__name__, error=error))
        self._contexts.close()
        self._file = None


def _shorten(path: Path) -> None:
    """Leaves the last MOST_KEPT bytes of a file, from the beginning of a line."""
    if not path.is_file() or path.stat().st_size <= MOST_KEPT:
        return
    with open(path, "r+b", buffering=0, opener=open_regular) as file:
        file.seek(-MOST_KEPT, os.SEEK_END)
        last = file.read().partition(b"\n")[2]
        file.seek(0)
        file.truncate()
        write_all(file, f"{EARLIER_CUT}\n".encode() + last)


def _is_output(file: FileIO) -> bool:
    """Whether standard output or standard error goes into this file, as with `> out/log.txt`."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError, AttributeError):
            if os.path.sameopenfile(file.fileno(), stream.fileno()):
                return True
    return False
