"""Whether llama.cpp's own server has the token ids of training for an exported file, where xllamacpp is installed.

It runs in a process of its own: a fault of native code ends that one.
"""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

from yeonma.adapter.prompt_builder import PromptBuilder
from yeonma.errors import Log
from yeonma.messages import tr
from yeonma.tokenization.chat_template_export import trials

PACKAGE = "xllamacpp"
SECONDS = 600
_PROGRAM = f"""\
import json, sys
from urllib.request import Request, urlopen
import {PACKAGE}
request = json.load(sys.stdin)
params = {PACKAGE}.CommonParams()
params.model.path, params.n_ctx, params.n_parallel, params.n_gpu_layers = request["gguf"], 256, 1, 0
params.use_jinja, params.no_extra_bufts, params.warmup, params.fit_params = True, True, False, False
server = {PACKAGE}.Server(params)
def post(path, body):
    headers = {{"Content-Type": "application/json"}}
    with urlopen(Request(server.listening_address + path, json.dumps(body).encode(), headers)) as response:
        return json.load(response)
def ids(messages):
    try:
        prompt = post("/apply-template", {{"messages": messages}})["prompt"]
    except OSError:
        return None
    return post("/tokenize", {{"content": prompt, "add_special": True, "parse_special": True}})["tokens"]
print(json.dumps([ids(messages) for messages in request["messages"]]))
"""


def is_installed() -> bool:
    return find_spec(PACKAGE) is not None


def check_prompts(gguf: Path, prompt_builder: PromptBuilder, log: Log) -> None:
    """Says on how many trial rows llama.cpp's server has the prompt ids of training; nothing if none can be tried."""
    adapter = prompt_builder.adapter
    if adapter.template.is_text:
        return
    tried = list(trials(adapter.template, prompt_builder.tokenizer, adapter.rules))
    messages = [list(conversation.messages) for conversation, _ in tried]
    if not messages:
        return
    ids = _ids(gguf, messages)
    if ids is None:
        log(
            tr("llama.cpp's server does not start with the chat template in this file: send it whole prompts")
        )
        return
    same = sum(one == expected for one, (_, expected) in zip(ids, tried, strict=True))
    log(
        tr(
            "llama.cpp's server gives the prompt ids of training on {same} of {tried} trial rows",
            same=same,
            tried=len(tried),
        )
    )
    if same < len(tried):
        log(tr("send it whole prompts where they differ: `yeonma inspect` shows them"))


def _ids(gguf: Path, messages: list[list[dict[str, object]]]) -> list[list[int] | None] | None:
    """The prompt ids of each row, None where it is refused; None for all if the server does not start."""
    request = json.dumps({"gguf": str(gguf), "messages": messages})
    try:
        done = subprocess.run(
            [sys.executable, "-c", _PROGRAM], input=request, capture_output=True, text=True, timeout=SECONDS
        )
        answer: list[list[int] | None] = json.loads(done.stdout.splitlines()[-1])
    except (subprocess.TimeoutExpired, ValueError, IndexError):
        return None
    return answer
