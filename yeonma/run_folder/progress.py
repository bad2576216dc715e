"""Records of steps and evaluations, and the progress display: a live line on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import cycle
from pathlib import Path
from typing import Literal

from rich.cells import cell_len
from rich.console import Console
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as Bar
from rich.status import Status
from rich.text import Text

from yeonma.config.metric_names import PREFIX
from yeonma.durations import in_two_units
from yeonma.errors import Log
from yeonma.messages import tr
from yeonma.run_folder.notebook_block import in_notebook, notebook_block
from yeonma.run_folder.units import counted_units
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


def run_console(*, quiet: bool) -> Console:
    """The console of a run, on standard output. In a notebook it prints plain lines: rich would show each of them as
    HTML, and kernels ask for colours although their output is no terminal."""
    interactive = False if in_notebook() else None
    return Console(quiet=quiet, soft_wrap=True, force_jupyter=False, force_interactive=interactive)


def log_of(console: Console) -> Log:
    """Prints lines on a console, escaped, without markup or wrapping."""
    return lambda line: console.out(one_line(line, MOST_OF_A_LINE), highlight=False)


LINE_WIDTH = 80
"""Columns that a printed line of a step has at most."""
LEAST_BAR = 10
"""Columns of the bar beside a live line, at least."""
ABOUT_LINES = 100
"""Printed steps of a run with `logging_steps` auto, about."""
LONGEST_SILENCE = 300.0
"""Seconds after which `logging_steps` auto prints a step anyway."""
ANSWER_SILENCE = 30.0
"""Seconds after which the next answer of the card is printed where there is no live line."""


def passes_a_tenth(done: int, before: int, total: int) -> bool:
    """Whether a count that has grown from `before` to `done` has passed another tenth of `total`."""
    return done * 10 // total > before * 10 // total


def printed_every(logging_steps: int | Literal["auto"], total_steps: int) -> int:
    """Steps between printed lines. auto: 1, 2, 5, 10, 20, 50 ..., so that a run has about a hundred lines."""
    if logging_steps != "auto":
        return logging_steps
    every = 1
    for factor in cycle((2, 2.5, 2)):
        if every * ABOUT_LINES * 1.5 >= total_steps:
            return every
        every = int(every * factor)
    raise AssertionError


FORWARD_SHARE = 1 / 3
"""The part of a step's time that its forward pass takes."""


@dataclass(frozen=True)
class CardWork:
    """What answering rows takes: those of the card, or of an evaluation."""

    prompt_tokens: int
    """Of all prompts, once for each model that answers them."""
    decoded_tokens: int
    """Of the longest answers: decoding one token of all rows is one step."""
    tokens_per_step: int
    """The tokens whose forward pass takes as long as such a step."""
    least_seconds: float
    """That such a step takes."""

    def seconds(self, forward_seconds_per_token: float) -> float:
        """About how long it takes."""
        step = max(self.tokens_per_step * forward_seconds_per_token, self.least_seconds)
        return self.prompt_tokens * forward_seconds_per_token + self.decoded_tokens * step


@dataclass(frozen=True)
class StepsBetween:
    """What counts for the time left besides the steps."""

    evaluations: int | None = None
    """Steps between evaluations; None: there are none."""
    saves: int | None = None
    """Steps between saves; None: there are none."""
    evaluation_tokens: int = 0
    """Tokens of an evaluation, from which its time follows until one was measured."""
    card: CardWork | None = None
    """What comes after the last step."""
    answers: CardWork | None = None
    """What an evaluation answers, from which its time follows, too."""


NOTHING_BETWEEN = StepsBetween()


class Progress:
    """Displays the steps from `start_step` + 1 to `total_steps`. A context manager.

    On a terminal, one line is updated at every step, and other messages appear above it. In a notebook, one block is
    (`NotebookBlock`). Elsewhere (a file, a pipe), every `logging_steps`-th step and the last one print a line with the
    same text:
    `step 12/90  epoch 0.40  loss 1.2345  lr 1.8e-04  312 tokens/s  12m03s left`.
    Loss and learning rate are those of the step. tokens/s and time left are estimated from the last 20 steps, and the
    time left also from the last evaluation and the last save; it counts the answers of the card. What a line has no
    room for is left out, the peak of memory first.

    `keep` gets the printed lines, and on a terminal or in a notebook those that would be printed elsewhere.
    """

    def __init__(
        self,
        total_steps: int,
        start_step: int,
        logging_steps: int | Literal["auto"],
        console: Console,
        *,
        between: StepsBetween = NOTHING_BETWEEN,
        keep: Log = lambda line: None,
    ) -> None:
        self._total_steps = total_steps
        self._start_step = start_step
        self._every = printed_every(logging_steps, total_steps)
        self._is_auto = logging_steps == "auto"
        self._console = console
        self._between = between
        self._keep = keep
        self._recent: deque[StepRecord] = deque(maxlen=RECENT_STEPS)
        self._evaluation_seconds = self._save_seconds = 0.0
        self._printed_at = time.monotonic()
        self._block = None if console.quiet else notebook_block(total_steps)
        # not interactive: TERM is dumb, or the user set TTY_INTERACTIVE=0
        live = console.is_terminal and console.is_interactive and self._block is None
        self._bar = _bar(console, total_steps, start_step) if live else None

    def step(self, record: StepRecord) -> None:
        """Displays a finished step."""
        self._recent.append(record)
        if self._block:
            self._block.step(record.step, record.loss, self._line(record, LINE_WIDTH))
        if self._bar:
            line = self._line(record, self._console.width - LEAST_BAR)
            self._bar.update(self._bar.task_ids[0], completed=record.step, description=line)
        silence = time.monotonic() - self._printed_at
        is_due = record.step % self._every == 0 or (self._is_auto and silence > LONGEST_SILENCE)
        is_first = self._is_auto and record.step == self._start_step + 1
        if is_due or is_first or record.step == self._total_steps:
            self._printed_at = time.monotonic()
            line = self._line(record, LINE_WIDTH)
            if self._bar or self._block:
                self._keep(line)
            else:
                self.print_line(line)

    def saved(self, seconds: float) -> None:
        """Notes how long a save took."""
        self._save_seconds = seconds

    def evaluation(self, record: EvaluationRecord) -> None:
        """Prints an evaluation on its own line."""
        self._evaluation_seconds = record.seconds
        if self._block:
            self._block.evaluation(record.step, record.loss)
        units = "labelled answers" if "reward_desirable" in record.metrics else "pairs"
        metrics = "".join(f"  {reward}" for reward in _rewards(record.metrics))
        if record.perplexity is not None:
            units = "examples"
            perplexity = tr("perplexity {perplexity}", perplexity=_perplexity(record.perplexity))
            metrics = f"  {perplexity}{_label_scores(record.metrics)}"
        self.print_line(
            tr(
                "step {step}/{total_steps}  epoch {epoch:.2f}  validation loss {loss:.4f}{metrics}  "
                "{examples} in {seconds}",
                step=record.step,
                total_steps=self._total_steps,
                epoch=record.epoch,
                loss=record.loss,
                metrics=metrics,
                examples=counted_units(record.examples, units),
                seconds=in_two_units(record.seconds),
            )
        )
        for name, loss in record.losses.items():
            self.print_line(tr("  {name}  validation loss {loss:.4f}", name=name, loss=loss))
        for line in _answer_scores(record.metrics):
            self.print_line(tr("  answers: {scores}", scores=line))

    def print_line(self, text: str) -> None:
        """Prints a line, without markup or wrapping; in a notebook, within the block. A Log."""
        if self._block:
            self._block.say(text)
        else:
            log_of(self._console)(text)
        self._keep(text)

    def _line(self, record: StepRecord, width: int) -> str:
        seconds = sum(step.seconds for step in self._recent)
        tokens = sum(step.tokens for step in self._recent)
        parts = [  # text, and when it is left out: the highest first
            (tr("step {step}/{total_steps}", step=record.step, total_steps=self._total_steps), 0),
            (tr("epoch {epoch:.2f}", epoch=record.epoch), 3),
            (tr("loss {loss:.4f}", loss=record.loss), 0),
            *((reward, 2) for reward in _rewards(record.metrics)),
            (tr("lr {rate:.1e}", rate=record.learning_rate), 4),
            (tr("{rate} tokens/s", rate=_rate(tokens, seconds)), 1),
            (tr("{time} left", time=in_two_units(self._seconds_left(record.step))), 0),
            (_size(record.peak_memory_bytes), 5),
        ]
        for most in range(5, -1, -1):
            line = "  ".join(text for text, rank in parts if rank <= most)
            if cell_len(line) <= width:
                break
        return line

    def card_seconds(self) -> float:
        """About how long the answers of the card will take."""
        return self._between.card.seconds(self._forward_seconds) if self._between.card is not None else 0.0

    @property
    def _forward_seconds(self) -> float:
        """Of a token, by the last steps."""
        tokens = sum(step.tokens for step in self._recent)
        return FORWARD_SHARE * sum(step.seconds for step in self._recent) / tokens if tokens else 0.0

    def _seconds_left(self, step: int) -> float:
        """Of steps, evaluations and saves after this step, and of the answers of the card."""

        def count(between: int | None) -> int:
            """How often something happens that is due after so many steps and after the last one."""
            if between is None:
                return 0
            done_before = (step - 1) // between  # what is due after this step is still to come
            return self._total_steps // between - done_before + (self._total_steps % between > 0)

        steps = (
            sum(record.seconds for record in self._recent) / len(self._recent) * (self._total_steps - step)
        )
        evaluation = self._evaluation_seconds
        if not evaluation:
            evaluation = self._between.evaluation_tokens * self._forward_seconds
            if self._between.answers is not None:
                evaluation += self._between.answers.seconds(self._forward_seconds)
        evaluations = evaluation * count(self._between.evaluations)
        saves = self._save_seconds * count(self._between.saves)
        return steps + evaluations + saves + self.card_seconds()

    def __enter__(self) -> Progress:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._bar:
            self._bar.stop()
        if self._block:
            self._block.close()


class AnswerProgress:
    """Displays that the rows of the model card are being answered. On a terminal, one line counts the answers;
    elsewhere, a line says that it begins, and others follow while it takes long. A context manager; call it with the
    number of answers so far, and of all.

    `whose`: who answers, such as `base and adapter`. `seconds`: about how long it takes; 0 if that is not known.
    """

    def __init__(
        self,
        whose: str,
        console: Console,
        keep: Log = lambda line: None,
        *,
        seconds: float = 0.0,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._whose = whose
        self._console = console
        self._keep = keep
        self._now = now
        self._ends = now() + seconds
        self._printed_at: float | None = None
        self._status: Status | None = None

    def __call__(self, done: int, total: int) -> None:
        line = self._line(done, total)
        if self._printed_at is None and self._console.is_terminal and self._console.is_interactive:
            self._status = self._console.status(Text(line))
            self._status.start()
        elif self._status is not None:
            self._status.update(Text(line))
        if self._printed_at is None or self._now() - self._printed_at > ANSWER_SILENCE:
            self._printed_at = self._now()
            self._keep(line)
            if self._status is None:
                log_of(self._console)(line)

    def _line(self, done: int, total: int) -> str:
        left = self._ends - self._now()
        if left < 1 or done == total:
            return tr(
                "answering the card's rows with {whose}: {done} of {total}",
                whose=self._whose,
                done=done,
                total=total,
            )
        return tr(
            "answering the card's rows with {whose}: {done} of {total}, {time} left",
            whose=self._whose,
            done=done,
            total=total,
            time=in_two_units(left),
        )

    def __enter__(self) -> AnswerProgress:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._status is not None:
            self._status.stop()


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
    about = tr("step {step}/{total_steps}", step=start_step, total_steps=total_steps)
    bar.add_task(about, total=total_steps, completed=start_step)
    return bar


def _rate(tokens: int, seconds: float) -> str:
    rate = tokens / seconds if seconds > 0 else 0.0
    return f"{rate:.0f}" if rate >= 10 else f"{rate:.1f}"


def _size(size_bytes: int) -> str:
    return f"{size_bytes / 1e9:.1f} GB" if size_bytes >= 1e9 else f"{size_bytes / 1e6:.0f} MB"


def _rewards(metrics: Mapping[str, float]) -> list[str]:
    """`margin 0.12` and `accuracy 0.75` from a pair loss's metrics, `reward 0.41` of answers that were drawn; empty for
    other losses."""
    names = {"reward_margin": tr("margin"), "reward_accuracy": tr("accuracy"), "reward": tr("reward")}
    return [f"{name} {metrics[key]:.2f}" for key, name in names.items() if key in metrics]


def _label_scores(metrics: Mapping[str, float]) -> str:
    """`  accuracy 0.92  macro F1 0.90` of answers that are labels; empty for others."""
    names = {"accuracy": tr("accuracy"), "macro_f1": tr("macro F1")}
    return "".join(f"  {name} {metrics[key]:.3f}" for key, name in names.items() if key in metrics)


def _answer_scores(metrics: Mapping[str, float]) -> list[str]:
    """`exact 12.5  chrf 40.1` of generated answers, in lines of at most LINE_WIDTH columns; empty if there are none."""
    lines: list[str] = []
    for key, value in metrics.items():
        if not key.startswith(PREFIX):
            continue
        score = f"{key.removeprefix(PREFIX)} {value:.4g}"
        if lines and cell_len(f"{lines[-1]}  {score}") <= LINE_WIDTH - 14:
            lines[-1] += f"  {score}"
        else:
            lines.append(score)
    return lines


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
