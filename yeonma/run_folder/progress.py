"""The numbers of a step, and what a run prints of them: a live line on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as Bar

RECENT_STEPS = 20


@dataclass(frozen=True)
class StepRecord:
    """One training step: a line of metrics.jsonl, its keys in this order.

    `loss` is the mean over the step's trained tokens, or over its pairs; `grad_norm` is the norm before clipping.
    `examples`, `tokens` and `trained_tokens` are counts over all processes; of pairs, `examples` are the pairs, and
    their prompt's tokens count once. `seconds` is the step's time, evaluation and saving not counted. `metrics` are
    keys of the line of their own, after these.
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
    """One look at the validation rows after `step` steps: a line that begins with `"evaluation": true`.

    `perplexity` is None, and not written, where the loss is none per token. `metrics` as in a step's.
    """

    step: int
    epoch: float
    loss: float
    perplexity: float | None
    examples: int
    trained_tokens: int
    seconds: float
    metrics: dict[str, float] = field(default_factory=dict)


class Progress:
    """Shows the steps `start_step` + 1 to `total_steps`. A context manager.

    On a terminal one line is drawn anew at every step, and what is said meanwhile stands above it. Elsewhere
    (a file, a pipe, a notebook) each `logging_steps`-th step and the last one print a line of the same words:
    `step 12/90  epoch 0.40  loss 1.2345  lr 1.8e-04  312 tokens/s  12m03s left  2.1 GB`.
    Loss and learning rate are that step's own; tokens/s and time left follow from the last 20 steps' seconds.
    """

    def __init__(self, total_steps: int, start_step: int, logging_steps: int, console: Console) -> None:
        self._total_steps = total_steps
        self._logging_steps = logging_steps
        self._console = console
        self._recent: deque[StepRecord] = deque(maxlen=RECENT_STEPS)
        # Not interactive: TERM is dumb, or the user said so (TTY_INTERACTIVE=0).
        live = console.is_terminal and console.is_interactive
        self._bar = _bar(console, total_steps, start_step) if live else None

    def step(self, record: StepRecord) -> None:
        """Show a finished step."""
        self._recent.append(record)
        if self._bar:
            self._bar.update(self._bar.task_ids[0], completed=record.step, description=self._line(record))
        elif record.step % self._logging_steps == 0 or record.step == self._total_steps:
            self.say(self._line(record))

    def evaluation(self, record: EvaluationRecord) -> None:
        """Print an evaluation, on a line of its own."""
        what = "labelled answers" if "reward_desirable" in record.metrics else "pairs"
        shown = _rewards(record.metrics)
        if record.perplexity is not None:
            shown, what = f"  perplexity {_perplexity(record.perplexity)}", "examples"
        self.say(
            f"step {record.step}/{self._total_steps}  epoch {record.epoch:.2f}"
            f"  validation loss {record.loss:.4f}{shown}"
            f"  {record.examples} {what} in {_duration(record.seconds)}"
        )

    def say(self, text: str) -> None:
        """Print `text` as it is: no markup, no line breaks of the terminal's width."""
        self._console.out(text, highlight=False)

    def _line(self, record: StepRecord) -> str:
        seconds = sum(step.seconds for step in self._recent)
        tokens = sum(step.tokens for step in self._recent)
        left = seconds / len(self._recent) * (self._total_steps - record.step)
        return (
            f"step {record.step}/{self._total_steps}  epoch {record.epoch:.2f}  loss {record.loss:.4f}"
            f"{_rewards(record.metrics)}  lr {record.learning_rate:.1e}  {_rate(tokens, seconds)} tokens/s"
            f"  {_duration(left)} left  {_size(record.peak_memory_bytes)}"
        )

    def __enter__(self) -> Progress:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._bar:
            self._bar.stop()


def peak_memory_bytes(device_type: str) -> int:
    """The most memory this process has used so far: tensors on the GPU for "cuda", else resident memory.

    0 where the system does not say.
    """
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
        # What others print is put above the line, but not taken away from a file or a pipe.
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
    """`  margin 0.12  accuracy 0.75` of pairs, nothing where there are none."""
    names = {"reward_margin": "margin", "reward_accuracy": "accuracy"}
    return "".join(f"  {name} {metrics[key]:.2f}" for key, name in names.items() if key in metrics)


def _perplexity(value: float) -> str:
    return f"{value:.2f}" if value < 1e5 else f"{value:.1e}"


def status_bytes(name: str) -> int | None:
    """What Linux says of this process's memory by a name such as `VmRSS`; None where it says nothing."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:")), None)


def _peak_resident_bytes() -> int:
    # On Linux ru_maxrss is inherited from the process that started this one, however large that was.
    resident = status_bytes("VmHWM")
    if resident is not None:
        return resident
    try:
        import resource
    except ImportError:
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
