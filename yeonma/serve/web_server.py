"""uvicorn's server behind the connections of this room, for any application. No torch here."""

from __future__ import annotations

import asyncio
import math
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from yeonma.errors import Log
from yeonma.serve.connections import AsgiApp, ConnectionLimits, Connections

GRACE_SECONDS = 3
"""Time for running answers to finish when the server shuts down."""


def make_server(app: AsgiApp, limits: ConnectionLimits, log: Log) -> tuple[uvicorn.Server, Connections]:
    """uvicorn's server, to run without sockets of its own, and the connections that it serves instead. The
    application's lifespan starts and closes them."""
    config = uvicorn.Config(
        app,
        http="h11",  # whatever else is installed
        loop="asyncio",
        ws="none",
        log_config=None,
        log_level="critical",  # the app logs its own errors
        access_log=False,
        proxy_headers=False,
        server_header=False,
        timeout_keep_alive=math.ceil(limits.keep_alive + limits.head)
        + 1,  # the connections' own limits come first
        timeout_graceful_shutdown=10
        * GRACE_SECONDS,  # a client that reads nothing must not block the shutdown
        lifespan="on",
    )
    server = uvicorn.Server(config)

    def make_protocol(state: dict[str, Any]) -> asyncio.Protocol:
        return H11Protocol(config, server.server_state, state)

    return server, Connections(limits, make_protocol, log)
