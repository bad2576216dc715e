"""The web application: routes, and the stream of what changes on a run's page."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response, StreamingResponse
from starlette.routing import Route

from yeonma.errors import UserError
from yeonma.messages import tr
from yeonma.studio.data_page import DataChoice, data_page
from yeonma.studio.found_runs import FoundRun, key_of, read_run, signature
from yeonma.studio.home_page import home_page
from yeonma.studio.roots import Found, Roots
from yeonma.studio.run_control import RunControl
from yeonma.studio.run_page import live_parts, run_page
from yeonma.studio.studio_page import DATA_PATH, TOKENS_PATH, message_page
from yeonma.studio.token_views import TokenViews
from yeonma.studio.tokens_page import TokenChoice, tokens_page

POLL_SECONDS = 1.0
"""How often a run's folder is looked at while its page is open."""
QUIET_SECONDS = 15.0
"""After so long without news a comment is sent, by which a browser that is gone is noticed."""
LOOK_SECONDS = 2.0
"""How long what a look at the roots found is taken for what is there."""
MOST_STREAMS = 64
"""Pages of runs that are kept up to date at once."""

log = logging.getLogger("yeonma.studio")
StudioLifespan = Callable[[Starlette], AbstractAsyncContextManager[None]]


@dataclass
class Studio:
    """What the pages are made of."""

    roots: Roots
    control: RunControl
    views: TokenViews
    ending: Callable[[], bool] = lambda: False
    """Whether the server is about to end, which ends the streams."""
    streams: int = 0
    _found: Found = field(default_factory=Found)
    _looked: float = float("-inf")

    def found(self) -> Found:
        """What lies below the roots, a moment ago."""
        if monotonic() - self._looked > LOOK_SECONDS:
            self._found, self._looked = self.roots.look(), monotonic()
        return self._found

    def run(self, key: str) -> FoundRun:
        """The run with that key. Raises HTTPException if there is none, or if its folder has left the roots."""
        folder = next((one for one in self.found().runs if key_of(one) == key), None)
        if folder is None or not self._is_there(folder):
            raise HTTPException(404, tr("There is no such run: its folder was moved or deleted."))
        return read_run(folder)

    def _is_there(self, folder: Path) -> bool:
        try:
            return folder.resolve(strict=True) == folder and self.roots.hold(folder)
        except (OSError, RuntimeError):
            return False


def make_studio_app(studio: Studio, lifespan: StudioLifespan | None = None) -> Starlette:
    """The pages. Access to them is checked before (`Access.guard`)."""

    def page(make: Callable[[Request], Response]) -> Callable[[Request], Awaitable[Response]]:
        async def endpoint(request: Request) -> Response:
            return await run_in_threadpool(make, request)

        return endpoint

    def home(request: Request) -> Response:
        found = studio.found()
        return home_page(studio.roots, list(map(read_run, found.runs)), is_whole=found.is_whole)

    def data(request: Request) -> Response:
        return data_page(studio.roots, studio.found(), DataChoice.of(request.query_params))

    def tokens(request: Request) -> Response:
        choice = TokenChoice.of(request.query_params)
        return tokens_page(studio.roots, studio.found(), choice, studio.views)

    def one_run(request: Request) -> Response:
        return run_page(studio.roots, studio.run(request.path_params["key"]), studio.control)

    def change(action: Callable[[FoundRun], None]) -> Callable[[Request], Response]:
        def answer(request: Request) -> Response:
            run = studio.run(request.path_params["key"])
            try:
                action(run)
            except UserError as error:
                return run_page(studio.roots, run, studio.control, problem=str(error))
            return RedirectResponse(f"/run/{run.key}", status_code=303)

        return answer

    async def events(request: Request) -> Response:
        run = await run_in_threadpool(studio.run, request.path_params["key"])
        if request.method == "HEAD":
            return Response(media_type="text/event-stream")
        if studio.streams >= MOST_STREAMS:
            raise HTTPException(503, tr("Too many pages of runs are open: close some of them."))
        return StreamingResponse(_changes(studio, run.folder), media_type="text/event-stream")

    return Starlette(
        routes=[
            Route("/", page(home), methods=["GET"]),
            Route(DATA_PATH, page(data), methods=["GET"]),
            Route(TOKENS_PATH, page(tokens), methods=["GET"]),
            Route("/run/{key}", page(one_run), methods=["GET"]),
            Route("/run/{key}/events", events, methods=["GET"]),
            Route("/run/{key}/stop", page(change(studio.control.stop)), methods=["POST"]),
            Route("/run/{key}/resume", page(change(studio.control.resume)), methods=["POST"]),
        ],
        exception_handlers={HTTPException: _on_http_error, Exception: _on_bug},
        lifespan=lifespan,
    )


async def _changes(studio: Studio, folder: Path) -> AsyncIterator[str]:
    """The parts of a run's page that have changed, as server-sent events, from all parts on."""
    sent: dict[str, str] = {}
    seen: object = None
    told = monotonic()
    studio.streams += 1
    try:
        while not studio.ending():
            now, parts = await run_in_threadpool(_parts_if_changed, studio, folder, seen)
            seen = now
            changed = {name: content for name, content in parts.items() if sent.get(name) != content}
            if changed:
                sent |= changed
                told = monotonic()
                yield f"data: {json.dumps(changed)}\n\n"
            elif monotonic() - told > QUIET_SECONDS:
                told = monotonic()
                yield ": \n\n"
            await asyncio.sleep(POLL_SECONDS)
    finally:
        studio.streams -= 1


def _parts_if_changed(studio: Studio, folder: Path, seen: object) -> tuple[object, dict[str, str]]:
    """What tells the folder's state, and the parts of its page, which are not made if that is still the same."""
    run = read_run(folder)
    control = studio.control
    now = (signature(folder), run.state, control.is_stopping(run), control.is_starting(run))
    return now, {} if now == seen else live_parts(run, control)


async def _on_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    known = {404: tr("There is no such page."), 405: tr("This page does not take such a request.")}
    is_plain = error.detail in ("Not Found", "Method Not Allowed")
    response = message_page(error.status_code, known[error.status_code] if is_plain else error.detail)
    for name, value in (error.headers or {}).items():
        response.headers[name] = value
    return response


async def _on_bug(request: Request, error: Exception) -> Response:
    log.error("%s %s failed", request.method, request.url.path, exc_info=error)
    return message_page(500, tr("This page failed; the studio's output in the terminal has the reason."))
