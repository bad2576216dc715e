"""Runs found again from their folders: what state they are in, how far they are, and what they printed last.

A run is an ordinary `yeonma` process. Nothing here starts or keeps one, so a run that a terminal started is seen as one
that the studio resumed.
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal

from yeonma.errors import UserError
from yeonma.files import kind_of, open_regular, read_regular
from yeonma.messages import in_every_language, later
from yeonma.run_folder.entries import LOCK, PRINTED, RUN, SEAL
from yeonma.run_folder.lock import is_locked, lock_holder
from yeonma.run_folder.printed_log import ENDED_BY, FAILED
from yeonma.run_folder.run_log import METRICS

FoundState = Literal["running", "stopped", "finished", "failed"]
STATES: dict[FoundState, str] = {
    "running": later("running"),
    "stopped": later("stopped before its end"),
    "finished": later("finished"),
    "failed": later("failed"),
}
LOG_BYTES = 32_768
"""Of the end of log.txt."""
LARGEST_RECORD = 1_000_000
"""Bytes of a run.json."""
_STOPS = ("Stopped", "KeyboardInterrupt")
"""What a call is ended by that was asked to stop, before its first step or after its last."""
_TIME = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d  ")


@dataclass(frozen=True)
class FoundRun:
    """A run's folder as it is now."""

    folder: Path
    state: FoundState
    message: str
    """Why it failed; empty for any other state."""
    process: int | None
    """The process that may be asked to stop: it runs on this machine and holds the folder's lock."""
    total_steps: int | None
    objective: str
    """`sft`, `dpo` or `grpo`; empty if that is not known."""
    changed: float
    """When its files changed last, as time.time()."""

    @property
    def key(self) -> str:
        return key_of(self.folder)


def key_of(folder: Path) -> str:
    """The run's name in addresses: of its path, so that any name of a folder fits, and no path can be asked for."""
    return sha256(os.fsencode(folder)).hexdigest()[:20]


def read_run(folder: Path) -> FoundRun:
    """The run in a folder. What is damaged or missing there is passed over, as the state of a run may change at any
    moment."""
    identity, finished = _record(folder)
    process = _running_process(folder)
    state: FoundState = "stopped"
    message = ""
    if process is not None or is_locked(folder):
        state = "running"
    elif finished:
        state = "finished"
    elif failures := failures_in(log_tail(folder)):
        state, message = "failed", "\n".join(failures)
    steps = identity.get("steps")
    return FoundRun(
        folder,
        state,
        message,
        process,
        steps if type(steps) is int and steps > 0 else None,
        str(identity.get("objective", ""))[:100],
        max((_changed(folder / name) for name in (RUN, METRICS, PRINTED)), default=0.0),
    )


def _record(folder: Path) -> tuple[dict[str, Any], bool]:
    """What run.json says: the identity, and whether the run is finished."""
    try:
        if os.lstat(folder / RUN).st_size > LARGEST_RECORD:
            return {}, False
        record = json.loads(read_regular(folder / RUN))
        identity, finished = record["identity"], record["finished"]
    except (UserError, OSError, ValueError, KeyError, TypeError, RecursionError):
        return {}, False
    return (identity, finished) if isinstance(identity, dict) and isinstance(finished, bool) else ({}, False)


def _running_process(folder: Path) -> int | None:
    """By /proc, without touching the lock, for which a beginning run would have to wait."""
    holder = lock_holder(folder)
    return holder.process if holder is not None and holder.is_here_with(folder) else None


def _changed(path: Path) -> float:
    try:
        return os.lstat(path).st_mtime
    except OSError:
        return 0.0


def log_tail(folder: Path, lines: int = 60) -> list[str]:
    """The last lines of what the run printed."""
    try:
        with open(folder / PRINTED, "rb", buffering=0, opener=open_regular) as file:
            size = os.fstat(file.fileno()).st_size
            file.seek(max(0, size - LOG_BYTES))
            content = file.read(LOG_BYTES)
    except (OSError, UserError):
        return []
    if size > LOG_BYTES:
        content = content.partition(b"\n")[2]
    return content.decode("utf-8", "replace").splitlines()[-lines:]


def failures_in(lines: list[str]) -> list[str]:
    """Why the last call of a run failed, by the last lines of its log; empty if it did not."""
    failures: list[str] = []
    for line in reversed(lines):
        text = _TIME.sub("", line, count=1)
        match = next((match for one in _failures() if (match := one.fullmatch(text))), None)
        if match is None or match[1] in _STOPS:
            break
        failures.append(": ".join(match.groups()))
    return failures[::-1]


@cache
def _failures() -> list[re.Pattern[str]]:
    """The last lines of a call that failed, in every language."""
    forms = [
        *in_every_language(FAILED, problem="PROBLEM"),
        *in_every_language(ENDED_BY, name="NAME", error="PROBLEM"),
    ]
    return [re.compile(re.escape(form).replace("PROBLEM", "(.*)").replace("NAME", "(.*?)")) for form in forms]


def signature(folder: Path) -> tuple[tuple[int, int], ...]:
    """Changes whenever a file that a run's page shows does."""
    found = []
    for name in (RUN, METRICS, PRINTED, LOCK, SEAL):
        if kind_of(folder / name) == "file":
            about = os.lstat(folder / name)
            found.append((about.st_mtime_ns, about.st_size))
        else:
            found.append((0, 0))
    return tuple(found)
