"""Records of steps and evaluations, and the progress display: a live line on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as Bar

from yeonma.errors import Log
from yeonma.run_folder.notebook_block import notebook_block
from yeonma.shown import MOST_OF_A_LINE, one_line

RECENT_STEPS = 20


@dataclass(frozen=True)
class StepRecord:
    """One training step, as a line of metrics.jsonl with its keys in this order.

    `loss` is the mean over the step's trained tokens, or over its pairs. `grad_norm` is the norm before clipping.
    `examples`, `tokens` and `trained_tokens` are totals over all processes. In preference training `examples` counts
    pairs, and the tokens of a pair's prompt count once. `seconds` excludes evaluation and saving. The entries of
    `metrics` become keys of the line, after the others.
    """

    step: int
    epoch: float
    loss: float
    learning_rate: float
    grad_norm: float
    examples: int
    tokens: int
    trained_tokens: int
    seconds: float
    peak_memory_bytes: int
    metrics: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class EvaluationRecord:
    """One evaluation on the validation rows after `step` steps, as a line that begins with `"evaluation": true`.

    `perplexity` is None and not written if the loss is not a mean over tokens. `metrics` is as in `StepRecord`.
    `losses` has the loss of each data set by its name, if there are several, and is else not written.
    """

    step: int
    epoch: float
    loss: float
    perplexity: float | None
    examples: int
    trained_tokens: int
    seconds: float
    metrics: dict[str, float] = field(default_factory=dict)
    losses: dict[str, float] = field(default_factory=dict)
    confusion: dict[str, dict[str, dict[str, int]]] = field(default_factory=dict)
    """By data set: `yeonma/data/classification.py`'s Confusion of the validation rows. Not written if empty."""


def log_of(console: Console) -> Log:
    """Prints lines on a console, escaped, without markup or wrapping."""
    return lambda line: console.out(one_line(line, MOST_OF_A_LINE), highlight=False)


class Progress:
    """Displays the steps from `start_step` + 1 to `total_steps`. A context manager.

    On a terminal, one line is updated at every step, and other messages appear above it. In a notebook, one block is
    (`NotebookBlock`). Elsewhere (a file, a pipe), every `logging_steps`-th step and the last one print a line with the
    same text:
    `step 12/90  epoch 0.40  loss 1.2345  lr 1.8e-04  312 tokens/s  12m03s left  2.1 GB`.
    Loss and learning rate are those of the step; tokens/s and time left are estimated from the last 20 steps.
    """

    def __init__(self, total_steps: int, start_step: int, logging_steps: int, console: Console) -> None:
        self._total_steps = total_steps
        self._logging_steps = logging_steps
        self._console = console
        self._recent: deque[StepRecord] = deque(maxlen=RECENT_STEPS)
        self._block = None if console.quiet else notebook_block(total_steps)
        # not interactive: TERM is dumb, or the user set TTY_INTERACTIVE=0
        live = console.is_terminal and console.is_interactive and self._block is None
        self._bar = _bar(console, total_steps, start_step) if live else None

    def step(self, record: StepRecord) -> None:
        """Displays a finished step."""
        self._recent.append(record)
        if self._block:
            self._block.step(record.step, record.loss, self._line(record))
        elif self._bar:
            self._bar.update(self._bar.task_ids[0], completed=record.step, description=self._line(record))
        elif record.step % self._logging_steps == 0 or record.step == self._total_steps:
            self.print_line(self._line(record))

    def evaluation(self, record: EvaluationRecord) -> None:
        """Prints an evaluation on its own line."""
        if self._block:
            self._block.evaluation(record.step, record.loss)
        units = "labelled answers" if "reward_desirable" in record.metrics else "pairs"
        metrics = _rewards(record.metrics)
        if record.perplexity is not None:
            metrics, units = f"  perplexity {_perplexity(record.perplexity)}", "examples"
            metrics += _label_scores(record.metrics)
        self.print_line(
            f"step {record.step}/{self._total_steps}  epoch {record.epoch:.2f}"
            f"  validation loss {record.loss:.4f}{metrics}"
            f"  {record.examples} {units} in {_duration(record.seconds)}"
        )
        for name, loss in record.losses.items():
            self.print_line(f"  {name}  validation loss {loss:.4f}")

    def print_line(self, text: str) -> None:
        """Prints a line, without markup or wrapping; in a notebook, within the block. A Log."""
        if self._block:
            self._block.say(text)
            return
        log_of(self._console)(text)

    def _line(self, record: StepRecord) -> str:
        seconds = sum(step.seconds for step in self._recent)
        tokens = sum(step.tokens for step in self._recent)
        seconds_left = seconds / len(self._recent) * (self._total_steps - record.step)
        return (
            f"step {record.step}/{self._total_steps}  epoch {record.epoch:.2f}  loss {record.loss:.4f}"
            f"{_rewards(record.metrics)}  lr {record.learning_rate:.1e}  {_rate(tokens, seconds)} tokens/s"
            f"  {_duration(seconds_left)} left  {_size(record.peak_memory_bytes)}"
        )

    def __enter__(self) -> Progress:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._bar:
            self._bar.stop()
        if self._block:
            self._block.close()


def peak_memory_bytes(device_type: str) -> int:
    """This process's peak memory: that of tensors on the GPU for "cuda", else resident memory. 0 if unknown."""
    if device_type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated()
    return _peak_resident_bytes()


def _bar(console: Console, total_steps: int, start_step: int) -> Bar:
    bar = Bar(
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=None),
        console=console,
        refresh_per_second=4,
        expand=True,
        # Other output appears above the line, unless it goes to a file or a pipe.
        redirect_stdout=sys.stdout.isatty(),
        redirect_stderr=sys.stderr.isatty(),
    )
    bar.add_task(f"step {start_step}/{total_steps}", total=total_steps, completed=start_step)
    return bar


def _rate(tokens: int, seconds: float) -> str:
    rate = tokens / seconds if seconds > 0 else 0.0
    return f"{rate:.0f}" if rate >= 10 else f"{rate:.1f}"


def _duration(seconds: float) -> str:
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    if whole < 86_400:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
    return f"{whole // 86_400}d{whole % 86_400 // 3600:02d}h"


def _size(size_bytes: int) -> str:
    return f"{size_bytes / 1e9:.1f} GB" if size_bytes >= 1e9 else f"{size_bytes / 1e6:.0f} MB"


def _rewards(metrics: Mapping[str, float]) -> str:
    """`  margin 0.12  accuracy 0.75` from a pair loss's metrics; empty for other losses."""
    names = {"reward_margin": "margin", "reward_accuracy": "accuracy"}
    return "".join(f"  {name} {metrics[key]:.2f}" for key, name in names.items() if key in metrics)


def _label_scores(metrics: Mapping[str, float]) -> str:
    """`  accuracy 0.92  macro F1 0.90` of answers that are labels; empty for others."""
    names = {"accuracy": "accuracy", "macro_f1": "macro F1"}
    return "".join(f"  {name} {metrics[key]:.3f}" for key, name in names.items() if key in metrics)


def _perplexity(value: float) -> str:
    return f"{value:.2f}" if value < 1e5 else f"{value:.1e}"


def status_bytes(name: str) -> int | None:
    """A memory figure of this process from Linux, such as `VmRSS`; None if it is not available."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:")), None)


def _peak_resident_bytes() -> int:
    # On Linux ru_maxrss may be that of the parent process, so VmHWM comes first.
    peak_bytes = status_bytes("VmHWM")
    if peak_bytes is not None:
        return peak_bytes
    try:
        import resource
    except ImportError:
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
