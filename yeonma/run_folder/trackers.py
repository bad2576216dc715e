"""Trackers, which get the numbers of metrics.jsonl while a run goes on; and loss.svg.

The model card shows loss.svg by a Markdown image, as GitHub and browsers draw it. How the hub shows it was not tried.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from yeonma.config.metric_names import PREFIX
from yeonma.errors import Problem, UserError, did_you_mean
from yeonma.files import replace_file
from yeonma.messages import tr
from yeonma.packages import install
from yeonma.run_folder.loss_plot import loss_svg
from yeonma.run_folder.progress import EvaluationRecord, StepRecord
from yeonma.run_folder.run_log import numbers_of, read_metrics
from yeonma.shown import json_text, one_line
from yeonma.streams import tell
from yeonma.svg import Point

Settings = Mapping[str, object]


def plot_loss(metrics_path: Path, svg_path: Path, per: str = tr("trained token")) -> None:
    """Draw training loss (each step, and a moving mean), validation loss and the scores of answers over the steps, for
    light and dark themes.

    The file is written beside its place and renamed. Without a loss there is no file. It has a few kilobytes however
    long the run is.
    """
    rows = [row for row in read_metrics(metrics_path) if row["loss"] is not None]
    if rows:
        training, validation = (_points(rows, evaluation) for evaluation in (False, True))
        evaluations = [row for row in rows if row.get("evaluation")]
        keys = dict.fromkeys(key for row in evaluations for key in row if key.startswith(PREFIX))
        scores = {
            key.removeprefix(PREFIX): [(row["step"], row[key]) for row in evaluations if key in row]
            for key in keys
        }
        replace_file(svg_path, loss_svg(training, validation, per, scores).encode())


def _points(rows: Sequence[Mapping[str, Any]], evaluation: bool) -> list[Point]:
    return [(row["step"], row["loss"]) for row in rows if row.get("evaluation", False) == evaluation]


@dataclass(frozen=True)
class RunningTracker:
    """A tracker that took the run's name and settings. `close` is told whether the run failed."""

    name: str
    log: Callable[[int, Mapping[str, float]], None]
    close: Callable[[bool], None]


class Trackers:
    """The trackers of this run. One that fails is named once and dropped; training goes on."""

    def __init__(self, running: Sequence[RunningTracker] = ()) -> None:
        self._running = list(running)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Send `values` of `step`; steps must not go back."""
        for tracker in tuple(self._running):
            try:
                tracker.log(step, values)
            except Exception as error:
                self._running.remove(tracker)
                _warn(
                    tr(
                        "{tracker} failed and gets no more metrics; training goes on ({error})",
                        tracker=tracker.name,
                        error=_reason(error),
                    )
                )

    def close(self, failed: bool = False) -> None:
        """Finish every tracker, as a failed run where `failed`. More calls do nothing."""
        running, self._running = self._running, []
        for tracker in running:
            try:
                tracker.close(failed)
            except Exception as error:
                _warn(tr("{tracker} failed at its end ({error})", tracker=tracker.name, error=_reason(error)))

    def __enter__(self) -> Trackers:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        self.close(failed=kind is not None)


def check_trackers(report_to: str | Sequence[str]) -> tuple[str, ...]:
    """The trackers that the setting names, each once; none for "none". Imports nothing and is quick.

    Raises UserError, with a line for each, for names that are unknown or not installed.
    """
    named = (report_to,) if isinstance(report_to, str) else tuple(report_to)
    names = tuple(dict.fromkeys(name for name in named if name != "none"))
    problems = [problem for name in names for problem in _problems(name)]
    if problems:
        raise UserError(problems)
    return names


def open_trackers(
    report_to: str | Sequence[str],
    run_name: str | None,
    output_dir: Path,
    settings: Mapping[str, object],
    start_step: int = 0,
) -> Trackers:
    """Start the named trackers. wandb may ask for a key on the terminal: start them before a progress line.

    Each gets the settings, without what looks like a secret. `run_name` defaults to the folder's name.
    `start_step` is the step of the checkpoint resumed from: tensorboard hides what an earlier process logged
    after it. The others show a resumed run as one more run. Raises UserError where one is missing or cannot
    start.
    """
    name = one_line(run_name or output_dir.resolve().name)
    shown = {key: _shown(key, value) for key, value in settings.items()}
    running: list[RunningTracker] = []
    for tracker in check_trackers(report_to):
        try:
            running.append(_START[tracker](name, output_dir, shown, start_step))
        except Exception as error:
            Trackers(running).close(failed=True)
            cure = tr("see that {tracker} works by itself, or leave it out", tracker=tracker)
            raise UserError(
                tr("{tracker} cannot start: {error}", tracker=tracker, error=_reason(error)),
                place="report_to",
                cure=cure,
            ) from error
    return Trackers(running)


def tracked(record: StepRecord | EvaluationRecord) -> dict[str, float]:
    """A record's numbers under the names that trackers show: `train/loss`, `validation/perplexity`, ..."""
    group = "validation" if isinstance(record, EvaluationRecord) else "train"
    values: dict[str, float] = {
        f"{group}/{key}": value for key, value in numbers_of(record).items() if key != "step"
    }
    if isinstance(record, EvaluationRecord):
        for name, loss in record.losses.items():
            values[f"validation/loss/{re.sub(r'[^-./ A-Za-z0-9_]+', '_', name)}"] = loss
    if isinstance(record, StepRecord) and record.seconds > 0:
        values["train/tokens_per_second"] = record.tokens / record.seconds
    return values


def _tensorboard(run_name: str, output_dir: Path, settings: Settings, start_step: int) -> RunningTracker:
    from torch.utils.tensorboard import SummaryWriter

    purge_step = start_step + 1 if start_step else 0
    writer = SummaryWriter(str(output_dir / "tensorboard"), purge_step=purge_step, flush_secs=10)
    shown = {"run_name": run_name, **settings}
    # Four spaces: tensorboard renders Markdown, and this is a block of code.
    lines = (f"    {key}: {json_text(value, default=str)}" for key, value in shown.items())
    writer.add_text("settings", "\n".join(lines), start_step)

    def log(step: int, values: Mapping[str, float]) -> None:
        for key, value in values.items():
            writer.add_scalar(key, value, step)

    return RunningTracker("tensorboard", log, lambda failed: writer.close())


def _wandb(run_name: str, output_dir: Path, settings: Settings, start_step: int) -> RunningTracker:
    import wandb

    run = wandb.init(
        project=os.environ.get("WANDB_PROJECT", "yeonma"),
        name=run_name,
        dir=os.environ.get("WANDB_DIR", str(output_dir)),
        config=dict(settings),
    )
    return RunningTracker(
        "wandb",
        lambda step, values: run.log(dict(values), step=step),
        lambda failed: run.finish(exit_code=int(failed)),
    )


def _trackio(run_name: str, output_dir: Path, settings: Settings, start_step: int) -> RunningTracker:
    import trackio

    run = trackio.init(project="yeonma", name=run_name, config=dict(settings))
    return RunningTracker(
        "trackio",
        lambda step, values: run.log(dict(values), step=step),
        lambda failed: trackio.finish(),
    )


def _mlflow(run_name: str, output_dir: Path, settings: Settings, start_step: int) -> RunningTracker:
    import mlflow

    if not {"MLFLOW_EXPERIMENT_NAME", "MLFLOW_EXPERIMENT_ID"} & os.environ.keys():
        mlflow.set_experiment("yeonma")
    mlflow.start_run(run_name=run_name)
    mlflow.log_params(dict(settings))
    return RunningTracker(
        "mlflow",
        lambda step, values: mlflow.log_metrics(dict(values), step=step),
        lambda failed: mlflow.end_run("FAILED" if failed else "FINISHED"),
    )


_START: Mapping[str, Callable[[str, Path, Settings, int], RunningTracker]] = {
    "tensorboard": _tensorboard,
    "wandb": _wandb,
    "trackio": _trackio,
    "mlflow": _mlflow,
}


def _problems(name: str) -> list[Problem]:
    if name not in _START:
        cure = did_you_mean(name, _START) or tr("known are {start}", start=", ".join(_START))
        return [Problem(tr('no tracker "{name}"', name=name), place="report_to", cure=cure)]
    spec = find_spec(name)
    # A folder `wandb`, left by a run in the working folder, imports as a package without an origin.
    if spec is None or spec.origin is None:
        return [Problem(tr("{name} is not installed", name=name), place="report_to", cure=install(name))]
    return []


def _warn(text: str) -> None:
    tell(tr("warning: {text}", text=text))


def _reason(error: Exception) -> str:
    """One short line of an error, without secrets: some trackers quote their address, password and all."""
    first = next(iter(str(error).strip().splitlines()), "")
    return _without_secrets(f"{type(error).__name__}: {first}" if first else type(error).__name__)[:300]


_SECRET_NAME = r"(?:token|key|secret|password|signature|credential)"
_SECRETS = (
    (re.compile(r"(?<=://)[^/@\s]+(?=@)"), "***"),
    (re.compile(rf"({_SECRET_NAME}=)[^&\s]+", re.IGNORECASE), r"\1***"),
    (re.compile(r"\b(?:hf_|sk-|wandb_v1_)[\w-]{8,}"), "***"),
)


def _without_secrets(text: str) -> str:
    for pattern, shown in _SECRETS:
        text = pattern.sub(shown, text)
    return text


def _shown(name: str, value: object) -> object:
    if not isinstance(value, str):
        return value
    return "***" if re.search(rf"{_SECRET_NAME}$", name, re.IGNORECASE) else _without_secrets(value)
