"""Tiny models with random weights, by transformers' family names: two layers, hidden size 32, 97 tokens.

The weights are drawn wide, so that attention matters: a token that sees one token too many or too few moves the
log-probabilities by far more than the tests allow. Models come frozen, in float32 and in eval mode.
"""

from __future__ import annotations

import copy
from functools import lru_cache
from inspect import signature
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.lfm2.modeling_lfm2 import Lfm2ShortConv
from transformers.pytorch_utils import Conv1D

from yeonma.model.forest_support import choose_plain_attention
from yeonma.model.recurrence.replace import let_recurrences_take_forests
from yeonma.tokenization.example import Example

VOCABULARY = 97
WINDOW = 5

COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_ONE_OF_EACH = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]}

FOREST_FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {},
    "qwen3_moe": _EXPERTS,
    "gemma2": {
        **_ONE_OF_EACH,
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 3.0,
        "query_pre_attn_scalar": 8,
    },
    "gemma3_text": {**_ONE_OF_EACH, "query_pre_attn_scalar": 8},
    "mistral": {"sliding_window": WINDOW},
    "gpt_oss": {
        **_ONE_OF_EACH,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    },
    "phi3": {"sliding_window": WINDOW},
    "granite": {
        "logits_scaling": 0.5,
        "attention_multiplier": 0.5,
        "residual_multiplier": 0.8,
        "embedding_multiplier": 2.0,
    },
    "exaone4": _ONE_OF_EACH,
    "gpt2": {
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 128,
        "attn_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "resid_pdrop": 0.0,
    },
    "qwen3_next": {
        **_EXPERTS,
        "layer_types": ["linear_attention", "full_attention"],
        "shared_expert_intermediate_size": 16,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
    },
    "lfm2": {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False},
}
OTHER_FAMILIES: dict[str, dict[str, Any]] = {
    "bloom": {"n_head": 4, "n_layer": 2},
    # Its mask has the window, its call of the attention has not.
    "phimoe": {"sliding_window": 64, "num_local_experts": 4, "num_experts_per_tok": 2},
}

_DELTA = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
_MAMBA2 = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 2}
RECURRENT_FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3_5_text": _DELTA,
    "qwen3_5_moe_text": {**_DELTA, **_EXPERTS, "shared_expert_intermediate_size": 16},
    "olmo_hybrid": {**_DELTA, "linear_num_key_heads": 4},
    "kimi_linear": {
        **_EXPERTS,
        "layer_types": ["linear_attention", "full_attention"],
        "linear_num_heads": 4,
        "linear_head_dim": 8,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "num_key_value_heads": 4,
    },
    "granitemoehybrid": {
        **_MAMBA2,
        "layer_types": ["mamba", "attention"],
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "shared_intermediate_size": 32,
    },
    "bamba": {**_MAMBA2, "attn_layer_indices": [1]},
    "nemotron_h": {
        "layers_block_type": ["mamba", "attention", "mlp", "moe"],
        "num_hidden_layers": 4,
        "mamba_num_heads": 4,
        "mamba_head_dim": 16,
        "ssm_state_size": 8,
        "n_groups": 2,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "moe_shared_expert_intermediate_size": 16,
    },
    "falcon_h1": {**_MAMBA2, "mamba_d_ssm": 64},
    "zamba2": {
        "layers_block_type": ["mamba", "hybrid"],
        "mamba_headdim": 16,
        "mamba_d_state": 8,
        "mamba_ngroups": 2,
        "n_mamba_heads": 4,
        "num_mem_blocks": 1,
        "use_mem_rope": True,
    },
    "lfm2_moe": {**_EXPERTS, "layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
}
"""Further families with recurrent layers on a forest; `qwen3_next` and `lfm2` are among FOREST_FAMILIES."""
if "kwargs" not in signature(Lfm2ShortConv.forward).parameters:
    # transformers before 5.22 hands no forest on to these convolutions, and Yeonma goes one sequence at a time
    OTHER_FAMILIES["lfm2"] = FOREST_FAMILIES.pop("lfm2")
    del RECURRENT_FAMILIES["lfm2_moe"]
ALL_RECURRENT = [*RECURRENT_FAMILIES, *(name for name in ("qwen3_next", "lfm2") if name in FOREST_FAMILIES)]

BORDER = 24
_LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0, 1.1, 1.2, 1.3],
    "long_factor": [1.0, 4.0, 16.0, 40.0],
    "original_max_position_embeddings": BORDER,
}
_DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
BORDER_FAMILIES: dict[str, dict[str, Any]] = {
    "phi3 longrope": {"original_max_position_embeddings": BORDER, "rope_parameters": _LONGROPE},
    "llama longrope": {"rope_parameters": _LONGROPE},
    "llama dynamic": {"max_position_embeddings": BORDER, "rope_parameters": _DYNAMIC},
    "gemma3_text longrope": {
        **_ONE_OF_EACH,
        "query_pre_attn_scalar": 8,
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            "full_attention": _LONGROPE,
        },
    },
    "phimoe longrope": {
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "rope_parameters": {**_LONGROPE, "short_mscale": 1.1, "long_mscale": 1.4},
    },
    "llama4_text": {
        "attention_chunk_size": 8,
        "intermediate_size_mlp": 48,
        "num_local_experts": 2,
        "interleave_moe_layer_step": 2,
        "no_rope_layers": [1, 0],
    },
}
"""Models whose numbers depend on the length of a sequence, with their borders among the lengths of the tests: a model
type, and what is special about it."""
MORE_FAMILIES: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 4},
    "qwen2_moe": {**_EXPERTS, "shared_expert_intermediate_size": 16},
    "deepseek_v3": {
        "num_key_value_heads": 4,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
        "n_group": 2,
        "topk_group": 1,
    },
    "cohere2": _ONE_OF_EACH,
    "olmo2": {},
    "olmo3": _ONE_OF_EACH,
    "glm4": {},
    "smollm3": {},
    "starcoder2": {"sliding_window": WINDOW},
    "ministral": _ONE_OF_EACH,
    "seed_oss": {},
    "ernie4_5": {},
    "phi": {},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "gpt_neox": {},
    "gptj": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128, "rotary_dim": 4},
    "stablelm": {},
    "mamba": {},
}


def tiny_model(family: str, seed: int = 0) -> Any:
    """A frozen model of one of the families above; each call gives a copy of its own."""
    return copy.deepcopy(_built(family, seed))


@lru_cache
def _built(family: str, seed: int) -> Any:
    families = {
        **FOREST_FAMILIES,
        **OTHER_FAMILIES,
        **RECURRENT_FAMILIES,
        **BORDER_FAMILIES,
        **MORE_FAMILIES,
    }
    options = {**COMMON, **copy.deepcopy(families[family])}  # a config changes its rope parameters
    config = AutoConfig.for_model(family.split()[0], **options)
    with torch.random.fork_rng():
        torch.manual_seed(seed)  # some parameters start from random numbers, and keep them below
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    choose_plain_attention(model)  # both as the check at loading does
    let_recurrences_take_forests(model)
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.25, generator=draw)
            else:  # gains, biases, sinks: near what they start from
                parameter.add_(torch.randn(parameter.shape, generator=draw), alpha=0.1)
    return model.requires_grad_(False).eval()


def with_lora(model: Any, **config: Any) -> Any:
    """A PeftModel whose adapter is not zero; the same numbers each time. `config`: fields of peft's LoraConfig."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    options = {"r": 4, "lora_alpha": 4, "target_modules": "all-linear", "init_lora_weights": False}
    options["fan_in_fan_out"] = any(isinstance(module, Conv1D) for module in model.modules())
    return get_peft_model(model, LoraConfig(**{**options, **config}))


def plain_logprobs(model: torch.nn.Module, example: Example) -> Tensor:
    """Log-probabilities of one sequence, computed with transformers alone."""
    ids = torch.from_numpy(example.token_ids.astype(np.int64))
    logprobs = torch.log_softmax(model(ids.unsqueeze(0), use_cache=False).logits[0, :-1].float(), -1)
    return logprobs.gather(1, ids[1:, None])[torch.from_numpy(example.trained[1:]), 0]
