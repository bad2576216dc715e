"""Heartbeat: detects that another process of the run has died or stopped.

A collective that waits for such a process would otherwise wait until its timeout. So a thread in every process
increments a counter in torchrun's store, and reads the counter of the next rank: three small requests per process and
interval, for any number of processes. If a process is lost, all others end with a message that names it. A process
whose device hangs while its threads run is not detected here; the collective's timeout ends it.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch.distributed as dist

from yeonma.errors import LOST, ProcessLost
from yeonma.messages import tr
from yeonma.streams import log_line
from yeonma.train.interrupt import Stopped

if TYPE_CHECKING:  # some builds of PyTorch have no torch.distributed
    from torch.distributed.distributed_c10d import Store

INTERVAL_SECONDS = 2.0
SILENCE_SECONDS = float(os.environ.get("YEONMA_SILENCE_SECONDS", "40"))
"""A process counts as lost after so many seconds without a beat. Its thread needs the interpreter lock, which a long C
call may hold."""
DONE = b"done"


@dataclass
class Heartbeat:
    """The thread of this process; see `watch_processes`."""

    store: Store
    rank: int
    count: int
    _leaving: threading.Event = field(default_factory=threading.Event)
    _loss: str | None = None

    @property
    def next(self) -> int:
        return (self.rank + 1) % self.count

    def wait_for_loss(self, seconds: float) -> str | None:
        """Wait until a process is lost. Returns a text that names it, or None after `seconds`."""
        deadline = time.monotonic() + seconds
        while self._loss is None and time.monotonic() < deadline:
            self._leaving.wait(0.1)
        return self._loss

    def loss_behind(self, error: RuntimeError | Stopped) -> str | None:
        """A text that names the lost process, if one is behind the error of a collective or torchrun's SIGTERM."""
        if isinstance(error, RuntimeError):
            if not _is_collective_error(error):
                return None
            try:
                return self.wait_for_loss(SILENCE_SECONDS + 2 * INTERVAL_SECONDS)
            except Stopped:
                if self._loss is None:
                    raise
        return self._loss

    def run(self) -> None:
        """Beat until this process leaves `watch_processes`. If another one is lost, end this process."""
        try:
            self._listen()
        except Exception:  # the store raises various errors when its host is gone
            if self._leaving.wait(2 * INTERVAL_SECONDS):
                return
            self._loss = tr("torchrun's store cannot be reached any more")
        if self._loss is not None and not self._leaving.wait(2 * INTERVAL_SECONDS):
            # the main thread is stuck in a collective
            log_line(_message(self._loss))
            os._exit(LOST)

    def _listen(self) -> None:
        self.store.set(f"who/{self.rank}", json.dumps({"host": socket.gethostname(), "pid": os.getpid()}))
        beats, last_beat, last_change = 0, b"", time.monotonic()
        while True:
            beats += 1
            self.store.set(f"beat/{self.rank}", str(beats))
            if self.store.check(["lost"]):
                self._loss = self.store.get("lost").decode()
                return
            beat = self._read(f"beat/{self.next}")
            if beat != last_beat:
                last_beat, last_change = beat, time.monotonic()
            if beat != DONE and (loss := self._check_next(time.monotonic() - last_change)):
                self._loss = loss
                self.store.set("lost", loss)
                return
            if self._leaving.wait(INTERVAL_SECONDS):
                return

    def _read(self, key: str) -> bytes:
        return bytes(self.store.get(key)) if self.store.check([key]) else b""

    def _check_next(self, silent_seconds: float) -> str | None:
        """How the next rank was lost; None if it is alive."""
        who = json.loads(self._read(f"who/{self.next}") or "null")
        if who is None:  # not started yet; torchrun itself detects it if it fails earlier
            return None
        is_local = who["host"] == socket.gethostname()
        if is_local and not _is_alive(who["pid"]):
            if self._read(f"beat/{self.next}") == DONE:
                return None
            return tr(
                "process {rank} ({host}, process id {pid}) has ended",
                rank=self.next,
                host=who["host"],
                pid=who["pid"],
            )
        if silent_seconds < SILENCE_SECONDS:
            return None
        loss = tr(
            "process {rank} ({host}, process id {pid}) has been silent for {seconds:.0f} seconds",
            rank=self.next,
            host=who["host"],
            pid=who["pid"],
            seconds=SILENCE_SECONDS,
        )
        if is_local:  # a stopped process does not react to torchrun's SIGTERM
            self._loss = loss  # first: once that process has ended, torchrun ends this one
            os.kill(who["pid"], getattr(signal, "SIGKILL", signal.SIGTERM))
        return loss


def _message(loss: str) -> str:
    return tr(
        "{loss}; this process ends too; run the same command to continue from the last checkpoint", loss=loss
    )


def _is_alive(pid: int) -> bool:
    """Whether a process of this machine runs. Zombies do not."""
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
    """Run the heartbeat within the block.

    If a process was lost, raises ProcessLost instead of a collective's error, or of Stopped by torchrun's signal.

    `store` must be a connection of its own, with a key prefix of its own.
    """
    heartbeat = Heartbeat(store, rank, count)
    thread = threading.Thread(target=heartbeat.run, name="heartbeat", daemon=True)
    thread.start()
    try:
        yield
    except (RuntimeError, Stopped) as error:
        if loss := heartbeat.loss_behind(error):
            raise ProcessLost(_message(loss)) from error
        raise
    else:
        store.set(f"beat/{rank}", DONE.decode())
    finally:
        heartbeat._leaving.set()
        thread.join(INTERVAL_SECONDS)


def _is_collective_error(error: RuntimeError) -> bool:
    """Whether a collective raised it. gloo raises a plain RuntimeError."""
    return isinstance(error, dist.DistError) or any(name in str(error) for name in ("gloo", "NCCL"))
