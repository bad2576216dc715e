"""Asks llama.cpp's server about a GGUF file, in a Python that has xllamacpp: JSON in, JSON out.

Does not import Yeonma.
"""

from __future__ import annotations

import json
import sys
from typing import Any
from urllib.request import Request, urlopen

import xllamacpp

request: dict[str, Any] = json.load(sys.stdin)
params = xllamacpp.CommonParams()
params.model.path = request["gguf"]
params.n_ctx = request["context"]
params.n_parallel = 1
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1  # threads that wait spin
params.n_gpu_layers = 0
params.use_jinja = True
params.warmup = params.fit_params = False
params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
server = xllamacpp.Server(params)


def post(path: str, body: dict[str, Any]) -> dict[str, Any]:
    sent = Request(
        server.listening_address + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urlopen(sent, timeout=600) as response:
        content: dict[str, Any] = json.load(response)
    return content


response: dict[str, list[Any]] = {"prompts": [], "ids": [], "answers": [], "chats": []}
for messages, text in zip(request["messages"], request["texts"], strict=True):
    prompt = post("/apply-template", {"messages": messages})["prompt"]
    response["prompts"].append(prompt)
    ids = post("/tokenize", {"content": text, "add_special": False, "parse_special": True})["tokens"]
    response["ids"].append(ids)
    options = {"temperature": 0.0, "n_predict": request["new_tokens"], "cache_prompt": False}
    options |= {"ignore_eos": request.get("ignore_eos", False), "repeat_penalty": 1.0}
    response["answers"].append(
        post("/completion", {"prompt": ids, "return_tokens": True, **options})["tokens"]
    )
    if request.get("chats"):
        body = {"messages": messages, "temperature": 0.0, "max_tokens": request["new_tokens"]}
        response["chats"].append(post("/v1/chat/completions", body)["choices"][0]["message"]["content"])
json.dump(response, sys.stdout)
