"""The ranks of an adapter, the limit that vLLM is started with for them, and what vLLM lacks. No torch here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from yeonma.model.adapter_config import read_adapter_config

VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""The values of vLLM's `--max-lora-rank`, without 1, which not every version accepts."""

VLLM_LACKS = ("use_dora", "modules_to_save", "trainable_token_indices")
"""Keys of PEFT's config that vLLM does not support."""


def lora_config(folder: Path) -> dict[str, Any]:
    """PEFT's own config in the folder, as far as it matters for a trained adapter. Raises UserError."""
    return dict(read_adapter_config(folder).keys)


def highest_rank(folder: Path) -> int:
    """The highest rank among the adapter's layers."""
    config = lora_config(folder)
    return max([config["r"], *(config.get("rank_pattern") or {}).values()])


def vllm_rank(rank: int) -> int | None:
    """The least limit of vLLM that takes this rank, or None if it takes none so high."""
    return next((limit for limit in VLLM_RANKS if limit >= rank), None)
