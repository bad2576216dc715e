"""Asks llama.cpp's server about a GGUF file, in a Python that has xllamacpp: JSON in, JSON out.

Does not import Yeonma.
"""

from __future__ import annotations

import json
import sys
from typing import Any
from urllib.request import Request, urlopen

import xllamacpp
from llama_params import params_of

request: dict[str, Any] = json.load(sys.stdin)
params = params_of(request["gguf"], request["context"])
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
