"""Attention over a forest, registered with transformers' AttentionInterface; the layout travels as a keyword.

A model loaded with the implementation `FOREST` calls `forest_attention` in every layer with what it would pass to
any backend: scale, grouped heads, sliding window (counted in positions), soft-capping and attention sinks are
honoured. Anything that a model does with its mask instead (ALiBi, chunks) is not seen here; the check at loading
finds such models.

Where the layer's features allow it, all segments go through one call on CUDA (`varlen`, `flex`), and on the CPU in
float32 through the calls of `cpu_cascade`; else each segment is a call of its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from yeonma.batch.forest import Forest
from yeonma.model.attention.cpu_cascade import (
    CascadeLayout,
    cascade_attention,
    cascade_layout,
    cpu_kernels,
    takes,
)
from yeonma.model.attention.flex import Tree, flex_forest_attention, has_flex
from yeonma.model.attention.varlen import (
    Capability,
    VarlenLayout,
    pick_backend,
    varlen_attention,
    varlen_forest_attention,
    varlen_layout,
)

FOREST = "yeonma_forest"


@dataclass(frozen=True)
class ForestLayout:
    """What attention needs of a forest; one object serves every layer of a forward pass."""

    lengths: tuple[int, ...]  # of the segments, in flat order; they sum to T
    paths: tuple[tuple[int, ...], ...]  # segment -> the segments it sees: its ancestors in order, then itself
    varlen: VarlenLayout | None = None  # the same for one call, on a device that has it
    tree: Tree | None = None  # and for FlexAttention
    cascade: CascadeLayout | None = None  # and for the CPU


def layout(
    forest: Forest, device: torch.device | None = None, capability: Capability | None = None
) -> ForestLayout:
    """`capability`: of the CUDA device that all segments may go through one call on; its tensors are on `device`."""
    paths: list[tuple[int, ...]] = []
    for index, segment in enumerate(forest.segments):
        paths.append((*paths[segment.parent], index) if segment.parent is not None else (index,))
    lengths = tuple(segment.length for segment in forest.segments)
    if device is None or capability is None:
        device = device or torch.device("cpu")
        on_cpu = cascade_layout(lengths, paths, device) if device.type in ("cpu", "meta") else None
        return ForestLayout(lengths, tuple(paths), cascade=on_cpu)
    # a forecast of memory, on the meta device, takes what needs no compiler
    tree = Tree(lengths, tuple(paths), device) if device.type == "cuda" and has_flex() else None
    return ForestLayout(lengths, tuple(paths), varlen_layout(lengths, paths, device, capability), tree)


def forest_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    forest: ForestLayout,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    watch: Callable[[torch.nn.Module, int | None], None] | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """query (1, heads, T, D), key and value (1, key heads, T, D) -> (1, T, heads, D).

    `watch` is called with the layer and its window; the check at loading compares that with the model's config.
    Raises ValueError for a mask made by the model itself, which cannot know the forest.
    """
    if attention_mask is not None:
        raise ValueError("the model made an attention mask of its own")
    if watch is not None:
        watch(module, sliding_window)
    if forest.varlen is not None:
        backend = pick_backend(
            capability=forest.varlen.capability,
            dtype=query.dtype,
            query_width=query.shape[-1],
            value_width=value.shape[-1],
            dropout=dropout,
            softcap=softcap,
            sinks=s_aux is not None,
            varlen=varlen_attention() is not None,
            flex=forest.tree is not None,
        )
        if backend == "flex" and forest.tree is not None:
            return flex_forest_attention(
                query,
                key,
                value,
                forest.tree,
                scaling=scaling,
                sliding_window=sliding_window,
                softcap=softcap,
                s_aux=s_aux,
            ), None
        if backend == "varlen":
            return varlen_forest_attention(
                query, key, value, forest.varlen, scaling=scaling, sliding_window=sliding_window
            ), None
    plain = softcap is None and s_aux is None
    if plain and forest.cascade is not None and takes(forest.cascade, query, value, dropout, sliding_window):
        return cascade_attention(query, key, value, forest.cascade, scaling), None
    # split, not slices: the gradient of a split is one concatenation
    queries, keys, values = (states.split(forest.lengths, dim=2) for states in (query, key, value))
    outputs = []
    for q, path in zip(queries, forest.paths, strict=True):
        k = keys[path[0]] if len(path) == 1 else torch.cat([keys[i] for i in path], dim=2)
        v = values[path[0]] if len(path) == 1 else torch.cat([values[i] for i in path], dim=2)
        output = segment_attention(
            q,
            k,
            v,
            scaling=scaling,
            dropout=dropout,
            sliding_window=sliding_window,
            softcap=softcap,
            s_aux=s_aux,
        )
        outputs.append(output.transpose(1, 2))
    return (torch.cat(outputs, dim=1) if len(outputs) > 1 else outputs[0]), None


def segment_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    scaling: float | None,
    sliding_window: int | None,
    softcap: float | None,
    s_aux: torch.Tensor | None,
    dropout: float = 0.0,
) -> torch.Tensor:
    """Of a segment's queries (1, heads, t, D) to the keys of its ancestors and its own, t the last of them."""
    mask = _mask(q.shape[2], k.shape[2], sliding_window, q.device)
    if softcap is None and s_aux is None:
        return _fused_attention(q, k, v, mask, dropout, scaling)
    return _plain_attention(q, k, v, mask, scaling, dropout, softcap, s_aux)


def _fused_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    dropout: float,
    scaling: float | None,
) -> torch.Tensor:
    causal, grouped = mask is None, q.shape[1] != k.shape[1]
    kernels = cpu_kernels()
    if q.device.type == "meta" and q.shape[-1] == v.shape[-1] and kernels is not None:
        # for a forecast of memory: there PyTorch would take apart what is one operation on any real device
        if mask is not None:
            mask = torch.zeros_like(mask, dtype=q.dtype).masked_fill_(~mask, -math.inf)
        output: torch.Tensor = kernels[0](q, k, v, dropout, causal, attn_mask=mask, scale=scaling)[0]
        return output
    return F.scaled_dot_product_attention(
        q, k, v, mask, dropout, is_causal=causal, scale=scaling, enable_gqa=grouped
    )


def _mask(queries: int, keys: int, window: int | None, device: torch.device) -> torch.Tensor | None:
    """Which keys each query sees, (queries, keys); None where plain causal attention over equal lengths says it."""
    if queries == keys and (window is None or keys <= window):
        return None
    position_q = torch.arange(keys - queries, keys, device=device).unsqueeze(1)
    position_k = torch.arange(keys, device=device)
    seen = position_k <= position_q
    return seen if window is None else seen & (position_k > position_q - window)


def _plain_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float | None,
    dropout: float,
    softcap: float | None,
    s_aux: torch.Tensor | None,
) -> torch.Tensor:
    """The same in plain operations, for what `scaled_dot_product_attention` cannot do. Shapes as there."""
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    scores = q @ k.transpose(2, 3) * (q.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if mask is None:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
    scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    if s_aux is not None:  # a learned score per head that takes part in the softmax and leads nowhere
        sink = s_aux.to(scores.dtype).reshape(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, sink], dim=-1)
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype)
    if s_aux is not None:
        weights = weights[..., :-1]
    return F.dropout(weights, dropout) @ v


def reference_mask(forest: Forest) -> torch.Tensor:
    """(T, T), True where a token sees a token: the contract in its plainest form, for tests and readers."""
    length = len(forest.token_ids_T)
    seen = torch.zeros(length, length, dtype=torch.bool)
    for segment in forest.segments:
        own = slice(segment.start, segment.start + segment.length)
        if segment.parent is not None:
            parent = forest.segments[segment.parent]
            seen[own] = seen[parent.start + parent.length - 1]  # what the parent's last token sees
        seen[own, own] = torch.ones(segment.length, segment.length, dtype=torch.bool).tril()
    return seen


def no_mask(*_: Any, **__: Any) -> None:
    return None


AttentionInterface.register(FOREST, forest_attention)
AttentionMaskInterface.register(FOREST, no_mask)
