"""A log that does not grow with the requests: so many records a minute, and the number of the others."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from time import monotonic

from yeonma.messages import counted, tr

RECORDS = 10
"""The most records in a minute, with their tracebacks."""
SECONDS = 60


class RecordLimit:
    """A filter for loggers."""

    def __init__(self, records: int = RECORDS, seconds: float = SECONDS) -> None:
        self._records, self._seconds = records, seconds
        self._since = float("-inf")
        self._let_through = self._left_out = 0

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether to log the record. The first one after others were left out says how many."""
        now = monotonic()
        if now - self._since >= self._seconds:
            if self._left_out:
                left_out = counted(
                    self._left_out, "record before this one was", "records before this one were"
                )
                record.msg = tr("({records} left out) {message}", records=left_out, message=record.msg)
            self._since, self._let_through, self._left_out = now, 0, 0
        if self._let_through < self._records:
            self._let_through += 1
            return True
        self._left_out += 1
        return False


def limit_log(names: Iterable[str]) -> None:
    """Limit what these loggers log together."""
    limit = RecordLimit()
    for name in names:
        logging.getLogger(name).addFilter(limit)
