"""Tiny checkpoints that also read images, in transformers' own classes: what tests/models.py has of text models."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForImageTextToText

from tests.models import COMMON, WINDOW
from tests.runs import characters

_TEXT = {**COMMON, "max_position_embeddings": 512}
_ROWS = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
"""Rotary positions in three rows: time, height and width."""
_ONE_OF_EACH = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_DELTA = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
_TOWER = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
_QWEN = {
    "depth": 1,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_heads": 2,
    "out_hidden_size": 32,
    "patch_size": 14,
}
_QWEN2_5 = {**_QWEN, "fullatt_block_indexes": [0]}
_QWEN3 = {**_QWEN, "num_position_embeddings": 16, "deepstack_visual_indexes": [0]}
_IDS = {"image_token_id": 90, "video_token_id": 91}
_OLD_IDS = {"image_token_index": 90}

FAMILIES: dict[str, dict[str, Any]] = {
    "qwen2_5_vl": {"text_config": {"rope_parameters": _ROWS}, "vision_config": _QWEN2_5, **_IDS},
    "qwen3_vl": {
        "text_config": {"rope_parameters": {**_ROWS, "mrope_interleaved": True}},
        "vision_config": _QWEN3,
        "tie_word_embeddings": True,
        **_IDS,
    },
    "qwen3_vl_moe": {
        "text_config": {**_EXPERTS, "rope_parameters": _ROWS},
        "vision_config": _QWEN3,
        **_IDS,
    },
    "qwen3_5": {
        "text_config": {**_DELTA, "rope_parameters": {**_ROWS, "partial_rotary_factor": 1.0}},
        "vision_config": _QWEN3,
        **_IDS,
    },
    "gemma3": {
        "text_config": {**_ONE_OF_EACH, "query_pre_attn_scalar": 8},
        "vision_config": {**_TOWER, "vision_use_head": False},
        "mm_tokens_per_image": 4,
        "boi_token_index": 91,
        "eoi_token_index": 92,
        **_OLD_IDS,
    },
    "gemma4": {
        "text_config": {
            **_ONE_OF_EACH,
            "hidden_size_per_layer_input": 0,
            "num_kv_shared_layers": 0,
            "global_head_dim": 8,
        },
        "vision_config": {**_TOWER, "num_key_value_heads": 2, "head_dim": 8},
        "audio_config": None,
        "boi_token_id": 92,
        "eoi_token_id": 93,
        "audio_token_id": 94,
        "boa_token_id": 95,
        "eoa_token_index": 96,
        **_IDS,
    },
    "mistral3": {
        "text_config": {"model_type": "mistral", "sliding_window": None},
        "vision_config": {**_TOWER, "model_type": "pixtral", "head_dim": 8},
        "spatial_merge_size": 1,
        "tie_word_embeddings": False,
        **_OLD_IDS,
    },
    "llama4": {
        "text_config": {
            "attention_chunk_size": 8,
            "intermediate_size_mlp": 48,
            "num_local_experts": 2,
            "interleave_moe_layer_step": 2,
            "no_rope_layers": [1, 0],
        },
        "vision_config": {
            **_TOWER,
            "intermediate_size": 64,
            "vision_output_dim": 16,
            "projector_input_dim": 16,
            "projector_output_dim": 16,
        },
        "boi_token_index": 91,
        "eoi_token_index": 92,
        **_OLD_IDS,
    },
    "llava": {
        "text_config": {"model_type": "llama"},
        "vision_config": {**_TOWER, "model_type": "clip_vision_model", "projection_dim": 16},
        **_OLD_IDS,
    },
    "internvl": {
        "text_config": {"model_type": "qwen2"},
        "vision_config": {
            **_TOWER,
            "model_type": "internvl_vision",
            "image_size": [28, 28],
            "patch_size": [14, 14],
        },
        "image_token_id": 90,
    },
    "exaone4_5": {
        "text_config": {**_ONE_OF_EACH, "model_type": "exaone4"},
        "vision_config": {**_QWEN2_5, "num_key_value_heads": 1},
        **_IDS,
    },
    "hyperclovax_vision_v2": {
        "text_config": {"model_type": "hyperclovax"},
        "vision_config": {**_QWEN2_5, "model_type": "qwen2_5_vl_vision"},
        **_IDS,
    },
}


for _family in [name for name in FAMILIES if name not in CONFIG_MAPPING]:
    del FAMILIES[_family]  # of a later version of transformers


def whole_model(family: str, seed: int = 0) -> Any:
    """The whole checkpoint, frozen, with weights drawn as those of tests/models.py are."""
    options = copy.deepcopy(FAMILIES[family])  # a config changes its rope parameters
    options["text_config"] = {**_TEXT, **options["text_config"]}
    config = AutoConfig.for_model(family, **options)
    model: Any = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.25, generator=draw)
            else:
                parameter.add_(torch.randn(parameter.shape, generator=draw), alpha=0.1)
    return model.requires_grad_(False).eval()


def checkpoint_folder(place: Path, family: str, seed: int = 0, **saving: Any) -> Path:
    """The checkpoint and a tokenizer, as a folder to give to `--base_model`. `saving`: for `save_pretrained`."""
    whole_model(family, seed).save_pretrained(place, **saving)
    characters().save_pretrained(place)
    return place
