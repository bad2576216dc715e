"""The web application around a worker: routes, the key, bounds on what comes in. Starlette's, run by uvicorn."""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from yeonma.after.api import Asking, Form, Refused, Reply, model_list, read_request, row_of_messages
from yeonma.after.worker import Busy, Job, Worker
from yeonma.errors import UserError
from yeonma.model.ask import Asker, Question

MOST_BYTES = 1_000_000
"""Of a request's body."""
MOST_TEXTS = 64
"""That one completion's request may ask to continue."""

log = logging.getLogger("yeonma.serve")


@dataclass(frozen=True)
class Bounds:
    most_new_tokens: int
    positions: Mapping[str, int | None]  # by model: prompt and answer together
    key: str | None
    hosts: Sequence[str] = field(default=("*",))  # names under which a browser may call


def make_app(askers: Mapping[str, Asker], worker: Worker, bounds: Bounds) -> Starlette:
    """`/v1/chat/completions`, `/v1/completions`, `/v1/models` and `/health`; the first three want the key."""
    created = int(time.time())

    def guarded(answer: Callable[[Request], Awaitable[Response]]) -> Callable[[Request], Awaitable[Response]]:
        async def endpoint(request: Request) -> Response:
            _check_key(request, bounds.key)
            return await answer(request)

        return endpoint

    async def chat(request: Request) -> Response:
        return await _complete(request, askers, worker, bounds, chat=True)

    async def completions(request: Request) -> Response:
        return await _complete(request, askers, worker, bounds, chat=False)

    async def models(request: Request) -> Response:
        return JSONResponse(model_list(list(askers), created))

    async def health(request: Request) -> Response:
        return JSONResponse({"status": "ok"})

    return Starlette(
        routes=[
            Route("/v1/chat/completions", guarded(chat), methods=["POST"]),
            Route("/v1/completions", guarded(completions), methods=["POST"]),
            Route("/v1/models", guarded(models), methods=["GET"]),
            Route("/health", health, methods=["GET"]),
        ],
        exception_handlers={Refused: _refused, HTTPException: _http, Exception: _bug},
        # a page in a browser must not reach a server on this machine by a name of its own
        middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=list(bounds.hosts), www_redirect=False)],
    )


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, Refused)
    headers = {"Retry-After": "1"} if error.status == 429 else None
    return JSONResponse(error.body, status_code=error.status, headers=headers)


async def _http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    what = f"{request.method} {request.url.path}: {error.detail}"
    return JSONResponse(Refused(error.status_code, what).body, status_code=error.status_code, headers=error.headers)


async def _bug(request: Request, error: Exception) -> Response:
    return JSONResponse(Refused(500, "the server failed; its output says how").body, status_code=500)


def _check_key(request: Request, key: str | None) -> None:
    if key is None:
        return
    scheme, _, given = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() != "bearer" or not hmac.compare_digest(given.strip().encode(), key.encode()):
        raise Refused(401, "a key is needed, and this is not it", code="invalid_api_key")


async def _complete(
    request: Request, askers: Mapping[str, Asker], worker: Worker, bounds: Bounds, *, chat: bool
) -> Response:
    # browsers send other types to other sites without asking them first
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise Refused(415, "the request's Content-Type must be application/json")
    asking = read_request(await _body(request), chat=chat, most_new_tokens=bounds.most_new_tokens)
    if asking.model not in askers:
        what = f"there is no model {asking.model[:100]!r}; there are {', '.join(askers)}"
        raise Refused(404, what, param="model", code="model_not_found")
    questions = await asyncio.to_thread(
        _questions, asking, askers[asking.model], bounds.positions[asking.model]
    )
    events: asyncio.Queue[tuple[int, str | Reply | Exception]] = asyncio.Queue()
    loop = asyncio.get_running_loop()

    def teller(index: int) -> Callable[[str | Reply | Exception], None]:
        def tell(event: str | Reply | Exception) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(events.put_nowait, (index, event))

        return tell

    jobs = [
        Job(asking.model, question, asking.how, asking.stream, teller(index))
        for index, question in enumerate(questions)
    ]
    try:
        worker.put(jobs)
    except Busy as error:
        raise Refused(429, f"{error}: ask again later", code="rate_limit_exceeded") from None
    form, prompt_tokens = Form.of(asking), sum(len(question.token_ids) for question in questions)
    if asking.stream:
        return StreamingResponse(_streamed(form, jobs, events, prompt_tokens), media_type="text/event-stream")
    return JSONResponse(form.whole(await _replies(request, jobs, events), prompt_tokens))


async def _body(request: Request) -> bytes:
    parts, size = [], 0
    try:
        async for part in request.stream():
            size += len(part)
            if size > MOST_BYTES:
                raise Refused(413, f"the request is larger than {MOST_BYTES:,} bytes")
            parts.append(part)
    except ClientDisconnect:
        raise Refused(400, "the request ended too early") from None
    return b"".join(parts)


def _questions(asking: Asking, asker: Asker, positions: int | None) -> list[Question]:
    """What the model is asked, as token ids. Raises Refused for what the template, or the model, has no room for."""
    room = asking.how.max_new_tokens
    try:
        if asking.chat:
            row = row_of_messages(asker.adapter.template, asking.prompt)
            # the fields' own names, whatever the columns were called in training
            questions = asker.questions([row], max_new_tokens=room)
        else:
            if len(asking.prompt) > MOST_TEXTS:
                raise Refused(400, f"more than {MOST_TEXTS} prompts", param="prompt")
            questions = [asker.text_question(text) for text in asking.prompt]
    except UserError as error:
        raise Refused(400, str(error), param="messages" if asking.chat else "prompt") from None
    longest = max(len(question.token_ids) for question in questions)
    if positions is not None and longest + room > positions:
        what = f"{longest} tokens and {room} new ones are more than the model's {positions}: shorten it, or ask for less"
        raise Refused(400, what, param="max_tokens", code="context_length_exceeded")
    return questions


Events = asyncio.Queue[tuple[int, str | Reply | Exception]]


async def _replies(request: Request, jobs: Sequence[Job], events: Events) -> list[Reply]:
    """All answers; whoever hangs up is not worked for."""
    found: dict[int, Reply] = {}
    watcher = asyncio.ensure_future(_hung_up(request, jobs))
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


async def _hung_up(request: Request, jobs: Sequence[Job]) -> None:
    while True:
        message = await request.receive()
        if message["type"] == "http.disconnect":
            _leave(jobs)
            return


def _leave(jobs: Sequence[Job]) -> None:
    for job in jobs:
        job.gone.set()


async def _streamed(form: Form, jobs: Sequence[Job], events: Events, prompt_tokens: int) -> AsyncIterator[str]:
    """The answers as server-sent events, text as it comes."""
    tokens, left = 0, len(jobs)
    shown = [""] * len(jobs)
    try:
        for each in form.first():
            yield _event(each)
        while left:
            index, event = await events.get()
            if isinstance(event, Exception):
                yield _event(_failed(event).body)
                return
            if isinstance(event, Reply):
                # what streaming held back, in case it was the frame's
                rest = event.text.removeprefix(shown[index].strip()) if shown[index] else event.text
                if not shown[index] and rest:
                    yield _event(form.part(rest, index))
                yield _event(form.last(event, index))
                tokens += event.tokens
                left -= 1
            else:
                shown[index] += event
                yield _event(form.part(event, index))
        for each in form.usage(prompt_tokens, tokens):
            yield _event(each)
        yield "data: [DONE]\n\n"
    finally:
        _leave(jobs)


def _failed(error: Exception) -> Refused:
    if isinstance(error, UserError | Busy):
        return Refused(503, str(error))
    log.error("an answer failed", exc_info=error)
    return Refused(500, "the server failed; its output says how")


def _event(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"
