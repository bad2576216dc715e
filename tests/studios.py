"""`yeonma studio` without a socket: requests to its ASGI application, and folders of runs to look at."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote

from yeonma.run_folder.entries import LOCK
from yeonma.studio.access import Access
from yeonma.studio.roots import Roots
from yeonma.studio.run_control import RunControl
from yeonma.studio.studio_app import Studio, make_studio_app
from yeonma.studio.token_views import TokenViews

KEY = "sesame"
HOST = "127.0.0.1:8765"


@dataclass(frozen=True)
class Answer:
    status: int
    headers: Mapping[str, str]
    text: str


@dataclass(frozen=True)
class Client:
    """Sends requests as a browser that has the cookie, unless told otherwise."""

    studio: Studio
    access: Access

    @staticmethod
    def on(*folders: Path, allow_code: bool = False, local_only: bool = True) -> Client:
        roots = Roots.of([str(folder) for folder in folders])
        studio = Studio(roots, RunControl(allow_code), TokenViews(roots.folders[0]))
        return Client(studio, Access(KEY, 8765, local_only))

    def ask(self, method: str, address: str, body: bytes = b"", **headers: str | None) -> Answer:
        """`headers`: with `_` for `-`; None leaves one out."""
        own: dict[str, str | None] = {
            "host": HOST,
            "cookie": f"{self.access.cookie}={self.access.session}",
            **({} if method == "GET" else {"origin": f"http://{HOST}"}),
            **{name.replace("_", "-"): value for name, value in headers.items()},
        }
        path, _, query = address.partition("?")
        scope = {
            "type": "http",
            "method": method,
            "path": unquote(path),
            "raw_path": path.encode(),
            "query_string": query.encode(),
            "headers": [
                (name.encode(), value.encode("latin-1")) for name, value in own.items() if value is not None
            ],
            "scheme": "http",
            "server": ("127.0.0.1", 8765),
        }
        sent: list[dict[str, object]] = []

        async def receive() -> dict[str, object]:
            return {"type": "http.request", "body": body, "more_body": False}

        async def send(message: dict[str, object]) -> None:
            sent.append(message)

        asyncio.run(self.access.guard(make_studio_app(self.studio))(scope, receive, send))  # type: ignore[arg-type]
        start, *rest = sent
        found = {name.decode(): value.decode() for name, value in start["headers"]}  # type: ignore[attr-defined]
        content = b"".join(part.get("body", b"") for part in rest)  # type: ignore[misc]
        return Answer(start["status"], found, content.decode())  # type: ignore[arg-type]

    def get(self, address: str, **headers: str | None) -> Answer:
        return self.ask("GET", address, **headers)


def step_line(step: int, loss: float | None = None) -> str:
    record = {
        "step": step,
        "epoch": step / 1000,
        "loss": 4.0 - step / 1e6 if loss is None else loss,
        "learning_rate": 1e-4,
        "grad_norm": 1.0,
        "examples": 4,
        "tokens": 400,
        "trained_tokens": 40,
        "seconds": 0.5,
        "peak_memory_bytes": 658_132_992,
    }
    return json.dumps(record) + "\n"


def evaluation_line(step: int, loss: float) -> str:
    record = {"evaluation": True, "step": step, "epoch": 1.0, "loss": loss, "perplexity": 2.0}
    return json.dumps({**record, "examples": 5, "trained_tokens": 50, "seconds": 0.1}) + "\n"


def run_folder(
    folder: Path,
    *,
    steps: int = 20,
    finished: bool = False,
    log: str = "",
    every: int = 10,
    **settings: object,
) -> Path:
    """What a run of so many of its 20 steps has left, or more; `every`: steps between evaluations."""
    folder.mkdir(parents=True)
    identity = {"objective": "sft", "steps": max(steps, 20)}
    (folder / "run.json").write_text(json.dumps({"identity": identity, "finished": finished}))
    with (folder / "metrics.jsonl").open("w") as file:
        for step in range(1, steps + 1):
            file.write(step_line(step))
            if step % every == 0:
                file.write(evaluation_line(step, 3.0 - step / 1e6))
    (folder / "log.txt").write_text(log, encoding="utf-8")
    lines = {"output_dir": str(folder), "trust_remote_code": False, "overwrite": False, **settings}
    text = "".join(f"{name}: {json.dumps(value)}\n" for name, value in lines.items())
    (folder / "settings.yaml").write_text(text, encoding="utf-8")
    return folder


def locked_by(folder: Path, process: int, host: str | None = None) -> None:
    """A lock file as a run of that process writes it, which is not locked here."""
    holder = {"process": process, "host": host or os.uname().nodename, "since": "2026-12-01 00:00 UTC"}
    (folder / LOCK).write_bytes(f" {json.dumps(holder)}".encode())
