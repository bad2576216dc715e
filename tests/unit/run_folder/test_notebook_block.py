"""The block of a notebook: shown once and then replaced, not at every step; whatever is said last stays."""

from __future__ import annotations

import math
from base64 import b64decode
from io import StringIO
from xml.etree import ElementTree

import pytest
from rich.console import Console

from yeonma.run_folder import notebook_block, progress
from yeonma.run_folder.notebook_block import MOST_LINES, NotebookBlock


class Shown:
    """What a notebook would have been sent: by MIME type, and whether it replaced what stood there."""

    def __init__(self) -> None:
        self.sent: list[tuple[dict[str, str], bool]] = []

    def publish(self, data: dict[str, str], update: bool) -> None:
        self.sent.append((data, update))


def block(total_steps: int = 100) -> tuple[NotebookBlock, Shown]:
    shown = Shown()
    return NotebookBlock(total_steps, shown.publish), shown


def curve(html: str) -> ElementTree.Element:
    data = html.partition("data:image/svg+xml;base64,")[2].partition('"')[0]
    return ElementTree.fromstring(b64decode(data))


def test_steps_within_half_a_second_are_shown_together(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(notebook_block.time, "monotonic", lambda: now[0])
    shown_block, shown = block()
    for step in range(1, 100):
        now[0] = step * 0.1
        shown_block.step(step, 3.0 - step / 100, f"step {step}")
    assert [data["text/plain"] for data, _ in shown.sent][:3] == ["step 1", "step 6", "step 11"]
    assert [update for _, update in shown.sent] == [False, *[True] * (len(shown.sent) - 1)]
    shown_block.close()
    assert shown.sent[-1][0]["text/plain"] == "step 99"
    count = len(shown.sent)
    shown_block.close()
    assert len(shown.sent) == count


def test_the_last_step_is_shown_at_once() -> None:
    shown_block, shown = block(total_steps=2)
    shown_block.step(1, 1.0, "step 1")
    shown_block.step(2, 1.0, "step 2")
    assert [data["text/plain"] for data, _ in shown.sent] == ["step 1", "step 2"]
    assert '<progress value="2" max="2"' in shown.sent[-1][0]["text/html"]


def test_lines_are_escaped_and_the_last_ones_stay() -> None:
    shown_block, shown = block()
    for number in range(MOST_LINES + 3):
        shown_block.say(f"<b>{number}\x1b[2J")
    page, text = shown.sent[-1][0]["text/html"], shown.sent[-1][0]["text/plain"]
    assert "<b>" not in page and "&lt;b&gt;3\\x1b[2J" in page and "\x1b" not in text
    assert text.splitlines()[0].startswith("<b>3") and len(text.splitlines()) == MOST_LINES


def test_the_curve_has_steps_and_evaluations_and_no_infinite_loss() -> None:
    shown_block, shown = block(total_steps=30)
    shown_block.say("begin")
    assert "data:image" not in shown.sent[-1][0]["text/html"]
    for step in range(1, 31):
        shown_block.step(step, math.nan if step == 7 else 2.0, f"step {step}")
    shown_block.evaluation(30, 1.5)
    shown_block.say("validation loss 1.5")
    drawing = curve(shown.sent[-1][0]["text/html"])
    texts = ["".join(element.itertext()) for element in drawing.iter() if element.tag.endswith("text")]
    assert "loss" in texts and any("validation" in text for text in texts)
    assert len(shown_block.training) == 29


def test_without_a_kernel_there_is_no_block() -> None:
    assert notebook_block.notebook_block(3) is None
    out = StringIO()
    with progress.Progress(3, 0, 1, Console(file=out)) as shown:
        shown.print_line("as before")
    assert out.getvalue() == "as before\n"
