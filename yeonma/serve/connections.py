"""The server's connections: how many there are, how long each may take, and that every request is well-formed.

uvicorn has no limits of time for a request that comes slowly and answers a connection too many only once it has sent
one. So this module accepts the connections itself and stands between each and uvicorn's own protocol. When there are
too many, those that have waited longest without a whole request make room: a real question gets in.
"""

from __future__ import annotations

import asyncio
import errno
import json
import os
import socket
from collections import Counter
from collections.abc import Awaitable, Callable, MutableMapping
from contextlib import suppress
from dataclasses import dataclass
from email.utils import formatdate
from enum import Enum
from http import HTTPStatus
from ipaddress import IPv4Address, ip_address, ip_network
from time import monotonic
from typing import Any, cast

from yeonma.errors import Log, system_reason
from yeonma.messages import tr
from yeonma.serve.request_error import RequestError
from yeonma.serve.request_framing import MAX_BODY_BYTES, BadRequest, RequestFraming

MAX_CONNECTIONS = 512
LEAST_CONNECTIONS = 8
ACCEPTED_AT_ONCE = 32
"""The most connections that are accepted before others have their turn; no more than an eighth of their limit."""
WAITING_CONNECTIONS = 1024
"""How many connections the system may hold until they are accepted."""
MAX_HELD_BYTES = 64_000_000
"""Of all bodies that are not complete yet, together."""
MAX_AHEAD_BYTES = 65_536
"""How much of later requests a client may send before its answer is complete."""
OUT_OF_RESOURCES = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
STATE = "connection"
"""The name of a request's connection in its ASGI state."""

AsgiMessage = MutableMapping[str, Any]
AsgiScope = MutableMapping[str, Any]
AsgiReceive = Callable[[], Awaitable[AsgiMessage]]
AsgiSend = Callable[[AsgiMessage], Awaitable[None]]
AsgiApp = Callable[[AsgiScope, AsgiReceive, AsgiSend], Awaitable[None]]


@dataclass(frozen=True)
class ConnectionLimits:
    """How many connections may be open, and what each may take, in seconds."""

    connections: int
    head: float = 10
    """From the connection to the first byte, and from the first byte of a request to the end of its headers."""
    body: float = 10
    """From there to the end of the body, and 1 second more for each `body_rate` bytes that have come."""
    body_rate: int = 16_384
    longest_body: float = 120
    keep_alive: float = 5
    """From an answer to the next request."""
    unread: float = 30
    """How long a client may leave an answer unread that has filled all buffers, or that was the last."""
    linger: float = 2
    """How long what a client still sends is read after its request was refused, so that it sees the refusal."""
    report: float = 60
    """Between two lines in the log about connections that were closed or refused."""


def connection_limit() -> int:
    """Half of the files that the process may still open, at most MAX_CONNECTIONS."""
    import resource

    may_open, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if may_open == resource.RLIM_INFINITY:
        return MAX_CONNECTIONS
    left = may_open - len(os.listdir("/dev/fd"))
    return max(LEAST_CONNECTIONS, min(MAX_CONNECTIONS, left // 2))


class Phase(Enum):
    """What a connection is waiting for."""

    IDLE = "the first byte of a request"
    HEAD = "the rest of the headers"
    BODY = "the rest of the body"
    ANSWER = "the application"
    END = "the client, to read what it was sent"


class Connection(asyncio.Protocol):
    """One connection. `inner` gets well-formed requests, one at a time, and writes to the transport itself."""

    def __init__(self, connections: Connections) -> None:
        self._connections, self._limits = connections, connections.limits
        self._framing = RequestFraming()
        self._is_answered = self._has_begun_answer = False
        self._body_since = 0.0
        self.phase = Phase.IDLE
        self.network: object = None
        """Where the client is, as far as limits go: its address, or its network for IPv6."""
        self._body_bytes = 0
        self.held_bytes = 0
        """What the application holds of a body that is not complete."""
        self.since = monotonic()
        """When the phase began."""
        self.deadline = self.since + self._limits.head
        self._unread_deadline = float("inf")
        self._inner = asyncio.Protocol()
        """One that does nothing, until the first request has come."""
        self._has_inner = False
        self.is_made = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        peer = transport.get_extra_info("peername")
        self.network = _network(str(peer[0])) if peer else None
        self.is_made = True

    def connection_lost(self, error: Exception | None) -> None:
        self._connections.forget(self)
        self._leave_inner(None)

    def data_received(self, content: bytes) -> None:
        if self.phase is Phase.END:
            return  # read so that the client sees the end of its answer
        self._framing.feed(content)
        if self.phase is Phase.ANSWER and self._framing.unread_bytes > MAX_AHEAD_BYTES:
            self.abort()
            return
        self._advance()

    def eof_received(self) -> bool:
        """A client that closes one direction cannot be told from one that is gone: it gets what is written already."""
        self._end(self._limits.unread)
        self._leave_inner(ConnectionAbortedError())
        return False

    def pause_writing(self) -> None:
        self._unread_deadline = monotonic() + self._limits.unread
        self._inner.pause_writing()

    def resume_writing(self) -> None:
        self._unread_deadline = float("inf")
        self._inner.resume_writing()

    @property
    def may_make_room(self) -> bool:
        """Whether it waits for its client, and not the client for an answer."""
        return self.is_made and self.phase is not Phase.ANSWER

    @property
    def is_overdue(self) -> bool:
        return self.is_made and monotonic() > min(self.deadline, self._unread_deadline)

    def end_in_time(self) -> str:
        """Close the connection because a time is over. Returns what to count it as; empty for an ordinary end."""
        if self.phase is Phase.IDLE:
            self._end(self._limits.unread)
            self._transport.close()
            return ""
        if self.phase in (Phase.HEAD, Phase.BODY):
            self._refuse(BadRequest(408, "the request did not come in time"))
        else:
            self.abort()
        return tr("too slow")

    def abort(self) -> None:
        self._connections.forget(self)
        self._transport.abort()

    def answer_begins(self) -> None:
        self._has_begun_answer = True

    def answer_ends(self) -> None:
        self._is_answered = True
        if self._transport.is_closing():
            self._end(self._limits.unread)
        elif self._framing.has_ended:
            self._next_request()

    def _next_request(self) -> None:
        self._framing.next_request()
        self._is_answered = self._has_begun_answer = False
        self._enter(Phase.IDLE, self._limits.keep_alive)
        self._advance()

    def _advance(self) -> None:
        """Pass on what has come, as far as it is well-formed."""
        try:
            while (part := self._framing.take()) is not None:
                if part.begins:
                    self._make_inner()
                    self._enter(Phase.BODY, self._limits.body)
                    self._body_since = self.since
                else:
                    self._count(len(part.content))
                if part.ends:
                    self._enter(Phase.ANSWER, float("inf"))
                self._inner.data_received(part.content)
                if self._transport.is_closing():
                    self._end(self._limits.unread)
                    return
                if part.ends and self._is_answered:
                    self._next_request()
                    return
        except BadRequest as error:
            self._connections.count("malformed")
            self._refuse(error)
            return
        if self.phase is Phase.IDLE and self._framing.unread_bytes:
            self._enter(Phase.HEAD, self._limits.head)

    def _make_inner(self) -> None:
        if not self._has_inner:
            self._has_inner = True
            self._inner = self._connections.make_inner(self)
            self._inner.connection_made(self._transport)

    def _count(self, size: int) -> None:
        self._body_bytes += size
        self._hold(min(self._body_bytes, MAX_BODY_BYTES))
        allowed = self._limits.body + self._body_bytes / self._limits.body_rate
        self.deadline = self._body_since + min(allowed, self._limits.longest_body)

    def _enter(self, phase: Phase, seconds: float) -> None:
        self._body_bytes = 0
        self._hold(0)
        self.phase, self.since = phase, monotonic()
        self.deadline = self.since + seconds

    def _hold(self, size: int) -> None:
        more, self.held_bytes = size - self.held_bytes, size
        self._connections.hold(more)

    def _end(self, seconds: float) -> None:
        self._enter(Phase.END, seconds)

    def _refuse(self, error: BadRequest) -> None:
        """Answer instead of the application, if it has not begun to answer, and close."""
        has_begun = self._has_begun_answer
        self._end(self._limits.linger)
        self._leave_inner(ConnectionAbortedError())
        if has_begun or self._transport.is_closing():
            self._transport.close()
            return
        self._transport.write(refusal(error.status, str(error)))
        try:
            self._transport.write_eof()
        except OSError:  # the client has reset the connection
            self.abort()

    def _leave_inner(self, error: Exception | None) -> None:
        """Tell uvicorn's protocol, once, that the connection is over. Without an error it closes the transport."""
        inner, self._inner = self._inner, asyncio.Protocol()
        inner.connection_lost(error)


class Connections:
    """All connections of a listening socket. `make_protocol` makes uvicorn's protocol for the state of a request."""

    def __init__(
        self, limits: ConnectionLimits, make_protocol: Callable[[dict[str, Any]], asyncio.Protocol], log: Log
    ) -> None:
        self.limits = limits
        self._make_protocol, self._log = make_protocol, log
        self._open: dict[Connection, None] = {}
        """In the order of their beginning."""
        self._opening: set[asyncio.Task[Any]] = set()
        self._held_bytes = 0
        self._counts: Counter[str] = Counter()
        self._reported = float("-inf")
        self._listener: socket.socket | None = None

    @property
    def number(self) -> int:
        return len(self._open)

    def start(self, listener: socket.socket, is_stopping: Callable[[], bool]) -> None:
        """Accept connections, until `stop`, or `is_stopping` says so."""
        listener.setblocking(False)
        listener.listen(WAITING_CONNECTIONS)
        self._listener, self._is_stopping = listener, is_stopping
        self._loop = asyncio.get_running_loop()
        self._accept_again()
        self._sweep()

    def stop(self) -> None:
        """Accept no more, and close the listening socket."""
        if self._listener is not None:
            self._loop.remove_reader(self._listener)
            self._listener.close()
            self._listener = None

    def close(self) -> None:
        """Close all connections at once."""
        self.stop()
        for connection in list(self._open):
            if connection.is_made:
                connection.abort()

    def make_inner(self, connection: Connection) -> asyncio.Protocol:
        return self._make_protocol({STATE: connection})

    def forget(self, connection: Connection) -> None:
        if connection in self._open:
            del self._open[connection]
            self.hold(-connection.held_bytes)
            connection.held_bytes = 0

    def hold(self, size: int) -> None:
        """Count the bytes of bodies that are not complete. Beyond the limit, those that are longest under way end."""
        self._held_bytes += size
        if size > 0 and self._held_bytes > MAX_HELD_BYTES:
            self._make_room([it for it in self._open if it.held_bytes])

    def count(self, what: str) -> None:
        self._counts[what] += 1

    def _accept_again(self) -> None:
        if self._listener is not None:
            self._loop.add_reader(self._listener, self._accept)

    def _accept(self) -> None:
        for _ in range(max(1, min(ACCEPTED_AT_ONCE, self.limits.connections // 8))):
            if self._listener is None:
                return
            if self._is_stopping():
                self.stop()
                return
            try:
                accepted, _ = self._listener.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as error:
                self.count(
                    tr("no file left to open") if error.errno in OUT_OF_RESOURCES else system_reason(error)
                )
                self._make_room([it for it in self._open if it.may_make_room])
                self._loop.remove_reader(self._listener)
                self._loop.call_later(0.2, self._accept_again)
                return
            self._admit(accepted)

    def _admit(self, accepted: socket.socket) -> None:
        if len(self._open) >= self.limits.connections:
            self._make_room([it for it in self._open if it.may_make_room])
        if len(self._open) >= self.limits.connections:  # all of them are being answered
            self.count(tr("refused, because all others were being answered"))
            _say(accepted, refusal(503, "too many requests are being answered: try again later"))
            return
        accepted.setblocking(False)
        connection = Connection(self)
        self._open[connection] = None
        opening = self._loop.create_task(self._loop.connect_accepted_socket(lambda: connection, accepted))
        self._opening.add(opening)

        def opened(task: asyncio.Task[Any]) -> None:
            self._opening.discard(task)
            if task.cancelled() or task.exception() is not None:
                self.forget(connection)
                accepted.close()

        opening.add_done_callback(opened)

    def _make_room(self, candidates: list[Connection]) -> None:
        """Close a few connections: the oldest of the network that has most of them."""
        if not candidates:
            return
        crowds = Counter(it.network for it in candidates)
        candidates.sort(key=lambda it: (-crowds[it.network], it.since))
        for connection in candidates[: max(1, self.limits.connections // 16)]:
            self.count(tr("closed to make room"))
            connection.abort()

    def _sweep(self) -> None:
        if self._listener is not None or self._open:
            self._loop.call_later(min(0.5, self.limits.keep_alive / 4), self._sweep)
        for connection in [it for it in self._open if it.is_overdue]:
            if what := connection.end_in_time():
                self.count(what)
        self._report()

    def _report(self) -> None:
        now = monotonic()
        if self._counts and now - self._reported >= self.limits.report:
            counts = ", ".join(
                tr("{count:,} {what}", count=count, what=what) for what, count in sorted(self._counts.items())
            )
            self._log(
                tr(
                    "connections closed or refused: {counts}; {number} are open",
                    counts=counts,
                    number=self.number,
                )
            )
            self._reported = now
            self._counts.clear()


def watched(app: AsgiApp) -> AsgiApp:
    """The application, whose answers' beginning and end their connection is told."""

    async def watched_app(scope: AsgiScope, receive: AsgiReceive, send: AsgiSend) -> None:
        connection: Connection | None = (scope.get("state") or {}).get(STATE)
        if scope["type"] != "http" or connection is None:
            await app(scope, receive, send)
            return

        async def noticed(message: AsgiMessage) -> None:
            if message["type"] == "http.response.start":
                connection.answer_begins()
            await send(message)
            if message["type"] == "http.response.body" and not message.get("more_body"):
                connection.answer_ends()

        await app(scope, receive, noticed)

    return watched_app


def refusal(status: int, message: str) -> bytes:
    """A whole answer, after which the connection closes."""
    body = json.dumps(RequestError(status, message).body).encode()
    lines = [
        f"HTTP/1.1 {status} {HTTPStatus(status).phrase}",
        f"Date: {formatdate(usegmt=True)}",
        "Content-Type: application/json",
        f"Content-Length: {len(body)}",
        "Connection: close",
    ]
    return "\r\n".join([*lines, "", ""]).encode() + body


def _say(accepted: socket.socket, content: bytes) -> None:
    """Send what fits at once, and close. What has come is read, or the system would not deliver the answer."""
    accepted.setblocking(False)
    with suppress(OSError):
        accepted.send(content)
        accepted.recv(65_536)
    accepted.close()


def _network(address: str) -> object:
    """One client may have all addresses of an IPv6 network."""
    found = ip_address(address.partition("%")[0])
    if isinstance(found, IPv4Address):
        return found
    return found.ipv4_mapped or ip_network((found, 64), strict=False)
