"""Keeps llama.cpp's server running, in a Python that has xllamacpp: options in JSON come in, its address goes out.

The server ends with its input. Does not import Yeonma.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import xllamacpp
from llama_params import params_of

options: dict[str, Any] = json.loads(sys.stdin.readline())
params = params_of(options["gguf"], options.get("context", 1024))
params.port = options["port"]
params.endpoint_props = True
if "chat_template" in options:
    params.chat_template = options["chat_template"]
if "n_predict" in options:
    params.n_predict = options["n_predict"]
if "antiprompt" in options:
    params.antiprompt = options["antiprompt"]
for name, value in options.get("sampling", {}).items():
    setattr(params.sampling, name, value)
if "lora" in options:
    lora = xllamacpp.CommonAdapterLoraInfo()
    lora.path, lora.scale = options["lora"], options.get("scale", 1.0)
    params.lora_adapters = [lora]
server = xllamacpp.Server(params)
print(json.dumps({"address": server.listening_address}), flush=True)
sys.stdin.read()
