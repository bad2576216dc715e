"""strace on the children of tests/faults/saver.py: what they call, and kills and errors at any of those calls."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
CALLS = (
    "write,pwrite64,writev,pwritev,ftruncate,fallocate,copy_file_range,sendfile,fsync,fdatasync,sync_file_range,"
    "rename,renameat,renameat2,link,linkat,symlink,symlinkat,unlink,unlinkat,mkdir,mkdirat,rmdir"
)
"""The calls that change what is on a disk; `?` before each in strace's words: not every processor has all."""
SET = ",".join(f"?{name}" for name in CALLS.split(","))
TRACED = re.compile(r"(?P<process>\d+) +(?P<name>\w+)\((?P<rest>.*)")


@dataclass(frozen=True)
class Call:
    """One call in a trace; `number`: the how many-th of its name it is in its thread, from 1."""

    process: int
    name: str
    number: int
    text: str


@dataclass(frozen=True)
class Outcome:
    """`status` is negative where a signal ended it; `error` is what a user would read."""

    status: int
    error: str
    bug: str


class Workshop:
    """The saving process, and jobs for it."""

    def __init__(self, line: socket.socket, process: subprocess.Popen[bytes]) -> None:
        self.line, self.process, self.received = line, process, b""
        assert self._next() == {"ready": True}

    def _next(self) -> dict[str, Any]:
        while b"\n" not in self.received:
            piece = self.line.recv(1 << 16)
            assert piece, "the saving process has ended"
            self.received += piece
        first, _, self.received = self.received.partition(b"\n")
        return dict(json.loads(first))

    def do(self, job: Mapping[str, Any], *strace: str) -> Outcome:
        """Have a child do the job; with words for strace, under it."""
        self.line.sendall(json.dumps(job).encode() + b"\n")
        child = self._next()["process"]
        tracer = None
        if strace:
            command = ["strace", "-f", "-y", "-s", "16", "-p", str(child), *strace]
            tracer = subprocess.Popen(command, stderr=subprocess.PIPE)
            assert tracer.stderr is not None
            first = tracer.stderr.readline().decode()
            if "attached" not in first:
                self.line.sendall(b"x")
                while "ended" not in self._next():
                    pass
                pytest.skip(f"strace cannot attach here: {first.strip()}")
        self.line.sendall(b"x")
        said: dict[str, Any] = {}
        while "ended" not in said:
            said |= self._next()
        if tracer is not None:
            tracer.communicate()
        return Outcome(said["ended"], said.get("error", ""), said.get("bug", ""))

    def done(self, job: Mapping[str, Any]) -> None:
        """The job must succeed."""
        outcome = self.do(job)
        assert (outcome.status, outcome.error, outcome.bug) == (0, "", ""), outcome

    def trace(self, job: Mapping[str, Any], log: Path) -> list[Call]:
        """What a job that succeeds calls, in order."""
        log.unlink(missing_ok=True)
        outcome = self.do(job, "-e", f"trace={SET}", "-o", str(log))
        assert (outcome.status, outcome.error, outcome.bug) == (0, "", ""), outcome
        seen: Counter[tuple[str, str]] = Counter()
        found = []
        for line in log.read_text(errors="replace").splitlines():
            if parts := TRACED.fullmatch(line):
                seen[parts["process"], parts["name"]] += 1
                number = seen[parts["process"], parts["name"]]
                found.append(Call(int(parts["process"]), parts["name"], number, parts["rest"]))
        return found

    def killed(self, job: Mapping[str, Any], at: Call) -> None:
        """Kill the job right before this call."""
        outcome = self.do(
            job,
            "-e", f"trace={at.name}",
            "-e", f"inject={at.name}:signal=SIGKILL:when={at.number}",
            "-o", os.devnull,
        )  # fmt: skip
        assert outcome.status == -9, (at, outcome)

    def failing(self, job: Mapping[str, Any], at: Call, error: str) -> Outcome:
        """Let this call fail."""
        return self.do(
            job,
            "-e", f"trace={at.name}",
            "-e", f"inject={at.name}:error={error}:when={at.number}",
            "-o", os.devnull,
        )  # fmt: skip


@contextmanager
def workshop() -> Iterator[Workshop]:
    """Skips where there is no strace."""
    if shutil.which("strace") is None:
        pytest.skip("strace is not installed")
    ours, theirs = socket.socketpair()
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": str(ROOT)}
    with ours:
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.saver"], cwd=ROOT, stdin=theirs, env=environment
        )
        theirs.close()
        try:
            yield Workshop(ours, process)
        finally:
            ours.close()
            process.wait()
