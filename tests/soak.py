"""Half-open connections against `yeonma serve`, while real questions are asked: `python -m tests.soak`.

The server may open 1,024 files. Other processes open connections that send nothing, slowly or half, and leave them
open; this one asks a question every half second, each over a connection of its own. Linux only.
"""

from __future__ import annotations

import argparse
import asyncio
import http.client
import json
import os
import random
import resource
import socket
import struct
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from time import monotonic, sleep
from typing import Any
from urllib.parse import urlsplit

FILES = 1024
CONNECTIONS_PER_PROCESS = 2500
SETTLE_SECONDS = 60
QUESTION_SECONDS = 0.5
HELD_SECONDS = 60
"""For which a connection is left open; all limits of the server are shorter."""
TEMPLATE = "below is an article.\n\n{document}\n\ntitle: {title}"
HELLO = bytes.fromhex("16030100f1010000ed0303") + bytes(230)
"""The beginning of a TLS handshake."""


def request(path: str, body: dict[str, Any] | None = None, length: int | None = None) -> bytes:
    content = b"" if body is None else json.dumps(body).encode()
    method = "GET" if body is None else "POST"
    lines = [f"{method} {path} HTTP/1.1", "Host: 127.0.0.1", "Content-Type: application/json"]
    lines += [f"Content-Length: {len(content) if length is None else length}", "", ""]
    return "\r\n".join(lines).encode() + content


def question(stream: bool, max_tokens: int) -> dict[str, Any]:
    messages = [{"role": "user", "content": "a question."}]
    options = {"max_tokens": max_tokens, "stream": stream, "temperature": 0}
    return {"model": "adapter", "messages": messages, **options}


Attack = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.read()


async def slow_headers(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\nX: ")
    ended = asyncio.ensure_future(reader.read())
    while not ended.done():
        writer.write(b"x")
        await asyncio.wait([ended], timeout=1)
    await ended


async def half_body(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(request("/v1/chat/completions", question(False, 1), 100_000))
    await reader.read()


async def idle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(request("/health"))
    await reader.read()


async def unread(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.transport.pause_reading()  # type: ignore[attr-defined]
    writer.write(request("/v1/chat/completions", question(True, 64)))
    await asyncio.sleep(45)


async def tls(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(HELLO)
    await reader.read()


async def reset(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(request("/v1/chat/completions", question(False, 1), 100_000))
    await writer.drain()
    sock = writer.get_extra_info("socket")
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


ATTACKS: dict[str, tuple[Attack, int]] = {
    "silent": (silent, 30),
    "slow_headers": (slow_headers, 20),
    "half_body": (half_body, 20),
    "idle": (idle, 10),
    "unread": (unread, 1),
    "tls": (tls, 9),
    "reset": (reset, 10),
}
"""With their shares of 100."""


async def attack(port: int, count: int, seconds: float, seed: int) -> Counter[str]:
    """Opens `count` connections, spread over `seconds`. Returns what became of them."""
    draw = random.Random(seed)
    outcomes: Counter[str] = Counter()
    names = draw.choices(list(ATTACKS), [share for _, share in ATTACKS.values()], k=count)

    async def one(name: str, delay: float) -> None:
        await asyncio.sleep(delay)
        try:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
        except OSError as error:
            outcomes[f"{name} not connected: {error.strerror}"] += 1
            return
        outcomes[name] += 1
        try:
            await asyncio.wait_for(ATTACKS[name][0](reader, writer), HELD_SECONDS)
        except asyncio.TimeoutError:  # such as one that the system dropped before the server saw it
            outcomes[f"{name} not closed"] += 1
        except OSError:
            pass
        writer.close()

    await asyncio.gather(*(one(name, draw.uniform(0, seconds)) for name in names))
    return outcomes


@dataclass(frozen=True)
class Soak:
    """What a soak found."""

    connections: int
    seconds: float
    questions: int
    failed_questions: int
    p50_seconds: float
    p99_seconds: float
    longest_seconds: float
    log_bytes: int
    files_at_start: int
    most_files: int
    files_at_end: int
    megabytes_at_start: int
    most_megabytes: int
    other_answers: int
    """Answers that were not that of the idle server."""
    load: float
    """Processes that wanted a core, on average over the last minute."""
    outcomes: dict[str, int]
    failures: list[str]


def ask(port: int) -> str:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        body = json.dumps(question(False, 8))
        connection.request("POST", "/v1/chat/completions", body, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        content = answer.read()
        if answer.status != 200:
            raise OSError(f"status {answer.status}: {content[:200]!r}")
        return str(json.loads(content)["choices"][0]["message"]["content"])
    finally:
        connection.close()


def files_of(process: int) -> int:
    return len(os.listdir(f"/proc/{process}/fd"))


def megabytes_of(process: int) -> int:
    status = Path(f"/proc/{process}/status").read_text()
    return int(status.partition("VmRSS:")[2].split()[0]) // 1024


def soak(root: Path, connections: int, seconds: float, seed: int = 0) -> Soak:
    """Serves a tiny model from `root`, an empty folder."""
    from tests.adapters import adapter_on, tiny_base
    from tests.runs import characters
    from tests.servers import serving

    base = tiny_base(root / "base", characters())
    adapter = adapter_on(base, root / "adapter", TEMPLATE)
    with serving(root / "errors", adapter, files=FILES) as server:
        port, process = urlsplit(server.url).port, server.process.pid
        assert port is not None
        expected = ask(port)
        numbers = _measure(port, process, connections, seconds, seed, expected)
        found = Soak(log_bytes=server.errors.stat().st_size, **numbers)
        print(f"soak: {json.dumps(asdict(found))}", flush=True)
        return found


def _measure(
    port: int, process: int, connections: int, seconds: float, seed: int, expected: str
) -> dict[str, Any]:
    parts = -(-connections // CONNECTIONS_PER_PROCESS)
    command = [sys.executable, "-m", "tests.soak", "--attack", str(port), "--seconds", str(seconds)]
    files = [files_of(process)]
    memory = [megabytes_of(process)]
    times, failures, others = [], [], 0
    attackers = [
        subprocess.Popen(
            [*command, "--connections", str(connections // parts), "--seed", str(seed + part)],
            stdout=subprocess.PIPE,
            text=True,
        )
        for part in range(parts)
    ]
    try:
        while any(attacker.poll() is None for attacker in attackers):
            started = monotonic()
            try:
                others += ask(port) != expected
            except (OSError, http.client.HTTPException) as error:
                failures.append(f"{type(error).__name__}: {error}")
            times.append(monotonic() - started)
            files.append(files_of(process))
            memory.append(megabytes_of(process))
            sleep(max(0.0, QUESTION_SECONDS - times[-1]))
        outcomes: Counter[str] = Counter()
        for attacker in attackers:
            assert attacker.stdout is not None
            outcomes.update(json.loads(attacker.stdout.read()))
    finally:
        for attacker in attackers:
            attacker.kill()
            attacker.wait()
    settled = monotonic() + SETTLE_SECONDS
    while files_of(process) > files[0] and monotonic() < settled:
        sleep(0.2)
    times.sort()
    return {
        "connections": sum(count for name, count in outcomes.items() if name in ATTACKS),
        "seconds": seconds,
        "questions": len(times),
        "failed_questions": len(failures),
        "p50_seconds": round(times[len(times) // 2], 3),
        "p99_seconds": round(times[min(len(times) - 1, len(times) * 99 // 100)], 3),
        "longest_seconds": round(times[-1], 3),
        "files_at_start": files[0],
        "most_files": max(files),
        "files_at_end": files_of(process),
        "megabytes_at_start": memory[0],
        "most_megabytes": max(memory),
        "other_answers": others,
        "load": round(os.getloadavg()[0], 1),
        "outcomes": dict(sorted(outcomes.items())),
        "failures": failures[:10],
    }


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__)
    parser.add_argument("--connections", type=int, default=10_000)
    parser.add_argument("--seconds", type=float, default=60, help="over which they are opened")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--attack", type=int, metavar="PORT", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.attack:
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        attacked = attack(arguments.attack, arguments.connections, arguments.seconds, arguments.seed)
        print(json.dumps(asyncio.run(attacked)))
        return 0
    with tempfile.TemporaryDirectory() as folder:
        found = soak(Path(folder), arguments.connections, arguments.seconds, arguments.seed)
    return 1 if found.failed_questions or found.other_answers else 0


if __name__ == "__main__":
    sys.exit(main())
