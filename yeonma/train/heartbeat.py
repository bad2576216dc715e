"""Heartbeat: find out when another process of the run dies or stops.

A process that waits in a collective for one that was killed, stopped or cut off would wait until the collective's
timeout. So a thread in every process increments a number in torchrun's store, and reads that of the next rank: three
small requests per process and interval, for any number of processes. When one is lost, all end, with its name. A
process whose threads run while its device hangs is not found here; the collective's timeout ends it.
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
"""A process that is silent for so long is lost. Its thread needs Python's interpreter lock now and then, which a long
call into C may hold."""
DONE = b"done"


@dataclass
class Heartbeat:
    """The thread of this process; see `watch_processes`."""

    store: Store
    rank: int
    count: int
    _left: threading.Event = field(default_factory=threading.Event)
    _verdict: str | None = None

    @property
    def next(self) -> int:
        return (self.rank + 1) % self.count

    def lost(self, seconds: float) -> str | None:
        """Wait until a process is lost, and return a message that names it; None if the time is over first."""
        until = time.monotonic() + seconds
        while self._verdict is None and time.monotonic() < until:
            self._left.wait(0.1)
        return self._verdict

    def run(self) -> None:
        """Beat until this process leaves. If another is lost, end this process."""
        try:
            self._listen()
        except Exception:  # the store raises various errors when its host is gone
            if self._left.wait(2 * INTERVAL_SECONDS):
                return
            self._verdict = "torchrun's store cannot be reached any more"
        if self._verdict is not None and not self._left.wait(2 * INTERVAL_SECONDS):
            # the main thread waits in a collective that will not end
            print(f"yeonma: {_message(self._verdict)}", file=sys.stderr, flush=True)
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
            if beat != DONE and (loss := self._loss(time.monotonic() - last)):
                self._verdict = loss
                self.store.set("lost", loss)
                return
            if self._left.wait(INTERVAL_SECONDS):
                return

    def _read(self, key: str) -> bytes:
        return bytes(self.store.get(key)) if self.store.check([key]) else b""

    def _loss(self, silent_seconds: float) -> str | None:
        """How the next rank was lost; None if it lives."""
        who = json.loads(self._read(f"who/{self.next}") or "null")
        if who is None:  # not started yet; torchrun itself notices one that ends before
            return None
        here = who["host"] == socket.gethostname()
        name = f"process {self.next} ({who['host']}, process id {who['pid']})"
        if here and not _is_there(who["pid"]):
            return None if self._read(f"beat/{self.next}") == DONE else f"{name} has ended"
        if silent_seconds < SILENCE_SECONDS:
            return None
        if here:  # a stopped process does not react to torchrun's SIGTERM either
            os.kill(who["pid"], getattr(signal, "SIGKILL", signal.SIGTERM))
        return f"{name} has been silent for {SILENCE_SECONDS:.0f} seconds"


def _message(verdict: str) -> str:
    return f"{verdict}; this process ends too; run the same command to continue from the last checkpoint"


def _is_there(pid: int) -> bool:
    """Whether a process of this machine runs; a zombie does not."""
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
def watch_processes(store: Store, rank: int, count: int) -> Iterator[None]:
    """Run the heartbeat within the block. Raises ProcessLost in place of the error of a collective that a lost process
    caused.

    `store` must have these keys to itself, and a connection of its own.
    """
    heartbeat = Heartbeat(store, rank, count)
    thread = threading.Thread(target=heartbeat.run, name="heartbeat", daemon=True)
    thread.start()
    try:
        yield
    except RuntimeError as error:
        if _is_of_a_collective(error) and (verdict := heartbeat.lost(SILENCE_SECONDS + 2 * INTERVAL_SECONDS)):
            raise ProcessLost(_message(verdict)) from error
        raise
    else:
        store.set(f"beat/{rank}", DONE.decode())
    finally:
        heartbeat._left.set()
        thread.join(INTERVAL_SECONDS)


def _is_of_a_collective(error: RuntimeError) -> bool:
    """Whether a collective failed; gloo raises a plain RuntimeError."""
    return isinstance(error, dist.DistError) or any(name in str(error) for name in ("gloo", "NCCL"))
