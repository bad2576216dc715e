"""Requests of OpenAI's completions API, as far as adapters can serve it. No server here.

Pydantic models check the requests. An unsupported parameter that would change the answer is refused by name, never
ignored. Reference: https://platform.openai.com/docs/api-reference/chat and .../completions; vLLM's extra parameters are
those of its OpenAI-compatible server.
"""

from __future__ import annotations

import hashlib
import json
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from yeonma.config.parse import describe, settings_of
from yeonma.config.settings import AnswerSettings
from yeonma.data.columns import KWARGS_COLUMN, TOOL_COLUMNS
from yeonma.data.rows import Row
from yeonma.data.template import Template
from yeonma.generation.sampling import LogitChanges
from yeonma.language import speaking
from yeonma.messages import counted_in_english
from yeonma.serve.request_error import RequestError, without_lone_surrogates

SAMPLING = ("temperature", "top_p", "top_k", "repetition_penalty", "seed")
"""Answer settings that a request may set. top_k and repetition_penalty are vLLM's extensions of OpenAI's API."""
NO_EFFECT = frozenset(
    (
        "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention",
        "prediction", "priority", "request_id", "cache_salt", "cache_prompt", "include_reasoning", "add_special_tokens",
        "detokenize", "spaces_between_special_tokens",
    )
)  # fmt: skip
"""Parameters that change no answer here, whatever their value."""
NEUTRAL: Mapping[str, tuple[object, ...]] = {
    "echo": (False,), "suffix": ("",), "logprobs": (False,), "top_logprobs": (0,), "modalities": (["text"],),
    "tools": ([],), "tool_choice": ("none", "auto"), "functions": ([],), "function_call": ("none", "auto"),
    "verbosity": ("medium",), "reasoning_effort": ("medium",), "parallel_tool_calls": (True, False),
    "chat_template_kwargs": ({},), "audio": (), "web_search_options": (),
    # of vLLM
    "add_generation_prompt": (True,), "continue_final_message": (False,), "length_penalty": (1,),
    "use_beam_search": (False,), "skip_special_tokens": (True,), "ignore_eos": (False,), "min_tokens": (0,),
    "include_stop_str_in_output": (False,), "stop_token_ids": ([],), "bad_words": ([],), "documents": ([],),
    "return_tokens_as_token_ids": (False,), "logits_processors": ([],), "vllm_xargs": ({},),
    "stream_reasoning": (True,), "truncate_prompt_tokens": (-1,), "separate_reasoning": (True,),
    "mm_processor_kwargs": ({},),
    "allowed_token_ids": (), "prompt_logprobs": (), "chat_template": (), "structured_outputs": (), "guided_json": (),
    "guided_regex": (), "guided_choice": (), "guided_grammar": (), "kv_transfer_params": (),
    # of llama.cpp and its clients
    "typical_p": (1,), "mirostat": (0,), "tfs_z": (1,), "top_a": (0,), "dynatemp_range": (0,), "xtc_probability": (0,),
    "dry_multiplier": (0,),
}  # fmt: skip
"""Parameters that are not supported, with the values that ask for what is done anyway. null always does."""
MAX_TOP_LOGPROBS = {"chat": 20, "completions": 5}
"""OpenAI's own limits."""
MAX_BIAS, MAX_PENALTY = 100, 2
SETTINGS = settings_of((AnswerSettings,))
MAX_STOPS = 4
"""OpenAI's own limit."""
MAX_STOP_CHARACTERS = 1000
MAX_MESSAGES, MAX_TOOLS, MAX_BIASES = 4096, 128, 4096
MAX_DEPTH, MAX_CONTAINERS = 64, 20_000
"""Of objects and lists within each other, and of all of them in a request."""
MAX_PROMPTS = 64
"""Maximum number of prompts in one completion request, and of answers to one request."""
TEMPLATE_ARGUMENTS = ("reasoning_effort", "verbosity")
"""Parameters that are arguments of the chat templates that know them; elsewhere only their default is accepted."""
NO_TOOLS = "tools are not supported: this model was trained with its own prompt template, which has no place for them"
TOKEN_COUNT = "a whole number of at least 1"
PENALTY = f"a number from -{MAX_PENALTY} to {MAX_PENALTY}"
UNSUPPORTED = "unsupported_parameter"


def _is_one_of(value: object, values: Sequence[object]) -> bool:
    """True and False are not 1 and 0 here."""
    return any(value == valid and isinstance(value, bool) == isinstance(valid, bool) for valid in values)


def _only(*values: object) -> AfterValidator:
    """Accepts only `values`, which ask for what is done anyway."""

    def check(value: object) -> object:
        if not _is_one_of(value, values):
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
    with speaking("en"):  # for programs
        return Field(default=None, description=describe(SETTINGS[name]))


def _as_list(value: object) -> object:
    return [value] if isinstance(value, str) else value


def _as_prompts(value: object) -> object:
    """Several prompts; a list of numbers is one prompt."""
    is_ids = isinstance(value, list) and value and all(isinstance(item, int) for item in value)
    return [value] if is_ids or isinstance(value, str) else value


def _whole(value: object) -> object:
    """Some clients write whole numbers as 1.0."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _none_for(neutral: object) -> BeforeValidator:
    """The value that turns a parameter off is as good as none."""
    return BeforeValidator(lambda value: None if _is_one_of(value, (neutral,)) else value)


def _token_ids(value: dict[str, float]) -> dict[str, float]:
    if not all(name.isascii() and name.isdecimal() and abs(bias) <= MAX_BIAS for name, bias in value.items()):
        raise ValueError("no token ids, or out of range")
    return value


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

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")
    include_usage: bool | None = Field(default=False, description="true or false")
    include_obfuscation: Any = None
    continuous_usage_stats: Annotated[Any, _only(False, None)] = None


class JsonSchema(BaseModel):
    """A schema for the answer. OpenAI's `strict` makes no difference: it is always kept."""

    model_config = ConfigDict(strict=True, frozen=True)
    schema_: dict[str, Any] = Field(default={"type": "object"}, alias="schema", description="an object")


class ResponseFormat(BaseModel):
    """The form of the answer's text."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")
    type: Literal["text", "json_object", "json_schema"] = Field(
        description="text, json_object or json_schema"
    )
    json_schema: JsonSchema | None = Field(default=None, description="an object")
    schema_: dict[str, Any] | None = Field(default=None, alias="schema", description="an object")
    """llama.cpp's place for the schema of a json_object."""


class CompletionParameters(BaseModel):
    """The common parameters of both kinds of request. null means not given."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")
    model: str = Field(description="a string")
    max_tokens: int | None = Field(default=None, ge=1, description=TOKEN_COUNT)
    stop: Annotated[
        list[Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARACTERS)]], BeforeValidator(_as_list)
    ] = Field(
        default=[],
        max_length=MAX_STOPS,
        description=f"a string, or a list of at most {MAX_STOPS} strings, none of them empty or longer than "
        f"{MAX_STOP_CHARACTERS} characters",
    )
    stream: bool = Field(default=False, description="true or false")
    stream_options: StreamOptions = Field(default=StreamOptions(), description="an object")
    return_token_ids: bool = Field(default=False, description="true or false")
    """vLLM's extension: return the token ids of prompt and answer."""

    temperature: Annotated[float, _in_range("temperature")] | None = _sampling("temperature")
    top_p: Annotated[float, _in_range("top_p")] | None = _sampling("top_p")
    top_k: Annotated[Annotated[int, _in_range("top_k")] | None, _none_for(-1)] = _sampling("top_k")
    repetition_penalty: Annotated[float, _in_range("repetition_penalty")] | None = _sampling(
        "repetition_penalty"
    )
    seed: Annotated[int, _in_range("seed")] | None = _sampling("seed")
    min_p: float = Field(default=0.0, ge=0, le=1, description="a number from 0 to 1")
    """vLLM's extension."""
    logit_bias: Annotated[
        dict[str, Annotated[float, Field(allow_inf_nan=False)]], AfterValidator(_token_ids)
    ] = Field(
        default={},
        max_length=MAX_BIASES,
        description=f"an object of token ids with numbers from -{MAX_BIAS} to {MAX_BIAS}, at most {MAX_BIASES}",
    )
    frequency_penalty: float = Field(default=0.0, ge=-MAX_PENALTY, le=MAX_PENALTY, description=PENALTY)
    presence_penalty: float = Field(default=0.0, ge=-MAX_PENALTY, le=MAX_PENALTY, description=PENALTY)
    n: Annotated[int, BeforeValidator(_whole)] = Field(
        default=1, ge=1, le=MAX_PROMPTS, description=f"a whole number from 1 to {MAX_PROMPTS}"
    )
    best_of: Annotated[int, BeforeValidator(_whole)] | None = Field(
        default=None, description="a whole number"
    )
    response_format: ResponseFormat | None = Field(default=None, description="an object")

    @property
    def changes(self) -> LogitChanges:
        bias = tuple((int(token_id), value) for token_id, value in self.logit_bias.items() if value)
        return LogitChanges(bias, self.presence_penalty, self.frequency_penalty, self.min_p)

    @property
    def schema_of_answer(self) -> Mapping[str, Any] | None:
        """The JSON schema that the answer must follow, if it is to be JSON."""
        wanted = self.response_format
        if wanted is None or wanted.type == "text":
            return None
        if wanted.type == "json_schema" and wanted.json_schema is not None:
            return wanted.json_schema.schema_
        return wanted.schema_ or {"type": "object"}


class ChatRequest(CompletionParameters):
    """The body of POST /v1/chat/completions."""

    messages: list[Message] = Field(
        min_length=1,
        max_length=MAX_MESSAGES,
        fail_fast=True,
        description=f"a list of 1 to {MAX_MESSAGES} messages",
    )
    max_completion_tokens: int | None = Field(default=None, ge=1, description=TOKEN_COUNT)
    logprobs: bool = Field(default=False, description="true or false")
    top_logprobs: int = Field(
        default=0,
        ge=0,
        le=MAX_TOP_LOGPROBS["chat"],
        description=f"a whole number from 0 to {MAX_TOP_LOGPROBS['chat']}",
    )
    tools: list[dict[str, Any]] = Field(
        default=[], max_length=MAX_TOOLS, description=f"a list of at most {MAX_TOOLS} objects"
    )
    tool_choice: Annotated[Any, _only("none", "auto")] = None
    parallel_tool_calls: bool = Field(default=True, description="true or false")
    chat_template_kwargs: dict[str, Any] = Field(default={}, description="an object")
    """vLLM's extension: arguments of the model's chat template, such as `enable_thinking`."""
    reasoning_effort: str | None = Field(default=None, description="a string")
    """An argument of the chat templates that know it, such as that of gpt-oss."""
    verbosity: str | None = Field(default=None, description="a string")
    """The same."""

    @property
    def offers_tools(self) -> bool:
        return bool(self.tools) and self.tool_choice != "none"

    @property
    def scored_tokens(self) -> int | None:
        """How many of the most likely tokens to return with each token; None for no log-probabilities."""
        return self.top_logprobs if self.logprobs else None


class TextRequest(CompletionParameters):
    """The body of POST /v1/completions: texts to continue."""

    prompt: Annotated[
        list[str | Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1, fail_fast=True)]],
        BeforeValidator(_as_prompts),
    ] = Field(
        min_length=1,
        max_length=MAX_PROMPTS,
        description=f"a string, a list of token ids, or a list of 1 to {MAX_PROMPTS} of these",
    )
    max_tokens: int | None = Field(default=None, ge=0, description=TOKEN_COUNT)
    """0 with `echo`: the prompt alone, to score it."""
    echo: bool = Field(default=False, description="true or false")
    logprobs: Annotated[int | None, _none_for(False)] = Field(
        default=None,
        ge=0,
        le=MAX_TOP_LOGPROBS["completions"],
        description=f"a whole number from 0 to {MAX_TOP_LOGPROBS['completions']}",
    )

    @property
    def scored_tokens(self) -> int | None:
        """As that of a ChatRequest."""
        return self.logprobs


Request = TypeVar("Request", bound=CompletionParameters)
NESTED: Mapping[str, type[BaseModel]] = {
    "messages": Message,
    "stream_options": StreamOptions,
    "response_format": ResponseFormat,
    "json_schema": JsonSchema,
}


def read_request(content: bytes, kind: type[Request]) -> Request:
    """Parses and checks the body of a request. Raises RequestError with the first problem."""
    try:
        body = json.loads(content)
    except (ValueError, RecursionError):
        raise RequestError(400, "the body is not JSON") from None
    if not isinstance(body, dict):
        raise RequestError(400, "the body is not a JSON object")
    _check_containers(body)
    given = {without_lone_surrogates(name): value for name, value in body.items() if value is not None}
    try:
        request = kind.model_validate(_without_neutral(given, kind))
    except ValidationError as error:
        raise _request_error(kind, error) from None
    for index, turn in enumerate(request.messages if isinstance(request, ChatRequest) else ()):
        if turn.content is None and not turn.tool_calls:
            raise RequestError(400, f"messages[{index}].content is missing", param="messages")
    if request.stream and request.return_token_ids:
        message = "a stream contains no token ids: leave out stream or return_token_ids"
        raise RequestError(400, message, param="return_token_ids")
    if request.best_of not in (None, request.n):
        raise _not_supported("best_of")
    wanted = request.response_format
    if wanted is not None and wanted.type == "json_schema" and wanted.json_schema is None:
        raise RequestError(400, "response_format.json_schema is missing", param="response_format")
    if isinstance(request, ChatRequest):
        _check_chat(request)
    if isinstance(request, TextRequest):
        _check_text(request)
    return request


def _without_neutral(given: Mapping[str, Any], kind: type[BaseModel]) -> dict[str, Any]:
    """The parameters that may change the answer. Raises RequestError for one that is not supported."""
    rest = {}
    for name, value in given.items():
        if name in kind.model_fields or (name not in NO_EFFECT and name not in NEUTRAL):
            rest[name] = value
        elif name in NEUTRAL and not _is_one_of(value, NEUTRAL[name]):
            raise _not_supported(name)
    return rest


def _not_supported(name: str) -> RequestError:
    message = f"{name} is not supported with this value: leave it out"
    return RequestError(400, message, param=name, code=UNSUPPORTED)


def for_template(request: ChatRequest, chat_template: str) -> ChatRequest:
    """The request without the arguments that the chat template does not know. Raises RequestError if one is not the
    default."""
    unknown = [
        name
        for name in TEMPLATE_ARGUMENTS
        if getattr(request, name) is not None and name not in chat_template
    ]
    for name in unknown:
        if not _is_one_of(getattr(request, name), NEUTRAL[name]):
            message = f"{name} is not supported: this model's chat template has no such argument"
            raise RequestError(400, message, param=name, code=UNSUPPORTED)
    return request.model_copy(update=dict.fromkeys(unknown))


def _check_chat(request: ChatRequest) -> None:
    """Raises RequestError for parameters that do not fit together."""
    if request.top_logprobs and not request.logprobs:
        raise RequestError(400, "top_logprobs needs logprobs: true", param="top_logprobs")
    if request.offers_tools and request.schema_of_answer is not None:
        message = "an answer in JSON cannot call tools: leave out response_format or tools"
        raise RequestError(400, message, param="response_format", code=UNSUPPORTED)


def _check_text(request: TextRequest) -> None:
    """Raises RequestError for parameters that do not fit together."""
    if request.max_tokens == 0 and not request.echo:
        message = f"max_tokens must be {TOKEN_COUNT}, or 0 with echo"
        raise RequestError(400, message, param="max_tokens")
    if request.n * len(request.prompt) > MAX_PROMPTS:
        asked = counted_in_english(
            len(request.prompt), f"prompt with n {request.n} asks", f"prompts with n {request.n} ask"
        )
        message = f"{asked} for more than {MAX_PROMPTS} answers"
        raise RequestError(400, message, param="n")


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
    if problem["type"] == "extra_forbidden":
        message = f"{place}.{location[-1]} is not supported: leave it out"
        return RequestError(400, without_lone_surrogates(message), param=param, code=UNSUPPORTED)
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


def _check_containers(body: dict[str, Any]) -> None:
    """Raises RequestError for JSON that is nested too deeply, or has too many objects and lists."""
    level: list[Any] = [body]
    number = depth = 0
    while level:
        number, depth = number + len(level), depth + 1
        if depth > MAX_DEPTH or number > MAX_CONTAINERS:
            problem = (
                f"more than {MAX_DEPTH} levels" if depth > MAX_DEPTH else f"more than {MAX_CONTAINERS:,}"
            )
            raise RequestError(400, f"the body has {problem} of objects and lists")
        level = [
            value
            for container in level
            for value in (container.values() if isinstance(container, dict) else container)
            if isinstance(value, dict | list)
        ]


def seed_of_choice(seed: int, choice: int) -> int:
    """The seed of one of several answers to a prompt: the first one's is the request's own."""
    if choice == 0:
        return seed
    digest = hashlib.sha256(f"{seed} {choice}".encode()).digest()
    return int.from_bytes(digest[:4], "little")


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
        raise RequestError(400, _why_not_one_message(messages), param="messages")
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


def _why_not_one_message(messages: Sequence[Message]) -> str:
    """What is wrong with a conversation for a template with a frame of its own, and how to send it."""
    takes = (
        "this model was trained with its own prompt template and takes exactly one message, with role user"
    )
    if messages[-1].role != "user":
        return f"{takes}: the last message must be the user's"
    before = {message.role for message in messages[:-1]}
    if before <= {"system", "developer"}:
        return f"{takes}: leave out the one with role {messages[0].role}, for which the template has no place"
    return f"{takes}: send only the last one, because the template has no place for those before it"


def _row_of_turns(template: Template, messages: Sequence[Message], request: ChatRequest | None) -> Row:
    """The row of a conversation. Raises RequestError if there is nothing to answer."""
    if messages[-1].role == "assistant":
        problem = "the last message is the assistant's: there is nothing to answer"
        raise RequestError(400, problem, param="messages")
    row = template.row_of_turns([message.turn for message in messages])
    if request is not None:
        kwargs = dict(request.chat_template_kwargs)
        for name in TEMPLATE_ARGUMENTS:
            if (value := getattr(request, name)) is not None:
                kwargs.setdefault(name, value)
        if kwargs:
            row[KWARGS_COLUMN] = kwargs
        if request.offers_tools:
            row[TOOL_COLUMNS[0]] = request.tools
    return Row(1, row, "messages")
