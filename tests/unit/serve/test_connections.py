"""What the server does with connections: malformed requests, slow ones, half-closed ones, and too many of them."""

from __future__ import annotations

import asyncio
import json
import socket
import struct
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from yeonma.serve.connections import Connections, ConnectionLimits, watched
from yeonma.serve.server import make_server

PATIENCE_SECONDS = 20
SHORT = ConnectionLimits(
    connections=12, head=0.4, body=0.4, keep_alive=0.4, unread=0.4, linger=0.4, report=0, longest_body=2
)
PATIENT = ConnectionLimits(connections=12, report=0)
MEGABYTE = 1_000_000


@dataclass
class Running:
    """A server of a small application, and what it saw."""

    port: int
    connections: Connections
    stop: Callable[[], None]
    log: list[str] = field(default_factory=list)
    abandoned: threading.Event = field(default_factory=threading.Event)
    """Set when a stream ended before its end."""

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), PATIENCE_SECONDS)

    def ask(self, *requests: bytes) -> bytes:
        """What comes back until the server closes."""
        with self.connect() as connection:
            for request in requests:
                connection.sendall(request)
            return read_all(connection)


def read_all(connection: socket.socket) -> bytes:
    parts = []
    while part := connection.recv(65536):
        parts.append(part)
    return b"".join(parts)


def read_until(connection: socket.socket, end: bytes) -> bytes:
    content = b""
    while end not in content:
        part = connection.recv(65536)
        assert part, content
        content += part
    return content


@contextmanager
def running(limits: ConnectionLimits) -> Iterator[Running]:
    listener = socket.create_server(("127.0.0.1", 0))
    log: list[str] = []
    abandoned, ready = threading.Event(), threading.Event()

    async def echo(request: Request) -> Response:
        body = await request.body()
        return JSONResponse({"path": request.url.path, "host": request.headers.get("host"), "body": body.decode()})

    async def flood(request: Request) -> Response:
        async def parts() -> AsyncIterator[bytes]:
            try:
                for _ in range(1000):
                    yield b"x" * 65_536
                    await asyncio.sleep(0)
            except BaseException:
                abandoned.set()
                raise

        return StreamingResponse(parts())

    async def wait(request: Request) -> Response:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        abandoned.set()
        return Response()

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        connections.start(listener, lambda: server.should_exit)
        ready.set()
        yield
        connections.close()

    methods = ["GET", "POST"]
    routes = [Route("/flood", flood), Route("/wait", wait), Route("/{path:path}", echo, methods=methods)]
    server, connections = make_server(watched(Starlette(routes=routes, lifespan=lifespan)), limits, log.append)

    def stop() -> None:
        server.should_exit = True

    thread = threading.Thread(target=server.run, kwargs={"sockets": []})
    thread.start()
    try:
        assert ready.wait(PATIENCE_SECONDS)
        yield Running(listener.getsockname()[1], connections, stop, log, abandoned)
    finally:
        stop()
        thread.join(PATIENCE_SECONDS)
        assert not thread.is_alive()


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running(PATIENT) as server:
        yield server


@pytest.fixture(scope="module")
def hasty() -> Iterator[Running]:
    with running(SHORT) as server:
        yield server


def get(path: str = "/", *fields: str, close: bool = True) -> bytes:
    lines = [f"GET {path} HTTP/1.1", "Host: a", *fields, *(["Connection: close"] if close else [])]
    return "\r\n".join([*lines, "", ""]).encode()


def statuses(answers: bytes) -> list[int]:
    return [int(part[:3]) for part in answers.split(b"HTTP/1.1 ")[1:]]


GOOD = get()
MALFORMED = {
    "length and chunks": (400, "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"),
    "chunks and length": (400, "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n0\r\n\r\n"),
    "two lengths": (400, "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nabcde"),
    "a length twice": (400, "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nContent-Length: 5\r\n\r\nabcde"),
    "a list of lengths": (400, "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 5, 5\r\n\r\nabcde"),
    "a length with a sign": (400, "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: +5\r\n\r\nabcde"),
    "a negative length": (400, "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: -5\r\n\r\nabcde"),
    "an empty length": (400, "POST / HTTP/1.1\r\nHost: a\r\nContent-Length:\r\n\r\nabcde"),
    "a length of many digits": (413, f"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: {'9' * 5000}\r\n\r\nabcde"),
    "a length beyond what is read": (413, "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 64000001\r\n\r\nabcde"),
    "bare line ends": (400, "GET / HTTP/1.1\nHost: a\n\n"),
    "one bare line end": (400, "GET / HTTP/1.1\r\nHost: a\nX: b\r\n\r\n"),
    "a bare carriage return": (400, "GET / HTTP/1.1\r\nHost: a\rX: b\r\n\r\n"),
    "a bare carriage return at the end": (400, "GET / HTTP/1.1\r\nHost: a\r\r\n\r\n"),
    "a folded line": (400, "GET / HTTP/1.1\r\nHost: a\r\nX: b\r\n c\r\n\r\n"),
    "a fold at first": (400, "GET / HTTP/1.1\r\n Host: a\r\n\r\n"),
    "a blank before the colon": (400, "GET / HTTP/1.1\r\nHost: a\r\nContent-Length : 5\r\n\r\nabcde"),
    "a name of other characters": (400, "GET / HTTP/1.1\r\nHost: a\r\nX(y): b\r\n\r\n"),
    "no name": (400, "GET / HTTP/1.1\r\nHost: a\r\n: b\r\n\r\n"),
    "no colon": (400, "GET / HTTP/1.1\r\nHost: a\r\nabc\r\n\r\n"),
    "a NUL": (400, "GET / HTTP/1.1\r\nHost: a\r\nX: b\0c\r\n\r\n"),
    "an escape": (400, "GET / HTTP/1.1\r\nHost: a\r\nX: b\x1b[31mc\r\n\r\n"),
    "no host": (400, "GET / HTTP/1.1\r\n\r\n"),
    "two hosts": (400, "GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n"),
    "a host with a blank": (400, "GET / HTTP/1.1\r\nHost: a b\r\n\r\n"),
    "a host with a path": (400, "GET / HTTP/1.1\r\nHost: a/b\r\n\r\n"),
    "an unknown coding": (501, "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n"),
    "a coding that is not the last": (400, "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked, gzip\r\n\r\n"),
    "a coding alone": (400, "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: gzip\r\n\r\n"),
    "chunked twice": (400, "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"),
    "an odd chunked": (400, "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: \x0bchunked\r\n\r\n0\r\n\r\n"),
    "chunks in HTTP/1.0": (400, "POST / HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"),
    "a chunk with a bare line end": (400, "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n1\na\r\n0\r\n\r\n"),
    "a chunk longer than it says": (400, "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nabc\r\n0\r\n\r\n"),
    "a chunk size with 0x": (400, "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n0x1\r\na\r\n0\r\n\r\n"),
    "a chunk of many digits": (400, "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\nfffffffffffffffff\r\n"),
    "a chunk beyond what is read": (413, "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\nfffffff\r\n"),
    "a long extension": (400, "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n1;" + "x" * 300 + "\r\na\r\n0\r\n\r\n"),
    "a folded trailer": (400, "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n a: b\r\n\r\n"),
    "many trailers": (431, "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n" + "a: b\r\n" * 5000),
    "an unknown expectation": (417, "POST / HTTP/1.1\r\nHost: a\r\nExpect: tea\r\nContent-Length: 1\r\n\r\n"),
    "a long target": (414, f"GET /{'a' * 9000} HTTP/1.1\r\nHost: a\r\n\r\n"),
    "a target without end": (414, f"GET /{'a' * 20_000}"),
    "a long field": (431, f"GET / HTTP/1.1\r\nHost: a\r\nX: {'a' * 20_000}"),
    "many fields": (431, "GET / HTTP/1.1\r\nHost: a\r\n" + "X: b\r\n" * 101 + "\r\n"),
    "a target with blanks": (400, "GET /a b HTTP/1.1\r\nHost: a\r\n\r\n"),
    "two blanks": (400, "GET  / HTTP/1.1\r\nHost: a\r\n\r\n"),
    "a tab": (400, "GET\t/ HTTP/1.1\r\nHost: a\r\n\r\n"),
    "a target that is no path": (400, "GET a HTTP/1.1\r\nHost: a\r\n\r\n"),
    "HTTP/0.9": (400, "GET /\r\n\r\n"),
    "HTTP/2": (505, "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"),
    "HTTP/3.0": (505, "GET / HTTP/3.0\r\nHost: a\r\n\r\n"),
    "small letters": (400, "GET / http/1.1\r\nHost: a\r\n\r\n"),
    "a proxy's request": (501, "CONNECT a:443 HTTP/1.1\r\nHost: a:443\r\n\r\n"),
    "TLS": (400, "\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03"),
    "another protocol": (400, "SSH-2.0-OpenSSH_9.6\r\n"),
    "a message of a terminal": (400, "\xff\xfb\x1f"),
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(MALFORMED))
def test_a_malformed_request_is_refused_and_the_connection_closed(name: str, server: Running) -> None:
    status, request = MALFORMED[name]
    answer = server.ask(request.encode("latin-1"), GOOD)  # what follows is not read as a request
    assert statuses(answer) == [status], answer
    head, _, body = answer.partition(b"\r\n\r\n")
    assert b"Connection: close" in head and b"Date: " in head
    assert json.loads(body)["error"]["message"]


@pytest.mark.parametrize("name", sorted(MALFORMED))
def test_a_malformed_request_is_refused_byte_by_byte_too(name: str) -> None:
    from yeonma.serve.request_framing import BadRequest, RequestFraming

    status, request = MALFORMED[name]
    framing = RequestFraming()
    with pytest.raises(BadRequest) as caught:
        for byte in request.encode("latin-1"):
            framing.feed(bytes([byte]))
            while framing.take() is not None:
                pass
    assert caught.value.status == status


WELL_FORMED = {
    "a body": ("POST /a HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n\r\nabcde", "abcde"),
    "an empty body": ("POST /a HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\n\r\n", ""),
    "zeros before a length": ("POST /a HTTP/1.1\r\nHost: a\r\nContent-Length: 005\r\n\r\nabcde", "abcde"),
    "line ends in a body": ("POST /a HTTP/1.1\r\nHost: a\r\nContent-Length: 8\r\n\r\na\nb\rc\r\n\n", "a\nb\rc\r\n\n"),
    "chunks": ("POST /a HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: Chunked\r\n\r\n2\r\nab\r\n3;x=\"y\"\r\ncde\r\n0\r\n\r\n", "abcde"),
    "large digits": ("POST /a HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n000A ;x\r\n0123456789\r\n00\r\n\r\n", "0123456789"),
    "trailers": ("POST /a HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n1\r\na\r\n0\r\nX: b\r\nY: c\r\n\r\n", "a"),
    "no chunk": ("POST /a HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", ""),
    "blank lines before": ("\r\n\r\nPOST /a HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\n\r\na", "a"),
    "blanks around a value": ("POST /a HTTP/1.1\r\nHost:  a\t \r\nContent-Length:1 \r\n\r\na", "a"),
    "a host elsewhere": ("POST http://a/a HTTP/1.1\r\nHost: b\r\nContent-Length: 1\r\n\r\na", "a"),
    "a later minor version": ("POST /a HTTP/1.7\r\nHost: a\r\nContent-Length: 1\r\n\r\na", "a"),
    "an expectation": ("POST /a HTTP/1.1\r\nHost: a\r\nExpect: 100-Continue\r\nContent-Length: 1\r\n\r\na", "a"),
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(WELL_FORMED))
def test_a_well_formed_request_is_answered(name: str, server: Running) -> None:
    request, body = WELL_FORMED[name]
    answer = server.ask(request.encode(), GOOD)
    answers = [part.partition(b"\r\n\r\n")[2] for part in answer.split(b"HTTP/1.1 200 OK")[1:]]
    assert json.loads(answers[0]) == {"path": "/a", "host": "a", "body": body}
    assert json.loads(answers[1])["path"] == "/"  # pipelined: the connection is still in step
    assert (b"HTTP/1.1 100 Continue" in answer) == (name == "an expectation")


def test_an_http_1_0_request_is_answered_and_the_connection_closed(server: Running) -> None:
    answer = server.ask(b"GET /a HTTP/1.0\r\nConnection: keep-alive\r\n\r\n")
    assert statuses(answer) == [200] and b"connection: close" in answer.lower()
