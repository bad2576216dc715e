"""The numbers of a run for its curves, read from metrics.jsonl as it is now: whole if it is short, else at even places.

A file of 100,000 steps has some 25 MB; reading all of it for each look would take half a second. So of a long file the
evaluations, the last steps, and steps at even places between are read, which takes a few hundredths.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

from yeonma.errors import UserError
from yeonma.files import open_regular
from yeonma.run_folder.run_log import METRICS, parsed_metrics
from yeonma.svg import Point

WHOLE_BYTES = 400_000
"""A file up to this size is read whole."""
PLACES = 300
"""Of a longer one, so many places are read, and at each place the lines within `PLACE_BYTES`."""
PLACE_BYTES = 4_096
TAIL_BYTES = 32_768
"""Of its end, all lines."""
MOST_EVALUATIONS = 300
RECENT_STEPS = 20
EVALUATION = b'{"evaluation": true'
"""How the line of an evaluation begins."""
_CHUNK_BYTES = 1 << 20


@dataclass(frozen=True)
class Curves:
    """Steps and evaluations in their order, each a record of metrics.jsonl."""

    steps: Sequence[Mapping[str, Any]] = ()
    evaluations: Sequence[Mapping[str, Any]] = ()
    is_whole: bool = True
    """Whether every step is among them."""

    @property
    def last_step(self) -> int:
        return int(self.steps[-1]["step"]) if self.steps else 0

    def points(self, key: str, *, evaluations: bool = False) -> list[Point]:
        """(step, number) of each record that has this number."""
        records = self.evaluations if evaluations else self.steps
        return [(one["step"], one[key]) for one in records if _is_number(one.get(key))]

    def tokens_per_second(self) -> list[Point]:
        return [
            (one["step"], one["tokens"] / one["seconds"])
            for one in self.steps
            if _is_number(one.get("tokens")) and _is_number(one.get("seconds")) and one["seconds"] > 0
        ]

    def seconds_left(self, total_steps: int) -> float | None:
        """Of the steps alone, by the last ones; None if there is none to go by."""
        recent = [one["seconds"] for one in self.steps[-RECENT_STEPS:] if _is_number(one.get("seconds"))]
        return sum(recent) / len(recent) * max(0, total_steps - self.last_step) if recent else None


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def read_curves(run: Path, places: int = PLACES, *, evaluations: bool = True) -> Curves:
    """Those of a run's folder; empty without a metrics.jsonl. A line that is no record is passed over. places: at how
    many a long file is read. evaluations: whether those of a long file are looked for."""
    try:
        with open(run / METRICS, "rb", buffering=0, opener=open_regular) as file:
            size = os.fstat(file.fileno()).st_size
            if size <= WHOLE_BYTES:
                return _curves(file.read(size).splitlines(keepends=True), is_whole=True)
            lines = list(_evaluation_lines(file, size)) if evaluations else []
            return _curves([*lines, *_lines_at_places(file, size, places)], is_whole=False)
    except (OSError, UserError):
        return Curves()


def _curves(lines: Sequence[bytes], *, is_whole: bool) -> Curves:
    """By step, each once: where a file was read twice, and where a resumed run wrote a step again."""
    steps: dict[int, Mapping[str, Any]] = {}
    evaluations: dict[int, Mapping[str, Any]] = {}
    for line in lines:
        record = parsed_metrics(line) if line.endswith(b"\n") else None
        if record is not None:
            (evaluations if record.get("evaluation") else steps)[record["step"]] = record
    return Curves(
        [steps[step] for step in sorted(steps)],
        [evaluations[step] for step in sorted(evaluations)],
        is_whole,
    )


def _lines_at_places(file: FileIO, size: int, places: int) -> Iterator[bytes]:
    """Lines at even places from the first line on, and all lines of the end."""
    for place in range(places):
        yield from _whole_lines(file, place * size // places, PLACE_BYTES)
    yield from _whole_lines(file, max(0, size - TAIL_BYTES), TAIL_BYTES)


def _whole_lines(file: FileIO, start: int, length: int) -> list[bytes]:
    """The lines that lie wholly within a stretch of a file. Only the first of a place's are read, beside the end's."""
    file.seek(start)
    content = file.read(length)
    if start:
        content = content.partition(b"\n")[2]
    lines = content.splitlines(keepends=True)
    return lines if length == TAIL_BYTES else lines[:2]


def _evaluation_lines(file: FileIO, size: int) -> Iterator[bytes]:
    places = list(_evaluation_places(file, size))
    chosen = places
    if len(places) > MOST_EVALUATIONS:
        chosen = [
            places[index * (len(places) - 1) // (MOST_EVALUATIONS - 1)] for index in range(MOST_EVALUATIONS)
        ]
    for place in chosen:
        file.seek(place)
        line = b""
        while not line.endswith(b"\n") and len(line) < _CHUNK_BYTES and (more := file.read(PLACE_BYTES)):
            line = (line + more).partition(b"\n")[0] + (b"\n" if b"\n" in more else b"")
        yield line


def _evaluation_places(file: FileIO, size: int) -> Iterator[int]:
    """Where lines of evaluations begin."""
    file.seek(0)
    start, rest = 0, b"\n"
    start -= len(rest)
    while start + len(rest) < size and (chunk := file.read(_CHUNK_BYTES)):
        content = rest + chunk
        at = content.find(b"\n" + EVALUATION)
        while at >= 0:
            yield start + at + 1
            at = content.find(b"\n" + EVALUATION, at + 1)
        rest = content[-len(EVALUATION) :]
        start += len(content) - len(rest)
