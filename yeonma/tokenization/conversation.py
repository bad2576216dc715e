"""Conversations as chat templates take them, and the text that a tokenizer's chat template writes of one."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from yeonma.bounded.template_text import request_for, text_of
from yeonma.data.template import RenderedTurn
from yeonma.data.turns import REASONING_KEYS, ToolCall

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ChatMessage = dict[str, Any]
"""A message as chat templates take it: `role` and `content`, and perhaps reasoning, `tool_calls` and other keys."""

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


def as_messages(turns: Sequence[RenderedTurn], reasoning_key: str = REASONING_KEYS[0]) -> list[ChatMessage]:
    """The turns as chat templates take them. Reasoning goes under `reasoning_key`."""
    messages: list[ChatMessage] = []
    for turn in turns:
        message: ChatMessage = {"role": str(turn.role), "content": turn.text}
        if (source := turn.turn) is not None:
            message |= source.other_keys
            if not source.has_content:
                message["content"] = None
            if source.reasoning is not None:
                message[reasoning_key] = source.reasoning
            if source.tool_calls:
                message["tool_calls"] = [call_message(call) for call in source.tool_calls]
        messages.append(message)
    return messages


def call_message(call: ToolCall) -> dict[str, Any]:
    function = {"name": call.name, "arguments": json.loads(call.arguments)}
    return {"type": "function", "function": function, **({} if call.id is None else {"id": call.id})}


@dataclass(frozen=True)
class Conversation:
    """What a chat template renders: messages, tools and its other arguments."""

    messages: Sequence[ChatMessage]
    tools: Sequence[dict[str, Any]] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)

    @property
    def before_last(self) -> Conversation:
        return replace(self, messages=self.messages[:-1])

    def with_last(self, message: ChatMessage) -> Conversation:
        return replace(self, messages=[*self.messages[:-1], message])


def text_by_tokenizer(tokenizer: PreTrainedTokenizerBase, conversation: Conversation, generate: bool) -> str:
    """The conversation as the tokenizer's own chat template writes it. Raises OverBounds, Refused and ValueError."""
    return text_of(request_of(tokenizer, conversation, generate))


def request_of(tokenizer: PreTrainedTokenizerBase, conversation: Conversation, generate: bool) -> bytes:
    """A request for this text. Raises Refused and ValueError."""
    tools = list(conversation.tools) or None
    template = tokenizer.get_chat_template(tools=tools)
    if isinstance(template, str) and "strftime_now" in template:
        template = FIXED_DATE + template
    return request_for(
        template,
        conversation.messages,
        tools=tools,
        add_generation_prompt=generate,
        variables={**tokenizer.special_tokens_map, **conversation.kwargs},
    )
