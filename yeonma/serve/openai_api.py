"""Requests and responses of OpenAI's completions API, as far as adapters can serve it. No server here.

Pydantic models check the requests. An unsupported parameter that would change the answer is refused by name, never
ignored. Reference: https://platform.openai.com/docs/api-reference/chat and .../completions.
"""

from __future__ import annotations

import json
import secrets
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from yeonma.config.parse import describe, settings_of
from yeonma.config.settings import AnswerSettings
from yeonma.data.columns import KWARGS_COLUMN, TOOL_COLUMNS
from yeonma.data.rows import Row
from yeonma.data.template import Template
from yeonma.data.turns import ToolCall

SAMPLING = ("temperature", "top_p", "top_k", "repetition_penalty", "seed")
"""Answer settings that a request may set. top_k and repetition_penalty are vLLM's extensions of OpenAI's API."""
SETTINGS = settings_of((AnswerSettings,))
MAX_STOPS = 4
"""OpenAI's own limit."""
MAX_PROMPTS = 64
"""Maximum number of prompts in one completion request."""
NO_TOOLS = "tools are not supported: this model was trained with its own prompt template, which has no place for them"
TOKEN_COUNT = "a whole number of at least 1"
UNSUPPORTED = "unsupported_parameter"


class RequestError(Exception):
    """A request that is refused, with its HTTP status and OpenAI's error body."""

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None
    ) -> None:
        super().__init__(_without_lone_surrogates(message))
        self.status, self.code = status, code
        self.param = None if param is None else _without_lone_surrogates(param)

    @property
    def body(self) -> dict[str, Any]:
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


def _without_lone_surrogates(text: str) -> str:
    """JSON can contain half of a surrogate pair, which UTF-8 cannot."""
    return text.encode("utf-8", "replace").decode()


def _only(*values: object) -> AfterValidator:
    """Accepts only `values`, which ask for what is done anyway. True and False are not 1 and 0 here."""

    def check(value: object) -> object:
        if not any(value == valid and isinstance(value, bool) == isinstance(valid, bool) for valid in values):
            raise ValueError("not supported")
        return value

    return AfterValidator(check)


def _in_range(name: str) -> AfterValidator:
    """Accepts the range of the answer setting `name`, without infinity and NaN."""

    def check(value: float) -> float:
        limits = SETTINGS[name].range
        if limits is not None and value not in limits:
            raise ValueError("out of range")
        return value

    return AfterValidator(check)


def _sampling(name: str) -> Any:
    return Field(default=None, description=describe(SETTINGS[name]))


def _as_list(value: object) -> object:
    return [value] if isinstance(value, str) else value


class TextPart(BaseModel):
    """A part of a message's content."""

    model_config = ConfigDict(strict=True, frozen=True)
    type: Annotated[str, _only("text")]
    text: str


class Message(BaseModel):
    """A message of a conversation. Its content may be split into parts."""

    model_config = ConfigDict(strict=True, frozen=True, extra="allow")
    role: str = Field(description="a string")
    content: str | list[TextPart] | None = Field(
        default=None, description="a string, or a list of parts of type text"
    )
    reasoning_content: str | None = Field(default=None, description="a string")
    reasoning: str | None = Field(default=None, description="a string")
    tool_calls: list[dict[str, Any]] | None = Field(default=None, description="a list of objects")
    tool_call_id: str | None = Field(default=None, description="a string")
    name: str | None = Field(default=None, description="a string")
    refusal: Annotated[Any, _only(None)] = None
    audio: Annotated[Any, _only(None)] = None
    function_call: Annotated[Any, _only(None)] = None

    @property
    def text(self) -> str:
        if self.content is None:
            return ""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)

    @property
    def turn(self) -> dict[str, Any]:
        """The turn of a turn list."""
        content = None if self.content is None else self.text
        turn = {"role": self.role, "content": content}
        for name in ("reasoning_content", "reasoning", "tool_calls", "tool_call_id", "name"):
            if (value := getattr(self, name)) is not None:
                turn[name] = value
        return {**(self.model_extra or {}), **turn}


class StreamOptions(BaseModel):
    """The contents of a stream besides text."""

    model_config = ConfigDict(strict=True, frozen=True)
    include_usage: bool = Field(default=False, description="true or false")


class CompletionParameters(BaseModel):
    """The common parameters of both kinds of request. null means not given."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")
    model: str = Field(description="a string")
    max_tokens: int | None = Field(default=None, ge=1, description=TOKEN_COUNT)
    stop: Annotated[list[Annotated[str, Field(min_length=1)]], BeforeValidator(_as_list)] = Field(
        default=[],
        max_length=MAX_STOPS,
        description=f"a string, or a list of at most {MAX_STOPS} strings, none of them empty",
    )
    stream: bool = Field(default=False, description="true or false")
    stream_options: StreamOptions = Field(default=StreamOptions(), description="an object")
    return_token_ids: bool = Field(default=False, description="true or false")
    """vLLM's extension: return the token ids of prompt and answer."""

    temperature: Annotated[float, _in_range("temperature")] | None = _sampling("temperature")
    top_p: Annotated[float, _in_range("top_p")] | None = _sampling("top_p")
    top_k: Annotated[int, _in_range("top_k")] | None = _sampling("top_k")
    repetition_penalty: Annotated[float, _in_range("repetition_penalty")] | None = _sampling(
        "repetition_penalty"
    )
    seed: Annotated[int, _in_range("seed")] | None = _sampling("seed")

    # parameters that have no effect on answers here
    user: Any = None
    metadata: Any = None
    store: Any = None
    service_tier: Any = None
    safety_identifier: Any = None
    prompt_cache_key: Any = None
    prompt_cache_retention: Any = None
    parallel_tool_calls: Any = None
    verbosity: Any = None

    # parameters that are accepted only with values that have no effect on answers
    n: Annotated[Any, _only(1)] = None
    best_of: Annotated[Any, _only(1)] = None
    echo: Annotated[Any, _only(False)] = None
    suffix: Annotated[Any, _only("")] = None
    frequency_penalty: Annotated[Any, _only(0)] = None
    presence_penalty: Annotated[Any, _only(0)] = None
    logprobs: Annotated[Any, _only(False)] = None
    top_logprobs: Annotated[Any, _only(0)] = None
    logit_bias: Annotated[Any, _only({})] = None
    response_format: Annotated[Any, _only({"type": "text"})] = None
    tool_choice: Annotated[Any, _only("none", "auto")] = None
    functions: Annotated[Any, _only([])] = None
    function_call: Annotated[Any, _only("none", "auto")] = None
    modalities: Annotated[Any, _only(["text"])] = None


class ChatRequest(CompletionParameters):
    """The body of POST /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1, description="a list of messages, at least one")
    max_completion_tokens: int | None = Field(default=None, ge=1, description=TOKEN_COUNT)
    tools: list[dict[str, Any]] = Field(default=[], description="a list of objects")
    chat_template_kwargs: dict[str, Any] = Field(default={}, description="an object")
    """vLLM's extension: arguments of the model's chat template, such as `enable_thinking`."""
    reasoning_effort: str | None = Field(default=None, description="a string")
    """An argument of the chat templates that know it, such as that of gpt-oss."""


class TextRequest(CompletionParameters):
    """The body of POST /v1/completions: texts to continue."""

    tools: Annotated[Any, _only([])] = None
    prompt: Annotated[list[str], BeforeValidator(_as_list)] = Field(
        min_length=1,
        max_length=MAX_PROMPTS,
        description=f"a string, or a list of 1 to {MAX_PROMPTS} strings",
    )


Request = TypeVar("Request", bound=CompletionParameters)
NESTED: Mapping[str, type[BaseModel]] = {"messages": Message, "stream_options": StreamOptions}


def read_request(content: bytes, kind: type[Request]) -> Request:
    """Parses and checks the body of a request. Raises RequestError with the first problem."""
    try:
        body = json.loads(content)
    except (ValueError, RecursionError):
        raise RequestError(400, "the body is not JSON") from None
    if not isinstance(body, dict):
        raise RequestError(400, "the body is not a JSON object")
    try:
        request = kind.model_validate(
            {_without_lone_surrogates(name): value for name, value in body.items() if value is not None}
        )
    except ValidationError as error:
        raise _request_error(kind, error) from None
    for index, turn in enumerate(request.messages if isinstance(request, ChatRequest) else ()):
        if turn.content is None and not turn.tool_calls:
            raise RequestError(400, f"messages[{index}].content is missing", param="messages")
    if request.stream and request.return_token_ids:
        message = "a stream contains no token ids: leave out stream or return_token_ids"
        raise RequestError(400, message, param="return_token_ids")
    return request


def _request_error(kind: type[BaseModel], error: ValidationError) -> RequestError:
    """The RequestError for the first problem that pydantic found."""
    problem = error.errors(include_url=False, include_context=False, include_input=False)[0]
    location = problem["loc"]
    param = str(location[0])
    if len(location) == 1 and problem["type"] == "extra_forbidden":
        return RequestError(400, f"{param} is not supported", param=param, code=UNSUPPORTED)
    place, index, description, model = "", "", "", kind
    for part in location:
        if isinstance(part, int):
            index = f"[{part}]"
        elif (field := model.model_fields.get(part)) is not None:
            place = f"{place}{index}.{part}" if place else part
            description, model = field.description or "", NESTED.get(part, model)
        else:  # the name of one type of a union
            break
    if not description:  # a parameter that accepts only values without effect
        message = f"{place} is not supported with this value: leave it out"
        return RequestError(400, message, param=param, code=UNSUPPORTED)
    is_missing = problem["type"] == "missing" and part == location[-1]
    return RequestError(
        400, f"{place} {'is missing' if is_missing else f'must be {description}'}", param=param
    )


def answer_settings(
    request: ChatRequest | TextRequest, defaults: AnswerSettings, limit: int
) -> AnswerSettings:
    """The request's settings, with `defaults` for the rest. As with OpenAI, a request without a seed gets a random one.

    Raises RequestError for more than `limit` new tokens.
    """
    values: dict[str, Any] = {"seed": secrets.randbits(32)}
    values |= {name: value for name in SAMPLING if (value := getattr(request, name)) is not None}
    for name in ("max_tokens", "max_completion_tokens"):
        max_new_tokens = getattr(request, name, None)
        if max_new_tokens is None:
            continue
        if max_new_tokens > limit:
            message = f"{name} is {max_new_tokens}, but this server allows at most {limit}"
            raise RequestError(400, message, param=name, code="max_tokens_too_large")
        values["max_new_tokens"] = max_new_tokens
    return replace(defaults, **values)


def row_of_messages(
    template: Template, messages: Sequence[Message], request: ChatRequest | None = None
) -> Row:
    """The row for a conversation. Its prompt is the one that training would make of this row.

    A template of turns takes messages, tools and arguments of the chat template as they are. Any other template has its
    own frame and takes one user message: the text of its field. If rows may have several fields, the message is a JSON
    object with one text per field, or plain text if a variant of the template has a single field. Raises RequestError
    for any other conversation.
    """
    if template.is_text:
        problem = "this model was trained on whole texts: use /v1/completions"
        raise RequestError(400, problem, param="messages")
    if template.takes_turns:
        return _row_of_turns(template, messages, request)
    if request is not None and request.tools:
        raise RequestError(400, NO_TOOLS, param="tools", code=UNSUPPORTED)
    if len(messages) != 1 or messages[0].role != "user":
        problem = "this model was trained with its own prompt template and takes exactly one message, with role user"
        raise RequestError(400, problem, param="messages")
    content = messages[0].text
    fields = sorted({name for variant in template.variants for name in variant.prompt_fields})
    if len(fields) == 1:
        return Row(1, {fields[0]: content}, "messages")
    single = next((v.prompt_fields[0] for v in template.variants if len(v.prompt_fields) == 1), None)
    if single is not None and not content.lstrip().startswith("{"):
        return Row(1, {single: content}, "messages")
    problem = f"the message must be a JSON object with these string fields: {', '.join(fields)}"
    try:
        values = json.loads(content)
    except (ValueError, RecursionError):
        raise RequestError(400, problem, param="messages") from None
    if not isinstance(values, dict) or not all(
        (value is None or isinstance(value, str)) for value in values.values()
    ):
        raise RequestError(400, problem, param="messages")
    unknown = sorted(values.keys() - set(fields))
    if unknown:
        raise RequestError(400, f"there is no field {unknown[0]!r:.100}; {problem}", param="messages")
    return Row(1, values, "messages")


def _row_of_turns(template: Template, messages: Sequence[Message], request: ChatRequest | None) -> Row:
    """The row of a conversation. Raises RequestError if there is nothing to answer."""
    if messages[-1].role == "assistant":
        problem = "the last message is the assistant's: there is nothing to answer"
        raise RequestError(400, problem, param="messages")
    row = template.row_of_turns([message.turn for message in messages])
    if request is not None:
        kwargs = dict(request.chat_template_kwargs)
        if request.reasoning_effort is not None:
            kwargs.setdefault("reasoning_effort", request.reasoning_effort)
        if kwargs:
            row[KWARGS_COLUMN] = kwargs
        if request.tools and request.tool_choice != "none":
            row[TOOL_COLUMNS[0]] = request.tools
    return Row(1, row, "messages")


@dataclass(frozen=True)
class ReasoningText:
    """A piece of the reasoning before an answer, for a stream."""

    text: str


@dataclass(frozen=True)
class Reply:
    """The text of an answer, and how it ended."""

    text: str
    token_ids: tuple[int, ...]
    """Without the stop token."""
    stopped: bool
    """Whether a stop token or a stop text ended it, rather than its length."""
    reasoning: str | None = None
    """The reasoning before the answer, if the model wrote some."""
    tool_calls: tuple[ToolCall, ...] = ()
    """The tool calls of the answer, which are not part of its text."""

    @property
    def finish_reason(self) -> str:
        return "tool_calls" if self.tool_calls else "stop" if self.stopped else "length"

    @property
    def message(self) -> dict[str, Any]:
        """The assistant's message."""
        reasoning = {} if self.reasoning is None else {"reasoning_content": self.reasoning}
        if not self.tool_calls:
            return {"role": "assistant", "content": self.text, **reasoning}
        return {"role": "assistant", "content": self.text or None, **reasoning, "tool_calls": self._calls}

    @property
    def _calls(self) -> list[dict[str, Any]]:
        return [
            {
                "id": call.id or f"call_{uuid.uuid4().hex}",
                "type": "function",
                "function": {"name": call.name, "arguments": call.arguments},
            }
            for call in self.tool_calls
        ]

    @property
    def last_delta(self) -> dict[str, Any]:
        """The last piece of a streamed message."""
        if not self.tool_calls:
            return {}
        return {"tool_calls": [{"index": index, **call} for index, call in enumerate(self._calls)]}


@dataclass(frozen=True)
class ResponseWriter:
    """Writes the responses to one request, with the same id and time."""

    request: ChatRequest | TextRequest
    id: str
    created: int

    @staticmethod
    def of(request: ChatRequest | TextRequest) -> ResponseWriter:
        prefix = "chatcmpl" if isinstance(request, ChatRequest) else "cmpl"
        return ResponseWriter(request, f"{prefix}-{uuid.uuid4().hex}", int(time.time()))

    @property
    def is_chat(self) -> bool:
        return isinstance(self.request, ChatRequest)

    def complete(self, replies: Sequence[Reply], prompts: Sequence[list[int]]) -> dict[str, Any]:
        """The complete response. `prompts`: the token ids of the prompts of the replies."""
        choices = []
        for index, (reply, prompt) in enumerate(zip(replies, prompts, strict=True)):
            choice: dict[str, Any] = {"index": index}
            if self.is_chat:
                choice["message"] = reply.message
            else:
                choice["text"] = reply.text
            if self.request.return_token_ids:
                choice["token_ids"] = list(reply.token_ids)
                if not self.is_chat:
                    choice["prompt_token_ids"] = prompt
            choices.append({**choice, "logprobs": None, "finish_reason": reply.finish_reason})
        usage = usage_of(sum(map(len, prompts)), sum(len(reply.token_ids) for reply in replies))
        ids = {"prompt_token_ids": prompts[0]} if self.is_chat and self.request.return_token_ids else {}
        return {**self._head(""), "choices": choices, "usage": usage, **ids}

    def stream_start(self) -> list[dict[str, Any]]:
        """The chunks at the start of a stream."""
        return [self._chunk({"delta": {"role": "assistant", "content": ""}})] if self.is_chat else []

    def stream_text(self, text: str, index: int = 0) -> dict[str, Any]:
        return self._chunk({"delta": {"content": text}} if self.is_chat else {"text": text}, index)

    def stream_reasoning(self, piece: ReasoningText, index: int = 0) -> dict[str, Any]:
        """A chunk with reasoning, under the key that vLLM, SGLang and DeepSeek's API use."""
        return self._chunk({"delta": {"reasoning_content": piece.text}}, index)

    def stream_end(self, reply: Reply, index: int = 0) -> dict[str, Any]:
        last = {"delta": reply.last_delta} if self.is_chat else {"text": ""}
        return self._chunk(last, index, reply.finish_reason)

    def stream_usage(self, prompt_tokens: int, tokens: int) -> list[dict[str, Any]]:
        """The chunks at the end of a stream: the usage, if the request asked for it."""
        if not self.request.stream_options.include_usage:
            return []
        return [{**self._head(".chunk"), "choices": [], "usage": usage_of(prompt_tokens, tokens)}]

    def _chunk(
        self, content: dict[str, Any], index: int = 0, finish_reason: str | None = None
    ) -> dict[str, Any]:
        choice = {"index": index, **content, "logprobs": None, "finish_reason": finish_reason}
        return {**self._head(".chunk"), "choices": [choice]}

    def _head(self, chunk: str) -> dict[str, Any]:
        kind = f"chat.completion{chunk}" if self.is_chat else "text_completion"
        return {"id": self.id, "object": kind, "created": self.created, "model": self.request.model}


def usage_of(prompt_tokens: int, tokens: int) -> dict[str, int]:
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": tokens,
        "total_tokens": prompt_tokens + tokens,
    }


def model_list(names: Sequence[str], created: int) -> dict[str, Any]:
    models = [{"id": name, "object": "model", "created": created, "owned_by": "yeonma"} for name in names]
    return {"object": "list", "data": models}
