"""What of an answer may be shown while it is still being written: nothing that the end may take back.

At the end the template's own text around the answer is taken off, white space at its end, and all from a stop text
on. So what may be part of these waits until it is clear.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from yeonma.adapter.prompt_builder import Prompt


@dataclass
class StreamBuffer:
    """One answer as it grows. `stops`: texts that end it, and are not part of it."""

    question: Prompt
    stops: Sequence[str] = ()
    shown: str = ""

    def more(self, text: str) -> str:
        """What can be shown by now and was not yet, where the model has written `text` so far."""
        return self._shown(_sure(self.question, self.stops, text))

    def rest(self, text: str) -> str:
        """What is still to be shown where `text` is all that the model has written."""
        return self._shown(self.whole(text))

    def whole(self, text: str) -> str:
        """The answer in all that the model has written."""
        at = self.stopped_at(text)
        return self.question.answer(text if at is None else text[:at])

    def stopped_at(self, text: str) -> int | None:
        """Where the first stop text begins; None where there is none."""
        start = len(text) - len(_body(self.question, text))
        found = [at for stop in self.stops if (at := text.find(stop, start)) >= 0]
        return min(found, default=None)

    def _shown(self, text: str) -> str:
        if not text.startswith(self.shown):  # a tokenizer that decodes a longer answer to another beginning
            return ""
        new, self.shown = text[len(self.shown) :], text
        return new


def _body(question: Prompt, text: str) -> str:
    """The text without the frame's beginning."""
    text = text.lstrip() if question.is_turn else text
    return text.removeprefix(question.frame[0])


def _sure(question: Prompt, stops: Sequence[str], text: str) -> str:
    """The part of an unfinished answer that every end of it has."""
    text = text.rstrip("\ufffd")  # half a character
    before, after = question.frame[0], question.frame[1].rstrip()
    begun = text.lstrip() if question.is_turn else text
    if len(begun) < len(before) and before.startswith(begun):
        return ""
    body = _body(question, text)
    ends = [len(body), *(at for at in range(len(body)) if any(stop.startswith(body[at:]) for stop in stops))]
    return min((_before_frame(body[:end], after) for end in ends), key=len)


def _before_frame(body: str, after: str) -> str:
    """The text without what may be the frame's after the answer, or the blanks before that."""
    if after and body.rstrip().endswith(after):
        return body.rstrip().removesuffix(after).rstrip()
    held = next((size for size in range(len(after) - 1, 0, -1) if body.endswith(after[:size])), 0)
    return body[: len(body) - held].rstrip()
