"""What models have answered, on disk as it comes, so that a comparison that was interrupted goes on."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from io import RawIOBase
from pathlib import Path
from typing import Any

from yeonma.errors import UserError
from yeonma.files import disk_errors_as_user_errors, write_all

Record = Mapping[str, Any]


@dataclass(frozen=True)
class AnswerCache:
    """Records by their keys, and the file that more of them are added to."""

    records: dict[str, Record]
    path: Path
    file: RawIOBase

    def add(self, key: str, record: Record) -> None:
        """Whole and at once: what was added is there whatever happens next. Raises UserError where the disk is full."""
        line = json.dumps({"key": key, **record}, ensure_ascii=False) + "\n"
        with disk_errors_as_user_errors(self.path.parent, "an answer"):
            write_all(self.file, line.encode())
        self.records[key] = record


@contextmanager
def open_answer_cache(path: Path) -> Iterator[AnswerCache]:
    """What the file holds, and the file open for more. Lines that were cut short or damaged are passed over.

    Raises UserError where it cannot be read or written.
    """
    try:
        text = path.read_text("utf-8", errors="replace") if path.exists() else ""
        records = dict(_read(text))
        file = path.open("ab", buffering=0)
    except OSError as error:
        raise UserError(f"cannot be written: {error.strerror or error}", place=str(path)) from error
    with file:
        if text and not text.endswith("\n"):
            with disk_errors_as_user_errors(path.parent, "an answer"):
                write_all(file, b"\n")
        yield AnswerCache(records, path, file)


def _read(text: str) -> Iterator[tuple[str, Record]]:
    for line in text.split("\n"):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(record, dict) and isinstance(key := record.pop("key", None), str) and _is_whole(record):
            yield key, record


def _is_whole(record: Mapping[str, Any]) -> bool:
    if "nll" in record:
        return isinstance(record["nll"], float) and isinstance(record.get("trained_tokens"), int)
    ids = record.get("token_ids")
    return (
        isinstance(record.get("text"), str)
        and isinstance(record.get("ended"), bool)
        and isinstance(ids, list)
        and all(isinstance(number, int) for number in ids)
    )
