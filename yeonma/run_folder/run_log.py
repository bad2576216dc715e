"""The logs of a run: metrics.jsonl has one object per step and evaluation, trained_rows.jsonl the rows of every step,
such as `{"step": 12, "rows": [17, 4, 99]}`, counted from 1 as in messages, or by data set in a mixture:
`{"step": 12, "rows": {"titles.jsonl": [17, 4], "chats.jsonl": [99]}}`.

A run appends to both. A resumed run first removes the lines after its checkpoint. The rows of a step do not depend on
the number of processes.
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
    """A file opened for appending. A context manager."""

    file: FileIO

    def append(self, line: bytes, what: str) -> None:
        """Passes a line to the operating system, so that a killed process loses none. `what` names it in errors.

        Raises UserError if the disk is full or fails. The next run removes an incomplete line.
        """
        with disk_errors_as_user_errors(Path(self.file.name), what, len(line), CURE):
            write_all(self.file, line)

    def sync(self) -> None:
        """Syncs the file to disk. Call it before a checkpoint gets its name, so that a power failure leaves no
        checkpoint without the lines of its steps. Raises as `append`."""
        with disk_errors_as_user_errors(Path(self.file.name), "the steps' lines", cure=CURE):
            os.fsync(self.file.fileno())

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *exception: object) -> None:
        self.file.close()


@dataclass(frozen=True)
class MetricsFile(LogFile):
    """metrics.jsonl, opened by `open_metrics`."""

    def write(self, record: StepRecord | EvaluationRecord) -> None:
        self.append(_metrics_line(record), "a step's line")


@dataclass(frozen=True)
class TrainedRows(LogFile):
    """trained_rows.jsonl, opened by `open_trained_rows`."""

    def write(self, step: int, rows: list[int] | dict[str, list[int]]) -> None:
        self.append((json.dumps({"step": step, "rows": rows}) + "\n").encode(), "a step's rows")


def open_metrics(path: Path, keep_steps: int | None, keep_evaluation: bool = True) -> MetricsFile:
    """Opens `path` for appending. A new run (`keep_steps` None) starts empty; otherwise the lines up to that step stay,
    and with `keep_evaluation` also the evaluation after it. Raises UserError for an invalid line.
    """
    last = keep_steps or 0, keep_evaluation
    keep = keep_steps is not None and path.exists()

    def is_kept(record: dict[str, Any]) -> bool:
        return (record["step"], record.get("evaluation", False)) <= last

    return MetricsFile(_open_at(path, _end_of_step(_metrics(path), is_kept) if keep else 0))


def open_trained_rows(path: Path, keep_steps: int) -> TrainedRows:
    """Opens `path` for appending, with the lines up to that step. Raises UserError for an invalid line."""
    keep = keep_steps and path.exists()
    lines = _lines(path, "rows", "not the rows of a step")
    return TrainedRows(
        _open_at(path, _end_of_step(lines, lambda row: row["step"] <= keep_steps) if keep else 0)
    )


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl, evaluations included, in the order written. Numbers that were not finite are
    None.

    A last line without a line end comes from an interrupted write and is left out. Raises UserError if the file is
    missing, or if a line is invalid.
    """
    if not path.is_file():
        raise UserError("no such file", place=str(path))
    return [values for _, values in _metrics(path)]


def numbers_of(record: StepRecord | EvaluationRecord) -> dict[str, Any]:
    """A record's numbers, then its metrics. A perplexity of None is left out, and so are the data sets' losses."""
    values = asdict(record)
    metrics = values.pop("metrics")
    values.pop("losses", None)
    if values.get("perplexity", 0.0) is None:
        del values["perplexity"]
    return {**values, **metrics}


def _metrics_line(record: StepRecord | EvaluationRecord) -> bytes:
    values = numbers_of(record)
    # JSON has no NaN and no infinity
    finite = {key: None if _is_not_finite(value) else value for key, value in values.items()}
    if isinstance(record, EvaluationRecord):
        losses = {name: None if _is_not_finite(loss) else loss for name, loss in record.losses.items()}
        finite = {"evaluation": True, **finite, **({"losses": losses} if losses else {})}
    return (json.dumps(finite, allow_nan=False) + "\n").encode()


def _is_not_finite(value: object) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


def _open_at(path: Path, end: int) -> FileIO:
    """Opens a file for appending and truncates it to `end` bytes. That is one system call, so a killed process leaves
    either all old lines or exactly the remaining ones."""
    file = path.open("ab", buffering=0)
    file.truncate(end)
    sync(path.parent)  # the file name; `LogFile.sync` syncs the content
    return file


def _end_of_step(
    lines: Iterator[tuple[int, dict[str, Any]]], is_kept: Callable[[dict[str, Any]], bool]
) -> int:
    """The size of the file in bytes, up to the first line that is not kept."""
    size = 0
    for end, values in lines:
        if not is_kept(values):
            break
        size = end
    return size


def _metrics(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    return _lines(path, "loss", "not a record of a step")


def _lines(path: Path, key: str, problem: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields (end in bytes, values) of each complete line. Raises UserError with the text `problem` for a line without
    a step or without `key`."""
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
                raise UserError(problem, place=f"{path}:{number}", cure="delete this line")
            yield end, values
