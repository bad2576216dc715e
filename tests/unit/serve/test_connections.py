"""What the server does with connections: malformed requests, slow ones, half-closed ones, and too many of them."""

from __future__ import annotations

import asyncio
import errno
import json
import logging
import os
import resource
import socket
import struct
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from yeonma.serve.bounded_log import RecordLimit
from yeonma.serve.connections import Connection, ConnectionLimits, Connections, connection_limit, watched
from yeonma.serve.request_framing import BadRequest, RequestFraming
from yeonma.serve.web_server import make_server

PATIENCE_SECONDS = 60
SHORT = ConnectionLimits(
    connections=12, head=0.4, body=0.4, keep_alive=0.4, unread=0.4, linger=0.4, report=0, longest_body=2
)
PATIENT = ConnectionLimits(connections=12, report=0)


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
        return JSONResponse(
            {"path": request.url.path, "host": request.headers.get("host"), "body": body.decode()}
        )

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

    routes = [
        Route("/flood", flood),
        Route("/wait", wait),
        Route("/{path:path}", echo, methods=["GET", "POST"]),
    ]
    server, connections = make_server(
        watched(Starlette(routes=routes, lifespan=lifespan)), limits, log.append
    )

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
GET, POST = (f"{method} / HTTP/1.1\r\nHost: a\r\n" for method in ("GET", "POST"))
CHUNKED = f"{POST}Transfer-Encoding: chunked\r\n\r\n"
MALFORMED = {
    "length and chunks": (400, POST + "Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"),
    "chunks and length": (400, POST + "Transfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n0\r\n\r\n"),
    "two lengths": (400, POST + "Content-Length: 5\r\nContent-Length: 6\r\n\r\nabcde"),
    "a length twice": (400, POST + "Content-Length: 5\r\nContent-Length: 5\r\n\r\nabcde"),
    "a list of lengths": (400, POST + "Content-Length: 5, 5\r\n\r\nabcde"),
    "a length with a sign": (400, POST + "Content-Length: +5\r\n\r\nabcde"),
    "a negative length": (400, POST + "Content-Length: -5\r\n\r\nabcde"),
    "an empty length": (400, POST + "Content-Length:\r\n\r\nabcde"),
    "a length of many digits": (413, POST + f"Content-Length: {'9' * 5000}\r\n\r\nabcde"),
    "a length beyond what is read": (413, POST + "Content-Length: 64000001\r\n\r\nabcde"),
    "bare line ends": (400, "GET / HTTP/1.1\nHost: a\n\n"),
    "one bare line end": (400, "GET / HTTP/1.1\r\nHost: a\nX: b\r\n\r\n"),
    "a bare carriage return": (400, "GET / HTTP/1.1\r\nHost: a\rX: b\r\n\r\n"),
    "a bare carriage return at the end": (400, "GET / HTTP/1.1\r\nHost: a\r\r\n\r\n"),
    "a folded line": (400, GET + "X: b\r\n c\r\n\r\n"),
    "a fold at first": (400, "GET / HTTP/1.1\r\n Host: a\r\n\r\n"),
    "a blank before the colon": (400, GET + "Content-Length : 5\r\n\r\nabcde"),
    "a name of other characters": (400, GET + "X(y): b\r\n\r\n"),
    "no name": (400, GET + ": b\r\n\r\n"),
    "no colon": (400, GET + "abc\r\n\r\n"),
    "a NUL": (400, GET + "X: b\0c\r\n\r\n"),
    "an escape": (400, GET + "X: b\x1b[31mc\r\n\r\n"),
    "no host": (400, "GET / HTTP/1.1\r\n\r\n"),
    "two hosts": (400, GET + "Host: b\r\n\r\n"),
    "a host with a blank": (400, "GET / HTTP/1.1\r\nHost: a b\r\n\r\n"),
    "a host with a path": (400, "GET / HTTP/1.1\r\nHost: a/b\r\n\r\n"),
    "an unknown coding": (501, POST + "Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n"),
    "a coding that is not the last": (400, POST + "Transfer-Encoding: chunked, gzip\r\n\r\n"),
    "a coding alone": (400, POST + "Transfer-Encoding: gzip\r\n\r\n"),
    "chunked twice": (400, POST + "Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"),
    "an odd chunked": (400, POST + "Transfer-Encoding: \x0bchunked\r\n\r\n0\r\n\r\n"),
    "chunks in HTTP/1.0": (400, "POST / HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"),
    "a chunk with a bare line end": (400, CHUNKED + "1\na\r\n0\r\n\r\n"),
    "a chunk longer than it says": (400, CHUNKED + "1\r\nabc\r\n0\r\n\r\n"),
    "a chunk size with 0x": (400, CHUNKED + "0x1\r\na\r\n0\r\n\r\n"),
    "a chunk of many digits": (400, CHUNKED + "fffffffffffffffff\r\n"),
    "a chunk beyond what is read": (413, CHUNKED + "fffffff\r\n"),
    "a long extension": (400, CHUNKED + "1;" + "x" * 300 + "\r\na\r\n0\r\n\r\n"),
    "a folded trailer": (400, CHUNKED + "0\r\n a: b\r\n\r\n"),
    "many trailers": (431, CHUNKED + "0\r\n" + "a: b\r\n" * 5000),
    "an unknown expectation": (417, POST + "Expect: tea\r\nContent-Length: 1\r\n\r\n"),
    "a long target": (414, f"GET /{'a' * 9000} HTTP/1.1\r\nHost: a\r\n\r\n"),
    "a target without end": (414, f"GET /{'a' * 20_000}"),
    "a long field": (431, GET + f"X: {'a' * 20_000}"),
    "many fields": (431, GET + "" + "X: b\r\n" * 101 + "\r\n"),
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
    status, request = MALFORMED[name]
    framing = RequestFraming()
    with pytest.raises(BadRequest) as caught:
        for byte in request.encode("latin-1"):
            framing.feed(bytes([byte]))
            while framing.take() is not None:
                pass
    assert caught.value.status == status


WELL_FORMED = {
    "a body": ("Content-Length: 5\r\n\r\nabcde", "abcde"),
    "an empty body": ("Content-Length: 0\r\n\r\n", ""),
    "zeros before a length": ("Content-Length: 005\r\n\r\nabcde", "abcde"),
    "line ends in a body": ("Content-Length: 8\r\n\r\na\nb\rc\r\n\n", "a\nb\rc\r\n\n"),
    "chunks": ("Transfer-Encoding: Chunked\r\n\r\n2\r\nab\r\n3;x=\"y\"\r\ncde\r\n0\r\n\r\n", "abcde"),
    "large digits": ("Transfer-Encoding: chunked\r\n\r\n000A ;x\r\n0123456789\r\n00\r\n\r\n", "0123456789"),
    "trailers": ("Transfer-Encoding: chunked\r\n\r\n1\r\na\r\n0\r\nX: b\r\nY: c\r\n\r\n", "a"),
    "no chunk": ("Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n", ""),
    "blank lines before": ("\r\n\r\nPOST /a HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\n\r\na", "a"),
    "blanks around a value": ("POST /a HTTP/1.1\r\nHost:  a\t \r\nContent-Length:1 \r\n\r\na", "a"),
    "a host elsewhere": ("POST http://a/a HTTP/1.1\r\nHost: b\r\nContent-Length: 1\r\n\r\na", "a"),
    "a later minor version": ("POST /a HTTP/1.7\r\nHost: a\r\nContent-Length: 1\r\n\r\na", "a"),
    "an expectation": ("Expect: 100-Continue\r\nContent-Length: 1\r\n\r\na", "a"),
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(WELL_FORMED))
def test_a_well_formed_request_is_answered(name: str, server: Running) -> None:
    request, body = WELL_FORMED[name]
    request = request if "HTTP/1." in request else f"POST /a HTTP/1.1\r\nHost: a\r\n{request}"
    answer = server.ask(request.encode(), GOOD)
    answers = [part.partition(b"\r\n\r\n")[2] for part in answer.split(b"HTTP/1.1 200 OK")[1:]]
    assert json.loads(answers[0]) == {"path": "/a", "host": "a", "body": body}
    assert json.loads(answers[1])["path"] == "/"  # pipelined: the connection is still in step
    assert (b"HTTP/1.1 100 Continue" in answer) == (name == "an expectation")


def test_an_http_1_0_request_is_answered_and_the_connection_closed(server: Running) -> None:
    answer = server.ask(b"GET /a HTTP/1.0\r\nConnection: keep-alive\r\n\r\n")
    assert statuses(answer) == [200] and b"connection: close" in answer.lower()


def test_a_connection_that_sends_nothing_is_closed_without_a_word(hasty: Running) -> None:
    with hasty.connect() as connection:
        assert read_all(connection) == b""


@pytest.mark.parametrize(
    "sent",
    [
        b"G",
        GET.encode() + b"X: ",
        POST.encode() + b"Content-Length: 9\r\n\r\nabc",
        CHUNKED.encode() + b"9\r\nabc",
        CHUNKED.encode() + b"1\r\na\r\n0\r\n",
    ],
)
def test_a_request_that_stops_in_the_middle_is_refused_in_time(sent: bytes, hasty: Running) -> None:
    answer = hasty.ask(sent)
    assert statuses(answer) == [408]


def test_bytes_that_come_one_by_one_win_no_time(hasty: Running) -> None:
    with hasty.connect() as connection:
        connection.settimeout(0.05)
        answer = b""
        for number in range(10_000):
            try:
                connection.sendall(b"GET / HTTP/1.1\r\nX: "[number : number + 1] or b"x")
                answer = connection.recv(65536)
                break
            except TimeoutError:
                continue
        assert number < 100 and statuses(answer) == [408]


def test_an_idle_connection_is_closed_in_time_and_used_until_then(hasty: Running) -> None:
    with hasty.connect() as connection:
        for path in ("/1", "/2", "/3"):
            connection.sendall(get(path, close=False))
            assert path.encode() in read_until(connection, b"}")
        assert read_all(connection) == b""


def test_pipelined_requests_are_answered_in_their_order(server: Running) -> None:
    answer = server.ask(b"".join(get(f"/{number}", close=number == 4) for number in range(5)))
    assert statuses(answer) == [200] * 5
    assert [
        json.loads(part.partition(b"\r\n\r\n")[2])["path"] for part in answer.split(b"HTTP/1.1 200 OK")[1:]
    ] == [f"/{number}" for number in range(5)]


def test_what_is_sent_far_ahead_of_an_answer_ends_the_connection(server: Running) -> None:
    server.abandoned.clear()
    with server.connect() as connection, pytest.raises(ConnectionError):
        connection.sendall(get("/wait", close=False))
        for _ in range(10_000):
            connection.sendall(get(close=False) * 100)
    assert server.abandoned.wait(PATIENCE_SECONDS)


def test_a_client_that_does_not_read_its_answer_is_left(hasty: Running) -> None:
    hasty.abandoned.clear()
    with hasty.connect() as connection:
        connection.sendall(get("/flood"))
        assert hasty.abandoned.wait(PATIENCE_SECONDS)
        with suppress(ConnectionError):
            assert not read_all(connection).endswith(b"0\r\n\r\n")  # it does not look whole


def leave_by_closing_one_direction(connection: socket.socket) -> None:
    connection.shutdown(socket.SHUT_WR)


def leave_by_reset(connection: socket.socket) -> None:
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


@pytest.mark.parametrize("leave", [socket.socket.close, leave_by_closing_one_direction, leave_by_reset])
@pytest.mark.parametrize("path", ["/wait", "/flood"])
def test_the_application_hears_when_its_client_has_gone(
    leave: Callable[[socket.socket], None], path: str, server: Running
) -> None:
    server.abandoned.clear()
    with server.connect() as connection:
        connection.sendall(get(path, close=False))
        if path == "/flood":
            connection.recv(10)
        leave(connection)
        assert server.abandoned.wait(PATIENCE_SECONDS)


def test_silent_connections_make_room_for_a_question() -> None:
    with running(PATIENT) as server:
        silent = [server.connect() for _ in range(PATIENT.connections * 3)]
        silent[-1].sendall(GOOD)
        assert statuses(read_all(silent[-1])) == [200]
        assert statuses(server.ask(GOOD)) == [200]
        assert server.connections.number <= PATIENT.connections
        assert silent[0].recv(1) == b""  # the oldest
        for connection in silent:
            connection.close()
        while not server.log:
            assert statuses(server.ask(GOOD)) == [200]
    assert server.log[0].startswith("connections closed or refused: ")
    assert "closed to make room; " in server.log[0]


def test_answers_are_not_closed_to_make_room() -> None:
    with running(PATIENT) as server:
        waiting = [server.connect() for _ in range(PATIENT.connections)]
        for connection in waiting:
            connection.sendall(get("/wait", close=False))
        while sum(not it.may_make_room for it in list(server.connections._open)) < PATIENT.connections:
            pass
        with server.connect() as connection:
            assert statuses(read_all(connection)) == [503]
        for connection in waiting:
            connection.close()
        while server.connections.number:
            pass
        assert statuses(server.ask(GOOD)) == [200]


def test_half_sent_bodies_are_bounded_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("yeonma.serve.connections.MAX_HELD_BYTES", 250_000)
    head = POST.encode() + b"Content-Length: 200000\r\nConnection: close\r\n\r\n"
    with running(PATIENT) as server:
        half_sent = [server.connect() for _ in range(3)]
        for number, connection in enumerate(half_sent, 1):
            connection.sendall(head + b"x" * 100_000)
            while server.connections._held_bytes < min(number, 2) * 100_000:
                pass
        with suppress(ConnectionError):
            assert read_all(half_sent[0]) == b""
        half_sent[2].sendall(b"x" * 100_000)
        assert statuses(read_all(half_sent[2])) == [200]
        for connection in half_sent:
            connection.close()


class Transport(asyncio.Transport):
    """Of a client that has reset the connection before the server reads that."""

    def __init__(self, address: str) -> None:
        super().__init__({"peername": (address, 1)})
        self.aborted = False

    def abort(self) -> None:
        self.aborted = True

    def is_closing(self) -> bool:
        return self.aborted

    def write(self, data: object) -> None:
        pass

    def write_eof(self) -> None:
        raise OSError(errno.ENOTCONN, "not connected")


def test_a_reset_that_crosses_a_refusal_ends_the_connection_without_an_error() -> None:
    connections = Connections(PATIENT, lambda state: asyncio.Protocol(), print)
    transport, connection = Transport("10.0.0.1"), Connection(connections)
    connections._open[connection] = None
    connection.connection_made(transport)
    connection.data_received(b"\xff")
    assert transport.aborted and connections.number == 0


def test_a_crowd_from_one_address_makes_room_before_others() -> None:
    connections = Connections(PATIENT, lambda state: asyncio.Protocol(), print)
    transports = [Transport(address) for address in ["10.0.0.1", *["fe80::1%lo", "fe80::2"] * 4, "10.0.0.2"]]
    for transport in transports:
        connection = Connection(connections)
        connections._open[connection] = None
        connection.connection_made(transport)
    for _ in range(7):
        connections._make_room(list(connections._open))
    assert [transport.aborted for transport in transports] == [False, *[True] * 7, False, False]


def test_no_file_left_to_open_is_said_once_and_passes() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with running(PATIENT) as server, socket.socket() as client, socket.socket() as second:
        assert statuses(server.ask(GOOD)) == [200]
        taken: list[int] = []
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (max(map(int, os.listdir("/dev/fd"))) + 8, hard))
            with suppress(OSError):
                while True:
                    taken.append(os.dup(0))
            client.settimeout(PATIENCE_SECONDS)
            client.connect(("127.0.0.1", server.port))
            while not server.log:
                pass
            assert "no file left to open" in server.log[0]
        finally:
            for file in taken:
                os.close(file)
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        client.sendall(GOOD)
        assert statuses(read_all(client)) == [200]
        second.connect(("127.0.0.1", server.port))
        second.sendall(GOOD)
        assert statuses(read_all(second)) == [200]


def test_the_number_of_connections_follows_from_the_files_that_may_be_opened() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = len(os.listdir("/dev/fd"))
    try:
        for files, least, most in ((used + 2, 8, 8), (used + 200, 95, 100), (used + 5000, 512, 512)):
            resource.setrlimit(resource.RLIMIT_NOFILE, (min(files, hard), hard))
            assert least <= connection_limit() <= most
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_the_server_stops_while_clients_are_silent_and_accepts_nobody_then() -> None:
    with running(PATIENT) as server, server.connect() as silent, server.connect() as begun:
        for connection in (silent, begun):
            connection.sendall(get(close=False))
            read_until(connection, b"}")
        begun.sendall(b"GET / HTTP/1.1\r\n")
        server.stop()
        assert read_all(silent) == b""
        with pytest.raises(OSError):
            while True:
                server.ask(GOOD)


def test_a_log_has_a_bounded_number_of_records_and_the_number_of_the_others() -> None:
    limit = RecordLimit(records=2, seconds=0.2)

    def record() -> logging.LogRecord:
        return logging.LogRecord("a", logging.ERROR, "p", 1, "%s failed", ("it",), None)

    assert [limit.filter(record()) for _ in range(5)] == [True, True, False, False, False]
    later = record()
    while not limit.filter(later):
        later = record()
    assert later.getMessage().endswith("records before this one were left out) it failed")
