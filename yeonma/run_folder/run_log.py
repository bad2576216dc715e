"""trained_rows.jsonl: the rows of every step, `{"step": 12, "rows": [17, 4, 99]}`, counted from 1 as in messages.

Written by the run itself as the steps are done, and cut back with metrics.jsonl where a run goes on. Steps are the same
for any number of processes, and so is this file.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

from yeonma.errors import UserError
from yeonma.files import disk_errors_as_user_errors, sync, write_all
from yeonma.run_folder.trackers import CURE

TRAINED_ROWS = "trained_rows.jsonl"


@dataclass(frozen=True)
class TrainedRows:
    """The file, open at its end. A context manager; `open_trained_rows` makes it."""

    file: FileIO

    def write(self, step: int, rows: list[int]) -> None:
        """Append a line and hand it to the operating system: a killed process loses no line. Raises UserError where the
        disk is full or fails.
        """
        line = (json.dumps({"step": step, "rows": rows}) + "\n").encode()
        with disk_errors_as_user_errors(Path(self.file.name), "a step's rows", len(line), CURE):
            write_all(self.file, line)

    def sync(self) -> None:
        """Wait for the disk; called before a checkpoint. Raises as `write`."""
        with disk_errors_as_user_errors(Path(self.file.name), "the steps' rows", cure=CURE):
            os.fsync(self.file.fileno())

    def __enter__(self) -> TrainedRows:
        return self

    def __exit__(self, *exception: object) -> None:
        self.file.close()


def open_trained_rows(path: Path, keep_steps: int) -> TrainedRows:
    """Open `path` to append to it, with its lines up to that step; what comes after them is cut off in one call."""
    end = _end_of_step(path, keep_steps) if keep_steps and path.exists() else 0
    file = path.open("ab", buffering=0)
    file.truncate(end)
    sync(path.parent)  # its name, before a checkpoint relies on it
    return TrainedRows(file)


def _end_of_step(path: Path, step: int) -> int:
    """In bytes. Raises UserError for a line that is none of ours."""
    end = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                if not line.endswith(b"\n") or json.loads(line)["step"] > step:
                    break
            except (ValueError, TypeError, KeyError) as error:
                cure = "delete this line"
                raise UserError("not the rows of a step", place=f"{path}:{number}", cure=cure) from error
            end += len(line)
    return end
