"""Where requests begin and end among the bytes of a connection, read strictly. No server here.

References: RFC 9110 (semantics) and RFC 9112 (HTTP/1.1). A message that two readers could read differently is refused,
and what passes is written anew, in one form: the parser behind this module never sees anything ambiguous.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

MAX_HEAD_BYTES = 16_384
"""Of a request line and all header fields."""
MAX_TARGET_BYTES = 8_000
MAX_FIELDS = 100
MAX_CHUNK_LINE_BYTES = 256
"""Of the size of a chunk with its extensions."""
MAX_BODY_BYTES = 1_000_000
"""What the application accepts."""
MAX_CONTENT_BYTES = 64_000_000
"""How much of a larger body is read and discarded, so that clients that send all of it first see the error."""

METHOD = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]{1,32}")
VERSION = re.compile(rb"HTTP/(\d)\.(\d)")
TARGET = re.compile(rb"[\x21-\x7e]+")
ABSOLUTE = re.compile(rb"https?://([^/?#]+)(.*)", re.IGNORECASE)
AUTHORITY = re.compile(rb"[A-Za-z0-9._~!$&'()*+,;=%:\[\]-]*")
FIELD = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]+):[ \t]*([\t\x20-\x7e\x80-\xff]*?)[ \t]*")
CHUNK_LINE = re.compile(rb"([0-9A-Fa-f]{1,15})[ \t]*(?:;[\t\x20-\x7e\x80-\xff]*)?\r\n")
BARE_LINE_END = re.compile(rb"(?<!\r)\n|\r(?!\n)")
LENGTH = re.compile(rb"[0-9]+")


class BadRequest(Exception):
    """A message that is refused, with the status to answer. Nothing after it on its connection can be trusted."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class RequestPart:
    """A part of a request, ready for the parser."""

    content: bytes
    begins: bool = False
    """The part is the request's head, whole."""
    ends: bool = False
    """The request is complete with it."""


class RequestFraming:
    """The requests of one connection, one after the other."""

    def __init__(self) -> None:
        self._unread = bytearray()
        self._next: Callable[[], RequestPart | None] = self._head
        self._scanned = 0
        """How much of an unfinished head was searched already."""
        self._missing = 0
        """Bytes that the body, or the chunk, still lacks."""
        self._content_bytes = 0
        self._trailer_bytes: int | None = None
        """None before the last chunk."""

    @property
    def unread_bytes(self) -> int:
        """The size of what was fed and not yet taken."""
        return len(self._unread)

    @property
    def has_ended(self) -> bool:
        """Whether the request is complete; the next one waits for `next_request`."""
        return self._next == self._nothing

    def feed(self, content: bytes) -> None:
        self._unread += content

    def next_request(self) -> None:
        """Go on to the next request of the connection."""
        self._next, self._scanned, self._content_bytes, self._trailer_bytes = self._head, 0, 0, None

    def take(self) -> RequestPart | None:
        """The next part of the request; None if more bytes are needed, or if the request is complete. Raises
        BadRequest."""
        return self._next()

    def _nothing(self) -> None:
        return None

    def _head(self) -> RequestPart | None:
        unread = self._unread
        while unread[:2] == b"\r\n":  # blank lines before a request are passed over
            del unread[:2]
            self._scanned = 0
        if unread[:1] == b"\x16":
            raise BadRequest(400, "this port speaks plain HTTP, not TLS: use http://")
        end = unread.find(b"\r\n\r\n", max(0, self._scanned - 3))
        _check_line_ends(unread, max(0, self._scanned - 1), len(unread) if end < 0 else end + 4)
        if (len(unread) if end < 0 else end) > MAX_HEAD_BYTES:
            first = unread.find(b"\r\n")
            if first < 0 or first > MAX_HEAD_BYTES:
                raise BadRequest(414, f"the request's target is longer than {MAX_TARGET_BYTES:,} bytes")
            raise BadRequest(431, f"the request's headers are larger than {MAX_HEAD_BYTES:,} bytes")
        if end < 0:
            if not _may_begin_request(unread):
                raise BadRequest(400, "this is no HTTP request")
            self._scanned = len(unread)
            return None
        lines = bytes(unread[:end]).split(b"\r\n")
        del unread[: end + 4]
        head = _read_head(lines)
        self._next = {None: self._chunks, 0: self._nothing}.get(head.length, self._content)
        self._missing = head.length or 0
        return RequestPart(head.written(), begins=True, ends=head.length == 0)

    def _content(self) -> RequestPart | None:
        if not self._unread:
            return None
        content = self._taken(min(self._missing, len(self._unread)))
        self._missing -= len(content)
        if not self._missing:
            self._next = self._nothing
        return RequestPart(content, ends=not self._missing)

    def _chunks(self) -> RequestPart | None:
        """All chunks that are there, without their extensions, and the end without its trailer fields."""
        written = bytearray()
        while not self.has_ended and (piece := self._piece()) is not None:
            written += piece
        return RequestPart(bytes(written), ends=self.has_ended) if written else None

    def _piece(self) -> bytes | None:
        """A line of a chunk's size, or content with the line end that belongs to it."""
        if self._trailer_bytes is not None:
            return self._trailer(self._trailer_bytes)
        if self._missing > 2:  # content, before the line end after it
            content = self._taken(min(self._missing - 2, len(self._unread)))
            self._missing -= len(content)
            return content or None
        if self._missing:
            if not b"\r\n".startswith(bytes(self._unread[:2])):
                raise BadRequest(400, "a chunk is longer than its size")
            if len(self._unread) < 2:
                return None
            self._missing = 0
            return self._taken(2)
        line = self._line(MAX_CHUNK_LINE_BYTES, "a chunk's size with its extensions")
        if line is None:
            return None
        if not (match := CHUNK_LINE.fullmatch(line)):
            raise BadRequest(400, "this is no size of a chunk")
        if not (size := int(match[1], 16)):
            return self._trailer(0)
        self._content_bytes += size
        if self._content_bytes > MAX_CONTENT_BYTES:
            raise _too_large()
        self._missing = size + 2
        return b"%x\r\n" % size

    def _trailer(self, size: int) -> bytes | None:
        """`size`: that of the trailer fields so far."""
        self._trailer_bytes = size
        while (line := self._line(MAX_HEAD_BYTES, "a trailer field")) is not None:
            if line == b"\r\n":
                self._next = self._nothing
                return b"0\r\n\r\n"
            _check_line_ends(line, 0, len(line))
            _field(line[:-2])
            self._trailer_bytes += len(line)
            if self._trailer_bytes > MAX_HEAD_BYTES:
                raise BadRequest(431, f"the trailer fields are larger than {MAX_HEAD_BYTES:,} bytes")
        return None

    def _line(self, limit: int, what: str) -> bytes | None:
        end = self._unread.find(b"\n", 0, limit)
        if end < 0 and len(self._unread) >= limit:
            raise BadRequest(400, f"{what}: longer than {limit:,} bytes")
        return None if end < 0 else self._taken(end + 1)

    def _taken(self, size: int) -> bytes:
        content = bytes(self._unread[:size])
        del self._unread[:size]
        return content


@dataclass(frozen=True)
class _RequestHead:
    line: bytes
    fields: Sequence[tuple[bytes, bytes]]
    length: int | None
    """Of the body; None: in chunks."""

    def written(self) -> bytes:
        lines = [self.line, *(name + b": " + value for name, value in self.fields)]
        return b"\r\n".join([*lines, b"", b""])


def _read_head(lines: Sequence[bytes]) -> _RequestHead:
    method, target, minor = _request_line(lines[0])
    if len(lines) > MAX_FIELDS + 1:
        raise BadRequest(431, f"the request has more than {MAX_FIELDS} header fields")
    fields = [_field(line) for line in lines[1:]]
    hosts = [value for name, value in fields if name.lower() == b"host"]
    if len(hosts) > 1 or (not hosts and minor):
        raise BadRequest(400, "the header Host is missing" if not hosts else "the header Host is there twice")
    if not all(AUTHORITY.fullmatch(host) for host in hosts):
        raise BadRequest(400, "the header Host is no host")
    if absolute := ABSOLUTE.fullmatch(target):  # its host counts, not that of the header
        if not AUTHORITY.fullmatch(absolute[1]):
            raise BadRequest(400, "the request's target has no host")
        target = absolute[2] if absolute[2].startswith(b"/") else b"/" + absolute[2]
        fields = [(b"Host", absolute[1]), *(field for field in fields if field[0].lower() != b"host")]
    elif method == b"CONNECT":
        raise BadRequest(501, "this is no proxy")
    elif not target.startswith(b"/") and (method, target) != (b"OPTIONS", b"*"):
        raise BadRequest(400, "the request's target is no path")
    length = _body_length(fields, minor)
    for name, value in fields:
        if name.lower() == b"expect" and minor and value.lower() != b"100-continue":
            raise BadRequest(417, "the only expectation that can be met is 100-continue")
    return _RequestHead(b"%b %b HTTP/1.%d" % (method, target, minor), fields, length)


def _request_line(line: bytes) -> tuple[bytes, bytes, int]:
    """Method, target and the minor version, 0 or 1."""
    words = line.split(b" ")
    if len(words) != 3 or not METHOD.fullmatch(words[0]) or not (version := VERSION.fullmatch(words[2])):
        if len(words[1] if len(words) > 1 else line) > MAX_TARGET_BYTES:
            raise BadRequest(414, f"the request's target is longer than {MAX_TARGET_BYTES:,} bytes")
        raise BadRequest(400, "this is no HTTP request")
    if version[1] != b"1":
        raise BadRequest(505, "this server speaks HTTP/1.1")
    method, target = words[:2]
    if len(target) > MAX_TARGET_BYTES:
        raise BadRequest(414, f"the request's target is longer than {MAX_TARGET_BYTES:,} bytes")
    if not TARGET.fullmatch(target):
        raise BadRequest(400, "the request's target has characters that must be written as %XX")
    return method, target, min(int(version[2]), 1)


def _field(line: bytes) -> tuple[bytes, bytes]:
    if not (match := FIELD.fullmatch(line)):
        raise BadRequest(400, "a header field is not written as `Name: value` on one line")
    return match[1], match[2]


def _body_length(fields: Sequence[tuple[bytes, bytes]], minor: int) -> int | None:
    """The bytes of the body; None if it comes in chunks. RFC 9112, section 6.3."""
    lengths = [value for name, value in fields if name.lower() == b"content-length"]
    codings = [value for name, value in fields if name.lower() == b"transfer-encoding"]
    if codings:
        if lengths:
            raise BadRequest(400, "the request has both Content-Length and Transfer-Encoding")
        if not minor:
            raise BadRequest(400, "HTTP/1.0 has no Transfer-Encoding")
        names = [name.strip().lower() for value in codings for name in value.split(b",")]
        if names[-1] != b"chunked" or b"chunked" in names[:-1]:
            raise BadRequest(400, "the last transfer coding must be chunked, and only the last")
        if len(names) > 1:
            raise BadRequest(501, "the only transfer coding that is supported is chunked")
        return None
    if not lengths:
        return 0
    if len(lengths) > 1 or not LENGTH.fullmatch(lengths[0]):
        raise BadRequest(400, "Content-Length is not one whole number")
    if len(lengths[0].lstrip(b"0")) > len(str(MAX_CONTENT_BYTES)) or int(lengths[0]) > MAX_CONTENT_BYTES:
        raise _too_large()
    return int(lengths[0])


def _too_large() -> BadRequest:
    return BadRequest(413, f"the request is larger than {MAX_CONTENT_BYTES:,} bytes")


def _may_begin_request(content: bytearray) -> bool:
    method = METHOD.match(content)
    if method is None:
        return bytes(content) in (b"", b"\r")  # of a blank line
    return bytes(content[method.end() : method.end() + 1]) in (b"", b" ")


def _check_line_ends(content: bytes | bytearray, start: int, end: int) -> None:
    found = BARE_LINE_END.search(content, start, end)
    if found and (found[0] == b"\n" or found.end() < len(content)):  # a last \r may become \r\n
        raise BadRequest(400, "a line does not end in CR LF")
