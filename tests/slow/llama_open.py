"""Keeps llama.cpp's server running, in a Python that has xllamacpp: options in JSON come in, its address goes out.

The server ends with its input. Does not import Yeonma.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import xllamacpp

options: dict[str, Any] = json.loads(sys.stdin.readline())
params = xllamacpp.CommonParams()
params.model.path = options["gguf"]
params.n_ctx = options.get("context", 1024)
params.n_parallel = 1
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1  # threads that wait spin
params.n_gpu_layers = 0
params.use_jinja = True
params.warmup = params.fit_params = False
params.port = options["port"]
params.endpoint_props = True
params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
if "chat_template" in options:
    params.chat_template = options["chat_template"]
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
