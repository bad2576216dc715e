"""What a chat template writes around an answer, found by letting it write one."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace

from yeonma.errors import UserError
from yeonma.messages import tr
from yeonma.tokenization.chat_template import PROBE, Chat, ChatAnswer
from yeonma.tokenization.conversation import ChatMessage, Conversation
from yeonma.tokenization.reasoning import AnswerShape

_CONTENT, _REASONING = PROBE.format(number=1), PROBE.format(number=2)
_PLACE = tr("chat template")


def shape_of(chat: Chat) -> AnswerShape:
    """What training makes a model write around reasoning and content."""
    shape, after = AnswerShape(chat.tags, marks=tuple(sorted(chat.habits.marks))), ""
    with suppress(UserError):
        answer = _answer(chat, {"role": "assistant", "content": _CONTENT})
        start, end = answer.content
        shape, after = replace(shape, lead=answer.text[:start]), answer.text[end:]
    shape = _with_parts_of_reasoning(chat, shape)
    return replace(shape, trail=_generated(chat, after, shape.texts))


def _with_parts_of_reasoning(chat: Chat, shape: AnswerShape) -> AnswerShape:
    """The shape with what the chat template writes before reasoning and between it and the content."""
    if (message := _with_reasoning(chat)) is None:
        return shape
    with suppress(UserError):
        answer = _answer(chat, message)
        start, end = answer.reasoning
        if start < end:
            shape = replace(shape, between=answer.text[end : answer.content[0]])
            shape = shape if chat.tags is not None else replace(shape, reasoning_lead=answer.text[:start])
    return shape


def frame_of(chat: Chat, before: str, after: str) -> tuple[str, str]:
    """The text around the answer's fields as the chat template writes it: `before` and `after` are the template's own
    text in the turn. The lead of `shape_of` is left out, and the text after the fields includes its trail."""
    content = before + _CONTENT + after
    try:
        text = _answer(chat, {"role": "assistant", "content": content}).text
    except UserError:
        return before, after
    start, _, end = text.partition(_CONTENT)
    shape = shape_of(chat)
    return start.removeprefix(shape.lead), _generated(chat, end, shape.texts)


def _with_reasoning(chat: Chat) -> ChatMessage | None:
    """A message with reasoning, as its own key or as a block; None if the chat template has no place for it."""
    if (key := chat.habits.reasoning_key) is not None:
        return {"role": "assistant", "content": _CONTENT, key: _REASONING}
    if (tags := chat.tags) is None:
        return None
    block = tags.open + tags.after_open + _REASONING + tags.closing
    return {"role": "assistant", "content": block + _CONTENT}


def _answer(chat: Chat, message: ChatMessage) -> ChatAnswer:
    conversation = Conversation([{"role": "user", "content": "x"}, message], kwargs=chat.kwargs)
    prompt = chat.prompt(conversation.before_last, _PLACE)
    return chat.answer(conversation, prompt, _PLACE)


def _generated(chat: Chat, after: str, shown: Sequence[str]) -> str:
    """What of the text after a content is in a generated text, up to the token that ends it. Of special tokens it has
    those that stand in the texts `shown`."""
    if chat.encoder.control is None:
        return after
    ends, text, position = {chat.end_id(), chat.encoder.eos_id}, "", 0
    for mark in chat.encoder.control.finditer(after):
        text += after[position : mark.start()]
        position = mark.end()
        token_id = chat.encoder.token_id(mark[0])
        if token_id in ends:
            return text
        if token_id not in chat.encoder.special_text or any(mark[0] in text for text in shown):
            text += mark[0]
    return text + after[position:]
