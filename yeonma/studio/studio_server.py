"""The studio on a listening socket."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from starlette.applications import Starlette

from yeonma.errors import Log
from yeonma.serve.bounded_log import limit_log
from yeonma.serve.connections import ConnectionLimits, connection_limit, watched
from yeonma.serve.web_server import make_server
from yeonma.studio.access import Access
from yeonma.studio.studio_app import Studio, make_studio_app

POLL_SECONDS = 0.1


def run_studio(
    studio: Studio, access: Access, listener: socket.socket, on_ready: Callable[[], None], log: Log
) -> None:
    """Serve until SIGINT or SIGTERM. Runs go on. Raises KeyboardInterrupt after SIGINT."""

    async def stop_accepting() -> None:
        while not server.should_exit:
            await asyncio.sleep(POLL_SECONDS)
        connections.stop()

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        stopping = asyncio.create_task(stop_accepting())
        connections.start(listener, lambda: server.should_exit)
        on_ready()
        try:
            yield
        finally:
            stopping.cancel()
            connections.close()
            studio.views.close()

    app = watched(access.guard(make_studio_app(studio, lifespan)))
    server, connections = make_server(app, ConnectionLimits(connection_limit()), log)
    studio.ending = lambda: server.should_exit
    limit_log(("yeonma.studio", "asyncio"))
    server.run(sockets=[])
