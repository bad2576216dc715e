"""All that Yeonma writes on standard output and standard error. Text of others is escaped (`shown.py`), except in
answers and tables of JSON that go into a file or a pipe.

A line of a training run that cannot be written does not end the run. The disk behind a log file may be full, the
terminal or the next program of a pipe may be gone. Training goes on; what counts lies in the output folder.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any, TextIO

from yeonma.errors import system_reason
from yeonma.messages import tr
from yeonma.shown import MOST_OF_A_LINE, indented, many_lines, one_line, traceback_text

if TYPE_CHECKING:
    import logging


class UnfailingStream:
    """A text stream that drops what cannot be written. `problem` is what went wrong the first time."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.problem = ""

    def write(self, text: str) -> int:
        with self._dropping():
            self._stream.write(text)
        return len(text)

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        with self._dropping():
            self._stream.flush()

    @contextmanager
    def _dropping(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self.problem = self.problem or system_reason(error)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def unfailing_streams(*, as_command: bool) -> Iterator[None]:
    """Within the block, errors of standard output and standard error are dropped; those of standard output are said
    once on standard error when it ends. `as_command`: what is still in their buffers is given up then, so that the
    process ends with its own status."""
    before = sys.stdout, sys.stderr
    out, err = UnfailingStream(before[0]), UnfailingStream(before[1])
    sys.stdout, sys.stderr = out, err
    try:
        yield
    finally:
        out.flush()
        if out.problem:
            err.write(
                tr("yeonma: warning: standard output could not be written: {problem}\n", problem=out.problem)
            )
        err.flush()
        sys.stdout, sys.stderr = before
        if as_command:
            for stream, unfailing in zip(before, (out, err), strict=True):
                if unfailing.problem:
                    give_up(stream)


def give_up(stream: TextIO) -> None:
    """Drops what a stream has not written, and all that follows. Python would otherwise end with status 120."""
    with suppress(OSError, ValueError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)
        stream.flush()


def escape_other_libraries() -> None:
    """From here on warnings, log records and tracebacks of any library of this process are escaped. Their own lines
    after the first are indented, so that none passes for one of ours. More calls do nothing."""
    import logging

    if warnings.formatwarning is not _warning_text:
        warnings.formatwarning = _warning_text
        logging.setLogRecordFactory(partial(_log_record, logging.getLogRecordFactory()))
        sys.excepthook = _print_traceback


_FORMER_WARNING_TEXT = warnings.formatwarning


def _warning_text(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    return _FORMER_WARNING_TEXT(indented(str(message)), category, one_line(filename), lineno, line)


def _log_record(former: Callable[..., logging.LogRecord], *values: Any, **named: Any) -> logging.LogRecord:
    record = former(*values, **named)
    with suppress(Exception):  # the handler reports what cannot be formatted
        if (text := record.getMessage()) != (shown := indented(text)):
            record.msg, record.args = shown, None
        if record.exc_info and record.exc_info[1] is not None:
            record.exc_text = traceback_text(record.exc_info[1]).rstrip("\n")
    return record


def _print_traceback(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    sys.stderr.write(traceback_text(error))


_COPIES: list[Callable[[str], None]] = []


@contextmanager
def copied(keep: Callable[[str], None]) -> Iterator[None]:
    """Within the block, `keep` gets every line that `tell` prints."""
    _COPIES.append(keep)
    try:
        yield
    finally:
        _COPIES.remove(keep)


def tell(line: str) -> None:
    """Prints a line on standard error, if that can be written."""
    for keep in _COPIES:
        keep(line)
    try:
        print(one_line(line, MOST_OF_A_LINE), file=sys.stderr, flush=True)
    except OSError:
        give_up(sys.stderr)


def log_line(line: str) -> None:
    """Prints a line of progress or a warning on standard error, if that can be written. A Log."""
    tell(f"yeonma: {line}")


def say(line: str = "") -> None:
    """Prints a line on standard output. A Log."""
    print(one_line(line, MOST_OF_A_LINE), flush=True)


def say_lines(text: str) -> None:
    """Prints lines on standard output. The line feeds in `text` must be ours: names in it are escaped before."""
    print("\n".join(one_line(line, MOST_OF_A_LINE) for line in text.split("\n")), flush=True)


def give(text: str) -> None:
    """Writes on standard output what was asked for, such as an answer: unchanged into a file or a pipe, escaped on a
    terminal."""
    sys.stdout.write(many_lines(text) if sys.stdout.isatty() else text)
    sys.stdout.flush()
