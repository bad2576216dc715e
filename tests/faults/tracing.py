"""Traces the children of tests/faults/saver.py with strace: lists their calls, and injects kills and errors there."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

IDENTITY = {"objective": "sft", "seed": 1}
"""Of the run whose folder the process fills."""
ROOT = Path(__file__).resolve().parents[2]
WRITES = ("write", "pwrite64", "writev", "pwritev", "pwritev2", "ftruncate", "truncate", "fallocate")
COPIES = ("copy_file_range", "sendfile")
SYNCS = ("fsync", "fdatasync", "sync_file_range", "syncfs", "sync", "msync")
RENAMES = ("rename", "renameat", "renameat2", "link", "linkat", "symlink", "symlinkat")
REMOVALS = ("unlink", "unlinkat", "rmdir")
FOLDERS = ("mkdir", "mkdirat")
OPENS = ("open", "openat", "openat2", "creat")
CALLS = (*WRITES, *COPIES, *SYNCS, *RENAMES, *REMOVALS, *FOLDERS, *OPENS)
"""The calls that change what is on a disk; of OPENS only those for writing. Memory maps for writing would be another
way: `test_nothing_is_written_through_memory` looks for them."""
LINE = re.compile(r"(?P<process>\d+) +(?P<name>\w+)\((?P<rest>.*)")
FOR_WRITING = re.compile(r"O_WRONLY|O_RDWR|O_CREAT|O_TRUNC")


@dataclass(frozen=True)
class Call:
    """One call in a trace; `number`: the how many-th of its name it is in its thread, from 1."""

    process: int
    name: str
    number: int
    text: str


@dataclass(frozen=True)
class Outcome:
    """`status` is negative where a signal ended it; `done`: how many of the job's calls came to their end; `error` is
    what a user would read."""

    status: int
    done: int
    error: str
    bug: str


class Workshop:
    """The saving process, and jobs for it."""

    def __init__(self, line: socket.socket) -> None:
        self.line, self.received = line, b""
        assert self._next() == {"ready": True}

    def _next(self) -> dict[str, Any]:
        while b"\n" not in self.received:
            piece = self.line.recv(1 << 16)
            assert piece, "the saving process has ended"
            self.received += piece
        first, _, self.received = self.received.partition(b"\n")
        return dict(json.loads(first))

    def do(self, job: Mapping[str, Any], strace: Sequence[str] = ()) -> Outcome:
        """Have a child do the job; with words for strace, under it. Skips the test where that cannot be."""
        if strace and shutil.which("strace") is None:
            pytest.skip("strace is not installed")
        child = self.take(job)["process"]
        tracer, refusal = None, ""
        if strace:
            command = ["strace", "-f", "-y", "-s", "16", *strace, "-p", str(child)]
            tracer = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
            assert tracer.stderr is not None
            first = tracer.stderr.readline()
            refusal = "" if "attached" in first else first or "no word"
        said = self.go_on("ended")
        if tracer is not None:
            tracer.communicate()
        if refusal:
            pytest.skip(f"strace cannot attach here: {refusal.strip()}")
        return Outcome(said["ended"], said.get("done", 0), said.get("error", ""), said.get("bug", ""))

    def take(self, job: Mapping[str, Any]) -> dict[str, Any]:
        """A child that waits to begin; what it says of itself."""
        self.line.sendall(json.dumps(job).encode() + b"\n")
        return self._next()

    def go_on(self, until: str) -> dict[str, Any]:
        """Let it begin; all that is said until that word."""
        self.line.sendall(b"x")
        return self.hear(until)

    def hear(self, until: str) -> dict[str, Any]:
        said: dict[str, Any] = {}
        while until not in said:
            said |= self._next()
        return said

    def succeed(self, job: Mapping[str, Any], strace: Sequence[str] = ()) -> None:
        outcome = self.do(job, strace)
        assert (outcome.status, outcome.error, outcome.bug) == (0, "", ""), outcome

    def trace(self, job: Mapping[str, Any], log: Path, also: str = "") -> list[Call]:
        """What a job that succeeds calls, in order: of CALLS, and of `also`."""
        names = ",".join(
            f"?{name}" for name in (*CALLS, *also.split())
        )  # `?`: not every processor has all of them
        self.succeed(job, ("-e", f"trace={names}", "-o", str(log)))
        seen: Counter[tuple[int, str]] = Counter()
        calls = []
        for line in log.read_text(errors="replace").splitlines():
            parts = LINE.fullmatch(line)
            if parts is None:
                continue
            process, name = int(parts["process"]), parts["name"]
            seen[process, name] += 1
            if name not in OPENS or FOR_WRITING.search(parts["rest"]):
                calls.append(Call(process, name, seen[process, name], parts["rest"]))
        return calls

    def kill(self, job: Mapping[str, Any], at: Call) -> Outcome:
        """Kill the job as it enters this call, which is then not made."""
        outcome = self.do(job, _inject(at, "signal=SIGKILL"))
        assert outcome.status == -9, (at, outcome)
        return outcome

    def fail(self, job: Mapping[str, Any], at: Call, error: str) -> Outcome:
        """Let this call fail."""
        return self.do(job, _inject(at, f"error={error}"))


def _inject(at: Call, what: str) -> tuple[str, ...]:
    return ("-e", f"trace={at.name}", "-e", f"inject={at.name}:{what}:when={at.number}", "-o", os.devnull)


@contextmanager
def workshop() -> Iterator[Workshop]:
    ours, theirs = socket.socketpair()
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONPATH": str(ROOT),
    }
    command = [sys.executable, "-W", "ignore", "-m", "tests.faults.saver"]
    with ours:
        process = subprocess.Popen(command, cwd=ROOT, stdin=theirs, env=environment)
        theirs.close()
        try:
            yield Workshop(ours)
        finally:
            ours.close()
            process.wait()
