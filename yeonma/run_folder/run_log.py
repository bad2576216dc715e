"""The logs of a run: metrics.jsonl, one object for each step and evaluation, and trained_rows.jsonl, the rows of every
step: `{"step": 12, "rows": [17, 4, 99]}`, counted from 1 as in messages.

The run appends to them as it goes. A resumed run cuts off the lines after its checkpoint. Steps are the same for any
number of processes, and so is trained_rows.jsonl.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from io import FileIO
from pathlib import Path
from typing import Any

from yeonma.errors import UserError
from yeonma.files import disk_errors_as_user_errors, sync, write_all
from yeonma.run_folder.progress import EvaluationRecord, StepRecord

TRAINED_ROWS = "trained_rows.jsonl"
CURE = "make room, then run the same command to continue from the last checkpoint"


@dataclass(frozen=True)
class LogFile:
    """A file that is open at its end. A context manager."""

    file: FileIO

    def append(self, line: bytes, what: str) -> None:
        """Hand a line to the operating system: a killed process loses none. Raises UserError where the disk is full or
        fails; the next run cuts off what was written of the line.
        """
        with disk_errors_as_user_errors(Path(self.file.name), what, len(line), CURE):
            write_all(self.file, line)

    def sync(self) -> None:
        """Wait for the disk. Called before a checkpoint is renamed into place, so that a power cut leaves no checkpoint
        whose steps have no lines. Raises as `append`.
        """
        with disk_errors_as_user_errors(Path(self.file.name), "the steps' lines", cure=CURE):
            os.fsync(self.file.fileno())

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *exception: object) -> None:
        self.file.close()


@dataclass(frozen=True)
class MetricsFile(LogFile):
    """metrics.jsonl; `open_metrics` makes it."""

    def write(self, record: StepRecord | EvaluationRecord) -> None:
        self.append(_metrics_line(record), "a step's line")


@dataclass(frozen=True)
class TrainedRows(LogFile):
    """trained_rows.jsonl; `open_trained_rows` makes it."""

    def write(self, step: int, rows: list[int]) -> None:
        self.append((json.dumps({"step": step, "rows": rows}) + "\n").encode(), "a step's rows")


def open_metrics(path: Path, keep_steps: int | None, keep_evaluation: bool = True) -> MetricsFile:
    """Open `path` to append to it: empty for a new run (`keep_steps` None), else with the lines up to that step, its
    evaluation among them or not. Raises UserError for a line that is no record.
    """
    last = keep_steps or 0, keep_evaluation
    keep = keep_steps is not None and path.exists()

    def is_kept(record: dict[str, Any]) -> bool:
        return (record["step"], record.get("evaluation", False)) <= last

    return MetricsFile(_open_at(path, _end_of_step(_metrics(path), is_kept) if keep else 0))


def open_trained_rows(path: Path, keep_steps: int) -> TrainedRows:
    """Open `path` to append to it, with the lines up to that step. Raises UserError for a line that is no step's."""
    keep = keep_steps and path.exists()
    lines = _lines(path, "rows", "not the rows of a step")
    return TrainedRows(
        _open_at(path, _end_of_step(lines, lambda row: row["step"] <= keep_steps) if keep else 0)
    )


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl, evaluations among them, in the order written.

    A number that was not finite is None. A last line without a line end is a write that was cut short: it is left out.
    Raises UserError where there is no such file and for a line that is no record.
    """
    if not path.is_file():
        raise UserError("no such file", place=str(path))
    return [values for _, values in _metrics(path)]


def numbers_of(record: StepRecord | EvaluationRecord) -> dict[str, Any]:
    """A record's numbers, its metrics after the others; without a perplexity where there is none."""
    values = asdict(record)
    metrics = values.pop("metrics")
    if values.get("perplexity", 0.0) is None:
        del values["perplexity"]
    return {**values, **metrics}


def _metrics_line(record: StepRecord | EvaluationRecord) -> bytes:
    values = numbers_of(record)
    if isinstance(record, EvaluationRecord):
        values = {"evaluation": True, **values}
    # JSON has no NaN and no infinity. Floats are written with as many digits as give the same float back.
    strict = {key: None if _is_not_finite(value) else value for key, value in values.items()}
    return (json.dumps(strict, allow_nan=False) + "\n").encode()


def _is_not_finite(value: object) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


def _open_at(path: Path, end: int) -> FileIO:
    """Open to append after `end` bytes. What comes after them is cut off in one system call, so that a kill leaves the
    old lines or the kept ones; those are not rewritten.
    """
    file = path.open("ab", buffering=0)
    file.truncate(end)
    sync(path.parent)  # its name; the content waits for `LogFile.sync`
    return file


def _end_of_step(
    lines: Iterator[tuple[int, dict[str, Any]]], is_kept: Callable[[dict[str, Any]], bool]
) -> int:
    """Where the last line of the beginning ends whose lines are kept, in bytes."""
    kept = 0
    for end, values in lines:
        if not is_kept(values):
            break
        kept = end
    return kept


def _metrics(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    return _lines(path, "loss", "not a record of a step")


def _lines(path: Path, key: str, otherwise: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Each whole line's end, in bytes, and its values. Raises UserError, with `otherwise`, for a line without a step or
    without `key`.
    """
    end = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                return
            end += len(line)
            try:
                values = json.loads(line)
            except ValueError:
                values = None
            if not (isinstance(values, dict) and isinstance(values.get("step"), int) and key in values):
                raise UserError(otherwise, place=f"{path}:{number}", cure="delete this line")
            yield end, values
