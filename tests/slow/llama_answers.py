"""Run by a Python that has llama-cpp-python: what a GGUF file answers. JSON in, JSON out; nothing of Yeonma's."""

from __future__ import annotations

import json
import sys
from typing import Any

from llama_cpp import Llama

asked: dict[str, Any] = json.load(sys.stdin)
model = Llama(model_path=asked["gguf"], n_ctx=asked["context"], n_threads=2, verbose=False, logits_all=False)
found: dict[str, list[Any]] = {"ids": [], "completions": [], "chats": []}
how = {"temperature": 0.0, "repeat_penalty": 1.0, "max_tokens": asked["max_new_tokens"]}
for prompt, messages in zip(asked["prompts"], asked["messages"], strict=True):
    found["ids"].append(model.tokenize(prompt["text"].encode(), add_bos=False, special=True))
    found["completions"].append(model.create_completion(prompt["ids"], **how)["choices"][0]["text"])
    chat = model.create_chat_completion(messages, **how)
    found["chats"].append(chat["choices"][0]["message"]["content"])
json.dump(found, sys.stdout)
