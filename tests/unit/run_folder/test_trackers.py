"""A run's progress lines, memory use, metrics.jsonl, loss plot and trackers."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Literal, get_args
from xml.etree import ElementTree

import numpy as np
import pytest
from rich.console import Console

from tests.chromium import browser, contrast, in_chromium, luminance
from yeonma.config import settings
from yeonma.errors import UserError
from yeonma.packages import install
from yeonma.run_folder import loss_plot
from yeonma.run_folder import trackers as tracking
from yeonma.run_folder.phases import in_two_units
from yeonma.run_folder.progress import (
    AnswerProgress,
    CardWork,
    EvaluationRecord,
    Progress,
    StepRecord,
    StepsBetween,
    peak_memory_bytes,
    printed_every,
)
from yeonma.run_folder.run_log import open_metrics, read_metrics
from yeonma.run_folder.trackers import (
    RunningTracker,
    Trackers,
    check_trackers,
    open_trackers,
    plot_loss,
    tracked,
)

STEP = StepRecord(
    step=12,
    epoch=0.4,
    loss=1.23448,
    learning_rate=1.8e-4,
    grad_norm=0.75,
    examples=8,
    tokens=312,
    trained_tokens=90,
    seconds=1.0,
    peak_memory_bytes=2_100_000_000,
)
EVALUATION = EvaluationRecord(
    step=12, epoch=0.4, loss=1.5, perplexity=4.4816890703, examples=20, trained_tokens=100, seconds=3.2
)


@pytest.fixture(autouse=True)
def _plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("FORCE_COLOR", "NO_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "COLUMNS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")


def steps(*numbers: int) -> list[StepRecord]:
    return [replace(STEP, step=number, loss=3 / number) for number in numbers]


# Progress

NONE_BETWEEN = StepsBetween()


def printed(
    show: Callable[[Progress], None],
    *,
    total_steps: int = 90,
    logging_steps: int | Literal["auto"] = 1,
    terminal: bool = False,
    width: int = 80,
    between: StepsBetween = NONE_BETWEEN,
    keep: Callable[[str], None] = lambda line: None,
) -> str:
    out = StringIO()
    console = Console(file=out, force_terminal=terminal, width=width)
    with Progress(total_steps, 0, logging_steps, console, between=between, keep=keep) as progress:
        show(progress)
    return out.getvalue()


def test_a_step_is_one_plain_line_outside_a_terminal() -> None:
    short = replace(STEP, tokens=31)
    expected = "step 12/90  epoch 0.40  loss 1.2345  lr 1.8e-04  31 tokens/s  1m18s left  2.1 GB\n"
    assert printed(lambda progress: progress.step(short)) == expected


def test_an_evaluation_is_one_plain_line() -> None:
    expected = "step 12/90  epoch 0.40  validation loss 1.5000  perplexity 4.48  20 examples in 3s\n"
    assert printed(lambda progress: progress.evaluation(EVALUATION)) == expected


def test_every_logging_steps_th_step_and_the_last_are_printed() -> None:
    def show(progress: Progress) -> None:
        for record in steps(*range(1, 8)):
            progress.step(record)

    text = printed(show, total_steps=7, logging_steps=3)
    assert re.findall(r"^step (\d+)/7 ", text, flags=re.MULTILINE) == ["3", "6", "7"]


def test_printed_text_is_neither_wrapped_nor_read_as_markup() -> None:
    text = "[bold]:smile:[/bold] " + "연마 " * 60
    assert printed(lambda progress: progress.print_line(text), width=40) == text + "\n"


def test_time_left_and_rate_use_recent_steps_and_ignore_evaluations() -> None:
    def show(progress: Progress) -> None:
        for number in range(1, 31):
            progress.step(replace(STEP, step=number, seconds=1000.0, tokens=1))
        for number in range(31, 51):
            progress.step(replace(STEP, step=number, seconds=3.0, tokens=600))
            progress.evaluation(replace(EVALUATION, step=number, seconds=5000.0))

    last_step = printed(show, total_steps=90).splitlines()[-2]
    assert "  200 tokens/s  2m00s left" in last_step


@pytest.mark.parametrize(
    ("seconds", "left"),
    [(0.0, "0s"), (59.4, "59s"), (59.6, "1m00s"), (3599.0, "59m59s"), (3661.0, "1h01m"), (90_000.0, "1d01h")],
)
def test_time_left_is_written_in_its_two_largest_units(seconds: float, left: str) -> None:
    text = printed(lambda progress: progress.step(replace(STEP, step=89, seconds=seconds)))
    assert f"  {left} left" in text


def test_a_terminal_has_one_live_line_with_evaluations_above_it() -> None:
    def show(progress: Progress) -> None:
        progress.step(replace(STEP, step=11))
        progress.evaluation(EVALUATION)
        progress.step(STEP)

    text = printed(show, terminal=True, width=100)
    rows = screen(text)
    assert rows[0] == "step 12/90  epoch 0.40  validation loss 1.5000  perplexity 4.48  20 examples in 3s"
    assert rows[1].startswith(
        "step 12/90  epoch 0.40  loss 1.2345  lr 1.8e-04  312 tokens/s  1m18s left  2.1 GB"
    )
    assert rows[2:] == []


def test_a_narrow_terminal_still_has_one_line() -> None:
    (row,) = screen(printed(lambda progress: progress.step(STEP), terminal=True, width=50))
    assert row.startswith("step 12/90  loss 1.2345  1m18s left")


@pytest.mark.parametrize("metrics", [{}, {"reward_margin": -12.25, "reward_accuracy": 0.75}])
@pytest.mark.parametrize(("total", "step"), [(90, 12), (12_000, 11_999), (1_000_000, 999_999)])
def test_a_printed_line_fits_into_80_columns(total: int, step: int, metrics: dict[str, float]) -> None:
    record = replace(STEP, step=step, tokens=312_345, metrics=metrics)
    (line,) = printed(lambda progress: progress.step(record), total_steps=total).splitlines()
    assert len(line) <= 80
    assert line.startswith(f"step {step}/{total}  ") and "  loss 1.2345  " in line and line.count(" left")
    (row,) = screen(printed(lambda progress: progress.step(record), total_steps=total, terminal=True))
    assert len(row) <= 80 and row.startswith(f"step {step}/{total}  ")


@pytest.mark.parametrize(
    ("total", "every"), [(1, 1), (150, 1), (151, 2), (1_000, 10), (10_000, 100), (40_000, 500)]
)
def test_auto_prints_about_a_hundred_lines(total: int, every: int) -> None:
    assert printed_every("auto", total) == every
    assert printed_every(7, total) == 7
    if total < 1_001:
        record = replace(STEP, step=1)

        def show(progress: Progress) -> None:
            for step in range(1, total + 1):
                progress.step(replace(record, step=step))

        shown = re.findall(
            r"^step (\d+)/", printed(show, total_steps=total, logging_steps="auto"), re.MULTILINE
        )
        numbers = [int(step) for step in shown]
        expected = {1, *range(every, total + 1, every), total}
        assert numbers == sorted(expected) and len(numbers) <= 151


def test_time_left_has_the_evaluations_and_saves_to_come() -> None:
    def show(progress: Progress) -> None:
        progress.evaluation(replace(EVALUATION, step=0, seconds=60.0))
        for step in range(1, 11):
            progress.step(replace(STEP, step=step, seconds=1.0))
            if step % 4 == 0 or step == 10:
                progress.evaluation(replace(EVALUATION, step=step, seconds=60.0))
            if step % 5 == 0:
                progress.saved(600.0)

    text = printed(show, total_steps=10, between=StepsBetween(evaluations=4, saves=5))
    left = re.findall(r"^step (\d+)/10 .* (\S+) left", text, re.MULTILINE)
    # at step 4, its own evaluation is still to come, and those of steps 8 and 10; at step 6, the save of step 10
    assert dict(left) == {
        **{"1": "3m09s", "2": "3m08s", "3": "3m07s", "4": "3m06s", "5": "2m05s", "6": "12m04s"},
        **{"7": "12m03s", "8": "12m02s", "9": "11m01s", "10": "11m00s"},
    }


def test_what_is_printed_is_kept_and_a_terminal_keeps_the_same(tmp_path: Path) -> None:
    kept: dict[bool, list[str]] = {False: [], True: []}
    for terminal, lines in kept.items():

        def show(progress: Progress) -> None:
            for record in steps(*range(1, 8)):
                progress.step(record)
            progress.evaluation(EVALUATION)

        text = printed(show, total_steps=7, logging_steps=3, terminal=terminal, keep=lines.append)
        if not terminal:
            assert text.splitlines() == lines
    assert kept[True] == kept[False] and len(kept[True]) == 4


def test_answers_are_counted_on_a_terminal_and_announced_elsewhere() -> None:
    shown = {}
    for terminal in (False, True):
        out, kept = StringIO(), list[str]()
        console = Console(file=out, force_terminal=terminal, width=80)
        with AnswerProgress("base and adapter", console, kept.append) as progress:
            for done in range(3):
                progress(done, 2)
        first = "answering the card's rows with base and adapter: 0 of 2"
        assert kept == [first]
        shown[terminal] = out.getvalue()
    assert shown[False] == f"{first}\n"
    assert "2 of 2" in shown[True] and shown[True].endswith("\x1b[2K")  # and the line is gone


def test_time_left_has_the_first_evaluation_and_the_answers_of_the_card() -> None:
    """A step of 30 tokens takes 9 seconds: a token takes a third of a tenth of that forward."""
    record = replace(STEP, seconds=9.0, tokens=30)
    card = CardWork(prompt_tokens=100, decoded_tokens=20, tokens_per_step=5, least_seconds=0.0)
    between = StepsBetween(evaluations=10, evaluation_tokens=50, card=card)
    expected = card.seconds(0.1)
    assert expected == pytest.approx(100 * 0.1 + 20 * 5 * 0.1)
    slow = replace(card, least_seconds=3.0)
    assert slow.seconds(0.1) == pytest.approx(100 * 0.1 + 20 * 3.0)

    def show(progress: Progress) -> None:
        assert progress.card_seconds() == 0
        progress.step(replace(record, step=9))
        progress.step(replace(record, step=10))
        progress.evaluation(replace(EVALUATION, step=10, seconds=7.0))
        assert progress.card_seconds() == pytest.approx(expected)

    left = re.findall(r" (\S+) left", printed(show, total_steps=10, between=between))
    assert left == [in_two_units(9 + 5 + expected), in_two_units(5 + expected)]


def test_answers_that_take_long_are_told_with_the_time_left() -> None:
    clock, out, kept = [0.0], StringIO(), list[str]()
    console = Console(file=out, width=80)
    with AnswerProgress(
        "base and adapter", console, kept.append, seconds=100.0, now=lambda: clock[0]
    ) as progress:
        for done, seconds in enumerate((0.0, 10.0, 40.0, 50.0, 120.0)):
            clock[0] = seconds
            progress(done, 10)
    about = "answering the card's rows with base and adapter: "
    assert kept == [f"{about}0 of 10, 1m40s left", f"{about}2 of 10, 1m00s left", f"{about}4 of 10"]
    assert out.getvalue().splitlines() == kept and max(map(len, kept)) <= 78


def screen(text: str) -> list[str]:
    """The lines that a terminal finally shows. Progress uses only carriage return, one line up and erase line."""
    rows, row = [""], 0
    for part in re.split(r"(\r|\n|\x1b\[[0-9;?]*[A-Za-z])", text):
        if part == "\n":
            row += 1
            rows += [""] * (row == len(rows))
        elif part == "\x1b[1A":
            row -= 1
        elif part == "\x1b[2K":
            rows[row] = ""
        elif part != "\r" and not part.startswith("\x1b"):
            rows[row] += part
    return [row.rstrip() for row in rows if row.strip()]


# Memory


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_peak_memory_excludes_the_parent_and_includes_freed_memory() -> None:
    child = (
        "from yeonma.run_folder.progress import peak_memory_bytes\n"
        "first = peak_memory_bytes('cpu'); block = b'x' * 100_000_000; del block\n"
        "print(first, peak_memory_bytes('cpu'))"
    )
    # The parent process uses more memory than its child ever does.
    parent = f"import subprocess, sys; large = b'x' * 300_000_000; subprocess.run([sys.executable, '-c', {child!r}])"
    done = subprocess.run([sys.executable, "-c", parent], capture_output=True, text=True, check=True)
    first, second = map(int, done.stdout.split())
    assert 1_000_000 < first < 150_000_000
    assert 90_000_000 < second - first < 150_000_000


@pytest.mark.gpu
def test_peak_memory_of_a_gpu_counts_its_tensors() -> None:
    import torch

    before = peak_memory_bytes("cuda")
    block = torch.empty(before + 50_000_000, dtype=torch.uint8, device="cuda")
    assert peak_memory_bytes("cuda") >= block.numel()


# metrics.jsonl


def test_metrics_lines_have_fixed_keys_and_exact_floats(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    third = replace(STEP, loss=1 / 3, learning_rate=1e-05)
    with open_metrics(path, None) as metrics:
        metrics.write(replace(EVALUATION, step=0))
        metrics.write(third)
    assert path.read_text() == (
        '{"evaluation": true, "step": 0, "epoch": 0.4, "loss": 1.5, "perplexity": 4.4816890703, "examples": 20,'
        ' "trained_tokens": 100, "seconds": 3.2}\n'
        '{"step": 12, "epoch": 0.4, "loss": 0.3333333333333333, "learning_rate": 1e-05, "grad_norm": 0.75,'
        ' "examples": 8, "tokens": 312, "trained_tokens": 90, "seconds": 1.0, "peak_memory_bytes": 2100000000}\n'
    )
    assert read_metrics(path)[1]["loss"] == 1 / 3


def test_non_finite_metrics_are_written_as_null(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with open_metrics(path, None) as metrics:
        metrics.write(replace(EVALUATION, perplexity=float("inf")))
        metrics.write(replace(STEP, grad_norm=float("nan")))
    evaluation, step = read_metrics(path)
    assert (evaluation["perplexity"], step["grad_norm"]) == (None, None)


def test_killed_process_loses_no_metrics_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    program = (
        "import os, signal\n"
        "from pathlib import Path\n"
        "from yeonma.run_folder.progress import StepRecord\n"
        "from yeonma.run_folder.run_log import open_metrics\n"
        f"metrics = open_metrics(Path({str(path)!r}), None)\n"
        "for step in (1, 2, 3):\n"
        "    metrics.write(StepRecord(step, 0.1, 1.0, 1e-4, 1.0, 8, 100, 50, 0.5, 1))\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    assert subprocess.run([sys.executable, "-c", program]).returncode == -9
    assert [row["step"] for row in read_metrics(path)] == [1, 2, 3]


def test_resumed_metrics_file_equals_that_of_an_uninterrupted_run(tmp_path: Path) -> None:
    records = [replace(EVALUATION, step=0), *steps(1, 2), replace(EVALUATION, step=2), *steps(3, 4, 5)]
    uninterrupted, resumed = tmp_path / "whole.jsonl", tmp_path / "cut.jsonl"
    with open_metrics(uninterrupted, None) as metrics:
        for record in records:
            metrics.write(record)
    # Killed in the middle of writing step 5, with the last checkpoint at step 2.
    resumed.write_bytes(uninterrupted.read_bytes()[:-20])
    with open_metrics(resumed, keep_steps=2) as metrics:
        assert resumed.read_bytes() == b"".join(uninterrupted.read_bytes().splitlines(keepends=True)[:4])
        for record in records[4:]:
            metrics.write(record)
    assert resumed.read_bytes() == uninterrupted.read_bytes()


def test_truncated_last_metrics_line_is_removed_on_resume(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1')
    assert [row["step"] for row in read_metrics(path)] == [1]
    open_metrics(path, keep_steps=5).file.close()
    assert path.read_text() == '{"step": 1, "loss": 2.0}\n'


def test_new_run_empties_an_existing_metrics_file(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 2.0}\n')
    open_metrics(path, None).file.close()
    assert path.read_bytes() == b""


def test_resuming_without_a_metrics_file_creates_one(tmp_path: Path) -> None:
    open_metrics(tmp_path / "metrics.jsonl", keep_steps=5).file.close()
    assert (tmp_path / "metrics.jsonl").read_bytes() == b""


@pytest.mark.parametrize(
    "line",
    [
        *('{"step": 2', "[2]", '{"loss": 1.0}', '{"step": "2", "loss": 1.0}', "\xff", "[" * 100_000),
        *('{"step": 2, "loss": "x"}', '{"step": 2, "loss": {}}', '{"step": -2, "loss": 1.0}'),
        *(
            '{"step": true, "loss": 1.0}',
            '{"step": 2, "loss": NaN}',
            '{"step": 2, "loss": 1.0, "epoch": [1]}',
        ),
        *('{"step": 2, "loss": 1, "losses": {"a": "b"}}', '{"step": 2, "loss": 1, "evaluation": "no"}'),
    ],
)
def test_invalid_metrics_line_is_reported_and_the_file_unchanged(tmp_path: Path, line: str) -> None:
    path = tmp_path / "metrics.jsonl"
    before = f'{{"step": 1, "loss": 2.0}}\n{line}\n'.encode("latin-1")
    path.write_bytes(before)
    with pytest.raises(UserError, match=re.escape(f"{path}:2: not a record of a step")):
        open_metrics(path, keep_steps=9)
    assert path.read_bytes() == before


def test_reading_a_missing_metrics_file_is_a_user_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"metrics\.jsonl: no such file"):
        read_metrics(tmp_path / "metrics.jsonl")


# loss.svg


def metrics_of(path: Path, *records: StepRecord | EvaluationRecord) -> Path:
    with open_metrics(path, None) as metrics:
        for record in records:
            metrics.write(record)
    return path


def plotted_shapes(svg: Path, name: str) -> list[tuple[str, int]]:
    """The lines and dots of a class, with their numbers of points. Also checks that the SVG loads nothing."""
    text = svg.read_text("utf-8")
    assert not re.search(r"<script|href|url\(|@import|\bon\w+=", text)
    assert re.findall(r"https?://[^\"]*", text) == ["http://www.w3.org/2000/svg"]
    shapes = [shape for shape in ElementTree.fromstring(text) if shape.get("class") == name]
    return [
        (
            shape.tag.rpartition("}")[2],
            len(shape.get("points", "").split()) or shape.get("d", "").count("M"),
        )
        for shape in shapes
    ]


def test_the_plot_shows_training_and_validation(tmp_path: Path) -> None:
    evaluations = [replace(EVALUATION, step=step) for step in (0, 20, 40)]
    metrics = metrics_of(
        tmp_path / "metrics.jsonl", *evaluations[:1], *steps(*range(1, 41)), *evaluations[1:]
    )
    plot_loss(metrics, tmp_path / "loss.svg", per="pair")
    assert plotted_shapes(tmp_path / "loss.svg", "training") == [("polyline", 40), ("polyline", 40)]
    assert plotted_shapes(tmp_path / "loss.svg", "validation") == [("polyline", 3), ("path", 3)]
    svg = (tmp_path / "loss.svg").read_text("utf-8")
    assert "prefers-color-scheme:dark" in svg
    for label in (
        "loss per pair",
        "training, each step",
        "training, moving mean",
        "validation",
        "step",
        "20",
    ):
        assert f">{label}</" in svg
    assert 'aria-label="Loss per pair: training 3 to 0.075, validation 1.5 to 1.5"' in svg


@in_chromium
def test_plot_is_readable_in_light_and_dark_themes(tmp_path: Path) -> None:
    metrics = metrics_of(tmp_path / "metrics.jsonl", *steps(*range(1, 41)), replace(EVALUATION, step=40))
    plot_loss(metrics, tmp_path / "loss.svg")
    pictures = []
    with browser(tmp_path / "profile") as tab:
        for dark in (False, True):
            tab.look(760, 420, dark=dark)
            tab.open(tmp_path / "loss.svg")
            background = tab.run("getComputedStyle(document.querySelector('.paper')).fill")
            assert (luminance(background) < 0.1) if dark else (luminance(background) > 0.9)
            for selectors, style, min_contrast in (
                ("text", "fill", 7),
                (".training, .validation", "color", 4.5),
            ):
                colours = tab.run(
                    f"[...document.querySelectorAll('{selectors}')].map(e => getComputedStyle(e).{style})"
                )
                assert min(contrast(colour, background) for colour in colours) >= min_contrast
            all_inside = tab.run(
                "[...document.querySelectorAll('text, path, polyline')].every(e => { const b = e.getBBox(); "
                "return b.x >= 0 && b.y >= 0 && b.x + b.width <= 720 && b.y + b.height <= 400; })"
            )
            assert all_inside
            assert tab.problems == []
            pictures.append(tab.picture())
    assert pictures[0] != pictures[1]


@pytest.mark.parametrize("number", [1, 9, 10])
def test_short_run_without_validation_is_plotted(tmp_path: Path, number: int) -> None:
    plot_loss(metrics_of(tmp_path / "metrics.jsonl", *steps(*range(1, number + 1))), tmp_path / "loss.svg")
    assert plotted_shapes(tmp_path / "loss.svg", "training")[-1][1] == number
    assert plotted_shapes(tmp_path / "loss.svg", "validation") == []


def test_plots_of_the_same_metrics_have_the_same_bytes(tmp_path: Path) -> None:
    metrics = metrics_of(tmp_path / "metrics.jsonl", *steps(*range(1, 41)), replace(EVALUATION, step=40))
    program = (
        "from pathlib import Path\n"
        "from yeonma.run_folder.trackers import plot_loss\n"
        f"plot_loss(Path({str(metrics)!r}), Path({str(tmp_path / 'other.svg')!r}))\n"
    )
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0
    plot_loss(metrics, tmp_path / "loss.svg")
    assert (tmp_path / "other.svg").read_bytes() == (tmp_path / "loss.svg").read_bytes()


def test_the_plot_of_a_long_run_is_small_and_keeps_every_peak(tmp_path: Path) -> None:
    losses = [2 + math.sin(step / 7) * 0.1 for step in range(100_000)]
    losses[70_001] = 5.0
    lines = (json.dumps({"step": step, "loss": loss}) for step, loss in enumerate(losses, 1))
    evaluations = (
        json.dumps({"evaluation": True, "step": step, "loss": 2.0}) for step in range(0, 100_000, 100)
    )
    (tmp_path / "metrics.jsonl").write_text("\n".join([*lines, *evaluations, ""]))
    plot_loss(tmp_path / "metrics.jsonl", tmp_path / "loss.svg")
    assert (tmp_path / "loss.svg").stat().st_size < 9_000
    assert [points for _, points in plotted_shapes(tmp_path / "loss.svg", "training")] == [242, 120]
    (peaks, _), *_ = re.findall(r'points="(.*?)".*?(stroke-opacity)', (tmp_path / "loss.svg").read_text())
    highest = min((tuple(map(float, pair.split(","))) for pair in peaks.split()), key=lambda pair: pair[1])
    assert highest == (pytest.approx(70 + 610 * 0.7, abs=0.1), pytest.approx(40 + 308 / 27, abs=1))


def test_plot_omits_non_finite_losses(tmp_path: Path) -> None:
    finite = steps(1, 2, 4)
    plot_loss(metrics_of(tmp_path / "finite.jsonl", *finite), tmp_path / "finite.svg")
    with_gap = [*finite[:2], replace(STEP, step=3, loss=float("nan")), *finite[2:]]
    plot_loss(metrics_of(tmp_path / "gap.jsonl", *with_gap), tmp_path / "gap.svg")
    assert (tmp_path / "gap.svg").read_bytes() == (tmp_path / "finite.svg").read_bytes()


def test_no_plot_is_written_without_losses(tmp_path: Path) -> None:
    plot_loss(metrics_of(tmp_path / "metrics.jsonl"), tmp_path / "loss.svg")
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_failed_plot_leaves_no_temporary_file(tmp_path: Path) -> None:
    metrics = metrics_of(tmp_path / "metrics.jsonl", *steps(1, 2))
    (tmp_path / "loss.svg").mkdir()
    with pytest.raises(OSError):
        plot_loss(metrics, tmp_path / "loss.svg")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["loss.svg", "metrics.jsonl"]


def test_the_moving_mean_is_centred_and_shorter_at_the_ends() -> None:
    mean = loss_plot._moving_mean(np.array([1.0, 2.0, 6.0, 7.0]), each_side=1)
    assert mean.tolist() == [1.5, 3.0, 5.0, 6.5]


# Trackers


def test_every_tracker_in_the_settings_has_a_start_function() -> None:
    assert tuple(tracking._START) == get_args(settings.Tracker)


def test_check_trackers_drops_none_and_repeated_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking, "find_spec", lambda name: type("Spec", (), {"origin": "somewhere"}))
    assert check_trackers("none") == check_trackers(["none"]) == check_trackers([]) == ()
    assert check_trackers("wandb") == ("wandb",)
    assert check_trackers(["mlflow", "wandb", "mlflow"]) == ("mlflow", "wandb")


def test_missing_and_unknown_trackers_are_reported_with_a_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "wandb").mkdir()  # the output of an earlier run in the working folder, not the library
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    for name in ("wandb", "mlflow"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    with pytest.raises(UserError) as error:
        check_trackers(["wandb", "mlflow", "tensorbord"])
    assert str(error.value).splitlines() == [
        f"report_to: wandb is not installed; {install('wandb')}",
        f"report_to: mlflow is not installed; {install('mlflow')}",
        'report_to: no tracker "tensorbord"; did you mean "tensorboard"?',
    ]


def test_tracked_metrics_are_prefixed_with_train_or_validation() -> None:
    assert tracked(replace(STEP, seconds=0.5)) == {
        "train/epoch": 0.4,
        "train/loss": 1.23448,
        "train/learning_rate": 1.8e-4,
        "train/grad_norm": 0.75,
        "train/examples": 8,
        "train/tokens": 312,
        "train/trained_tokens": 90,
        "train/seconds": 0.5,
        "train/peak_memory_bytes": 2_100_000_000,
        "train/tokens_per_second": 624.0,
    }
    assert set(tracked(EVALUATION)) == {
        f"validation/{name}"
        for name in ("epoch", "loss", "perplexity", "examples", "trained_tokens", "seconds")
    }


def recorder(calls: list[object], fail: bool = False) -> RunningTracker:
    def log(step: int, values: Mapping[str, float]) -> None:
        calls.append((step, dict(values)))
        if fail:
            raise ConnectionError("no route to https://me:sesame@host/api?api_key=sesame\nsecond line")

    return RunningTracker("shaky" if fail else "steady", log, lambda failed: calls.append(failed))


def test_failing_tracker_is_warned_about_once_and_dropped(capsys: pytest.CaptureFixture[str]) -> None:
    steady: list[object] = []
    shaky: list[object] = []
    with Trackers([recorder(shaky, fail=True), recorder(steady)]) as trackers:
        for step in (1, 2, 3):
            trackers.log(step, {"train/loss": 1.0})
    assert shaky == [(1, {"train/loss": 1.0})]
    assert steady == [*((step, {"train/loss": 1.0}) for step in (1, 2, 3)), False]
    assert capsys.readouterr().err == (
        "warning: shaky failed and gets no more metrics; training goes on"
        " (ConnectionError: no route to https://***@host/api?api_key=***)\n"
    )


def test_interrupted_run_closes_its_trackers_as_failed() -> None:
    calls: list[object] = []
    with pytest.raises(KeyboardInterrupt), Trackers([recorder(calls)]):
        raise KeyboardInterrupt
    assert calls == [True]


def test_tracker_that_fails_on_close_does_not_affect_others(capsys: pytest.CaptureFixture[str]) -> None:
    calls: list[object] = []

    def close(failed: bool) -> None:
        raise OSError("disk full")

    trackers = Trackers([RunningTracker("shaky", lambda step, values: None, close), recorder(calls)])
    trackers.close()
    trackers.close()
    assert calls == [False]
    assert capsys.readouterr().err == "warning: shaky failed at its end (OSError: disk full)\n"


def events(folder: Path):  # type: ignore[no-untyped-def]
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    return accumulator.EventAccumulator(str(folder)).Reload()


def test_tensorboard_gets_metrics_and_settings_without_secrets(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    run_settings = {
        "learning_rate": 2e-4,
        "add_eos_token": True,
        "micro_batch_tokens": 4096,
        "template": "{document}\n{title}",
        "hub_token": "sesame",
        "data_path": "s3://me:sesame@bucket/rows.jsonl",
    }
    with open_trackers("tensorboard", "first", tmp_path, run_settings) as trackers:
        trackers.log(1, {"train/loss": 2.5, "train/tokens": 100})
        trackers.log(2, {"train/loss": 1.5, "train/tokens": 90})
    accumulator = events(tmp_path / "tensorboard")
    assert [(event.step, event.value) for event in accumulator.Scalars("train/loss")] == [(1, 2.5), (2, 1.5)]
    assert [event.value for event in accumulator.Scalars("train/tokens")] == [100, 90]
    (text,) = accumulator.Tensors("settings/text_summary")
    assert text.tensor_proto.string_val[0].decode().splitlines() == [
        '    run_name: "first"',
        "    learning_rate: 0.0002",
        "    add_eos_token: true",
        "    micro_batch_tokens: 4096",
        r'    template: "{document}\n{title}"',
        '    hub_token: "***"',
        '    data_path: "s3://***@bucket/rows.jsonl"',
    ]


def test_tensorboard_shows_no_step_twice_after_resuming(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    with open_trackers(["tensorboard"], None, tmp_path, {}) as trackers:
        for step in (1, 2, 3, 4):
            trackers.log(step, {"train/loss": float(step)})
    with open_trackers(["tensorboard"], None, tmp_path, {}, start_step=2) as trackers:
        trackers.log(3, {"train/loss": 30.0})
    shown = [(event.step, event.value) for event in events(tmp_path / "tensorboard").Scalars("train/loss")]
    assert shown == [(1, 1.0), (2, 2.0), (3, 30.0)]


def test_tracker_that_cannot_start_is_a_user_error(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    (tmp_path / "tensorboard").write_text("a file where the folder should be")
    with pytest.raises(
        UserError, match=r"report_to: tensorboard cannot start: .*; see that tensorboard works"
    ):
        open_trackers("tensorboard", None, tmp_path, {})


def test_without_a_tracker_nothing_is_written(tmp_path: Path) -> None:
    with open_trackers("none", None, tmp_path, {}) as trackers:
        trackers.log(1, {"train/loss": 1.0})
    assert list(tmp_path.iterdir()) == []


def test_settings_with_secret_like_names_are_shown_and_tokens_masked() -> None:
    shown = json.loads(
        json.dumps({key: tracking._shown(key, 5) for key in ("card_rows", "micro_batch_tokens")})
    )
    assert shown == {"card_rows": 5, "micro_batch_tokens": 5}
    assert tracking._shown("lr_scheduler", "linear") == "linear"
    assert tracking._shown("base_model", "hf_abcdefghij1234") == "***"


# Rewards

REWARDS = {"reward_margin": 0.25, "reward_accuracy": 0.75}


def test_rewards_are_recorded_tracked_and_printed(tmp_path: Path) -> None:
    step = replace(STEP, metrics=REWARDS)
    evaluation = replace(
        EVALUATION, perplexity=None, examples=16, metrics={**REWARDS, "reward_chosen": math.nan}
    )
    with open_metrics(tmp_path / "metrics.jsonl", None) as metrics:
        metrics.write(step)
        metrics.write(evaluation)
    step_line, evaluation_line = read_metrics(tmp_path / "metrics.jsonl")
    assert list(step_line)[-3:] == ["peak_memory_bytes", *REWARDS]
    assert list(evaluation_line)[-4:] == ["seconds", *REWARDS, "reward_chosen"]
    assert evaluation_line["reward_chosen"] is None
    assert "perplexity" not in evaluation_line
    assert tracked(step)["train/reward_margin"] == tracked(evaluation)["validation/reward_margin"] == 0.25
    assert printed(lambda progress: progress.step(step)) == (
        "step 12/90  loss 1.2345  margin 0.25  accuracy 0.75  312 tokens/s  1m18s left\n"
    )
    assert printed(lambda progress: progress.evaluation(evaluation)) == (
        "step 12/90  epoch 0.40  validation loss 1.5000  margin 0.25  accuracy 0.75  16 pairs in 3s\n"
    )
