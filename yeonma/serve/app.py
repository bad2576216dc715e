"""The web application, with Starlette: routes, the API key, limits on requests."""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from yeonma.adapter.prompt_builder import Prompt, PromptBuilder
from yeonma.config.settings import AnswerSettings
from yeonma.data.columns import KWARGS_COLUMN, TOOL_COLUMNS
from yeonma.data.turns import ToolCall
from yeonma.errors import UserError
from yeonma.generation.json_grammar import JsonGrammar, JsonVocabulary
from yeonma.messages import counted_in_english, tr
from yeonma.serve.listen import names_this_machine
from yeonma.serve.one_at_a_time import Full, OneAtATime
from yeonma.serve.openai_api import (
    UNSUPPORTED,
    ChatRequest,
    TextRequest,
    answer_settings,
    for_template,
    read_request,
    row_of_messages,
    seed_of_choice,
)
from yeonma.serve.openai_responses import (
    ReasoningText,
    Reply,
    ResponseWriter,
    ScoredPrompt,
    SentPrompt,
    model_list,
)
from yeonma.serve.request_bounds import check_length, texts_in
from yeonma.serve.request_error import RequestError
from yeonma.serve.request_framing import MAX_BODY_BYTES
from yeonma.serve.token_names import TokenNames
from yeonma.serve.try_page import page_model, try_page
from yeonma.serve.worker import Busy, Event, GrammarFailed, Job, PromptTooLarge, ScoredTokens, Worker
from yeonma.tokenization.chat_template_export import base_chat_template
from yeonma.tokenization.tool_calls import FindCalls

MAX_PREPARING = 64
"""Maximum number of requests that wait to be parsed and tokenised."""

log = logging.getLogger("yeonma.serve")


@dataclass(frozen=True)
class Limits:
    """Limits on requests, and on who may send them."""

    defaults: AnswerSettings
    """Settings that a request does not set."""
    max_new_tokens_limit: int
    positions: int | None
    """The model's maximum number of tokens in prompt and answer together."""
    key: str | None
    local_only: bool
    """Whether only this machine can connect. Then a request with another host name comes from a web page that abuses
    the browser (DNS rebinding), and is refused."""


@dataclass(frozen=True)
class Models:
    """The models by their names in requests, and the threads that serve them."""

    prompt_builders: Mapping[str, PromptBuilder]
    worker: Worker
    tokenizing: ThreadPoolExecutor
    """One thread, because not every tokenizer is thread-safe."""
    preparing: OneAtATime = field(default_factory=lambda: OneAtATime(MAX_PREPARING))
    """Whose turn that thread is. What waits for it is not parsed yet."""
    vocabularies: dict[str, JsonVocabulary] = field(default_factory=dict)
    """For answers in JSON, made when the first request asks a model for one. Only the thread above uses it."""


@dataclass(frozen=True)
class Asked:
    """What a request asks for, ready for the worker."""

    prompts: Sequence[Prompt]
    sent: Sequence[SentPrompt]
    grammar: JsonGrammar | None


NO_TEXTS = (KWARGS_COLUMN, *TOOL_COLUMNS)
"""Columns of a row whose texts need not be in its prompt."""
Lifespan = Callable[[Starlette], AbstractAsyncContextManager[None]]
Events = asyncio.Queue[tuple[int, Event]]
"""Index of a choice in a response, and what the worker reports about it."""


def make_app(models: Models, limits: Limits, lifespan: Lifespan | None = None) -> Starlette:
    """`/v1/chat/completions`, `/v1/completions`, `/v1/models` and `/page.json`, which need the key, and `/health` and
    the page at `/`, which do not."""
    created = int(time.time())
    page_response = try_page()

    def guarded(
        handler: Callable[[Request], Awaitable[Response]],
    ) -> Callable[[Request], Awaitable[Response]]:
        async def endpoint(request: Request) -> Response:
            _check_host(request, limits.local_only)
            _check_key(request, limits.key)
            return await handler(request)

        return endpoint

    async def chat(request: Request) -> Response:
        return await _complete(request, ChatRequest, models, limits)

    async def completions(request: Request) -> Response:
        return await _complete(request, TextRequest, models, limits)

    async def list_models(request: Request) -> Response:
        return JSONResponse(model_list(list(models.prompt_builders), created))

    async def one_model(request: Request) -> Response:
        name = _known_model(request.path_params["name"], models.prompt_builders)
        return JSONResponse(model_list([name], created)["data"][0])

    async def page(request: Request) -> Response:
        _check_host(request, limits.local_only)
        return page_response

    async def page_models(request: Request) -> Response:
        content = {
            "models": [page_model(name, builder) for name, builder in models.prompt_builders.items()],
            "max_new_tokens": limits.defaults.max_new_tokens,
            "max_new_tokens_limit": limits.max_new_tokens_limit,
            "temperature": limits.defaults.temperature,
        }
        return JSONResponse(content)

    async def health(request: Request) -> Response:
        return JSONResponse({"status": "ok"})

    return Starlette(
        routes=[
            Route("/v1/chat/completions", guarded(chat), methods=["POST"]),
            Route("/v1/completions", guarded(completions), methods=["POST"]),
            Route("/v1/models", guarded(list_models), methods=["GET"]),
            Route("/v1/models/{name:path}", guarded(one_model), methods=["GET"]),
            Route("/", page, methods=["GET"]),
            Route("/page.json", guarded(page_models), methods=["GET"]),
            Route("/health", health, methods=["GET"]),
        ],
        exception_handlers={
            RequestError: _on_request_error,
            HTTPException: _on_http_error,
            Exception: _on_bug,
        },
        lifespan=lifespan,
    )


async def _on_request_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestError)
    return JSONResponse(error.body, status_code=error.status, headers=error.headers)


async def _on_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = f"{request.method} {request.url.path}: {error.detail}"
    return JSONResponse(
        RequestError(error.status_code, message).body, status_code=error.status_code, headers=error.headers
    )


async def _on_bug(request: Request, error: Exception) -> Response:
    log.error("%s %s failed", request.method, request.url.path, exc_info=error)
    return JSONResponse(_internal_error().body, status_code=500)


def _internal_error() -> RequestError:
    return RequestError(500, "internal server error; the server's output has the traceback")


def _check_host(request: Request, local_only: bool) -> None:
    if local_only and not names_this_machine(request.headers.get("host", "")):
        raise RequestError(403, "this server only serves its own machine: use 127.0.0.1 or localhost")


def _check_key(request: Request, key: str | None) -> None:
    if key is None:
        return
    scheme, _, token = request.headers.get("authorization", "").partition(" ")
    token_bytes = token.strip().encode("latin-1", "replace")
    if scheme.lower() != "bearer" or not hmac.compare_digest(token_bytes, key.encode()):
        challenge = 'Bearer realm="yeonma"' + (', error="invalid_token"' if token else "")
        raise RequestError(
            401,
            "the API key is missing or wrong",
            code="invalid_api_key",
            headers={"WWW-Authenticate": challenge},
        )


def _known_model(name: str, prompt_builders: Mapping[str, PromptBuilder]) -> str:
    if name not in prompt_builders:
        message = f"there is no model {name[:100]!r}; there are {', '.join(prompt_builders)}"
        raise RequestError(404, message, param="model", code="model_not_found")
    return name


async def _complete(
    http_request: Request, kind: type[ChatRequest] | type[TextRequest], models: Models, limits: Limits
) -> Response:
    # browsers send other content types across sites without a preflight request
    if http_request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise RequestError(415, "the request's Content-Type must be application/json")
    if http_request.headers.get("content-encoding", "identity").lower() != "identity":
        raise RequestError(
            415, "the request's body must not be compressed", headers={"Accept-Encoding": "identity"}
        )
    loop = asyncio.get_running_loop()
    body = await _body(http_request)
    try:
        async with models.preparing.turn(len(body)):
            if await http_request.is_disconnected():
                raise RequestError(400, "the client disconnected")
            request = read_request(body, kind)
            settings = answer_settings(request, limits.defaults, limits.max_new_tokens_limit)
            prompt_builder = models.prompt_builders[_known_model(request.model, models.prompt_builders)]
            asked = await loop.run_in_executor(
                models.tokenizing,
                partial(_asked, request, settings.max_new_tokens, prompt_builder, models, limits.positions),
            )
    except Full as error:
        raise _busy(error) from None
    events: Events = asyncio.Queue()

    def notifier(index: int) -> Callable[[Event], None]:
        def notify(event: Event) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(events.put_nowait, (index, event))

        return notify

    scored, echoes = request.scored_tokens, isinstance(request, TextRequest) and request.echo
    jobs = [
        Job(
            request.model,
            prompt,
            replace(settings, seed=seed_of_choice(settings.seed, choice)),
            tuple(request.stop),
            request.stream,
            notifier(index * request.n + choice),
            request.changes,
            asked.grammar,
            scored,
            scores_prompt=echoes and scored is not None and choice == 0,
        )
        for index, prompt in enumerate(asked.prompts)
        for choice in range(request.n)
    ]
    try:
        models.worker.submit(jobs)
    except Busy as error:
        raise _busy(error) from None
    find_calls = _call_finder(request, prompt_builder)
    writer = ResponseWriter.of(request, asked.sent, TokenNames.of(prompt_builder.tokenizer))
    # prompts are never shortened silently
    headers = {"Yeonma-Shortened": "true"} if any(prompt.shortened for prompt in asked.prompts) else None
    if request.stream:
        chunks = _streamed(writer, jobs, events, find_calls)
        return StreamingResponse(chunks, headers=headers, media_type="text/event-stream")
    replies, scored_prompts = await _replies(http_request, jobs, events)
    replies = [_with_calls(reply, find_calls) for reply in replies]
    by_prompt = {index // request.n: prompt for index, prompt in scored_prompts.items()}
    return JSONResponse(writer.complete(replies, by_prompt), headers=headers)


def _busy(error: Exception) -> RequestError:
    message = f"{error}: try again later"
    return RequestError(429, message, code="rate_limit_exceeded", headers={"Retry-After": "1"})


def _call_finder(request: ChatRequest | TextRequest, prompt_builder: PromptBuilder) -> FindCalls | None:
    """The function that finds tool calls in the answers to a request; None if it offers no tools."""
    if not isinstance(request, ChatRequest) or not request.offers_tools:
        return None
    find_calls = prompt_builder.find_calls
    if find_calls is None or request.parallel_tool_calls:
        return find_calls

    def find_first(text: str) -> tuple[str, tuple[ToolCall, ...]]:
        rest, calls = find_calls(text)
        return rest, calls[:1]

    return find_first


def _with_calls(reply: Reply, find_calls: FindCalls | None) -> Reply:
    """The reply with the tool calls in its text apart."""
    if find_calls is None:
        return reply
    text, calls = find_calls(reply.text)
    return replace(reply, text=text, tool_calls=calls)


async def _body(request: Request) -> bytes:
    too_large = partial(
        RequestError, 413, f"the request is larger than {MAX_BODY_BYTES:,} bytes", code="request_too_large"
    )
    length = request.headers.get("content-length", "")
    if "expect" in request.headers and length.isdecimal() and int(length) > MAX_BODY_BYTES:
        # the client waits for permission to send; what it sends next need not be the body
        raise too_large(headers={"Connection": "close"})
    parts, size = [], 0
    try:
        async for part in request.stream():
            size += len(part)
            if size <= MAX_BODY_BYTES:
                parts.append(part)
    except ClientDisconnect:
        raise RequestError(400, "the request ended too early") from None
    if size > MAX_BODY_BYTES:
        raise too_large()
    return b"".join(parts)


def _asked(
    request: ChatRequest | TextRequest,
    max_new_tokens: int,
    prompt_builder: PromptBuilder,
    models: Models,
    positions: int | None,
) -> Asked:
    """The request's prompts as token ids, and the grammar of its answers. Raises RequestError if they do not fit the
    template or the model."""
    prompts = _prompts(request, max_new_tokens, prompt_builder, positions)
    vocabulary = len(prompt_builder.tokenizer)
    if any(token_id >= vocabulary for token_id, _ in request.changes.logit_bias):
        raise RequestError(400, f"logit_bias: this model has {vocabulary} tokens", param="logit_bias")
    sent = [SentPrompt("", prompt.token_ids.tolist()) for prompt in prompts]
    if isinstance(request, TextRequest) and request.echo:
        names = TokenNames.of(prompt_builder.tokenizer)
        sent = [
            replace(prompt, text=given if isinstance(given, str) else names.joined(given))
            for prompt, given in zip(sent, request.prompt, strict=True)
        ]
    return Asked(prompts, sent, _grammar(request, prompt_builder, models.vocabularies))


def _grammar(
    request: ChatRequest | TextRequest,
    prompt_builder: PromptBuilder,
    vocabularies: dict[str, JsonVocabulary],
) -> JsonGrammar | None:
    """What the answers must follow. Raises RequestError if that is not possible."""
    schema = request.schema_of_answer
    if schema is None:
        return None
    try:
        vocabulary = vocabularies.get(request.model)
        if vocabulary is None:
            vocabulary = JsonVocabulary.of(prompt_builder.tokenizer, prompt_builder.stop_ids)
            vocabularies[request.model] = vocabulary
        return vocabulary.grammar(schema)
    except UserError as error:
        raise RequestError(400, str(error), param="response_format", code=UNSUPPORTED) from None


def _prompts(
    request: ChatRequest | TextRequest,
    max_new_tokens: int,
    prompt_builder: PromptBuilder,
    positions: int | None,
) -> list[Prompt]:
    """The request's prompts as token ids. Raises RequestError if they do not fit the template or the model."""
    try:
        if isinstance(request, ChatRequest):
            template = prompt_builder.adapter.template
            chat_template = base_chat_template(prompt_builder.tokenizer) if template.takes_turns else ""
            request = for_template(request, chat_template)
            row = row_of_messages(template, request.messages, request)
            texts = texts_in([value for name, value in row.values.items() if name not in NO_TEXTS])
            check_length(texts, prompt_builder.tokenizer, positions, "messages")
            prompts = prompt_builder.prompts([row], max_new_tokens=max_new_tokens)
        else:
            for prompt in request.prompt:
                check_length(texts_in(prompt), prompt_builder.tokenizer, positions, "prompt")
            prompts = [_text_prompt(prompt_builder, prompt) for prompt in request.prompt]
    except UserError as error:
        param = "messages" if isinstance(request, ChatRequest) else "prompt"
        raise RequestError(400, str(error), param=param) from None
    longest = max(len(prompt.token_ids) for prompt in prompts)
    if positions is not None and longest + max_new_tokens > positions:
        prompt = f"a prompt of {counted_in_english(longest, 'token')}"
        message = (
            f"{prompt} and {max_new_tokens} new ones exceed the model's {positions} positions: shorten the prompt or "
            "lower max_tokens"
        )
        raise RequestError(400, message, param="max_tokens", code="context_length_exceeded")
    return prompts


def _text_prompt(prompt_builder: PromptBuilder, prompt: str | list[int]) -> Prompt:
    """A prompt of text, or of token ids, which stay as they are."""
    if isinstance(prompt, str):
        return prompt_builder.text_prompt(prompt)
    size = len(prompt_builder.tokenizer)
    if max(prompt) >= size:
        raise RequestError(400, f"prompt: token {max(prompt)}: this model has {size} tokens", param="prompt")
    return Prompt(np.array(prompt, dtype=np.int32))


async def _replies(
    request: Request, jobs: Sequence[Job], events: Events
) -> tuple[list[Reply], dict[int, ScoredPrompt]]:
    """The replies to all jobs, and the scored prompts. If the client disconnects, the jobs are cancelled."""
    replies: dict[int, Reply] = {}
    prompts: dict[int, ScoredPrompt] = {}
    watcher = asyncio.ensure_future(_cancel_on_disconnect(request, jobs, events))
    try:
        while len(replies) < len(jobs):
            index, event = await events.get()
            if isinstance(event, Exception):
                raise _worker_error(event)
            if isinstance(event, Reply):
                replies[index] = event
            if isinstance(event, ScoredPrompt):
                prompts[index] = event
    except BaseException:
        _cancel(jobs)
        raise
    finally:
        watcher.cancel()
    return [replies[index] for index in range(len(jobs))], prompts


async def _cancel_on_disconnect(request: Request, jobs: Sequence[Job], events: Events) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
    _cancel(jobs)
    events.put_nowait((0, Busy("the client disconnected")))


def _cancel(jobs: Sequence[Job]) -> None:
    for job in jobs:
        job.cancelled.set()


async def _streamed(
    writer: ResponseWriter,
    jobs: Sequence[Job],
    events: Events,
    find_calls: FindCalls | None,
) -> AsyncIterator[str]:
    """The answers as server-sent events, with text as it is generated. An answer that may contain tool calls is sent
    when it is complete."""
    tokens, running = 0, len(jobs)
    scores: dict[int, ScoredTokens] = {}
    scored_prompts: set[int] = set()
    try:
        for chunk in writer.stream_start():
            yield _event(chunk)
        while running:
            index, event = await events.get()
            if isinstance(event, Exception):
                yield _event(_worker_error(event).body)
                return
            if isinstance(event, Reply):
                event = _with_calls(event, find_calls)
                if find_calls is not None and event.text:
                    yield _event(writer.stream_text(event.text, index))
                yield _event(writer.stream_end(event, index))
                tokens += len(event.token_ids)
                running -= 1
            elif isinstance(event, ScoredPrompt) and index not in scored_prompts:
                scored_prompts.add(index)  # again after memory ran out
                for chunk in writer.stream_prompt(index // writer.request.n, event):
                    yield _event(chunk)
            elif isinstance(event, tuple):
                scores[index] = event
            elif isinstance(event, str) and find_calls is None:
                yield _event(writer.stream_text(event, index, scores.pop(index, ())))
            elif isinstance(event, ReasoningText) and writer.is_chat:
                yield _event(writer.stream_reasoning(event, index))
        for chunk in writer.stream_usage(tokens):
            yield _event(chunk)
        yield "data: [DONE]\n\n"
    finally:
        _cancel(jobs)


def _worker_error(error: Exception) -> RequestError:
    if isinstance(error, Busy | PromptTooLarge):
        return RequestError(503, str(error))
    if isinstance(error, GrammarFailed):
        return RequestError(500, str(error))
    log.error(tr("an answer failed"), exc_info=error)
    return _internal_error()


def _event(value: dict[str, Any]) -> str:
    # ASCII only: some clients treat U+2028 and the like as line breaks
    return f"data: {json.dumps(value)}\n\n"
