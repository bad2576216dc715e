"""A command with all the processes that it starts, ended together."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from threading import Event

SECONDS_TO_GO = 5.0
"""How long the last processes of a killed group may take to disappear: a GPU's memory is freed as they do."""


class OverLimit(RuntimeError):
    """The command took longer than its limit, and was ended."""


class Stopped(RuntimeError):
    """`stop_all` was called."""


_running: set[subprocess.Popen[bytes]] = set()
_stopping = Event()


def run_group(
    command: Sequence[str],
    log: Path,
    environment: Mapping[str, str],
    limit_seconds: float | None = None,
    folder: Path | None = None,
) -> int:
    """Run a command to its end, in `folder`, with what it prints in the file `log`; returns its exit status.

    Whatever ends this call, an exception or a signal's too, no process of the command's group is left.
    Raises OverLimit after `limit_seconds`, and Stopped after `stop_all`.
    """
    if _stopping.is_set():
        raise Stopped("stopped")
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "wb") as file:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            env=dict(environment),
            cwd=folder,
            start_new_session=True,
        )
        _running.add(process)
        try:
            status = process.wait(limit_seconds)
        except subprocess.TimeoutExpired:
            raise OverLimit(f"stopped after {limit_seconds:.0f} s") from None
        finally:
            end_group(process)
            _running.discard(process)
    if _stopping.is_set():
        raise Stopped("stopped")
    return status


def stop_all() -> None:
    """End the groups of all threads, which then raise Stopped, as every later `run_group` does."""
    _stopping.set()
    for process in list(_running):
        end_group(process)


def end_group(process: subprocess.Popen[bytes]) -> None:
    """Kill what is left of the process's group, and wait until it is gone."""
    deadline = time.monotonic() + SECONDS_TO_GO
    while time.monotonic() < deadline:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            break
        process.poll()  # a leader that has ended is in its group until somebody has asked for its status
        time.sleep(0.01)
    process.wait()
