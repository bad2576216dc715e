"""A judge that follows a known rule, as a real server with OpenAI's API in this process."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Rule = Callable[[str, str], str]
"""The two answers in the order in which they stand -> what the judge writes."""
_ANSWERS = [r"<(?:answer_A|답 A)>\n(.*?)\n</", r"<(?:answer_B|답 B)>\n(.*?)\n</"]
TRIAL = ("2", "3")
"""The answers of the small question that comes first."""


def written(verdict: str) -> str:
    return json.dumps({"reason": f"because of {verdict}", "verdict": verdict})


def longer(first: str, second: str) -> str:
    return written("tie" if len(first) == len(second) else "A" if len(first) > len(second) else "B")


def always_first(first: str, second: str) -> str:
    return written("A")


def garbage(first: str, second: str) -> str:
    return "Both answers have their merits."


@dataclass
class RuledJudge:
    """What the server does, and what it saw. The counts may be read while it runs."""

    rule: Rule
    troubles: list[Callable[[BaseHTTPRequestHandler], bool]] = field(default_factory=list)
    """Each is done to one request, in turn. A true result ends the request."""
    refuse: Callable[[Mapping[str, Any]], str | None] = lambda body: None
    """The message with which a request of this content is refused."""
    wait_seconds: float = 0.0
    url: str = ""
    bodies: list[dict[str, Any]] = field(default_factory=list)
    """Of all requests, also of those that ended in trouble."""
    keys: list[str | None] = field(default_factory=list)
    most_at_once: int = 0
    at_once: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def questions(self) -> list[tuple[str, str]]:
        """The two answers of each request but the trial."""
        return [two for body in self.bodies if (two := answers_in(prompt_in(body))) != TRIAL]


def prompt_in(body: Mapping[str, Any]) -> str:
    return str(body["messages"][-1]["content"])


def answers_in(prompt: str) -> tuple[str, str]:
    first, second = (re.search(pattern, prompt, re.DOTALL) for pattern in _ANSWERS)
    assert first is not None and second is not None, prompt
    return first[1], second[1]


def send(request: BaseHTTPRequestHandler, status: int, content: object, **headers: str) -> None:
    data = json.dumps(content).encode()
    request.send_response(status)
    for name, value in headers.items():
        request.send_header(name.replace("_", "-"), value)
    request.send_header("Content-Length", str(len(data)))
    request.end_headers()
    request.wfile.write(data)


def busy(request: BaseHTTPRequestHandler) -> bool:
    send(request, 429, {"error": {"message": "slow down"}}, Retry_After="0.01")
    return True


def broken(request: BaseHTTPRequestHandler) -> bool:
    send(request, 503, {"error": {"message": "restarting"}}, Retry_After="0.01")
    return True


def dropped(request: BaseHTTPRequestHandler) -> bool:
    """The connection ends without a response."""
    request.close_connection = True
    return True


def torn(request: BaseHTTPRequestHandler) -> bool:
    """The connection ends within the response."""
    request.send_response(200)
    request.send_header("Content-Length", "1000")
    request.end_headers()
    request.wfile.write(b'{"choices": [')
    request.close_connection = True
    return True


@contextmanager
def judging(judge: RuledJudge) -> Iterator[RuledJudge]:
    """The judge at its `url`, on a free port."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            send(self, 200, {"data": [{"id": "judge"}, {"id": "other"}]})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with judge.lock:
                judge.bodies.append(body)
                judge.keys.append(self.headers.get("Authorization"))
                judge.at_once += 1
                judge.most_at_once = max(judge.most_at_once, judge.at_once)
                trouble = judge.troubles.pop(0) if judge.troubles else None
            try:
                if judge.wait_seconds:
                    threading.Event().wait(judge.wait_seconds)
                if trouble is not None and trouble(self):
                    return
                self.judge(body)
            finally:
                with judge.lock:
                    judge.at_once -= 1

        def judge(self, body: Mapping[str, Any]) -> None:
            if self.path != "/v1/chat/completions" or body["model"] != "judge":
                send(self, 404, {"error": {"message": f"no model {body['model']}"}})
            elif (message := judge.refuse(body)) is not None:
                send(self, 400, {"error": {"message": message}})
            else:
                message = {"role": "assistant", "content": judge.rule(*answers_in(prompt_in(body)))}
                usage = {"prompt_tokens": 100, "completion_tokens": 10}
                send(self, 200, {"choices": [{"message": message, "finish_reason": "stop"}], "usage": usage})

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    judge.url = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield judge
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
