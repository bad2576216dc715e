"""Requests to `yeonma serve`: damaged bytes, heads, bodies and values, sent to a real server of tiny models.

Every answer must be well-formed, with a status that does not blame the server, and afterwards the server must give the
same answer to a good question as before.
"""

from __future__ import annotations

import json
import re
import socket
import tempfile
import threading
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from tests.fuzz.harness import Target
from tests.fuzz.mutate import damaged_bytes, damaged_json, damaged_text, damaged_value
from tests.fuzz.sandbox import Sandbox
from yeonma.errors import UserError
from yeonma.serve.try_page import try_page

LIMIT_SECONDS = 0.25
PATIENCE_SECONDS = 15
TITLE, CHAT, COMPLETIONS = "title", "/v1/chat/completions", "/v1/completions"
MESSAGES = [{"role": "user", "content": "Who is it?"}]
SCHEMA = {"type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"]}
TOOL = {"type": "function", "function": {"name": "f", "description": "d", "parameters": SCHEMA}}
BODIES: tuple[tuple[str, dict[str, Any]], ...] = (
    (CHAT, {"model": TITLE, "messages": MESSAGES, "max_tokens": 4}),
    (CHAT, {"model": "chat", "messages": [{"role": "system", "content": "Be kind."}, *MESSAGES], "stream": True}),
    (CHAT, {"model": "chat", "messages": MESSAGES, "tools": [TOOL], "tool_choice": "auto", "n": 2}),
    (CHAT, {"model": TITLE, "messages": MESSAGES, "logprobs": True, "top_logprobs": 2, "stop": ["a", "b"]}),
    (CHAT, {"model": TITLE, "messages": MESSAGES, "temperature": 0.7, "top_p": 0.9, "top_k": 5, "seed": 3}),
    (CHAT, {"model": "chat", "messages": MESSAGES, "chat_template_kwargs": {"enable_thinking": False}}),
    (CHAT, {"model": "chat", "messages": [*MESSAGES, {"role": "assistant", "content": "I."}, *MESSAGES]}),
    (CHAT, {"model": "chat", "messages": [{"role": "user", "content": [{"type": "text", "text": "Who?"}]}]}),
    (COMPLETIONS, {"model": TITLE, "prompt": "Who", "max_tokens": 4, "logit_bias": {"5": 3, "6": -100}}),
    (COMPLETIONS, {"model": "base", "prompt": [[5, 6, 7], "a"], "echo": True, "logprobs": 2, "stream": True}),
    (COMPLETIONS, {"model": "base", "prompt": "a", "n": 3, "presence_penalty": 1, "frequency_penalty": -1}),
    (CHAT, {"model": TITLE, "messages": MESSAGES, "response_format": {"type": "json_object"}}),
    (
        CHAT,
        {
            "model": TITLE,
            "messages": MESSAGES,
            "response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA}},
        },
    ),
)  # fmt: skip
NAMES = tuple(
    sorted({name for _, body in BODIES for name in body} | {"user", "best_of", "min_p", "suffix", "role"})
)
PATHS = (
    CHAT,
    COMPLETIONS,
    "/v1/models",
    "/v1/models/title",
    "/v1/models/%00%ff",
    "/health",
    "/",
    "*",
    "//a",
    "/%2e%2e/a",
)
METHODS = ("GET", "POST", "HEAD", "OPTIONS", "PUT", "DELETE", "PATCH", "CONNECT", "TRACE", "get", "X")
FIELDS = (
    "Host: 127.0.0.1", "Host: evil", "Host:", "Connection: close", "Connection: keep-alive", "Expect: 100-continue",
    "Expect: a", "Content-Length: 0", "Content-Length: 5", "Content-Length: 5, 5", "Content-Length: -1",
    "Transfer-Encoding: chunked", "Transfer-Encoding: gzip, chunked", "Transfer-Encoding: identity",
    "Content-Type: application/json", "Content-Type: text/plain", "Content-Encoding: gzip", "Upgrade: h2c",
    "Upgrade: websocket", "Connection: upgrade", "Authorization: Bearer a", "Authorization: Basic Og==",
    "Authorization: Bearer \xe9", "Cookie: a=b", "X" * 300 + ": a", "X: " + "a" * 9000, "X : a", " X: a", "X", ": a",
    "X: \x00", "X: \x1b[31m", "X: \xff",
)  # fmt: skip
HTTP_TOKENS = (
    "\r\n",
    "\n",
    "\r",
    ":",
    " ",
    "\t",
    "HTTP/1.1",
    "HTTP/1.0",
    "HTTP/2.0",
    "0\r\n\r\n",
    *METHODS,
    *PATHS,
    *FIELDS,
)
HUGE: tuple[Any, ...] = (
    "a" * 300_000, " " * 900_000, "가" * 100_000, "e" + "\u0301" * 20_000, "\U0001f469\u200d" * 5000,
    "<|im_end|>" * 2000,
    list(range(50_000)), [5] * 5000, [""] * 3000, [{}] * 30_000, MESSAGES * 5000, MESSAGES * 300, [TOOL] * 200,
    {str(n): 1 for n in range(5000)}, {str(n): 1 for n in range(90)}, {"1": 10**400}, 10**4000, 10**30, -(2**63), 2**53,
    1e-320, 1e308, float("nan"), float("inf"), True, "\ud800", "\udfff\ud800", "\0", "\x1b[2J", 0, -1, 0.5, 1.0, "1",
)  # fmt: skip


@dataclass(frozen=True)
class Sent:
    """Bytes to send, in parts."""

    parts: tuple[bytes, ...]

    def __repr__(self) -> str:
        return f"Sent({[part if len(part) < 3000 else part[:3000] + b'...' for part in self.parts]!r})"


def written(path: str, body: bytes, method: str = "POST", *fields: str) -> bytes:
    lines = [f"{method} {path} HTTP/1.1", "Host: 127.0.0.1", "Content-Type: application/json", *fields]
    lines += [f"Content-Length: {len(body)}", "Connection: close"]
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + body


def in_chunks(path: str, body: bytes, size: int) -> bytes:
    head = (
        f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nConnection: close\r\n"
    )
    parts = [body[at : at + size] for at in range(0, len(body), size)]
    chunks = b"".join(b"%x;a=b\r\n%b\r\n" % (len(part), part) for part in parts)
    return head.encode() + b"Transfer-Encoding: chunked\r\n\r\n" + chunks + b"0\r\nX: y\r\n\r\n"


def nested(depth: int) -> bytes:
    return b'{"model":"title","messages":' + b'[{"a":' * depth + b"1" + b"}]" * depth + b"}"


@st.composite
def cases(draw: Any) -> Sent:
    path, body = draw(st.sampled_from(BODIES))
    kind = draw(st.sampled_from(("body", "body", "huge", "head", "bytes", "route", "nested", "pipeline")))
    if kind == "body":
        content = draw(damaged_json(body, NAMES))
        request = written(path, content) if draw(st.booleans()) else in_chunks(path, content, 37)
    elif kind == "huge":
        changed = draw(damaged_value(body, NAMES, max_edits=1))
        target = changed if isinstance(changed, dict) else dict(body)
        messages = target.get("messages")
        if draw(st.booleans()) and isinstance(messages, list) and messages and isinstance(messages[0], dict):
            target = messages[0]
        target[
            draw(st.sampled_from((*NAMES, "content", *(key for key in target if isinstance(key, str)))))
        ] = draw(st.sampled_from(HUGE))
        request = written(path, json.dumps(changed).encode())
    elif kind == "head":
        text = written(path, json.dumps(body).encode()).decode("latin-1")
        request = draw(damaged_text(text, HTTP_TOKENS)).encode("utf-8", "surrogatepass")
    elif kind == "bytes":
        request = draw(
            damaged_bytes(written(path, json.dumps(body).encode()), (b"\r\n", b"0\r\n\r\n", b"\n"))
        )
    elif kind == "route":
        path, method = draw(st.sampled_from(PATHS)), draw(st.sampled_from(METHODS))
        fields = draw(st.lists(st.sampled_from(FIELDS), max_size=2))
        request = written(path, draw(st.sampled_from((b"", json.dumps(body).encode()))), method, *fields)
    elif kind == "nested":
        request = written(path, nested(draw(st.sampled_from((1, 30, 40, 500, 3000, 100_000)))))
    else:
        one = written(path, json.dumps(body).encode()).replace(b"Connection: close", b"X: y")
        request = one + draw(damaged_bytes(one)) + written("/health", b"", "GET")
    at = draw(st.integers(0, len(request)))
    return Sent((request[:at], request[at:]) if draw(st.booleans()) else (request,))


@lru_cache(maxsize=1)
def port() -> int:
    """Of a server in this process, with short times."""
    from tests.adapters import adapter_on, tiny_base
    from tests.tokenizers import byte_level
    from yeonma.config.settings import ServeSettings
    from yeonma.serve.connections import ConnectionLimits
    from yeonma.serve.listen import listen
    from yeonma.serve.server import load_served_models, open_adapters, run_server

    root = Path(tempfile.mkdtemp())
    base = tiny_base(root / "base", byte_level(), positions=2048)
    adapters = [str(adapter_on(base, root / name, name)) for name in (TITLE, "chat")]
    settings = ServeSettings(
        adapter_dirs=tuple(adapters), max_new_tokens=8, max_new_tokens_limit=16, temperature=0
    )
    opened = open_adapters(settings)
    models = load_served_models(opened, settings, lambda text: None)
    listener, ready = listen("127.0.0.1", 0, None), threading.Event()
    limits = ConnectionLimits(64, LIMIT_SECONDS, LIMIT_SECONDS, 1 << 24, 2, LIMIT_SECONDS, 2, LIMIT_SECONDS)
    number = int(listener.getsockname()[1])
    words = (opened, models, settings, listener, None, ready.set, lambda text: None, limits)
    threading.Thread(target=run_server, args=words, daemon=True).start()
    assert ready.wait(60)
    return number


def send(case: Sent) -> bytes:
    """What comes back until the server closes."""
    parts = []
    with socket.create_connection(("127.0.0.1", port()), PATIENCE_SECONDS) as connection:
        try:
            for part in case.parts:
                connection.sendall(part)
            while part := connection.recv(1 << 16):
                parts.append(part)
        except ConnectionError:  # refused while it was still being sent
            pass
    return b"".join(parts)


GOOD = Sent((written(CHAT, json.dumps({**BODIES[0][1], "max_tokens": 8}).encode()),))
FIELD = re.compile(r"[!#-'*+.^_`|~0-9A-Za-z-]+: [\x20-\x7e]*")


@lru_cache(maxsize=1)
def expected() -> object:
    return good_answer()


def good_answer() -> object:
    ((status, content),) = answers(send(GOOD))
    assert status == 200, content
    return json.loads(content)["choices"]


def answers(content: bytes) -> list[tuple[int, bytes]]:
    """Statuses and contents. Raises AssertionError for what is no HTTP."""
    found = []
    while content:
        head, blank, content = content.partition(b"\r\n\r\n")
        assert blank, f"a cut head: {head!r}"
        first, *lines = head.decode("latin-1").split("\r\n")
        match = re.fullmatch(r"HTTP/1\.1 (\d{3}) [A-Za-z -]+", first)
        assert match, first
        assert all(FIELD.fullmatch(line) for line in lines), lines
        fields = {name.lower(): value for name, value in (line.split(": ", 1) for line in lines)}
        if (status := int(match[1])) < 200:
            continue
        if fields.get("transfer-encoding") == "chunked":
            body = b""
            while size := int(content.partition(b"\r\n")[0], 16):
                _, _, content = content.partition(b"\r\n")
                body, end, content = body + content[:size], content[size : size + 2], content[size + 2 :]
                assert end == b"\r\n", "a broken chunk"
            assert content.startswith(b"0\r\n\r\n"), "no last chunk"
            content = content[5:]
            if fields["content-type"].startswith("text/event-stream"):
                assert body.endswith(b"data: [DONE]\n\n") or b'"error"' in body, body
        else:
            length = int(fields["content-length"])
            body, content = (
                (b"", content) if _is_of_head(content, length) else (content[:length], content[length:])
            )
            assert len(body) in (0, length), "a cut answer"
            if body and fields["content-type"].startswith("text/html"):
                assert body == bytes(try_page().body)
            elif body:
                json.loads(body)
        found.append((status, body))
    return found


def _is_of_head(content: bytes, length: int) -> bool:
    """An answer to HEAD has no content."""
    return not content or (length > 0 and content.startswith(b"HTTP/1.1 "))


def read(case: Sent, sandbox: Sandbox) -> None:
    before = expected()
    found = answers(send(case))
    for status, content in found:
        assert status < 500 or status in (501, 505), (status, content)
    assert good_answer() == before, "another answer to the good question"
    if not found or any(status >= 400 for status, _ in found):
        raise UserError("refused" if found else "not answered", place="request")


def started(folder: Path) -> dict[str, bytes]:
    """Starts the server, before the first case has its bounds of time and memory."""
    expected()
    return {}


REQUESTS = Target("requests", cases(), GOOD, files=lambda case: {}, read=read, pristine=started)
