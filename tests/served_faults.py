"""A server that asks a real one wrongly, as servers out in the world do: other prompts, other ends, other parameters.

It renders messages with the folder's chat template, changes the token ids, and has `yeonma serve` answer these.
"""

from __future__ import annotations

import json
import threading
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Literal

from yeonma.model.load import load_tokenizer
from yeonma.model.source import BaseSource
from yeonma.tokenization.chat_template_export import chat_ids
from yeonma.tokenization.conversation import Conversation

Ids = list[int]
Tells = Literal["ids", "counts", "text"]


@dataclass(frozen=True)
class WrongServer:
    """How it differs from the real one."""

    change: Callable[[Ids], Ids] = lambda ids: ids
    """Of the ids of a prompt."""
    template: str | None = None
    """Another chat template."""
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    """Arguments of the chat template."""
    more: Mapping[str, Any] = field(default_factory=dict)
    """Parameters of its own, for requests by messages. Those of the request win."""
    tells: Tells = "ids"
    """ids: as vLLM, prompt ids and log-probabilities. counts: as Ollama. text: answers alone."""


@contextmanager
def wrong_server(real: str, model: str, folder: Path, wrong: WrongServer) -> Iterator[str]:
    """Its address. `real`: the address of `yeonma serve` with /v1, and its `model`. `folder`: that of the run."""
    tokenizer: Any = load_tokenizer(BaseSource(str(folder), None, False), keep_exported=True)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            owner = "vllm" if wrong.tells == "ids" else "library"
            self._give({"data": [{"id": model, "owned_by": owner}]} if self.path == "/v1/models" else None)

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if self.path == "/v1/chat/completions":
                self._give(self._chat(body))
            elif wrong.tells == "ids":
                self._give(_post(f"{real}/completions", {**body, "model": model}))
            else:
                self._give(None)

        def _chat(self, body: dict[str, Any]) -> dict[str, Any]:
            asked = Conversation(body["messages"], kwargs=wrong.kwargs)
            ids = wrong.change(chat_ids(tokenizer, asked, wrong.template))
            kept = {
                name: value for name, value in body.items() if name in ("max_tokens", "temperature", "top_k")
            }
            given = {"repetition_penalty": body["repetition_penalty"]} if "repetition_penalty" in body else {}
            sent = {"model": model, "prompt": ids, "return_token_ids": True, **kept, **wrong.more, **given}
            answer = _post(f"{real}/completions", sent)
            (choice,) = answer["choices"]
            message = {"role": "assistant", "content": choice["text"]}
            reply = {"choices": [{"message": message, "finish_reason": choice["finish_reason"]}]}
            if wrong.tells != "text":
                reply["usage"] = answer["usage"]
            if wrong.tells == "ids":
                reply["prompt_token_ids"] = ids
                reply["choices"][0]["token_ids"] = choice["token_ids"]
            return reply

        def _give(self, content: dict[str, Any] | None) -> None:
            data = json.dumps(content or {"error": {"message": "no such place"}}).encode()
            self.send_response(200 if content is not None else 404)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, format: str, *arguments: object) -> None:
            """Nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _post(address: str, body: Mapping[str, Any]) -> dict[str, Any]:
    request = urllib.request.Request(address, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request) as response:
        content: dict[str, Any] = json.load(response)
    return content
