"""A time limit for calls of foreign code in this thread, without signals."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import monotonic
from typing import TypeVar

Result = TypeVar("Result")


class TooSlow(BaseException):
    """Raised inside a call that exceeds its deadline. Not an Exception, so that the called code does not catch it."""


class Deadline:
    """Limits calls in this thread to `seconds`; a second thread watches the time.

    It needs no signals. It cannot interrupt a long operation inside C code.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._thread = threading.get_ident()
        self._lock = threading.Lock()
        self._started_at: float | None = None

    def call(self, function: Callable[[], Result]) -> Result:
        """Call `function` and return its result. Raises TooSlow when its time is up."""
        with self._lock:
            self._started_at = monotonic()
        try:
            return function()
        finally:
            with self._lock:
                self._started_at = None

    def interrupt_if_late(self) -> None:
        """Called by the watching thread. The lock ensures that the exception does not reach a call that has ended."""
        with self._lock:
            if self._started_at is not None and monotonic() - self._started_at > self.seconds:
                self._started_at = None
                ctypes.pythonapi.PyThreadState_SetAsyncExc(
                    ctypes.c_ulong(self._thread), ctypes.py_object(TooSlow)
                )


@contextmanager
def deadline(seconds: float) -> Iterator[Deadline]:
    """A `Deadline` for calls in this thread within the block."""
    limit, done = Deadline(seconds), threading.Event()

    def watch() -> None:
        while not done.wait(seconds / 4):
            limit.interrupt_if_late()

    watcher = threading.Thread(target=watch, name="deadline", daemon=True)
    watcher.start()
    try:
        yield limit
    finally:
        done.set()
        watcher.join()
