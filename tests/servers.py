"""`yeonma serve` in its own process, started as a user starts it; ready once it prints its address."""

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
    """Ends in /v1."""
    ready_line: str
    errors: Path

    def client(self, key: str = "none") -> OpenAI:
        return OpenAI(base_url=self.url, api_key=key, max_retries=0, timeout=PATIENCE_SECONDS)


@contextmanager
def serving(
    errors: Path, *words: Path | str, environment: Mapping[str, str] | None = None, files: int | None = None
) -> Iterator[Server]:
    """On a free port. Ctrl-C must end it with status 0. `errors`: a file for its standard error. `files`: how many
    files it may open."""
    command = [sys.executable, "-m", "yeonma", "serve", *map(str, words), "--port", "0"]
    if files is not None:
        command = ["sh", "-c", f'ulimit -n {files} && exec "$@"', "sh", *command]
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
        ready_line = process.stdout.readline()
        url = re.search(r"http://\S+/v1", ready_line)
        assert url is not None, errors.read_text()
        yield Server(process, url[0], ready_line, errors)
        process.send_signal(signal.SIGINT)
        assert process.wait(PATIENCE_SECONDS) == 0, errors.read_text()
        assert "Traceback" not in errors.read_text(), errors.read_text()
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
