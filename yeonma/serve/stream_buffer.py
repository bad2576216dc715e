"""Decides which part of a growing answer can be streamed already: the part that no continuation can change.

When an answer ends, the template's text around it and everything from a stop text on are removed. Text that may turn
out to be one of these is held back until it is certain. Blanks and line ends are text like any other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from yeonma.adapter.prompt_builder import Prompt


@dataclass
class StreamBuffer:
    """A growing answer. `stops`: texts that end the answer and are not part of it."""

    prompt: Prompt
    stops: Sequence[str] = ()
    sent: str = ""
    reasoning_sent: str = ""

    def new_text(self, text: str) -> str:
        """The new text to send, after the model has generated `text` so far."""
        content = self.prompt.parts(text, growing=True).content
        return self._unsent(_stable_text(self.prompt, self.stops, content))

    def new_reasoning(self, text: str, *, growing: bool = True) -> str:
        """The new text of the reasoning to send. `growing`: more text may follow."""
        reasoning = self.prompt.parts(text, growing=growing).reasoning or ""
        if reasoning.isspace() or not reasoning.startswith(self.reasoning_sent):
            return ""
        new, self.reasoning_sent = reasoning[len(self.reasoning_sent) :], reasoning
        return new

    def remaining_text(self, text: str) -> str:
        """The text that remains to be sent, when `text` is all that the model has generated."""
        return self._unsent(self.answer(text))

    def answer(self, text: str) -> str:
        """The answer, when `text` is all that the model has generated."""
        content = self.prompt.parts(text).content
        position = self._stop_position(content)
        return self.prompt.unframed(content if position is None else content[:position])

    def is_stopped(self, text: str, *, growing: bool = True) -> bool:
        """Whether a stop text ends the answer. `growing`: more text may follow, so that a stop text within what may
        become the template's text before the answer does not end it yet. Reasoning has no stop texts."""
        content = self.prompt.parts(text, growing=growing).content
        if growing and _may_be_frame(self.prompt, content):
            return False
        return self._stop_position(content) is not None

    def _stop_position(self, text: str) -> int | None:
        """The start of the stop text in the content that ends first, or None. So the answer is the same whether it
        grows by characters or by tokens."""
        start = len(text) - len(_without_frame_before(self.prompt, text))
        ends = [(at + len(stop), at) for stop in self.stops if (at := text.find(stop, start)) >= 0]
        return min(ends)[1] if ends else None

    def _unsent(self, text: str) -> str:
        if not text.startswith(self.sent):  # the tokenizer decodes the longer answer differently
            return ""
        new, self.sent = text[len(self.sent) :], text
        return new


def _without_frame_before(prompt: Prompt, text: str) -> str:
    """The text without the template's text before the answer."""
    return text.removeprefix(prompt.frame[0])


def _may_be_frame(prompt: Prompt, text: str) -> bool:
    """Whether the text may still become the template's text before the answer."""
    return len(text) < len(prompt.frame[0]) and prompt.frame[0].startswith(text)


def _stable_text(prompt: Prompt, stops: Sequence[str], text: str) -> str:
    """The part of an unfinished answer that no continuation can change."""
    if _may_be_frame(prompt, text):
        return ""
    body = _without_frame_before(prompt, text)
    possible_stops = (i for i in range(len(body)) if any(stop.startswith(body[i:]) for stop in stops))
    ends = [len(body), *possible_stops]
    return min((_without_frame_after(body[:end], prompt.frame[1]) for end in ends), key=len)


def _without_frame_after(body: str, after: str) -> str:
    """The text without a possible beginning of `after` (the template's text after the answer) at its end."""
    size = next((size for size in range(len(after), 0, -1) if body.endswith(after[:size])), 0)
    return body[: len(body) - size]
