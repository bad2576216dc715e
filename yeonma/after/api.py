"""OpenAI's requests and responses for text, as far as an adapter can answer them. Pure: no server here.

What a request asks for and cannot have is refused by name; nothing is passed over that would change the answer.
https://platform.openai.com/docs/api-reference/chat and .../completions have the forms.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from yeonma.configure import group_of, settings_from_keywords
from yeonma.errors import UserError
from yeonma.settings import AnswerSettings
from yeonma.text.rows import Row
from yeonma.text.template import Template

READ = ("temperature", "top_p", "top_k", "repetition_penalty", "seed")
"""Settings of an answer that a request may bring; the last but two are not OpenAI's, clients send them as extras."""
WITHOUT_EFFECT = (
    "user",
    "metadata",
    "store",
    "service_tier",
    "safety_identifier",
    "prompt_cache_key",
    "prompt_cache_retention",
    "parallel_tool_calls",
    "verbosity",
)
"""Fields that change no answer here."""
AS_DEFAULT: Mapping[str, tuple[object, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "logit_bias": ({},),
    "response_format": ({"type": "text"},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "stop": ([],),
}
"""Fields that are accepted with these values alone (or null), which ask for what is done anyway."""


class Refused(Exception):
    """A request that gets no answer: an HTTP status, and OpenAI's form of an error."""

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.param, self.code = status, param, code

    @property
    def body(self) -> dict[str, Any]:
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


@dataclass(frozen=True)
class Asking:
    """A request, checked: which model, what it is asked, and how it is to answer."""

    chat: bool
    model: str
    prompt: Any  # a list of messages, or texts to continue
    how: AnswerSettings
    stream: bool
    stream_usage: bool


def read_request(content: bytes, *, chat: bool, most_new_tokens: int) -> Asking:
    """The body of a chat completion's request, or of a completion's. Raises Refused."""
    try:
        body = json.loads(content)
    except (ValueError, RecursionError):
        raise Refused(400, "the body is not JSON") from None
    if not isinstance(body, dict):
        raise Refused(400, "the body is not a JSON object")
    body = {name: value for name, value in body.items() if value is not None}
    prompt_name = "messages" if chat else "prompt"
    for name in ("model", prompt_name):
        if name not in body:
            raise Refused(400, f"{name} is missing", param=name)
    if not isinstance(body["model"], str):
        raise Refused(400, "model is not a text", param="model")
    limits = ("max_tokens", "max_completion_tokens") if chat else ("max_tokens",)
    own = {"model", prompt_name, "stream", "stream_options", *limits, *READ, *WITHOUT_EFFECT}
    for name, value in body.items():
        if name in own:
            continue
        if name not in AS_DEFAULT:
            raise Refused(400, f"there is no {name} here", param=name, code="unsupported_parameter")
        if not any(value == each and isinstance(value, bool) == isinstance(each, bool) for each in AS_DEFAULT[name]):
            raise Refused(400, f"{name} cannot be had here: leave it out", param=name, code="unsupported_parameter")
    options = body.get("stream_options", {})
    if not isinstance(options, dict):
        raise Refused(400, "stream_options is not an object", param="stream_options")
    flags = {"stream": body.get("stream", False), "include_usage": options.get("include_usage", False)}
    for name, value in flags.items():
        if not isinstance(value, bool):
            raise Refused(400, f"{name} is not true or false", param=name)
    return Asking(
        chat,
        body["model"],
        body[prompt_name] if chat else _texts(body["prompt"]),
        _how(body, limits, most_new_tokens),
        flags["stream"],
        flags["include_usage"],
    )


def _texts(prompt: Any) -> list[str]:
    texts = [prompt] if isinstance(prompt, str) else prompt
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
        raise Refused(400, "prompt is not a text, nor a list of texts", param="prompt")
    return texts


def _how(body: Mapping[str, Any], limits: Sequence[str], most_new_tokens: int) -> AnswerSettings:
    given = {name: body[name] for name in READ if name in body}
    wanted = most_new_tokens
    for name in limits:
        if name not in body:
            continue
        wanted = body[name]
        if not isinstance(wanted, int) or isinstance(wanted, bool) or wanted < 1:
            raise Refused(400, f"{name} is not a number from 1 on", param=name)
        if wanted > most_new_tokens:
            what = f"{name} is {wanted}, and this server gives at most {most_new_tokens}"
            raise Refused(400, what, param=name, code="max_tokens_too_large")
    try:
        reading = settings_from_keywords((AnswerSettings,), {**given, "max_new_tokens": wanted})
    except UserError as error:
        raise Refused(400, str(error), param=error.problems[0].place or None) from None
    return group_of(reading.settings, AnswerSettings)


def row_of_messages(template: Template, messages: Any) -> Row:
    """The row that a conversation stands for: what is asked with it is what a row of the data set would be asked with.

    A template of turn lists takes the messages as they are. Any other has its own frame, so that there is one message,
    the user's: its text is the template's field; where a row may need several fields, it is a JSON object with a text
    for each. Raises Refused for a conversation that the template has no place for.
    """
    if not isinstance(messages, list) or not messages or not all(isinstance(each, dict) for each in messages):
        raise Refused(400, "messages is not a list of messages", param="messages")
    turns = [{"role": each.get("role"), "content": _content(each.get("content"), at)} for at, each in enumerate(messages)]
    if template.is_chat:
        if turns[-1]["role"] == "assistant":
            raise Refused(400, "the last message is the assistant's: there is nothing to answer", param="messages")
        return Row(1, {template.answer_field: turns}, "messages")
    if len(turns) != 1 or turns[0]["role"] != "user":
        what = "this model was trained with a frame of its own and answers one message, of the role user"
        raise Refused(400, what, param="messages")
    content = turns[0]["content"]
    fields = sorted({name for variant in template.variants for name in variant.prompt_fields})
    if len(fields) == 1:
        return Row(1, {fields[0]: content}, "messages")
    what = f"the message must be a JSON object with the texts of {', '.join(fields)}"
    try:
        values = json.loads(content)
    except (ValueError, RecursionError):
        raise Refused(400, what, param="messages") from None
    if not isinstance(values, dict) or not all(isinstance(value, str) for value in values.values()):
        raise Refused(400, what, param="messages")
    unknown = sorted(values.keys() - set(fields))
    if unknown:
        raise Refused(400, f"there is no field {unknown[0]}; {what}", param="messages")
    return Row(1, values, "messages")


def _content(content: Any, at: int) -> str:
    """A message's text, which may come in parts."""
    if isinstance(content, str):
        return content
    place = f"messages[{at}].content"
    if not isinstance(content, list) or not all(isinstance(part, dict) for part in content):
        raise Refused(400, f"{place} is not a text", param="messages")
    for part in content:
        if part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise Refused(400, f"{place} holds something other than text", param="messages")
    return "".join(part["text"] for part in content)


@dataclass(frozen=True)
class Reply:
    """An answer's text, and why it ended where it did."""

    text: str
    tokens: int
    ended: bool

    @property
    def finish_reason(self) -> str:
        return "stop" if self.ended else "length"


@dataclass(frozen=True)
class Form:
    """The responses to one request; they share an id and a time."""

    asking: Asking
    id: str
    created: int

    @staticmethod
    def of(asking: Asking) -> Form:
        prefix = "chatcmpl" if asking.chat else "cmpl"
        return Form(asking, f"{prefix}-{uuid.uuid4().hex}", int(time.time()))

    def whole(self, replies: Sequence[Reply], prompt_tokens: int) -> dict[str, Any]:
        choices = []
        for at, reply in enumerate(replies):
            said = {"message": {"role": "assistant", "content": reply.text}} if self.asking.chat else {"text": reply.text}
            choices.append({"index": at, **said, "logprobs": None, "finish_reason": reply.finish_reason})
        usage = usage_of(prompt_tokens, sum(reply.tokens for reply in replies))
        return {**self._head(""), "choices": choices, "usage": usage}

    def first(self) -> list[dict[str, Any]]:
        """What a stream begins with."""
        return [self._chunk({"delta": {"role": "assistant", "content": ""}})] if self.asking.chat else []

    def part(self, text: str, at: int = 0) -> dict[str, Any]:
        return self._chunk({"delta": {"content": text}} if self.asking.chat else {"text": text}, at)

    def last(self, reply: Reply, at: int = 0) -> dict[str, Any]:
        return self._chunk({"delta": {}} if self.asking.chat else {"text": ""}, at, reply.finish_reason)

    def usage(self, prompt_tokens: int, tokens: int) -> list[dict[str, Any]]:
        """What a stream ends with, where that was asked for."""
        if not self.asking.stream_usage:
            return []
        return [{**self._head(".chunk"), "choices": [], "usage": usage_of(prompt_tokens, tokens)}]

    def _chunk(self, said: dict[str, Any], at: int = 0, finish_reason: str | None = None) -> dict[str, Any]:
        choice = {"index": at, **said, "logprobs": None, "finish_reason": finish_reason}
        return {**self._head(".chunk"), "choices": [choice]}

    def _head(self, chunk: str) -> dict[str, Any]:
        kind = f"chat.completion{chunk}" if self.asking.chat else "text_completion"
        return {"id": self.id, "object": kind, "created": self.created, "model": self.asking.model}


def usage_of(prompt_tokens: int, tokens: int) -> dict[str, int]:
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": tokens,
        "total_tokens": prompt_tokens + tokens,
    }


def model_list(names: Sequence[str], created: int) -> dict[str, Any]:
    models = [{"id": name, "object": "model", "created": created, "owned_by": "yeonma"} for name in names]
    return {"object": "list", "data": models}
