"""Adapter folders as other tools leave them: PEFT's files and a tokenizer, of each kind that Yeonma takes."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "patterns": {
        "rank_pattern": {"q_proj": 2, r"layers\.1\..*v_proj": 3},
        "alpha_pattern": {r"^model\.layers\.0\.self_attn\.q_proj": 16},
    },
    "expression": {"target_modules": r"model\.layers\.\d+\.(self_attn|mlp)\.(q|k|down)_proj"},
    "excluding": {"target_modules": "all-linear", "exclude_modules": r".*layers\.0\..*"},
    "one layer": {"layers_to_transform": [1], "layers_pattern": "layers"},
    "embedding": {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
    "whole modules": {"modules_to_save": ["norm", "lm_head"]},
    "tied modules": {"modules_to_save": ["embed_tokens", "lm_head"], "ensure_weight_tying": True},
    "tokens": {"trainable_token_indices": [5, 6, 7]},
    "tokens of both": {"trainable_token_indices": {"embed_tokens": [5, 6], "lm_head": [5, 6]}},
    "new tokens": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "new rows": {},
    "new trained tokens": {"trainable_token_indices": [-2, -1]},
}
"""Kind -> fields of PEFT's LoraConfig. Those that begin with "new" have eight tokens more than the base."""
NEW = 8
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def plain_model(base: Path, kind: str) -> Any:
    """The base, with more rows for a kind with tokens of its own."""
    model: Any = AutoModelForCausalLM.from_pretrained(base)
    if kind.startswith("new"):
        torch.manual_seed(2)
        model.resize_token_embeddings(model.config.vocab_size + NEW, mean_resizing=False)
    return model


def foreign_adapter(base: Path, folder: Path, kind: str = "plain", *, tokenizer: bool = True) -> Path:
    """An adapter of a kind, made by PEFT alone, with weights that show."""
    model, fields = plain_model(base, kind), dict(KINDS[kind])
    if isinstance(indices := fields.get("trainable_token_indices"), list) and indices[0] < 0:
        fields["trainable_token_indices"] = [model.config.vocab_size + index for index in indices]
    torch.manual_seed(1)
    options = {"r": 4, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", **fields}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft_model = get_peft_model(model, LoraConfig(**options))
        for name, parameter in peft_model.named_parameters():
            if parameter.requires_grad and "lora_A" not in name:
                parameter.data += 0.1 * torch.randn_like(parameter)
        peft_model.save_pretrained(str(folder))
    if tokenizer:
        own = AutoTokenizer.from_pretrained(base)
        if kind.startswith("new"):
            own.add_tokens([f"<new{number}>" for number in range(NEW)])
        own.save_pretrained(folder)
    return folder


def by_peft(base: Path, folder: Path, kind: str) -> Any:
    """The adapter on its base, by PEFT alone."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return PeftModel.from_pretrained(plain_model(base, kind), str(folder)).eval()


def change_config(folder: Path, **keys: Any) -> None:
    path = folder / CONFIG
    path.write_text(json.dumps({**json.loads(path.read_text()), **keys}))


def change_tensors(
    folder: Path, change: Callable[[dict[str, torch.Tensor]], Mapping[str, torch.Tensor]]
) -> None:
    save_file(dict(change(load_file(folder / WEIGHTS))), folder / WEIGHTS)
