"""The steps of a run with all that is told of them: progress, metrics.jsonl, trained_rows.jsonl and trackers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from rich.console import Console

from yeonma.configure import flat, group_of
from yeonma.settings import RunSettings
from yeonma.train.checkpoint import RunState
from yeonma.train.loop import Watch
from yeonma.train.progress import EvaluationRecord, Progress, StepRecord
from yeonma.train.tracking import open_metrics, open_trackers, tracked
from yeonma.train.trained_rows import TRAINED_ROWS, open_trained_rows


def watched(
    settings: Mapping[type, object],
    steps: Callable[[Watch], RunState],
    console: Console,
    total_steps: int,
    start: RunState,
    output: Path,
) -> RunState:
    """Take the steps from `start` on, in the one process that tells of them. Returns the last state."""
    run = group_of(settings, RunSettings)
    with (
        open_metrics(output / "metrics.jsonl", start.step or None, not start.evaluation_due) as metrics,
        open_trained_rows(output / TRAINED_ROWS, start.step) as trained_rows,
        open_trackers(run.report_to, run.run_name, output, flat(settings), start.step) as trackers,
        Progress(total_steps, start.step, run.logging_steps, console) as progress,
    ):

        def step(record: StepRecord, rows: list[int]) -> None:
            metrics.write(record)
            trained_rows.write(record.step, rows)
            progress.step(record)
            if record.step % run.logging_steps == 0:
                trackers.log(record.step, tracked(record))

        def evaluation(record: EvaluationRecord) -> None:
            metrics.write(record)
            progress.evaluation(record)
            trackers.log(record.step, tracked(record))

        def before_save() -> None:
            metrics.sync()
            trained_rows.sync()

        return steps(Watch(step, evaluation, before_save, progress.say))
