"""The web application around a worker: routes, the key, bounds on what comes in. On Starlette."""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from yeonma.adapter.prompt_builder import Prompt, PromptBuilder
from yeonma.config.settings import AnswerSettings
from yeonma.errors import UserError
from yeonma.serve.openai_api import Asking, Form, Refused, Reply, model_list, read_request, row_of_messages
from yeonma.serve.worker import Busy, Job, NoRoom, Worker

MOST_BYTES = 1_000_000
"""Of a request's body."""
READ_BYTES = 64_000_000
"""Of a larger one that are read to no use, so that its sender, who listens only afterwards, learns why."""
MOST_TEXTS = 64
"""That one completion's request may ask to continue."""
LOCAL = ("127.0.0.1", "localhost", "::1")

log = logging.getLogger("yeonma.serve")


@dataclass(frozen=True)
class Bounds:
    """What requests may have."""

    usual: AnswerSettings
    """Where they do not say."""
    max_new_tokens_limit: int
    positions: int | None
    """Of the model: prompt and answer together."""
    key: str | None
    local: bool
    """Whether requests come from this machine alone. Then a name of another one shows a page in a browser that must not
    get here (DNS rebinding)."""


@dataclass(frozen=True)
class Models:
    """What can be asked, by the names in requests, and the thread that answers."""

    askers: Mapping[str, PromptBuilder]
    worker: Worker
    tokenizing: ThreadPoolExecutor
    """Of one thread: not every tokenizer bears two."""


Lifespan = Callable[[Starlette], AbstractAsyncContextManager[None]]
Events = asyncio.Queue[tuple[int, str | Reply | Exception]]
"""What is told of a request's questions, by their index."""


def make_app(models: Models, bounds: Bounds, lifespan: Lifespan | None = None) -> Starlette:
    """`/v1/chat/completions`, `/v1/completions` and `/v1/models`, which want the key, and `/health`."""
    created = int(time.time())

    def guarded(answer: Callable[[Request], Awaitable[Response]]) -> Callable[[Request], Awaitable[Response]]:
        async def endpoint(request: Request) -> Response:
            _check_host(request, bounds.local)
            _check_key(request, bounds.key)
            return await answer(request)

        return endpoint

    async def chat(request: Request) -> Response:
        return await _complete(request, models, bounds, chat=True)

    async def completions(request: Request) -> Response:
        return await _complete(request, models, bounds, chat=False)

    async def list_models(request: Request) -> Response:
        return JSONResponse(model_list(list(models.askers), created))

    async def one_model(request: Request) -> Response:
        name = _known(request.path_params["name"], models.askers)
        return JSONResponse(model_list([name], created)["data"][0])

    async def health(request: Request) -> Response:
        return JSONResponse({"status": "ok"})

    return Starlette(
        routes=[
            Route("/v1/chat/completions", guarded(chat), methods=["POST"]),
            Route("/v1/completions", guarded(completions), methods=["POST"]),
            Route("/v1/models", guarded(list_models), methods=["GET"]),
            Route("/v1/models/{name:path}", guarded(one_model), methods=["GET"]),
            Route("/health", health, methods=["GET"]),
        ],
        exception_handlers={Refused: _refused, HTTPException: _http, Exception: _bug},
        lifespan=lifespan,
    )


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, Refused)
    headers = {"Retry-After": "1"} if error.status == 429 else None
    return JSONResponse(error.body, status_code=error.status, headers=headers)


async def _http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    what = f"{request.method} {request.url.path}: {error.detail}"
    return JSONResponse(
        Refused(error.status_code, what).body, status_code=error.status_code, headers=error.headers
    )


async def _bug(request: Request, error: Exception) -> Response:
    log.error("%s %s failed", request.method, request.url.path, exc_info=error)
    return JSONResponse(Refused(500, "the server failed; its output says how").body, status_code=500)


def _check_host(request: Request, local: bool) -> None:
    try:
        name = urlsplit(f"//{request.headers.get('host', '')}").hostname
    except ValueError:
        name = None
    if local and name not in LOCAL:
        raise Refused(403, "this server is for this machine alone: ask for it as 127.0.0.1 or localhost")


def _check_key(request: Request, key: str | None) -> None:
    if key is None:
        return
    scheme, _, given = request.headers.get("authorization", "").partition(" ")
    given_bytes = given.strip().encode("latin-1", "replace")
    if scheme.lower() != "bearer" or not hmac.compare_digest(given_bytes, key.encode()):
        raise Refused(401, "a key is needed, and this is not it", code="invalid_api_key")


def _known(name: str, askers: Mapping[str, PromptBuilder]) -> str:
    if name not in askers:
        what = f"there is no model {name[:100]!r}; there are {', '.join(askers)}"
        raise Refused(404, what, param="model", code="model_not_found")
    return name


async def _complete(request: Request, models: Models, bounds: Bounds, *, chat: bool) -> Response:
    # browsers send other types to other sites without asking them first
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise Refused(415, "the request's Content-Type must be application/json")
    content = await _body(request)
    asking = read_request(content, chat=chat, usual=bounds.usual, limit=bounds.max_new_tokens_limit)
    asker = models.askers[_known(asking.model, models.askers)]
    questions = await asyncio.get_running_loop().run_in_executor(
        models.tokenizing, _questions, asking, asker, bounds.positions
    )
    events: Events = asyncio.Queue()
    loop = asyncio.get_running_loop()

    def teller(index: int) -> Callable[[str | Reply | Exception], None]:
        def tell(event: str | Reply | Exception) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(events.put_nowait, (index, event))

        return tell

    jobs = [
        Job(asking.model, question, asking.how, asking.stops, asking.stream, teller(index))
        for index, question in enumerate(questions)
    ]
    try:
        models.worker.put(jobs)
    except Busy as error:
        raise Refused(429, f"{error}: ask again later", code="rate_limit_exceeded") from None
    form, prompts = Form.of(asking), [question.token_ids.tolist() for question in questions]
    # nothing is cut without a word
    headers = {"Yeonma-Shortened": "true"} if any(question.shortened for question in questions) else None
    if asking.stream:
        parts = _streamed(form, jobs, events, sum(map(len, prompts)))
        return StreamingResponse(parts, headers=headers, media_type="text/event-stream")
    return JSONResponse(form.whole(await _replies(request, jobs, events), prompts), headers=headers)


async def _body(request: Request) -> bytes:
    refused = Refused(413, f"the request is larger than {MOST_BYTES:,} bytes", code="request_too_large")
    length = request.headers.get("content-length", "")
    if "expect" in request.headers and length.isdecimal() and int(length) > MOST_BYTES:
        raise refused  # its sender waits for leave
    parts, size = [], 0
    try:
        async for part in request.stream():
            size += len(part)
            if size > READ_BYTES:
                break
            if size <= MOST_BYTES:
                parts.append(part)
    except ClientDisconnect:
        raise Refused(400, "the request ended too early") from None
    if size > MOST_BYTES:
        raise refused
    return b"".join(parts)


def _questions(asking: Asking, asker: PromptBuilder, positions: int | None) -> list[Prompt]:
    """What the model is asked, as token ids. Raises Refused for what the template, or the model, has no room for."""
    room = asking.how.max_new_tokens
    try:
        if asking.chat:
            row = row_of_messages(asker.adapter.template, asking.prompt)
            questions = asker.questions([row], max_new_tokens=room)
        else:
            if len(asking.prompt) > MOST_TEXTS:
                raise Refused(400, f"more than {MOST_TEXTS} prompts", param="prompt")
            questions = [asker.text_question(text) for text in asking.prompt]
    except UserError as error:
        raise Refused(400, str(error), param="messages" if asking.chat else "prompt") from None
    longest = max(len(question.token_ids) for question in questions)
    if positions is not None and longest + room > positions:
        what = f"{longest} tokens and {room} new ones are more than the model's {positions}: ask for less"
        raise Refused(400, what, param="max_tokens", code="context_length_exceeded")
    return questions


async def _replies(request: Request, jobs: Sequence[Job], events: Events) -> list[Reply]:
    """All answers; whoever hangs up is not worked for."""
    found: dict[int, Reply] = {}
    watcher = asyncio.ensure_future(_hung_up(request, jobs, events))
    try:
        while len(found) < len(jobs):
            index, event = await events.get()
            if isinstance(event, Exception):
                raise _failed(event)
            if isinstance(event, Reply):
                found[index] = event
    except BaseException:
        _leave(jobs)
        raise
    finally:
        watcher.cancel()
    return [found[index] for index in range(len(jobs))]


async def _hung_up(request: Request, jobs: Sequence[Job], events: Events) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
    _leave(jobs)
    events.put_nowait((0, Busy("nobody waits any more")))


def _leave(jobs: Sequence[Job]) -> None:
    for job in jobs:
        job.gone.set()


async def _streamed(
    form: Form, jobs: Sequence[Job], events: Events, prompt_tokens: int
) -> AsyncIterator[str]:
    """The answers as server-sent events, text as it comes."""
    tokens, left = 0, len(jobs)
    try:
        for each in form.first():
            yield _event(each)
        while left:
            index, event = await events.get()
            if isinstance(event, Exception):
                yield _event(_failed(event).body)
                return
            if isinstance(event, Reply):
                yield _event(form.last(event, index))
                tokens += len(event.token_ids)
                left -= 1
            else:
                yield _event(form.part(event, index))
        for each in form.usage(prompt_tokens, tokens):
            yield _event(each)
        yield "data: [DONE]\n\n"
    finally:
        _leave(jobs)


def _failed(error: Exception) -> Refused:
    if isinstance(error, Busy | NoRoom):
        return Refused(503, str(error))
    log.error("an answer failed", exc_info=error)
    return Refused(500, "the server failed; its output says how")


def _event(value: dict[str, Any]) -> str:
    # ASCII alone: some clients take U+2028 and its like for the end of a line
    return f"data: {json.dumps(value)}\n\n"
