"""Stop a run early with a checkpoint: on SIGTERM, on Ctrl-C, or when its time limit is over.

Before the first step and after the last there is nothing to save, and a signal raises `Stopped` wherever the run is.
During the steps it is a request: every process adds its own to the step's one sum, so all stop after the same step,
with a checkpoint. A second signal kills the process at once; like kill -9 at any moment, it damages nothing.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType

from yeonma.errors import UserError

TIME_OVER = 75
"""Exit status of a run that `time_limit` stopped: sysexits' EX_TEMPFAIL, "try again"."""
REASONS = {143: "SIGTERM", 130: "Ctrl-C", TIME_OVER: "time_limit"}
"""Why a run stops, by the exit status that it then has. Where there are several, the first counts."""
SPARE_SECONDS = 1.0
"""Kept free beside what steps and saves have taken so far."""
TWICE_SECONDS = 2.0
"""A job manager may signal both torchrun and its processes, and torchrun passes it on: within this time it is one."""
BEGAN = "YEONMA_BEGAN"
"""Environment variable: when the command began that started this process, in seconds of time.time()."""

FIRST_SIGNAL = (
    "saving a checkpoint, then stopping; "
    "a second signal kills the run at once and leaves the last checkpoint intact"
)

_SIGNALS = {signal.SIGINT: 130, signal.SIGTERM: 143}
_GIVEN_BACK = [
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT") if hasattr(signal, name)
]
# The last two are torchrun's to take, where the processes are started from here.


class Stopped(KeyboardInterrupt):
    """A run was stopped before it was finished. `status` is the exit status of the command: 143, 130 or 75 (see
    REASONS). `told`: the text has been printed."""

    def __init__(self, text: str, status: int, told: bool = False) -> None:
        super().__init__(text)
        self.status, self.told = status, told


@dataclass
class Stop:
    """What this process knows of a wish to stop.

    `at_once`: a signal raises where it comes. `others`: there are more processes, and a wish counts once all know it.
    """

    ends: float = float("inf")  # of the time limit, by time.monotonic()
    at_once: bool = True
    others: bool = False
    slowest_step: float = 0.0
    slowest_save: float = 0.0
    agreed: int | None = None  # the exit status to stop with, the same in every process
    _signalled: int | None = None

    def wishes(self) -> list[float]:
        """This process's, a number for each of REASONS: to be summed over all processes and given to `agree`."""
        reasons = {self._signalled, TIME_OVER if self._is_late(self.slowest_step) else None}
        return [float(status in reasons) for status in REASONS]

    def agree(self, sums: Sequence[float]) -> None:
        """All processes call it with the same sums, and stop after the same step."""
        self.agreed = next(
            (status for status, total in zip(REASONS, sums, strict=True) if total), self.agreed
        )

    def settle(self) -> bool:
        """Whether to stop here: asked once a step, at its end."""
        if not self.others:  # nobody to ask: what has come since the step's sum counts too
            self.agree(self.wishes())
        return self.agreed is not None

    def hurry(self) -> bool:
        """Whether to leave what can be done again, such as an evaluation; this process's own view."""
        return self._signalled is not None or self._is_late(0.0)

    def took(self, *, step: float = 0.0, save: float = 0.0) -> None:
        """Seconds of a step or a save; the time limit leaves room for the slowest."""
        self.slowest_step, self.slowest_save = max(self.slowest_step, step), max(self.slowest_save, save)

    def check(self) -> None:
        """Between two parts of a run that have nothing to save. Raises Stopped where a wish came."""
        if self._signalled is not None or time.monotonic() > self.ends:
            self._leave(self._signalled or TIME_OVER)

    def signalled(self, number: int) -> None:
        """A signal came. Raises Stopped in the phases that can be left anywhere."""
        self._signalled = _SIGNALS[signal.Signals(number)]
        if self.at_once:
            self._leave(self._signalled)

    @contextmanager
    def between_steps(self) -> Iterator[None]:
        """Within, signals are wishes that are looked at after each step."""
        self.at_once = False
        try:
            yield
        finally:
            self.at_once = True

    def _is_late(self, room: float) -> bool:
        return time.monotonic() + room + self.slowest_save + SPARE_SECONDS > self.ends

    def _leave(self, status: int) -> None:
        text = f"stopped by {REASONS[status]}; what is done so far is kept: run the same command to continue"
        raise Stopped(text, status)


@dataclass
class _Watcher:
    """A thread that hears signals while the main one is inside C, such as a backward pass: it answers the first, and
    ends the process at the second."""

    heard: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._ours, theirs = socket.socketpair()
        theirs.setblocking(False)
        self._theirs = theirs
        self._former = signal.set_wakeup_fd(theirs.fileno(), warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._listen, name="signals", daemon=True)
        self._thread.start()

    def close(self) -> None:
        signal.set_wakeup_fd(self._former)
        self._theirs.close()
        self._thread.join()
        self._ours.close()

    def _listen(self) -> None:
        while received := self._ours.recv(1):
            number = received[0]
            if number in _SIGNALS:
                self._hear(number, time.monotonic())

    def _hear(self, number: int, now: float) -> None:
        if not self.heard:
            if os.environ.get("RANK", "0") == "0":
                name = REASONS[_SIGNALS[signal.Signals(number)]]
                os.write(2, f"yeonma: {name}: {FIRST_SIGNAL}\n".encode())
            self.heard.append(now)
        elif "TORCHELASTIC_RUN_ID" not in os.environ or now - self.heard[0] > TWICE_SECONDS:
            os._exit(_SIGNALS[signal.Signals(number)])


@contextmanager
def stoppable(time_limit: str | None, *, as_command: bool) -> Iterator[Stop]:
    """Hears SIGTERM and SIGINT within, and gives their handlers back to whoever had them.

    As a command, a second signal ends the process; else, in a notebook or a program, it raises KeyboardInterrupt, and
    SIGTERM, once the run has stopped, does what it would have done without us. Outside the main thread, where no
    handler can be set, only the time limit holds. A signal that is ignored, as under nohup, stays ignored.
    """
    gone = time.time() - float(os.environ.get(BEGAN, time.time()))
    limit = seconds_of(time_limit) if time_limit is not None else float("inf")
    stop = Stop(time.monotonic() + limit - gone)
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    heard: list[int] = []

    def handle(number: int, frame: FrameType | None) -> None:
        heard.append(number)
        if len(heard) > 1 and not as_command:
            raise KeyboardInterrupt
        if len(heard) == 1:
            stop.signalled(number)

    former = {number: signal.getsignal(number) for number in _GIVEN_BACK}
    for number in _SIGNALS:
        if former[number] not in (signal.SIG_IGN, None):
            signal.signal(number, handle)
    watcher = _Watcher() if as_command else None
    try:
        yield stop
    finally:
        for number, handler in former.items():
            if handler is not None:
                signal.signal(number, handler)
        if watcher is not None:
            watcher.close()
        if heard[:1] == [signal.SIGTERM] and not as_command:
            signal.raise_signal(signal.SIGTERM)


_PARTS = re.compile(r"(?:(\d+)d)?(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s)?")
_CLOCK = re.compile(r"(?:(\d+)-)?(\d+):(\d\d):(\d\d)")


def seconds_of(time_limit: str) -> int:
    """`11h30m`, `90m`, `45s`, `1d`, `1:30:00` or, as job queues write it, `1-12:00:00`. Raises UserError for others."""
    text = time_limit.strip()
    match = _CLOCK.fullmatch(text) or _PARTS.fullmatch(text)
    days, hours, minutes, seconds = (int(part or 0) for part in match.groups()) if match else (0, 0, 0, 0)
    total = ((days * 24 + hours) * 60 + minutes) * 60 + seconds
    if not 0 < total < 10**9:
        cure = "write it as 11h30m, 90m, 45s or 1:30:00"
        raise UserError(f'"{time_limit}" is no time', place="time_limit", cure=cure)
    return total
