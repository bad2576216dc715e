"""Answers of a GGUF file, for a Python that has llama-cpp-python. JSON in, JSON out; does not import Yeonma."""

from __future__ import annotations

import json
import sys
from typing import Any

from llama_cpp import Llama

request: dict[str, Any] = json.load(sys.stdin)
model = Llama(
    model_path=request["gguf"], n_ctx=request["context"], n_threads=2, verbose=False, logits_all=False
)
response: dict[str, list[Any]] = {"ids": [], "completions": [], "chats": []}
options = {"temperature": 0.0, "repeat_penalty": 1.0, "max_tokens": request["max_new_tokens"]}
for prompt, messages in zip(request["prompts"], request["messages"], strict=True):
    response["ids"].append(model.tokenize(prompt["text"].encode(), add_bos=False, special=True))
    response["completions"].append(model.create_completion(prompt["ids"], **options)["choices"][0]["text"])
    chat = model.create_chat_completion(messages, **options)
    response["chats"].append(chat["choices"][0]["message"]["content"])
json.dump(response, sys.stdout)
