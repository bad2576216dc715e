"""`yeonma serve`: adapters behind OpenAI's interface, by vLLM where that asks with the trained tokens, else by us."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Mapping
from importlib.util import find_spec
from typing import TYPE_CHECKING

from yeonma.config.parse import group_of
from yeonma.config.settings import ServeSettings
from yeonma.errors import UserError
from yeonma.serve.listen import key_of, listen, url_of

if TYPE_CHECKING:
    from yeonma.serve.server import Served


def run(settings: Mapping[type, object]) -> int:
    """Serve until Ctrl-C. The port is taken, and folders are looked at, before weights are loaded. Raises UserError."""
    asked = group_of(settings, ServeSettings)
    key = key_of(asked.api_key, os.environ)
    with listen(asked.host, asked.port, key) as listener:
        if find_spec("starlette") is None or find_spec("uvicorn") is None:
            cure = "install them with: pip install starlette uvicorn"
            raise UserError("it needs the packages starlette and uvicorn", place="yeonma serve", cure=cure)
        from yeonma.serve.server import load_served_models, open_served, run_server

        served = open_served(asked)
        if _by_vllm(asked, served):
            _become_vllm(asked, served, listener, key)
        speakers = load_served_models(served, asked, _say)
        try:
            run_server(served, speakers, asked, listener, key, lambda: _ready(served, listener, key))
        except KeyboardInterrupt:
            _say("stopped")
    return 0


def _ready(served: Served, listener: socket.socket, key: str | None) -> None:
    needed = "; requests must bring the key" if key else ""
    print(f"Serving {', '.join(served.names)} at {url_of(listener)}/v1{needed}. Ctrl-C stops.", flush=True)


def _by_vllm(asked: ServeSettings, served: Served) -> bool:
    """Raises UserError where vLLM is wanted and cannot be had."""
    from yeonma.serve.vllm import is_there, why_not

    if asked.engine == "yeonma" or (asked.engine == "auto" and (asked.device == "cpu" or not is_there())):
        return False
    reason = (
        why_not(list(served.askers.values()), asked.quantization)
        if is_there()
        else "it is not installed, or there is no GPU"
    )
    if reason and asked.engine == "vllm":
        raise UserError(f"vLLM cannot serve this: {reason}", place="--engine vllm", cure="leave it out")
    if reason:
        _say(f"not by vLLM: {reason}")
    return not reason


def _become_vllm(asked: ServeSettings, served: Served, listener: socket.socket, key: str | None) -> None:
    """Replace this process by vLLM's server, at the port that was held for it."""
    from yeonma.serve.vllm import VllmPlan, rank_of, vllm_command

    source = served.first.source
    plan = VllmPlan(
        base=source.name,
        base_name=served.base_name,
        revision=source.revision,
        adapters={
            name: (asker.adapter.path.absolute(), rank_of(asker)) for name, asker in served.askers.items()
        },
        host=asked.host,
        port=listener.getsockname()[1],
        dtype=asked.dtype,
        trust_remote_code=asked.trust_remote_code,
        temperature=asked.temperature,
        max_new_tokens_limit=asked.max_new_tokens_limit,
    )
    command = vllm_command(plan)
    listener.close()
    _say(f"by vLLM: {' '.join(command[1:])}")
    environment = {**os.environ, **({"VLLM_API_KEY": key} if key else {})}
    sys.stdout.flush()
    os.execve(command[0], command, environment)


def _say(text: str) -> None:
    print(f"yeonma: {text}", file=sys.stderr, flush=True)
