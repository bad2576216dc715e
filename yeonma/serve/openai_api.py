"""OpenAI's requests and responses for text, as far as an adapter can answer them. Pure: no server here.

What a request asks for and cannot have is refused by name; nothing is passed over that would change the answer.
https://platform.openai.com/docs/api-reference/chat and .../completions have the forms.
"""

from __future__ import annotations

import json
import secrets
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from yeonma.config.parse import describe, settings_of
from yeonma.config.settings import AnswerSettings
from yeonma.data.rows import Row
from yeonma.data.template import Template

READ = ("temperature", "top_p", "top_k", "repetition_penalty", "seed")
"""Settings of an answer that a request may bring; top_k and repetition_penalty are not OpenAI's, clients send them as
extras."""
KNOWN = settings_of((AnswerSettings,))
MOST_STOPS = 4  # OpenAI's own bound
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
}
"""Fields that are accepted with these values alone (or null), which ask for what is done anyway."""


class Refused(Exception):
    """A request that gets no answer: an HTTP status, and OpenAI's form of an error."""

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None
    ) -> None:
        super().__init__(_utf8(message))
        self.status, self.code = status, code
        self.param = None if param is None else _utf8(param)

    @property
    def body(self) -> dict[str, Any]:
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


def _utf8(text: str) -> str:
    """The text without half characters, which JSON can spell and no response can hold."""
    return text.encode("utf-8", "replace").decode()


@dataclass(frozen=True)
class Asking:
    """A request, checked: which model, what it is asked, and how it is to answer."""

    chat: bool
    model: str
    prompt: Any  # a list of messages, or texts to continue
    how: AnswerSettings
    stops: tuple[str, ...]
    stream: bool
    stream_usage: bool
    token_ids: bool
    """Whether the ids are wanted too: vLLM's `return_token_ids`."""


def read_request(content: bytes, *, chat: bool, usual: AnswerSettings, limit: int) -> Asking:
    """The body of a chat completion's request, or of a completion's. `usual` is what holds where it does not say, and
    `limit` the most tokens that it may ask for. Raises Refused."""
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
    own = {"model", prompt_name, "stop", "stream", "stream_options", "return_token_ids", *limits, *READ}
    own.update(WITHOUT_EFFECT)
    for name, value in body.items():
        if name in own:
            continue
        if name not in AS_DEFAULT:
            raise Refused(400, f"there is no {name} here", param=name, code="unsupported_parameter")
        if not any(
            value == each and isinstance(value, bool) == isinstance(each, bool) for each in AS_DEFAULT[name]
        ):
            raise Refused(
                400, f"{name} cannot be had here: leave it out", param=name, code="unsupported_parameter"
            )
    options = body.get("stream_options", {})
    if not isinstance(options, dict):
        raise Refused(400, "stream_options is not an object", param="stream_options")
    flags = {"stream": body.get("stream", False), "include_usage": options.get("include_usage", False)}
    flags["return_token_ids"] = body.get("return_token_ids", False)
    for name, value in flags.items():
        if not isinstance(value, bool):
            raise Refused(400, f"{name} is not true or false", param=name)
    if flags["stream"] and flags["return_token_ids"]:
        raise Refused(400, "a stream brings no token ids: leave one of the two out", param="return_token_ids")
    return Asking(
        chat,
        body["model"],
        body[prompt_name] if chat else _texts(body["prompt"]),
        _how(body, limits, usual, limit),
        _stops(body.get("stop", [])),
        flags["stream"],
        flags["include_usage"],
        flags["return_token_ids"],
    )


def _texts(prompt: Any) -> list[str]:
    texts = [prompt] if isinstance(prompt, str) else prompt
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
        raise Refused(400, "prompt is not a text, nor a list of texts", param="prompt")
    return texts


def _stops(stop: Any) -> tuple[str, ...]:
    stops = [stop] if isinstance(stop, str) else stop
    if not isinstance(stops, list) or not all(isinstance(text, str) and text for text in stops):
        raise Refused(400, "stop is not a text, nor a list of texts", param="stop")
    if len(stops) > MOST_STOPS:
        raise Refused(400, f"more than {MOST_STOPS} stop texts", param="stop")
    return tuple(stops)


def _how(body: Mapping[str, Any], limits: Sequence[str], usual: AnswerSettings, limit: int) -> AnswerSettings:
    """Without a seed of its own every request draws anew, as with OpenAI."""
    given: dict[str, Any] = {"seed": secrets.randbits(32)}
    for name in READ:
        if name not in body:
            continue
        value, setting = body[name], KNOWN[name]
        kinds = (int, float) if float in setting.members else (int,)
        fits = isinstance(value, kinds) and not isinstance(value, bool)
        if not fits or (setting.range is not None and value not in setting.range):
            raise Refused(400, f"{name} is not {describe(setting)}", param=name)
        given[name] = value
    for name in limits:
        if name not in body:
            continue
        given["max_new_tokens"] = wanted = body[name]
        if not isinstance(wanted, int) or isinstance(wanted, bool) or wanted < 1:
            raise Refused(400, f"{name} is not a whole number of at least 1", param=name)
        if wanted > limit:
            what = f"{name} is {wanted}, and this server gives at most {limit}"
            raise Refused(400, what, param=name, code="max_tokens_too_large")
    return replace(usual, **given)


def row_of_messages(template: Template, messages: Any) -> Row:
    """The row that a conversation stands for: what is asked with it is what a row of the data set would be asked with.

    A template of turn lists takes the messages as they are. Any other has its own frame, so that there is one message,
    the user's: its text is the template's field; where a row may need several fields, it is a JSON object with a text
    for each, or plain text for the field of a variant that has one alone. Raises Refused for a conversation that the
    template has no place for.
    """
    if not isinstance(messages, list) or not messages or not all(isinstance(each, dict) for each in messages):
        raise Refused(400, "messages is not a list of messages", param="messages")
    turns = [
        {"role": each.get("role"), "content": _content(each.get("content"), at)}
        for at, each in enumerate(messages)
    ]
    if template.is_chat:
        if turns[-1]["role"] == "assistant":
            raise Refused(
                400, "the last message is the assistant's: there is nothing to answer", param="messages"
            )
        return Row(1, {template.answer_field: turns}, "messages")
    if len(turns) != 1 or turns[0]["role"] != "user":
        what = "this model was trained with a frame of its own and answers one message, of the role user"
        raise Refused(400, what, param="messages")
    content = turns[0]["content"]
    fields = sorted({name for variant in template.variants for name in variant.prompt_fields})
    if len(fields) == 1:
        return Row(1, {fields[0]: content}, "messages")
    alone = next((v.prompt_fields[0] for v in template.variants if len(v.prompt_fields) == 1), None)
    if alone is not None and not content.lstrip().startswith("{"):
        return Row(1, {alone: content}, "messages")
    what = f"the message must be a JSON object with the texts of {', '.join(fields)}"
    try:
        values = json.loads(content)
    except (ValueError, RecursionError):
        raise Refused(400, what, param="messages") from None
    if not isinstance(values, dict) or not all(
        (value is None or isinstance(value, str)) for value in values.values()
    ):
        raise Refused(400, what, param="messages")
    unknown = sorted(values.keys() - set(fields))
    if unknown:
        raise Refused(400, f"there is no field {unknown[0]!r:.100}; {what}", param="messages")
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
    token_ids: tuple[int, ...]
    """Without the token that ended it."""
    ended: bool
    """By a stop token or a stop text, not by its length."""

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

    def whole(self, replies: Sequence[Reply], prompts: Sequence[list[int]]) -> dict[str, Any]:
        """`prompts`: the ids that each reply is the answer to."""
        choices = []
        for at, (reply, prompt) in enumerate(zip(replies, prompts, strict=True)):
            said: dict[str, Any] = {"text": reply.text}
            if self.asking.chat:
                said = {"message": {"role": "assistant", "content": reply.text}}
            if self.asking.token_ids:
                said["token_ids"] = list(reply.token_ids)
                if not self.asking.chat:
                    said["prompt_token_ids"] = prompt
            choices.append({"index": at, **said, "logprobs": None, "finish_reason": reply.finish_reason})
        usage = usage_of(sum(map(len, prompts)), sum(len(reply.token_ids) for reply in replies))
        ids = {"prompt_token_ids": prompts[0]} if self.asking.chat and self.asking.token_ids else {}
        return {**self._head(""), "choices": choices, "usage": usage, **ids}

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
