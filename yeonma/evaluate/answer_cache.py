"""Answers and losses on disk, written as they are computed, so that an interrupted comparison can continue."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from io import RawIOBase
from pathlib import Path
from typing import Any

from yeonma.errors import UserError, system_reason
from yeonma.files import disk_errors_as_user_errors, write_all
from yeonma.messages import tr
from yeonma.shown import json_text

CacheRecord = Mapping[str, Any]


@dataclass(frozen=True)
class AnswerCache:
    """Records by key, and the file to which new ones are appended."""

    records: dict[str, CacheRecord]
    path: Path
    file: RawIOBase

    def add(self, key: str, record: CacheRecord) -> None:
        """Append a record with one write, so that it survives a kill. Raises UserError if the disk is full."""
        line = json_text({"key": key, **record}) + "\n"
        with disk_errors_as_user_errors(self.path.parent, tr("an answer")):
            write_all(self.file, line.encode())
        self.records[key] = record


@contextmanager
def open_answer_cache(
    path: Path, is_complete: Callable[[CacheRecord], bool] | None = None
) -> Iterator[AnswerCache]:
    """The cache at `path`, which is created if it does not exist. Damaged lines are ignored, and records that are not
    complete; by default, these are those of answers and losses.

    Raises UserError if the file cannot be read or written.
    """
    try:
        text = path.read_text("utf-8", errors="replace") if path.exists() else ""
        records = dict(_read(text, is_complete or _is_complete))
        file = path.open("ab", buffering=0)
    except OSError as error:
        raise UserError(
            tr("cannot be written: {value}", value=system_reason(error)), place=str(path)
        ) from error
    with file:
        if text and not text.endswith("\n"):
            with disk_errors_as_user_errors(path.parent, tr("an answer")):
                write_all(file, b"\n")
        yield AnswerCache(records, path, file)


def _read(text: str, is_complete: Callable[[CacheRecord], bool]) -> Iterator[tuple[str, CacheRecord]]:
    for line in text.split("\n"):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if (
            isinstance(record, dict)
            and isinstance(key := record.pop("key", None), str)
            and is_complete(record)
        ):
            yield key, record


def _is_complete(record: Mapping[str, Any]) -> bool:
    if "nll" in record:
        return isinstance(record["nll"], float) and isinstance(record.get("trained_tokens"), int)
    token_ids = record.get("token_ids")
    return (
        isinstance(record.get("text"), str)
        and isinstance(record.get("ended"), bool)
        and isinstance(token_ids, list)
        and all(isinstance(token_id, int) for token_id in token_ids)
    )
