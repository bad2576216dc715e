"""The parameters of llama.cpp's server for comparisons: one thread, numbers in float32. For a Python with xllamacpp.

Does not import Yeonma.
"""

from __future__ import annotations

from typing import Any

import xllamacpp


def params_of(gguf: str, context: int) -> Any:
    params = xllamacpp.CommonParams()
    params.model.path = gguf
    params.n_ctx = context
    params.n_parallel = 1
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1  # threads that wait spin
    params.n_gpu_layers = 0
    params.use_jinja = True
    params.warmup = params.fit_params = False
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    return params
