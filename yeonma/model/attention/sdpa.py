"""Attention over a forest segment by segment: PyTorch's `scaled_dot_product_attention` or plain operations.

A segment's queries attend to the concatenated keys of its ancestors and its own. This works on any device, for any
layer.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from yeonma.model.attention.backend import Backend, ForestShape, LayerCall
from yeonma.model.attention.cpu_cascade import cpu_kernels


def _lay_out(shape: ForestShape) -> ForestShape:
    return shape


def _has_no_extras(call: LayerCall, shape: ForestShape) -> bool:
    return call.softcap is None and call.sinks is None


def _any_layer(call: LayerCall, shape: ForestShape) -> bool:
    return True


def attend_by_segment(call: LayerCall, shape: ForestShape) -> torch.Tensor:
    # split, not slices: the gradient of a split is one concatenation
    queries, keys, values = (
        states.split(shape.lengths, dim=2) for states in (call.query, call.key, call.value)
    )
    outputs = []
    for query, path in zip(queries, shape.paths, strict=True):
        output = segment_attention(
            query,
            keys[path[0]] if len(path) == 1 else torch.cat([keys[i] for i in path], dim=2),
            values[path[0]] if len(path) == 1 else torch.cat([values[i] for i in path], dim=2),
            scaling=call.scaling,
            dropout=call.dropout,
            sliding_window=call.sliding_window,
            softcap=call.softcap,
            s_aux=call.sinks,
        )
        outputs.append(output.transpose(1, 2))
    return torch.cat(outputs, dim=1) if len(outputs) > 1 else outputs[0]


def segment_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    scaling: float | None,
    sliding_window: int | None,
    softcap: float | None,
    s_aux: torch.Tensor | None,
    dropout: float = 0.0,
) -> torch.Tensor:
    """Attention of one segment's queries (1, heads, t, D) to the keys of its ancestors and its own, which are the last
    t.

    Returns (1, heads, t, E).
    """
    mask = _mask(query.shape[2], key.shape[2], sliding_window, query.device)
    if softcap is None and s_aux is None:
        return _fused_attention(query, key, value, mask, dropout, scaling)
    return _plain_attention(query, key, value, mask, scaling, dropout, softcap, s_aux)


def _fused_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    dropout: float,
    scaling: float | None,
) -> torch.Tensor:
    is_causal, is_grouped = mask is None, query.shape[1] != key.shape[1]
    kernels = cpu_kernels()
    if query.device.type == "meta" and query.shape[-1] == value.shape[-1] and kernels is not None:
        # for a memory forecast: on the meta device, PyTorch would decompose what is one operation on a real device
        if mask is not None:
            mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill_(~mask, -math.inf)
        output: torch.Tensor = kernels[0](
            query, key, value, dropout, is_causal, attn_mask=mask, scale=scaling
        )[0]
        return output
    return F.scaled_dot_product_attention(
        query, key, value, mask, dropout, is_causal=is_causal, scale=scaling, enable_gqa=is_grouped
    )


def _mask(queries: int, keys: int, window: int | None, device: torch.device) -> torch.Tensor | None:
    """(queries, keys), True where a query sees a key; None if it is the causal mask for equal lengths."""
    if queries == keys and (window is None or keys <= window):
        return None
    position_q = torch.arange(keys - queries, keys, device=device).unsqueeze(1)
    position_k = torch.arange(keys, device=device)
    visible = position_k <= position_q
    return visible if window is None else visible & (position_k > position_q - window)


def _plain_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float | None,
    dropout: float,
    softcap: float | None,
    s_aux: torch.Tensor | None,
) -> torch.Tensor:
    """Attention in plain operations, for what `scaled_dot_product_attention` does not support. Shapes as there."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if mask is None:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=query.device).tril()
    scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    if s_aux is not None:  # attention sinks: a learned score per head in the softmax, without a value
        sink = s_aux.to(scores.dtype).reshape(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, sink], dim=-1)
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    if s_aux is not None:
        weights = weights[..., :-1]
    return F.dropout(weights, dropout) @ value


SDPA = Backend("sdpa", _lay_out, _has_no_extras, attend_by_segment)
PLAIN_OPERATIONS = Backend("plain", _lay_out, _any_layer, attend_by_segment)
