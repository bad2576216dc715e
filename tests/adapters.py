"""Adapter folders of tiny models: a base on disk, with a tokenizer, and an adapter with weights that show."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from yeonma.adapter.adapter_folder import base_identity, describe, write_adapter
from yeonma.data.template import load_template
from yeonma.model.base_content import read_content
from yeonma.model.load import LoraShape, add_lora, load_base, load_tokenizer
from yeonma.model.source import find_base
from yeonma.tokenization.chat_template_export import export_chat_template
from yeonma.tokenization.example import TokenRules


@dataclass(frozen=True)
class Folders:
    base: Path
    adapter: Path


def tiny_base(
    folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    *,
    seed: int = 0,
    layers: int = 2,
    positions: int = 4096,
    width: int = 32,
    spread: float = 0.3,
) -> Path:
    """A whole model on disk: a llama with random weights of this `spread`, as many tokens as the tokenizer has."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=3 * width // 2,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=positions,
        initializer_range=spread,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def tiny_adapter(
    root: Path,
    tokenizer: PreTrainedTokenizerBase,
    *,
    template: str = "title",
    columns: dict[str, str] | None = None,
    cutoff_len: int = 2048,
) -> Folders:
    """A base under `root` and an adapter folder beside it, as a run would leave it."""
    base = tiny_base(root / "base", tokenizer)
    return Folders(base, adapter_on(base, root / "OUT", template, columns=columns, cutoff_len=cutoff_len))


def adapter_on(
    base: Path,
    folder: Path,
    template: str,
    *,
    columns: dict[str, str] | None = None,
    cutoff_len: int = 2048,
    seed: int = 0,
    r: int = 4,
) -> Path:
    """An adapter folder on a base that is there; the same weights for the same seed."""
    source = find_base(str(base))
    model: Any = load_base(source, torch.device("cpu"), torch.float32)
    identity = base_identity(model, source)
    peft_model = add_lora(model, LoraShape(r, 8, 0.0, "all-linear"), seed=seed)
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in peft_model.named_parameters():
            if "lora_B" in name:  # zero at the start: without this base and adapter would be one
                parameter.normal_(std=0.3, generator=draw)
    folder.mkdir()
    parsed = load_template(template)
    rules = TokenRules(cutoff_len)
    own = load_tokenizer(source)
    details = describe(
        identity,
        parsed,
        columns,
        rules,
        tokenizer=own,
        trust_remote_code=False,
        trained_on={},
        content=read_content(source),
    )
    write_adapter(folder, peft_model, own, parsed, details, export_chat_template(parsed, own))
    return folder
