"""`yeonma serve` as a process of its own, as a user starts it: ready when it says so."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from openai import OpenAI

ROOT = Path(__file__).resolve().parent.parent
PATIENCE_SECONDS = 120


@dataclass(frozen=True)
class Server:
    process: subprocess.Popen[str]
    url: str
    """With /v1."""
    said: str
    """Its line when it was ready."""
    errors: Path

    def client(self, key: str = "none") -> OpenAI:
        return OpenAI(base_url=self.url, api_key=key, max_retries=0, timeout=PATIENCE_SECONDS)


@contextmanager
def serving(
    errors: Path, *words: Path | str, environment: Mapping[str, str] | None = None
) -> Iterator[Server]:
    """At a free port. It must end by Ctrl-C with status 0; `errors` is a file for what it says on standard error."""
    command = [sys.executable, "-m", "yeonma", "serve", *map(str, words), "--port", "0"]
    own = {name: value for name, value in os.environ.items() if name != "YEONMA_API_KEY"}
    with errors.open("w") as file:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**own, **(environment or {})},
            stdout=subprocess.PIPE,
            stderr=file,
            text=True,
        )
    try:
        assert process.stdout is not None
        said = process.stdout.readline()
        found = re.search(r"http://\S+/v1", said)
        assert found is not None, errors.read_text()
        yield Server(process, found[0], said, errors)
        process.send_signal(signal.SIGINT)
        assert process.wait(PATIENCE_SECONDS) == 0, errors.read_text()
        assert "Traceback" not in errors.read_text(), errors.read_text()
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
