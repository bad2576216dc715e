"""Stops a run early with a checkpoint: on SIGTERM, on Ctrl-C, when its terminal closes (SIGHUP), or when its time limit
is reached.

Before the first step and after the last there is nothing to save, and a signal raises `Stopped` at once. During the
steps a signal is a request: every process adds its requests to the step's all-reduce, so that all stop after the same
step, with a checkpoint. A second signal kills the process at once. Like kill -9 at any moment, it damages nothing.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from types import FrameType

from yeonma.errors import UserError
from yeonma.messages import tr
from yeonma.shown import one_line

TIME_OVER = 75
"""Exit status of a run that `time_limit` stopped: EX_TEMPFAIL of sysexits.h, "try again"."""
HUNG_UP = 129
"""Exit status of a run whose terminal was closed: 128 + SIGHUP."""
REASONS = {143: "SIGTERM", 130: "Ctrl-C", HUNG_UP: "SIGHUP", TIME_OVER: "time_limit"}
"""Reasons to stop, by their exit status. If there are several, the first one counts."""
SPARE_SECONDS = 1.0
"""Safety margin of the time limit, on top of the slowest step and save so far."""
DUPLICATE_SECONDS = 2.0
"""A job manager may signal both torchrun and its processes, and torchrun forwards its own signal. Two signals within
this time count as one."""
START_TIME = "YEONMA_BEGAN"
"""Environment variable with the time.time() at which the command started, for the processes that it starts."""

FIRST_SIGNAL = tr(
    "saving a checkpoint, then stopping; a second signal kills the run at once and leaves "
    "the last checkpoint intact"
)

_STATUS = {"SIGINT": 130, "SIGTERM": 143, "SIGHUP": HUNG_UP}
_SIGNALS = {getattr(signal, name): status for name, status in _STATUS.items() if hasattr(signal, name)}
"""Signals that stop a run -> its exit status. Windows has no SIGHUP."""
_RESTORED_SIGNALS = [
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT") if hasattr(signal, name)
]
"""Signals whose handlers are restored. torchrun replaces the last two when it starts processes from here."""


class Stopped(KeyboardInterrupt):
    """A run stopped before it was finished. `status` is the exit status of the command, one of REASONS.
    `printed`: the message has already been printed."""

    def __init__(self, message: str, status: int, printed: bool = False) -> None:
        super().__init__(message)
        self.status, self.printed = status, printed

    def _render_traceback_(self) -> list[str]:
        """What a notebook shows instead of a traceback, which IPython asks for: the message alone."""
        return [f"yeonma: {one_line(str(self))}"]


@dataclass
class Stop:
    """Requests to stop a run, and what the processes agreed on."""

    deadline: float = float("inf")
    """Of the time limit, on the clock of time.monotonic()."""
    raises: bool = True
    """Whether a signal raises Stopped at once, instead of requesting a stop after the step."""
    several_processes: bool = False
    """A request then takes effect only when all processes know it."""
    slowest_step: float = 0.0
    slowest_save: float = 0.0
    agreed: int | None = None
    """The exit status to stop with, the same in every process; None to go on."""
    _signalled: int | None = None

    def requests(self) -> list[float]:
        """1.0 or 0.0 for each of REASONS: this process's requests, to sum over all processes and pass to `agree`."""
        reasons = {self._signalled, TIME_OVER if self._is_late(self.slowest_step) else None}
        return [float(status in reasons) for status in REASONS]

    def agree(self, sums: Sequence[float]) -> None:
        """Takes the summed requests, which are the same in every process."""
        self.agreed = next(
            (status for status, total in zip(REASONS, sums, strict=True) if total), self.agreed
        )

    def is_due(self) -> bool:
        """Whether to stop after this step. Call it once at the end of each step."""
        if not self.several_processes:  # requests since the step's all-reduce count too
            self.agree(self.requests())
        return self.agreed is not None

    def is_urgent(self) -> bool:
        """Whether this process should abandon work that can be repeated, such as an evaluation."""
        return self._signalled is not None or self._is_late(0.0)

    def record_seconds(self, *, step: float = 0.0, save: float = 0.0) -> None:
        """Records the duration of a step or a save. The run stops early enough for the slowest of each."""
        self.slowest_step, self.slowest_save = max(self.slowest_step, step), max(self.slowest_save, save)

    def check(self) -> None:
        """Raises Stopped if a stop was requested. Call it where there is nothing to save."""
        if self._signalled is not None or time.monotonic() > self.deadline:
            self._raise(self._signalled or TIME_OVER)

    def handle_signal(self, number: int) -> None:
        """Records a signal. Raises Stopped outside of the steps."""
        self._signalled = _SIGNALS[signal.Signals(number)]
        if self.raises:
            self._raise(self._signalled)

    @contextmanager
    def between_steps(self) -> Iterator[None]:
        """Within the block, signals are requests that take effect after a step."""
        self.raises = False
        try:
            yield
        finally:
            self.raises = True

    def _is_late(self, step_seconds: float) -> bool:
        """Whether a step of this length and a save might end after the deadline."""
        return time.monotonic() + step_seconds + self.slowest_save + SPARE_SECONDS > self.deadline

    def _raise(self, status: int) -> None:
        message = tr(
            "stopped by {reasons}; all work so far is kept: run the same command to continue",
            reasons=REASONS[status],
        )
        raise Stopped(message, status)


@dataclass
class _SignalThread:
    """A thread that receives signals while the main thread runs C code, such as a backward pass. It confirms the first
    signal and ends the process at the second."""

    first_signal: float | None = None
    """When it came, by time.monotonic()."""

    def __post_init__(self) -> None:
        self._receiver, sender = socket.socketpair()
        sender.setblocking(False)
        self._sender = sender
        self._earlier_fd = signal.set_wakeup_fd(sender.fileno(), warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._listen, name="signals", daemon=True)
        self._thread.start()

    def close(self) -> None:
        signal.set_wakeup_fd(self._earlier_fd)
        self._sender.close()
        self._thread.join()
        self._receiver.close()

    def _listen(self) -> None:
        while received := self._receiver.recv(1):
            number = received[0]
            if number in _SIGNALS:
                self._react(number, time.monotonic())

    def _react(self, number: int, now: float) -> None:
        if self.first_signal is None:
            if os.environ.get("RANK", "0") == "0":
                name = REASONS[_SIGNALS[signal.Signals(number)]]
                with suppress(OSError):  # the terminal may be gone
                    os.write(2, f"yeonma: {name}: {FIRST_SIGNAL}\n".encode())
            self.first_signal = now
        elif "TORCHELASTIC_RUN_ID" not in os.environ or now - self.first_signal > DUPLICATE_SECONDS:
            os._exit(_SIGNALS[signal.Signals(number)])


@contextmanager
def stoppable(time_limit: str | None, *, as_command: bool) -> Iterator[Stop]:
    """Handles SIGTERM, SIGINT and SIGHUP within the block, and restores the earlier handlers after it.

    `as_command`: a second signal ends the process. Otherwise, as in a notebook, a second signal raises
    KeyboardInterrupt, and a SIGTERM or SIGHUP is sent again to the earlier handler once the run has stopped. Outside
    the main thread no handlers can be set, and only the time limit works. Ignored signals, as SIGHUP under nohup, stay
    ignored.
    """
    elapsed = time.time() - float(os.environ.get(START_TIME, time.time()))
    limit = seconds_of(time_limit) if time_limit is not None else float("inf")
    stop = Stop(time.monotonic() + limit - elapsed)
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    signals: list[int] = []

    def handle(number: int, frame: FrameType | None) -> None:
        signals.append(number)
        if len(signals) > 1 and not as_command:
            raise KeyboardInterrupt
        if len(signals) == 1:
            stop.handle_signal(number)

    earlier_handlers = {number: signal.getsignal(number) for number in _RESTORED_SIGNALS}
    for number in _SIGNALS:
        if earlier_handlers[number] not in (signal.SIG_IGN, None):
            signal.signal(number, handle)
    signal_thread = _SignalThread() if as_command else None
    try:
        yield stop
    finally:
        for number, handler in earlier_handlers.items():
            if handler is not None:
                signal.signal(number, handler)
        if signal_thread is not None:
            signal_thread.close()
        if signals and signals[0] != signal.SIGINT and not as_command:
            signal.raise_signal(signal.Signals(signals[0]))


def heeded_signals() -> str:
    """The signals that torchrun may handle in the process that starts the others, as its option `signals_to_handle`
    lists them: all but those that are ignored, as SIGHUP is under nohup."""
    names = [name for name in ("SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT") if hasattr(signal, name)]
    return ",".join(name for name in names if signal.getsignal(getattr(signal, name)) != signal.SIG_IGN)


_PARTS = re.compile(r"(?:(\d+)d)?(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s)?")
_CLOCK = re.compile(r"(?:(\d+)-)?(\d+):(\d\d):(\d\d)")


def seconds_of(time_limit: str) -> int:
    """Parses `11h30m`, `90m`, `45s`, `1d`, `1:30:00` or `1-12:00:00`, the format of job queues. Raises UserError for
    others."""
    text = time_limit.strip()
    match = _CLOCK.fullmatch(text) or _PARTS.fullmatch(text)
    days, hours, minutes, seconds = (int(part or 0) for part in match.groups()) if match else (0, 0, 0, 0)
    total = ((days * 24 + hours) * 60 + minutes) * 60 + seconds
    if not 0 < total < 10**9:
        cure = tr("write it as 11h30m, 90m, 45s or 1:30:00")
        raise UserError(
            tr('"{time_limit}" is not a duration', time_limit=time_limit), place="time_limit", cure=cure
        )
    return total
