"""PEFT's layers for trained tokens without a copy of the whole embedding: the frozen layer's own result, with the few
rows of these tokens put in.

PEFT writes the trained rows into a copy of the embedding (V, H) in every forward pass, and its gradient is a matrix of
that size again. Here both are as large as the rows. The frozen weight is only used by the frozen layer itself, so it
may be sharded.

Shapes: V vocabulary, H hidden, R trained rows.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.trainable_tokens import TrainableTokensLayer
from torch import nn

from yeonma.model.sharding import own_class
from yeonma.model.transfer import to_device

Forward = Callable[[torch.Tensor], torch.Tensor]


def patch_trained_rows(model: nn.Module) -> int:
    """Patches PEFT's layers for trained tokens around a plain embedding, or a dense head without a bias. Returns their
    number."""
    patched = 0
    layers: list[Any] = [module for module in model.modules() if isinstance(module, TrainableTokensLayer)]
    for layer in layers:
        if "forward" not in vars(layer):
            base = layer.base_layer
            if isinstance(base, nn.Embedding) and base.max_norm is None:
                layer.forward = partial(_embedding, layer, layer.forward)
            elif own_class(base) is nn.Linear and base.bias is None:
                layer.forward = partial(_head, layer, layer.forward)
            else:
                continue
            patched += 1
    return patched


def _is_plain(layer: Any) -> bool:
    """Checked at every call, because adapters may be added, switched and merged later."""
    if layer.disable_adapters or layer.merged or len(layer.active_adapters) != 1:
        return False
    return layer.active_adapters[0] in layer.trainable_tokens_delta


def _rows(layer: Any) -> tuple[list[int], torch.Tensor]:
    """The trained tokens, and their rows (R, H) in the number format of the frozen weight."""
    (adapter,) = layer.active_adapters
    return layer.token_indices[adapter], layer.trainable_tokens_delta[adapter].to(
        layer.base_layer.weight.dtype
    )


def _embedding(layer: Any, peft_forward: Forward, token_ids: torch.Tensor) -> torch.Tensor:
    if not _is_plain(layer):
        return peft_forward(token_ids)
    tokens, rows_RH = _rows(layer)
    embedded = layer.base_layer(token_ids)
    row_of_V = torch.full((layer.base_layer.num_embeddings,), -1, device=token_ids.device)
    row_of_V[to_device(tokens, token_ids.device)] = torch.arange(len(tokens), device=token_ids.device)
    row = row_of_V[token_ids]
    own = F.embedding(row.clamp(min=0), rows_RH)
    if (scale := layer._get_embed_scale()) is not None:
        own = own * scale.to(own.dtype)
    return torch.where((row >= 0)[..., None], own, embedded)


def _head(layer: Any, peft_forward: Forward, hidden: torch.Tensor) -> torch.Tensor:
    if not _is_plain(layer):
        return peft_forward(hidden)
    tokens, rows_RH = _rows(layer)
    logits = layer.base_layer(hidden)
    return logits.index_copy(-1, to_device(tokens, hidden.device), F.linear(hidden, rows_RH))
