"""Standard output and error that cannot be written do not end a run."""

from __future__ import annotations

import errno
import io
import os
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout

import pytest
from rich.console import Console

from yeonma.streams import unfailing_streams


class Full(io.StringIO):
    """A stream whose disk is full."""

    def write(self, text: str) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_fault_91_lines_that_cannot_be_written_are_dropped_and_that_is_said_once() -> None:
    err = io.StringIO()
    with redirect_stdout(Full()), redirect_stderr(err):
        with unfailing_streams(as_command=False):
            print("one")
            Console().out("two")
            sys.stdout.writelines(["three"])
        with pytest.raises(OSError):
            print("as always again")
    assert err.getvalue() == (
        "yeonma: warning: standard output could not be written: No space left on device\n"
    )


def test_fault_91_both_may_be_full() -> None:
    with redirect_stdout(Full()), redirect_stderr(Full()), unfailing_streams(as_command=False):
        print("one")
        print("two", file=sys.stderr)


def test_streams_that_work_are_written_as_always() -> None:
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err), unfailing_streams(as_command=False):
        print("one")
        print("two", file=sys.stderr)
        assert not sys.stdout.isatty() and sys.stdout.encoding == out.encoding
    assert (out.getvalue(), err.getvalue()) == ("one\n", "two\n")


def test_other_errors_pass() -> None:
    with redirect_stdout(io.StringIO()), pytest.raises(TypeError), unfailing_streams(as_command=False):
        sys.stdout.write(1)  # type: ignore[arg-type]


SCRIPT = """
import sys
from yeonma.streams import tell, unfailing_streams
with unfailing_streams(as_command=True):
    for number in range(5000):
        print("a line of a step", number)
    print("what went wrong", file=sys.stderr)
tell("the end")
sys.exit(3)
"""


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="this system has no /dev/full")
def test_fault_91_a_process_ends_with_its_own_status() -> None:
    """Python ends with status 120 where a buffer cannot be written at its end."""
    with open("/dev/full", "w") as full:
        assert subprocess.run([sys.executable, "-c", SCRIPT], stdout=full, stderr=full).returncode == 3
        said = subprocess.run([sys.executable, "-c", SCRIPT], stdout=full, stderr=subprocess.PIPE, text=True)
    assert said.stderr.splitlines() == [
        "what went wrong",
        "yeonma: warning: standard output could not be written: No space left on device",
        "the end",
    ]
    piped = subprocess.Popen(
        [sys.executable, "-c", SCRIPT], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    assert piped.stdout is not None
    piped.stdout.close()  # the next program of a pipe is gone
    assert piped.wait() == 3
