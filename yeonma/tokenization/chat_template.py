"""A bound on the time of code that is not ours and may never end, such as a model's chat template."""

from __future__ import annotations

import ctypes
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from time import monotonic
from typing import TypeVar

from transformers import PreTrainedTokenizerBase

from yeonma.errors import UserError
from yeonma.tokenization.text_encoder import Span, TextEncoder

Result = TypeVar("Result")


class TooSlow(BaseException):
    """Raised inside a call that took too long. Not an Exception, so that the code in the call does not catch it."""


class Deadline:
    """Runs calls in this thread, each for at most `seconds`; a second thread watches.

    Works wherever Python code runs, signals or not. A single long operation inside C code is not interrupted.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._thread = threading.get_ident()
        self._lock = threading.Lock()
        self._began: float | None = None

    def call(self, function: Callable[[], Result]) -> Result:
        """What `function` returns. Raises TooSlow when its time is over."""
        with self._lock:
            self._began = monotonic()
        try:
            return function()
        finally:
            with self._lock:
                self._began = None

    def interrupt_if_late(self) -> None:
        """Called by the watching thread. The lock keeps the exception from a call that has ended."""
        with self._lock:
            if self._began is not None and monotonic() - self._began > self.seconds:
                self._began = None
                ctypes.pythonapi.PyThreadState_SetAsyncExc(
                    ctypes.c_ulong(self._thread), ctypes.py_object(TooSlow)
                )


@contextmanager
def deadline(seconds: float) -> Iterator[Deadline]:
    """A `Deadline` for calls made in this thread within the block."""
    bound, over = Deadline(seconds), threading.Event()

    def watch() -> None:
        while not over.wait(seconds / 4):
            bound.interrupt_if_late()

    watcher = threading.Thread(target=watch, name="deadline", daemon=True)
    watcher.start()
    try:
        yield bound
    finally:
        over.set()
        watcher.join()


Message = dict[str, str]
"""`role` and `content`, as chat templates take them."""

RENDER_SECONDS = 10.0
"""The most time that one use of a chat template may take."""

# Some chat templates write the current date, which would change the tokens from day to day. Ours stays on the day that
# Llama 3's templates fall back on. The line break after the macro is not written (trim_blocks).
_DATE = {
    "%Y": "2024",
    "%y": "24",
    "%m": "07",
    "%d": "26",
    "%B": "July",
    "%b": "Jul",
    "%A": "Friday",
    "%a": "Fri",
}
_TIME = {"%H": "12", "%I": "12", "%M": "00", "%S": "00", "%p": "PM"}
_FIXED_DAY = "".join(f"|replace('{code}','{text}')" for code, text in {**_DATE, **_TIME}.items())
FIXED_DATE = f"{{%- macro strftime_now(format) -%}}{{{{ format{_FIXED_DAY} }}}}{{%- endmacro %}}\n"

_PROBE = "Zq{number}qZ"
_PROBES = re.compile(r"Zq\d+qZ")


@dataclass(frozen=True)
class ChatAnswer:
    """What follows a prompt: an assistant's text as the chat template writes it, through the end token."""

    text: str
    content: Span
    """Where in `text` the data stands."""
    ended: bool
    """Whether the chat template ends it with a special token of its own."""


@dataclass(frozen=True)
class Chat:
    """A tokenizer's chat template. `trailer` is what it writes after an assistant's text, where that is known."""

    encoder: TextEncoder
    bound: Deadline
    trailer: str | None = None

    def prompt(self, messages: Sequence[Message], place: str) -> str:
        """The text that asks for the next assistant turn: what generation feeds. Raises UserError with `place`."""
        return self._render(messages, place, ask=True)

    def answer(self, messages: Sequence[Message], prompt: str, place: str) -> ChatAnswer:
        """The last message, an assistant's, as what follows `prompt`. Raises UserError with `place`.

        Where the rendered conversation does not go on from the prompt (templates that drop or open a thinking part),
        it is the content and what stands behind it.
        """
        whole = self._render(messages, place)
        content = messages[-1]["content"]
        trailer, body = self._split(messages, whole, content, place)
        end = self._end_of(trailer)
        if whole.startswith(prompt):
            start, at = len(prompt), body.rfind(content.strip(), len(prompt))
        else:
            start = at = body.rfind(content.strip())
        if start < 0:  # the template rewrote the content: what was given, as the template ends it
            return ChatAnswer(content.strip() + trailer[:end], (0, len(content.strip())), end > 0)
        text = body[start:] + (trailer[:end] if end else "")
        text = text if end else text.rstrip()
        return ChatAnswer(text, (max(at - start, 0), len(body) - start), end > 0)

    def data_of(self, messages: Sequence[Message], prompt: str, place: str) -> list[Span]:
        """Where the messages' contents stand in their prompt text."""
        frames = self._frames(messages, place)
        found = frames and _between(frames, [message["content"] for message in messages], prompt)
        return found or _in_order([message["content"] for message in messages], prompt, self.encoder)

    def end_id(self) -> int | None:
        """The token that the chat template ends an assistant turn with, or None."""
        if self.trailer is None or self.encoder.control is None:
            return None
        found = self.encoder.control.findall(self.trailer)
        return self.encoder.token_id(found[-1]) if found else None

    def _split(self, messages: Sequence[Message], whole: str, content: str, place: str) -> tuple[str, str]:
        """The trailer and the text before it, which ends with the content wherever the template keeps it."""
        trailer = self.trailer
        if trailer is None or not whole.removesuffix(trailer).rstrip().endswith(content.strip()):
            trailer = self.probe_trailer(messages, place)
        if not whole.endswith(trailer):
            raise UserError(
                "the model's chat template does not write the assistant's text at the end",
                place=place,
                cure="use a template without turns, or a model with another chat template",
            )
        return trailer, whole[: len(whole) - len(trailer)]

    def _end_of(self, trailer: str) -> int:
        """The end of the last special token in `trailer`, or 0."""
        if self.encoder.control is None:
            return 0
        return max((mark.end() for mark in self.encoder.control.finditer(trailer)), default=0)

    def probe_trailer(self, messages: Sequence[Message], place: str) -> str:
        """What the chat template writes after the text of the last message, an assistant's."""
        probe = _PROBE.format(number=0)
        text = self._render([*messages[:-1], {**messages[-1], "content": probe}], place)
        if probe not in text:
            raise UserError(
                "the model's chat template does not write the assistant's text",
                place=place,
                cure="use a template without turns, or a model with another chat template",
            )
        return text.rpartition(probe)[2]

    def _frames(self, messages: Sequence[Message], place: str) -> list[str] | None:
        """The prompt's text before, between and behind the contents; None where the template does not keep them."""
        probes = [_PROBE.format(number=number) for number in range(len(messages))]
        asked = [{**message, "content": probe} for message, probe in zip(messages, probes, strict=True)]
        text = self._render(asked, place, ask=True)
        return _PROBES.split(text) if _PROBES.findall(text) == probes else None

    def _render(self, messages: Sequence[Message], place: str, *, ask: bool = False) -> str:
        tokenizer = self.encoder.tokenizer
        if tokenizer.chat_template is None:
            raise UserError(
                "the model's tokenizer has no chat template, which turns need",
                place="--base_model",
                cure="use a template without turns, or the model's instruction-tuned version",
            )
        try:
            return self.bound.call(lambda: _apply(tokenizer, messages, ask))
        except TooSlow:  # ends the whole batch: the next row would take as long
            raise TooSlow(place) from None
        except Exception as error:  # whatever the model's template raises; it is not our code
            what = f"the model's chat template refuses this row: {error}"
            raise UserError(
                what, place=place, cure="change the row's turns, or use a template without turns"
            ) from error


@contextmanager
def chat_of(encoder: TextEncoder) -> Iterator[Chat]:
    """The tokenizer's chat template, for use within the block and this thread.

    Raises UserError, with the place of the row, when one use of the template takes over RENDER_SECONDS.
    """
    with deadline(RENDER_SECONDS) as bound:
        try:
            yield _with_trailer(Chat(encoder, bound))
        except TooSlow as slow:
            what = f"the model's chat template did not end within {bound.seconds:g} seconds"
            raise UserError(what, place=str(slow), cure="use a template without turns") from None


def _with_trailer(chat: Chat) -> Chat:
    """Learns the trailer from a conversation of one question; templates that refuse it are asked row by row."""
    if chat.encoder.tokenizer.chat_template is None:
        return chat
    messages = [{"role": role, "content": "x"} for role in ("user", "assistant")]
    try:
        return replace(chat, trailer=chat.probe_trailer(messages, place="chat template"))
    except UserError:
        return chat


def _apply(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], ask: bool) -> str:
    template = tokenizer.get_chat_template()
    template = FIXED_DATE + template if "strftime_now" in template else template
    return str(
        tokenizer.apply_chat_template(
            list(messages), chat_template=template, tokenize=False, add_generation_prompt=ask
        )
    )


def _between(frames: Sequence[str], contents: Sequence[str], text: str) -> list[Span] | None:
    """Where the contents stand in `text` when the frames stand around them; None where they do not."""
    spans, at = [], len(frames[0])
    if not text.startswith(frames[0]):
        return None
    for content, frame in zip(contents, frames[1:], strict=True):
        forms = [content, content.strip(), content.rstrip(), content.lstrip()]
        form = next((form for form in forms if text.startswith(form + frame, at)), None)
        if form is None:
            return None
        spans.append((at, at + len(form)))
        at += len(form) + len(frame)
    return spans if at == len(text) else None


def _in_order(contents: Sequence[str], text: str, encoder: TextEncoder) -> list[Span]:
    """The same by searching, for templates that change contents: each line with special-token text in it."""
    spans, at = [], 0
    for line in [line.strip() for content in contents for line in content.split("\n")]:
        found = text.find(line, at) if line and encoder.has_special(line) else -1
        if found >= 0:
            spans.append((found, found + len(line)))
            at = found + len(line)
    return spans
