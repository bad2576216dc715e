"""Work that only one request may do at a time. Small work does not wait long behind large."""

from __future__ import annotations

import asyncio
import heapq
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from itertools import count
from time import monotonic

from yeonma.messages import counted_in_english

BYTES_PER_SECOND = 100_000
"""A request is let in as if it had come 1 second later for each of these, so that no size waits for ever."""


class Full(Exception):
    """Too many are waiting."""


class OneAtATime:
    """A lock for one event loop. At most `most_waiting` wait for it; of more, the last in the order is turned away."""

    def __init__(self, most_waiting: int) -> None:
        self._most_waiting = most_waiting
        self._waiting: list[tuple[float, int, asyncio.Future[None]]] = []
        self._is_taken = False
        self._numbers = count()

    @asynccontextmanager
    async def turn(self, size: int) -> AsyncIterator[None]:
        """Alone until its end. Raises Full if too many are waiting. `size`: of the work, in bytes."""
        if self._is_taken:
            await self._wait(size)
        self._is_taken = True
        try:
            yield
        finally:
            self._pass_on()

    async def _wait(self, size: int) -> None:
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        entry = (monotonic() + size / BYTES_PER_SECOND, next(self._numbers), turn)
        heapq.heappush(self._waiting, entry)
        if len(self._waiting) > self._most_waiting:
            last = max(self._waiting)
            self._remove(last)
            last[2].set_exception(
                Full(counted_in_english(self._most_waiting, "request is waiting", "requests are waiting"))
            )
        try:
            await turn
        except asyncio.CancelledError:
            if turn.cancelled():
                self._remove(entry)
            elif turn.exception() is None:  # its turn had come
                self._pass_on()
            raise

    def _remove(self, entry: tuple[float, int, asyncio.Future[None]]) -> None:
        self._waiting.remove(entry)
        heapq.heapify(self._waiting)

    def _pass_on(self) -> None:
        self._is_taken = bool(self._waiting)
        if self._waiting:
            heapq.heappop(self._waiting)[2].set_result(None)
