"""The progress of a run as one block of a notebook, updated in place: a bar, the numbers of a step, the loss curve."""

from __future__ import annotations

import math
import sys
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from uuid import uuid4

from yeonma.messages import tr
from yeonma.run_folder.loss_plot import loss_svg
from yeonma.shown import MOST_OF_A_LINE, html, one_line
from yeonma.svg import Point, image

SECONDS_BETWEEN_UPDATES = 0.5
"""A run of quick steps would otherwise send more than a browser can draw."""

MOST_LINES = 10

Publish = Callable[[dict[str, str], bool], None]
"""Shows the block, by MIME type. The second argument: whether it replaces what was shown before."""


def notebook_block(total_steps: int) -> NotebookBlock | None:
    """The block of a run in this process's notebook; None if it has none."""
    publish = _publisher()
    return None if publish is None else NotebookBlock(total_steps, publish)


def in_notebook() -> bool:
    """Whether this process is the kernel of a notebook."""
    return getattr(_shell(), "kernel", None) is not None


def _shell() -> Any:
    """IPython's shell. Imports nothing: a kernel has imported IPython."""
    ipython = sys.modules.get("IPython")
    return None if ipython is None else ipython.get_ipython()


def _publisher() -> Publish | None:
    """Sends to the notebook whose kernel this process is."""
    if not in_notebook():
        return None
    shell = _shell()
    transient = {"display_id": uuid4().hex}

    def publish(data: dict[str, str], update: bool) -> None:
        shell.display_pub.publish(data, {}, transient=transient, update=update)

    return publish


@dataclass
class NotebookBlock:
    """What is shown, and the points of the curve. A resumed run's curve begins where it was resumed."""

    total_steps: int
    publish: Publish
    training: list[Point] = field(default_factory=list)
    validation: list[Point] = field(default_factory=list)
    line: str = ""
    """The numbers of the last step."""
    said: deque[str] = field(default_factory=lambda: deque(maxlen=MOST_LINES))
    """Lines about evaluations and the like."""
    step_number: int = 0
    is_shown: bool = False
    has_news: bool = False
    updated: float = -math.inf
    """When, by time.monotonic()."""

    def step(self, number: int, loss: float, line: str) -> None:
        """A finished step. It is shown now, or with one of the next."""
        self.step_number, self.line = number, line
        _add(self.training, number, loss)
        self.has_news = True
        if time.monotonic() - self.updated >= SECONDS_BETWEEN_UPDATES or number == self.total_steps:
            self._update()

    def evaluation(self, number: int, loss: float) -> None:
        """An evaluation after step `number`. The lines about it follow."""
        _add(self.validation, number, loss)

    def say(self, line: str) -> None:
        """A line that is shown now. Of many, the last ones stay."""
        self.said.append(line)
        self._update()

    def close(self) -> None:
        """Shows what has not been shown yet."""
        if self.has_news:
            self._update()

    def _update(self) -> None:
        self.publish({"text/plain": self._text(), "text/html": self._html()}, self.is_shown)
        self.is_shown, self.has_news, self.updated = True, False, time.monotonic()

    def _lines(self) -> list[str]:
        return [line for line in (self.line, *self.said) if line]

    def _text(self) -> str:
        return "\n".join(one_line(line, MOST_OF_A_LINE) for line in self._lines())

    def _html(self) -> str:
        lines = "<br>".join(html(line) for line in self._lines())
        bar = f'<progress value="{self.step_number}" max="{self.total_steps}" style="width:100%"></progress>'
        curve = ""
        if self.training or self.validation:
            plot = loss_svg(self.training, self.validation, "")
            curve = f"<br>{image(plot, tr('loss over the steps'))}"
        return f'<div style="max-width:720px">{bar}<code style="white-space:pre-wrap">{lines}</code>{curve}</div>'


def _add(points: list[Point], step: int, loss: float) -> None:
    if math.isfinite(loss):
        points.append((step, loss))
