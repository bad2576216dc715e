"""A bound on the time of code that is not ours and may never end, such as a model's chat template."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import monotonic
from typing import TypeVar

Result = TypeVar("Result")


class TooSlow(BaseException):
    """Raised inside a call that took too long. Not an Exception, so that the code in the call does not catch it."""


class Deadline:
    """Runs calls in this thread, each for at most `seconds`; a second thread watches.

    Works wherever Python code runs, signals or not. A single long operation inside C code is not interrupted.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._thread = threading.get_ident()
        self._lock = threading.Lock()
        self._began: float | None = None

    def call(self, function: Callable[[], Result]) -> Result:
        """What `function` returns. Raises TooSlow when its time is over."""
        with self._lock:
            self._began = monotonic()
        try:
            return function()
        finally:
            with self._lock:
                self._began = None

    def interrupt_if_late(self) -> None:
        """Called by the watching thread. The lock keeps the exception from a call that has ended."""
        with self._lock:
            if self._began is not None and monotonic() - self._began > self.seconds:
                self._began = None
                ctypes.pythonapi.PyThreadState_SetAsyncExc(
                    ctypes.c_ulong(self._thread), ctypes.py_object(TooSlow)
                )


@contextmanager
def deadline(seconds: float) -> Iterator[Deadline]:
    """A `Deadline` for calls made in this thread within the block."""
    bound, over = Deadline(seconds), threading.Event()

    def watch() -> None:
        while not over.wait(seconds / 4):
            bound.interrupt_if_late()

    watcher = threading.Thread(target=watch, name="deadline", daemon=True)
    watcher.start()
    try:
        yield bound
    finally:
        over.set()
        watcher.join()
