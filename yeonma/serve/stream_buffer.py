"""Decides which part of a growing answer can be streamed already: the part that no continuation can take back.

When an answer ends, the template's own text around it, trailing white space and everything from a stop text on are
removed. Text that may turn out to be one of these is held back until it is clear.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from yeonma.adapter.prompt_builder import Prompt


@dataclass
class StreamBuffer:
    """One answer as it grows. `stops`: texts that end the answer and are not part of it."""

    prompt: Prompt
    stops: Sequence[str] = ()
    sent: str = ""

    def new_text(self, text: str) -> str:
        """What can be sent now and was not yet, after the model has generated `text`."""
        return self._unsent(_settled(self.prompt, self.stops, text))

    def rest(self, text: str) -> str:
        """What is left to send, now that `text` is all that the model has generated."""
        return self._unsent(self.answer(text))

    def answer(self, text: str) -> str:
        """The answer in all that the model has generated."""
        at = self.stop_position(text)
        return self.prompt.answer(text if at is None else text[:at])

    def stop_position(self, text: str) -> int | None:
        """Where the first stop text begins, or None."""
        start = len(text) - len(_body(self.prompt, text))
        positions = [at for stop in self.stops if (at := text.find(stop, start)) >= 0]
        return min(positions, default=None)

    def _unsent(self, text: str) -> str:
        if not text.startswith(self.sent):  # the tokenizer decodes the longer answer to another beginning
            return ""
        new, self.sent = text[len(self.sent) :], text
        return new


def _body(prompt: Prompt, text: str) -> str:
    """The text without the frame before the answer."""
    text = text.lstrip() if prompt.is_turn else text
    return text.removeprefix(prompt.frame[0])


def _settled(prompt: Prompt, stops: Sequence[str], text: str) -> str:
    """The beginning of an unfinished answer that is the same however it goes on."""
    text = text.rstrip("\ufffd")  # the first bytes of a character
    before, after = prompt.frame[0], prompt.frame[1].rstrip()
    start = text.lstrip() if prompt.is_turn else text
    if len(start) < len(before) and before.startswith(start):
        return ""
    body = _body(prompt, text)
    ends = [len(body), *(at for at in range(len(body)) if any(stop.startswith(body[at:]) for stop in stops))]
    return min((_without_frame_after(body[:end], after) for end in ends), key=len)


def _without_frame_after(body: str, after: str) -> str:
    """The text without a possible beginning of `after`, the frame after the answer, and the white space before it."""
    if after and body.rstrip().endswith(after):
        return body.rstrip().removesuffix(after).rstrip()
    overlap = next((size for size in range(len(after) - 1, 0, -1) if body.endswith(after[:size])), 0)
    return body[: len(body) - overlap].rstrip()
