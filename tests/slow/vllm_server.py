"""Starts a real vLLM that a Python of its own has, on the CPU."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

from yeonma.serve.listen import listen

START_SECONDS = 900
CPU = {
    "OMP_NUM_THREADS": "2",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "HF_HUB_OFFLINE": "1",
}
MORE = ("--enforce-eager", "--max-model-len", "1024", "--trust-request-chat-template")


def start_words(python: str, model: str) -> list[str]:
    """`vllm serve`; the package vllm-cpu has no version for that command to show, but its server's module runs."""
    names = "from importlib.metadata import version; version('vllm')"
    if subprocess.run([python, "-c", names], capture_output=True, check=False).returncode == 0:
        return [python, "-m", "vllm.entrypoints.cli.main", "serve", model]
    return [python, "-m", "vllm.entrypoints.openai.api_server", "--model", model]


def free_port() -> int:
    with listen("127.0.0.1", 0, None) as listener:
        return int(listener.getsockname()[1])


@contextmanager
def vllm_serving(words: Sequence[str], log: Path) -> Iterator[str]:
    url = f"http://127.0.0.1:{words[words.index('--port') + 1]}"
    bin_folder = str(Path(words[0]).parent)
    environment = {**os.environ, **CPU, "PATH": f"{bin_folder}:{os.environ['PATH']}"}
    with log.open("w") as file:
        process = subprocess.Popen(words, env=environment, stdout=file, stderr=file)
    try:
        limit = time.monotonic() + START_SECONDS
        while not _is_up(url):
            assert process.poll() is None and time.monotonic() < limit, log.read_text()[-3000:]
            time.sleep(1)
        yield url
    finally:
        process.terminate()
        process.wait(60)


def _is_up(url: str) -> bool:
    try:
        with urlopen(f"{url}/health", timeout=5):
            return True
    except (URLError, OSError):
        return False
