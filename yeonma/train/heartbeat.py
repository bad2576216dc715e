"""Whether the other processes of a run are still there. Each beats, and the one before it listens.

Who waits in a sum for a process that was killed, stopped or cut off would wait as long as the sum may take, and that is
long: a first process may tokenise for hours. So a thread in every process writes a number into the store that torchrun
keeps, again and again, and looks at its successor's: three small requests a process and interval, for any number of
processes. What it finds missing ends all processes, with its name. A process that runs but never ends what it does
(a deadlock on its device) beats all the same, and is not found.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch.distributed as dist

from yeonma.errors import LOST, ProcessLost

if TYPE_CHECKING:  # a build of PyTorch may be without processes
    from torch.distributed.distributed_c10d import Store

INTERVAL_SECONDS = 2.0
SILENCE_SECONDS = float(os.environ.get("YEONMA_SILENCE_SECONDS", "40"))
"""A process that was not heard of for so long is lost. Its thread needs Python's lock for a moment now and then, which
a long call into C may hold."""
DONE = b"done"


@dataclass
class Heartbeat:
    """This process's thread. `company` makes it."""

    store: Store
    rank: int
    count: int
    _left: threading.Event = field(default_factory=threading.Event)
    _verdict: str | None = None

    @property
    def next(self) -> int:
        return (self.rank + 1) % self.count

    def lost(self, seconds: float) -> str | None:
        """Who is lost, in words, as soon as that is known or the time is over."""
        until = time.monotonic() + seconds
        while self._verdict is None and time.monotonic() < until:
            self._left.wait(0.1)
        return self._verdict

    def run(self) -> None:
        """Until the process leaves, or another is lost: then the process ends."""
        try:
            self._listen()
        except Exception:  # whatever the store raises where its host is gone
            if self._left.wait(2 * INTERVAL_SECONDS):
                return
            self._verdict = "the process that all were started by, or the way to it, is gone"
        if self._verdict is not None and not self._left.wait(2 * INTERVAL_SECONDS):
            # the main thread waits for what will not come
            print(f"yeonma: {told(self._verdict)}", file=sys.stderr, flush=True)
            os._exit(LOST)

    def _listen(self) -> None:
        self.store.set(f"who/{self.rank}", json.dumps({"host": socket.gethostname(), "pid": os.getpid()}))
        beats, heard, last = 0, b"", time.monotonic()
        while True:
            beats += 1
            self.store.set(f"beat/{self.rank}", str(beats))
            if self.store.check(["lost"]):
                self._verdict = self.store.get("lost").decode()
                return
            beat = self._read(f"beat/{self.next}")
            if beat != heard:
                heard, last = beat, time.monotonic()
            if beat != DONE and (how := self._is_lost(time.monotonic() - last)):
                self._verdict = how
                self.store.set("lost", how)
                return
            if self._left.wait(INTERVAL_SECONDS):
                return

    def _read(self, key: str) -> bytes:
        return bytes(self.store.get(key)) if self.store.check([key]) else b""

    def _is_lost(self, silent_seconds: float) -> str | None:
        who = json.loads(self._read(f"who/{self.next}") or "null")
        if who is None:  # it has not come so far; torchrun knows of those that ended before
            return None
        here = who["host"] == socket.gethostname()
        name = f"process {self.next} ({who['host']}, process id {who['pid']})"
        if here and not _is_there(who["pid"]):
            return None if self._read(f"beat/{self.next}") == DONE else f"{name} has ended"
        if silent_seconds < SILENCE_SECONDS:
            return None
        if here:  # stopped, it would not hear torchrun's SIGTERM either
            os.kill(who["pid"], getattr(signal, "SIGKILL", signal.SIGTERM))
        return f"{name} was not heard of for {SILENCE_SECONDS:.0f} seconds"


def told(verdict: str) -> str:
    return f"{verdict}; this process ends too, and the same command goes on from the last checkpoint"


def _is_there(pid: int) -> bool:
    """On this machine; a process that has ended and that nobody has asked about is not."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        if Path("/proc/self/stat").exists():
            return False
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return False
        return True
    return stat.rpartition(")")[2].split()[0] not in ("Z", "X")


@contextmanager
def company(store: Store, rank: int, count: int) -> Iterator[None]:
    """Beat and listen within. Raises ProcessLost in the place of the error that a lost process brings about in a sum.

    `store`: of torchrun's, for these keys alone and with a connection of its own.
    """
    beating = Heartbeat(store, rank, count)
    thread = threading.Thread(target=beating.run, name="heartbeat", daemon=True)
    thread.start()
    try:
        yield
    except RuntimeError as error:
        if _is_of_a_sum(error) and (verdict := beating.lost(SILENCE_SECONDS + 2 * INTERVAL_SECONDS)):
            raise ProcessLost(told(verdict)) from error
        raise
    else:
        store.set(f"beat/{rank}", DONE.decode())
    finally:
        beating._left.set()
        thread.join(INTERVAL_SECONDS)


def _is_of_a_sum(error: RuntimeError) -> bool:
    """A failed meeting of processes; gloo has no class of its own for it."""
    return isinstance(error, dist.DistError) or any(name in str(error) for name in ("gloo", "NCCL"))
