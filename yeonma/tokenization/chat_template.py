"""The model's chat template: the prompt and answer that it renders, its end token, a time limit for its code."""

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

from yeonma.data.template import RenderedTurn
from yeonma.errors import UserError
from yeonma.tokenization.text_encoder import Span, TextEncoder

ChatMessage = dict[str, str]
"""`role` and `content`, as chat templates take them."""

RENDER_SECONDS = 10.0
"""The time limit for rendering one conversation."""

# Some chat templates write the current date, so tokens would change daily. We fix it to the date that Llama 3's
# templates fall back on. The line break after the macro is not rendered (trim_blocks).
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
_FIXED_DATE_FILTERS = "".join(f"|replace('{code}','{text}')" for code, text in {**_DATE, **_TIME}.items())
FIXED_DATE = f"{{%- macro strftime_now(format) -%}}{{{{ format{_FIXED_DATE_FILTERS} }}}}{{%- endmacro %}}\n"

_PROBE = "Zq{number}qZ"
_PROBES = re.compile(r"Zq\d+qZ")


def as_messages(turns: Sequence[RenderedTurn]) -> list[ChatMessage]:
    return [{"role": str(turn.role), "content": turn.text} for turn in turns]


@dataclass(frozen=True)
class ChatAnswer:
    """The assistant's text after a prompt as the chat template renders it, including the end token."""

    text: str
    content: Span
    """The span of the message's content in `text`."""
    ended: bool
    """Whether the text ends with a special token of the chat template."""


@dataclass(frozen=True)
class Chat:
    """A tokenizer's chat template. `trailer`: the text after an assistant's content, if known."""

    encoder: TextEncoder
    deadline: Deadline
    trailer: str | None = None

    def prompt(self, messages: Sequence[ChatMessage], place: str) -> str:
        """The text up to the next assistant turn, from which generation starts. Raises UserError with `place`."""
        return self._render(messages, place, generate=True)

    def answer(self, messages: Sequence[ChatMessage], prompt: str, place: str) -> ChatAnswer:
        """The last message, an assistant's, as a continuation of `prompt`. Raises UserError with `place`.

        If the rendered conversation does not begin with the prompt (templates that drop or open a thinking part), the
        answer is the content and the text after it.
        """
        conversation = self._render(messages, place)
        content = messages[-1]["content"]
        trailer, body = self._split(messages, conversation, content, place)
        end = self._end_of(trailer)
        if conversation.startswith(prompt):
            start, data_start = len(prompt), body.rfind(content.strip(), len(prompt))
        else:
            start = data_start = body.rfind(content.strip())
        if start < 0:  # the template rewrites the content: use the original and the template's end
            return ChatAnswer(content.strip() + trailer[:end], (0, len(content.strip())), end > 0)
        text = body[start:] + (trailer[:end] if end else "")
        text = text if end else text.rstrip()
        return ChatAnswer(text, (max(data_start - start, 0), len(body) - start), end > 0)

    def content_spans(self, messages: Sequence[ChatMessage], prompt: str, place: str) -> list[Span]:
        """The spans of the messages' contents in the text of their prompt."""
        frames = self._frames(messages, place)
        contents = [message["content"] for message in messages]
        spans = frames and _between(frames, contents, prompt)
        return spans or _in_order(contents, prompt, self.encoder)

    def end_id(self) -> int | None:
        """The token with which the chat template ends an assistant turn, or None."""
        if self.trailer is None or self.encoder.control is None:
            return None
        tokens = self.encoder.control.findall(self.trailer)
        return self.encoder.token_id(tokens[-1]) if tokens else None

    def _split(
        self, messages: Sequence[ChatMessage], conversation: str, content: str, place: str
    ) -> tuple[str, str]:
        """(trailer, text before it) of a conversation. The text ends with the content if the template keeps it."""
        trailer = self.trailer
        if trailer is None or not conversation.removesuffix(trailer).rstrip().endswith(content.strip()):
            trailer = self.probe_trailer(messages, place)
        if not conversation.endswith(trailer):
            raise UserError(
                "the model's chat template does not write the assistant's text at the end",
                place=place,
                cure="use a template without turns, or a model with another chat template",
            )
        return trailer, conversation[: len(conversation) - len(trailer)]

    def _end_of(self, trailer: str) -> int:
        """The position after the last special token in `trailer`, or 0."""
        if self.encoder.control is None:
            return 0
        return max((mark.end() for mark in self.encoder.control.finditer(trailer)), default=0)

    def probe_trailer(self, messages: Sequence[ChatMessage], place: str) -> str:
        """The text that the chat template writes after the content of the last message, an assistant's."""
        probe = _PROBE.format(number=0)
        text = self._render([*messages[:-1], {**messages[-1], "content": probe}], place)
        if probe not in text:
            raise UserError(
                "the model's chat template does not write the assistant's text",
                place=place,
                cure="use a template without turns, or a model with another chat template",
            )
        return text.rpartition(probe)[2]

    def _frames(self, messages: Sequence[ChatMessage], place: str) -> list[str] | None:
        """The prompt's text before, between and after the contents; None if the template changes contents."""
        probes = [_PROBE.format(number=number) for number in range(len(messages))]
        probing = [{**message, "content": probe} for message, probe in zip(messages, probes, strict=True)]
        text = self._render(probing, place, generate=True)
        return _PROBES.split(text) if _PROBES.findall(text) == probes else None

    def _render(self, messages: Sequence[ChatMessage], place: str, *, generate: bool = False) -> str:
        tokenizer = self.encoder.tokenizer
        if tokenizer.chat_template is None:
            raise UserError(
                "the model's tokenizer has no chat template, which templates with turns need",
                place="--base_model",
                cure="use a template without turns, or the model's instruction-tuned version",
            )
        try:
            return self.deadline.call(lambda: _apply(tokenizer, messages, generate))
        except TooSlow:  # stop the whole batch: the next row would take as long
            raise TooSlow(place) from None
        except Exception as error:  # the model's template may raise anything
            problem = f"the model's chat template refuses this row: {error}"
            cure = "change the row's turns, or use a template without turns"
            raise UserError(problem, place=place, cure=cure) from error


@contextmanager
def chat_of(encoder: TextEncoder) -> Iterator[Chat]:
    """The tokenizer's chat template, for use within the block, in this thread.

    Raises UserError, with the place of the row, if rendering it takes longer than RENDER_SECONDS.
    """
    with deadline(RENDER_SECONDS) as limit:
        try:
            yield _with_trailer(Chat(encoder, limit))
        except TooSlow as slow:
            problem = f"the model's chat template did not end within {limit.seconds:g} seconds"
            raise UserError(problem, place=str(slow), cure="use a template without turns") from None


def _with_trailer(chat: Chat) -> Chat:
    """`chat` with the trailer of a short conversation. A template that refuses it is probed row by row instead."""
    if chat.encoder.tokenizer.chat_template is None:
        return chat
    messages = [{"role": role, "content": "x"} for role in ("user", "assistant")]
    try:
        return replace(chat, trailer=chat.probe_trailer(messages, place="chat template"))
    except UserError:
        return chat


def _apply(tokenizer: PreTrainedTokenizerBase, messages: Sequence[ChatMessage], generate: bool) -> str:
    template = tokenizer.get_chat_template()
    template = FIXED_DATE + template if "strftime_now" in template else template
    return str(
        tokenizer.apply_chat_template(
            list(messages), chat_template=template, tokenize=False, add_generation_prompt=generate
        )
    )


def _between(frames: Sequence[str], contents: Sequence[str], text: str) -> list[Span] | None:
    """The spans of the contents in `text` if the frames surround them, else None."""
    spans, position = [], len(frames[0])
    if not text.startswith(frames[0]):
        return None
    for content, frame in zip(contents, frames[1:], strict=True):
        forms = [content, content.strip(), content.rstrip(), content.lstrip()]
        form = next((form for form in forms if text.startswith(form + frame, position)), None)
        if form is None:
            return None
        spans.append((position, position + len(form)))
        position += len(form) + len(frame)
    return spans if position == len(text) else None


def _in_order(contents: Sequence[str], text: str, encoder: TextEncoder) -> list[Span]:
    """The spans of lines with special-token text, by search: for templates that change contents."""
    spans, position = [], 0
    for line in [line.strip() for content in contents for line in content.split("\n")]:
        start = text.find(line, position) if line and encoder.has_special(line) else -1
        if start >= 0:
            position = start + len(line)
            spans.append((start, position))
    return spans


Result = TypeVar("Result")


class TooSlow(BaseException):
    """Raised inside a call that exceeds its deadline. Not an Exception, so that the called code does not catch it."""


class Deadline:
    """Limits calls in this thread to `seconds`; a second thread watches the time.

    It needs no signals. It cannot interrupt a long operation inside C code.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._thread = threading.get_ident()
        self._lock = threading.Lock()
        self._started_at: float | None = None

    def call(self, function: Callable[[], Result]) -> Result:
        """Call `function` and return its result. Raises TooSlow when its time is up."""
        with self._lock:
            self._started_at = monotonic()
        try:
            return function()
        finally:
            with self._lock:
                self._started_at = None

    def interrupt_if_late(self) -> None:
        """Called by the watching thread. The lock ensures that the exception does not reach a call that has ended."""
        with self._lock:
            if self._started_at is not None and monotonic() - self._started_at > self.seconds:
                self._started_at = None
                ctypes.pythonapi.PyThreadState_SetAsyncExc(
                    ctypes.c_ulong(self._thread), ctypes.py_object(TooSlow)
                )


@contextmanager
def deadline(seconds: float) -> Iterator[Deadline]:
    """A `Deadline` for calls in this thread within the block."""
    limit, done = Deadline(seconds), threading.Event()

    def watch() -> None:
        while not done.wait(seconds / 4):
            limit.interrupt_if_late()

    watcher = threading.Thread(target=watch, name="deadline", daemon=True)
    watcher.start()
    try:
        yield limit
    finally:
        done.set()
        watcher.join()
