"""`yeonma serve`: adapters over an OpenAI-compatible API, by vLLM if it uses the trained prompt ids, else by Yeonma."""

from __future__ import annotations

import os
import socket
import sys
from functools import partial
from importlib.util import find_spec
from typing import TYPE_CHECKING

from yeonma.commands.first_checks import check_serve, vllm_refusal
from yeonma.config.settings import ServeSettings
from yeonma.errors import UserError
from yeonma.messages import tr
from yeonma.packages import install
from yeonma.serve.listen import api_key, listen, url_of
from yeonma.shown import shell_word
from yeonma.streams import log_line, say

if TYPE_CHECKING:
    from yeonma.serve.server import ServedAdapters

PACKAGES = ("starlette", "uvicorn", "pydantic")


def run(settings: ServeSettings) -> int:
    """Serves until Ctrl-C. Opens the port and checks the folders before any weights are loaded. Raises UserError."""
    key = api_key(settings.api_key, os.environ)
    with listen(settings.host, settings.port, key) as listener:
        if missing := [name for name in PACKAGES if find_spec(name) is None]:
            names = " ".join(missing)
            cure = tr("install it with: {install}", install=install(*missing))
            raise UserError(tr("missing packages: {names}", names=names), place="yeonma serve", cure=cure)
        check_serve(settings)
        from yeonma.serve.server import load_served_models, open_adapters, run_server

        adapters = open_adapters(settings, log_line)
        if _use_vllm(settings, adapters):
            _exec_vllm(settings, adapters, listener, key)
        models = load_served_models(adapters, settings, log_line)
        try:
            on_ready = partial(_print_ready, list(models), listener, key)
            run_server(adapters, models, settings, listener, key, on_ready, log_line)
        except KeyboardInterrupt:
            log_line(tr("stopped"))
    return 0


def _print_ready(names: list[str], listener: socket.socket, key: str | None) -> None:
    values = {"names": ", ".join(names), "address": f"{url_of(listener)}/v1"}
    say(
        tr("Serving {names} at {address}; requests need the API key. Ctrl-C stops.", **values)
        if key
        else tr("Serving {names} at {address}. Ctrl-C stops.", **values)
    )
    say(tr("Try it in a browser: {address}", address=f"{url_of(listener)}/"))


def _use_vllm(settings: ServeSettings, adapters: ServedAdapters) -> bool:
    """Raises UserError if the settings ask for vLLM and it cannot serve the adapters."""
    from yeonma.serve.vllm import is_available, is_cpu_build, why_not

    if settings.engine == "yeonma":
        return False
    if settings.engine == "auto" and (settings.device == "cpu" or not is_available()):
        return False
    # on a CPU only if asked for by name: it then takes a minute or so to start
    reason = (
        why_not(list(adapters.prompt_builders.values()), settings.quantization)
        if is_available() or is_cpu_build()
        else tr("it is not installed, or there is no GPU and it is no build for the CPU")
    )
    if reason and settings.engine == "vllm":
        raise vllm_refusal(reason)
    if reason:
        log_line(tr("not using vLLM: {reason}", reason=reason))
    return not reason


def _exec_vllm(
    settings: ServeSettings, adapters: ServedAdapters, listener: socket.socket, key: str | None
) -> None:
    """Replaces this process by vLLM's server, on the port that was reserved for it."""
    from yeonma.serve.vllm import VllmPlan, is_available, rank_of, vllm_command

    source = adapters.first.source
    plan = VllmPlan(
        base=source.name,
        base_name=adapters.base_name or adapters.names[0],
        revision=source.revision,
        adapters={
            name: (builder.adapter.path.absolute(), rank_of(builder))
            for name, builder in adapters.prompt_builders.items()
            if not builder.adapter.is_whole
        },
        host=settings.host,
        port=listener.getsockname()[1],
        # vLLM's own choice on a CPU is the base's format; Yeonma computes in float32 there
        dtype=settings.dtype if settings.dtype != "auto" or is_available() else "float32",
        trust_remote_code=settings.trust_remote_code,
        temperature=settings.temperature,
        max_new_tokens_limit=settings.max_new_tokens_limit,
    )
    command = vllm_command(plan)
    log_line(tr("vLLM has no page to try the models on; `--engine yeonma` has one"))
    listener.close()
    log_line(tr("starting vLLM: {command}", command=" ".join(map(shell_word, command[1:]))))
    environment = {**os.environ, **({"VLLM_API_KEY": key} if key else {})}
    sys.stdout.flush()
    os.execve(command[0], command, environment)
