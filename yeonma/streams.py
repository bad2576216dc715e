"""Standard output and standard error of a training run: a line that cannot be written does not end the run.

The disk behind a log file may be full, the terminal or the next program of a pipe may be gone. Training goes on; what
counts lies in the output folder.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO


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
            self.problem = self.problem or error.strerror or str(error)

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
            err.write(f"yeonma: warning: standard output could not be written: {out.problem}\n")
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


def tell(line: str) -> None:
    """Prints a line on standard error, if that can be written."""
    try:
        print(line, file=sys.stderr, flush=True)
    except OSError:
        give_up(sys.stderr)
