"""The logs of a run: metrics.jsonl has one object per step and evaluation, trained_rows.jsonl the rows of every step,
such as `{"step": 12, "rows": [17, 4, 99]}`, counted from 1 as in messages, or by data set in a mixture:
`{"step": 12, "rows": {"titles.jsonl": [17, 4], "chats.jsonl": [99]}}`. answers.jsonl, where a run measures answers, has
one object per evaluation and row; rollouts.jsonl, where a run learns from rewards, one per answer that a step drew.

A run appends to all of them. A checkpoint records how many lines they have and their SHA-256, so that a resumed run
knows whether somebody has changed them, and removes exactly the lines after its checkpoint. The rows of a step do not
depend on the number of processes.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from hashlib import sha256
from io import FileIO
from itertools import islice
from pathlib import Path
from typing import Any

from yeonma.errors import Log, UserError
from yeonma.files import MOST_BYTES, disk_errors_as_user_errors, kind_of, open_regular, sync, write_all
from yeonma.messages import counted, tr
from yeonma.run_folder.progress import EvaluationRecord, StepRecord

METRICS, TRAINED_ROWS = "metrics.jsonl", "trained_rows.jsonl"
ANSWERS, ROLLOUTS = "answers.jsonl", "rollouts.jsonl"
THEN_CONTINUE = tr("then run the same command to continue from the last checkpoint")
VARYING = ("seconds", "drawing_seconds", "scoring_seconds", "peak_memory_bytes")
"""Numbers of a step that differ from run to run. The sum of a log leaves them out, so that checkpoints are equal."""

LogSums = dict[str, dict[str, Any]]
"""File name -> `lines` and their `sha256`."""


@dataclass
class LineSum:
    """The number of lines of a log, and the SHA-256 of what does not vary in them."""

    lines: int = 0
    digest: Any = field(default_factory=sha256)

    def add(self, values: Mapping[str, Any]) -> None:
        fixed = {name: value for name, value in values.items() if name not in VARYING}
        self.digest.update(json.dumps(fixed).encode())
        self.lines += 1

    def as_record(self) -> dict[str, Any]:
        return {"lines": self.lines, "sha256": self.digest.hexdigest()}


@dataclass(frozen=True)
class LogFile:
    """A file opened for appending, and the sum of its lines. A context manager."""

    file: FileIO
    sum: LineSum

    def append(self, values: Mapping[str, Any], what: str) -> None:
        """Passes a line to the operating system, so that a killed process loses none. `what` names it in errors.

        Raises UserError if the disk is full or fails. The next run removes an incomplete line.
        """
        line = (json.dumps(values, allow_nan=False) + "\n").encode()
        with disk_errors_as_user_errors(Path(self.file.name), what, len(line), then=THEN_CONTINUE):
            write_all(self.file, line)
        self.sum.add(values)

    def sync(self) -> None:
        """Syncs the file to disk. Call it before a checkpoint gets its name, so that a power failure leaves no
        checkpoint without the lines of its steps. Raises as `append`."""
        with disk_errors_as_user_errors(Path(self.file.name), tr("the steps' lines"), then=THEN_CONTINUE):
            os.fsync(self.file.fileno())

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *exception: object) -> None:
        self.file.close()


@dataclass(frozen=True)
class MetricsFile(LogFile):
    """metrics.jsonl, opened by `open_metrics`."""

    def write(self, record: StepRecord | EvaluationRecord) -> None:
        self.append(_metrics_values(record), tr("a step's line"))


@dataclass(frozen=True)
class TrainedRows(LogFile):
    """trained_rows.jsonl, opened by `open_trained_rows`."""

    def write(self, step: int, rows: list[int] | dict[str, list[int]]) -> None:
        self.append({"step": step, "rows": rows}, tr("a step's rows"))


@dataclass(frozen=True)
class AnswersFile(LogFile):
    """answers.jsonl or rollouts.jsonl, opened by `open_answers`."""

    def write(self, step: int, lines: Sequence[Mapping[str, Any]]) -> None:
        for line in lines:
            self.append({"step": step, **line}, tr("an answer's line"))


def open_metrics(
    path: Path, keep_steps: int | None, keep_evaluation: bool = True, lines: int | None = None
) -> MetricsFile:
    """Opens `path` for appending. A new run (`keep_steps` None) starts empty; otherwise the first `lines` stay or, if
    the checkpoint does not say how many, the lines up to that step, and with `keep_evaluation` also the evaluation
    after it. Raises UserError for an invalid line among them.
    """
    last = keep_steps or 0, keep_evaluation

    def is_kept(record: dict[str, Any]) -> bool:
        return (record["step"], record.get("evaluation", False)) <= last

    return MetricsFile(*_opened(path, _metrics(path), is_kept, lines if keep_steps is not None else 0))


def open_trained_rows(path: Path, keep_steps: int, lines: int | None = None) -> TrainedRows:
    """Opens `path` for appending, with the first `lines`, or else with the lines up to that step. Raises UserError for
    an invalid line among them."""
    return TrainedRows(
        *_opened(path, _trained_rows(path), lambda row: row["step"] <= keep_steps, lines if keep_steps else 0)
    )


def open_answers(path: Path, lines: int) -> AnswersFile:
    """Opens `path` for appending, with the first `lines`. Raises UserError for an invalid line among them."""
    return AnswersFile(*_opened(path, _answers(path), lambda _: True, lines))


def check_logs(output: Path, sums: Mapping[str, Mapping[str, Any]], step: int, log: Log) -> None:
    """Whether the logs still begin with the lines that they had when the checkpoint of `step` was saved.

    Raises UserError for each that does not, and logs one that is missing. Changes nothing. `sums` is empty in
    checkpoints of earlier versions, which can only be checked line by line.
    """
    for name, lines_of in (
        (METRICS, _metrics),
        (TRAINED_ROWS, _trained_rows),
        (ANSWERS, _answers),
        (ROLLOUTS, _answers),
    ):
        recorded, path = sums.get(name), output / name
        if recorded is None and name not in (ANSWERS, ROLLOUTS) and kind_of(path):
            for _, values in lines_of(path):
                if values["step"] > step:
                    break
        if recorded is None or not recorded["lines"]:
            continue
        if not kind_of(path):
            log(tr("warning: {path} is missing: it will begin after step {step}", path=path, step=step))
            continue
        present = LineSum()
        with suppress(UserError):  # the lines before it are too few
            for _, values in islice(lines_of(path), recorded["lines"]):
                present.add(values)
        if present.as_record() != recorded:
            what = tr(
                "its first {lines} are not those that the run wrote up to step {step}",
                lines=counted(recorded["lines"], "line"),
                step=step,
            )
            cure = tr(
                "restore a copy, or delete the file: the run then continues, and it begins after step {step}",
                step=step,
            )
            raise UserError(what, place=str(path), cure=cure)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl, evaluations included, in the order written. Numbers that were not finite are
    None.

    A last line without a line end comes from an interrupted write and is left out. Raises UserError if the file is
    missing, or if a line is invalid.
    """
    if not path.is_file():
        raise UserError(tr("no such file"), place=str(path))
    return [values for _, values in _metrics(path)]


def numbers_of(record: StepRecord | EvaluationRecord) -> dict[str, Any]:
    """A record's numbers, then its metrics. A perplexity of None is left out, and so is what is said by data set."""
    values = asdict(record)
    metrics = values.pop("metrics")
    values.pop("losses", None)
    values.pop("confusion", None)
    if values.get("perplexity", 0.0) is None:
        del values["perplexity"]
    return {**values, **metrics}


def _metrics_values(record: StepRecord | EvaluationRecord) -> dict[str, Any]:
    values = numbers_of(record)
    # JSON has no NaN and no infinity
    finite = {key: None if _is_not_finite(value) else value for key, value in values.items()}
    if isinstance(record, EvaluationRecord):
        losses = {name: None if _is_not_finite(loss) else loss for name, loss in record.losses.items()}
        finite = {"evaluation": True, **finite, **({"losses": losses} if losses else {})}
        finite |= {"confusion": record.confusion} if record.confusion else {}
    return finite


def _is_not_finite(value: object) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


def _opened(
    path: Path,
    lines: Iterator[tuple[int, dict[str, Any]]],
    is_kept: Callable[[dict[str, Any]], bool],
    count: int | None,
) -> tuple[FileIO, LineSum]:
    """A file opened for appending and truncated to the first `count` lines, or to those before the first that is not
    kept; and the sum of what stays. Truncating is one system call, so a killed process leaves either all old lines or
    exactly the remaining ones."""
    end, kept = 0, LineSum()
    for size, values in islice(lines, count) if kind_of(path) else ():
        if count is None and not is_kept(values):
            break
        end = size
        kept.add(values)
    file = open(path, "ab", buffering=0, opener=open_regular)  # noqa: SIM115 (the caller closes it)
    file.truncate(end)
    sync(path.parent)  # the file name; `LogFile.sync` syncs the content
    return file, kept


def _trained_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    return _lines(path, _is_rows, tr("not the rows of a step"))


def _answers(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    return _lines(path, lambda values: isinstance(values.get("answer"), str), tr("not an answer to a row"))


def _metrics(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    return _lines(path, _is_metrics, tr("not a record of a step"))


def _is_rows(values: Mapping[str, Any]) -> bool:
    """Whether it has the numbers of a step's rows, or those of each data set."""
    rows = values.get("rows")
    lists = rows.values() if isinstance(rows, dict) else [rows]
    return all(isinstance(numbers, list) and all(type(row) is int for row in numbers) for numbers in lists)


def _is_metrics(values: Mapping[str, Any]) -> bool:
    """Whether it has a loss, and numbers or nulls alone, beside the losses of data sets, the confusion of labels and
    the mark of evaluations."""
    by_set = ("evaluation", "losses", "confusion")
    own = {name: value for name, value in values.items() if name not in by_set}
    losses = values.get("losses", {})
    if not _is_confusion(values.get("confusion", {})):
        return False
    if "loss" not in own or not isinstance(losses, dict) or type(values.get("evaluation", True)) is not bool:
        return False
    return all(value is None or _is_number(value) for value in (*own.values(), *losses.values()))


def _is_confusion(value: Any, depth: int = 3) -> bool:
    """Whether it is data set -> label -> predicted label -> number of rows."""
    if depth == 0:
        return type(value) is int and 0 <= value < 2**63
    return isinstance(value, dict) and all(_is_confusion(inner, depth - 1) for inner in value.values())


def _is_step(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _is_number(value: Any) -> bool:
    return abs(value) < 2**63 if type(value) is int else type(value) is float and math.isfinite(value)


def _lines(
    path: Path, is_valid: Callable[[Mapping[str, Any]], bool], problem: str
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields (end in bytes, values) of each complete line. Raises UserError with the text `problem` for a line without
    a step or that is not valid."""
    end = 0
    with path.open("rb") as file:  # its caller has seen that it is a file
        for number, line in enumerate(iter(partial(file.readline, MOST_BYTES), b""), start=1):
            if not line.endswith(b"\n"):
                return
            end += len(line)
            values = _parsed(line, is_valid)
            if values is None:
                raise UserError(problem, place=f"{path}:{number}", cure=tr("delete this line"))
            yield end, values


def parsed_metrics(line: bytes) -> dict[str, Any] | None:
    """The record in a line of metrics.jsonl; None if it is none."""
    return _parsed(line, _is_metrics)


def _parsed(line: bytes, is_valid: Callable[[Mapping[str, Any]], bool]) -> dict[str, Any] | None:
    try:
        values = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return values if isinstance(values, dict) and _is_step(values.get("step")) and is_valid(values) else None
