"""Attention over a whole forest in one call on CUDA, by `torch.nn.attention.varlen.varlen_attn` (FlashAttention).

A segment's queries are its own tokens. Its keys are those of its ancestors and its own, gathered in this order, so
there are more keys than queries. The kernel aligns such a rectangle at its lower right corner: the last query sees all
keys (Dao 2023, arXiv:2307.08691). All index arithmetic is done once per forest, on the CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from inspect import signature
from typing import Any

import numpy as np
import torch

from yeonma.model.attention.backend import (
    HALF,
    MIN_CAPABILITY,
    Backend,
    Capability,
    ForestShape,
    LayerCall,
)
from yeonma.model.transfer import to_device

MAX_HEAD_WIDTH = 256
WIDE_HEAD = 192
"""The backward pass of wider heads needs the shared memory of data-centre GPUs."""
DATA_CENTRE = ((8, 0), (9, 0), (10, 0), (10, 3))
"""The compute capabilities of these GPUs."""


@cache
def varlen_attention() -> Callable[..., Any] | None:
    """PyTorch's `varlen_attn`, or None if it supports no scale or window. For versions without `enable_gqa`, key heads
    are repeated."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    parameters = signature(varlen_attn).parameters
    if not {"scale", "window_size"} <= parameters.keys():
        return None
    if "enable_gqa" in parameters:
        return varlen_attn

    def with_heads_repeated(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *args: Any,
        enable_gqa: bool,
        **options: Any,
    ) -> Any:
        groups = query.shape[1] // key.shape[1]
        if enable_gqa:
            key, value = (states.repeat_interleave(groups, dim=1) for states in (key, value))
        return varlen_attn(query, key, value, *args, **options)

    return with_heads_repeated


@dataclass(frozen=True, eq=False)
class GatheredKeys:
    """The tokens (T) from which the gathered keys (K) come, and how their gradients are summed.

    A token's key is gathered once for its own segment and once for every segment below. Gradients are summed over these
    copies in float32, always in the same order.
    """

    token_K: torch.Tensor  # int64, the token of a key
    own_T: torch.Tensor  # int64, index into K of a token's copy in its own segment
    shared_S: torch.Tensor  # int64, the tokens with further copies, those with the most first
    rounds: tuple[torch.Tensor, ...]
    """Round n: the n-th further copies, as indices into K, of those first tokens of `shared_S` that have one."""


@dataclass(frozen=True, eq=False)
class VarlenLayout:
    """A forest laid out for `varlen_attn`."""

    query_ends: torch.Tensor  # (segments + 1,) int32
    key_ends: torch.Tensor
    max_queries: int
    max_keys: int
    pairs: int
    """Number of pairs of a query and a key that it sees, without a window."""
    copies: GatheredKeys | None  # None if no segment has a parent: then keys are not copied
    capability: Capability


def varlen_layout(
    lengths: Sequence[int], paths: Sequence[Sequence[int]], device: torch.device, capability: Capability
) -> VarlenLayout:
    """The layout for `ForestShape`'s lengths and paths, with tensors on `device`."""
    count = np.asarray(lengths, dtype=np.int64)
    starts = np.concatenate([[0], np.cumsum(count)])
    keys = np.asarray([sum(lengths[i] for i in path) for path in paths], dtype=np.int64)
    ends = np.concatenate([[0], np.cumsum(keys)])

    on_device = partial(to_device, device=device)
    copies = None
    if ends[-1] > starts[-1]:
        token_K = np.concatenate([np.arange(starts[i], starts[i + 1]) for path in paths for i in path])
        own_T = np.concatenate([np.arange(end - n, end) for end, n in zip(ends[1:], count, strict=True)])
        shared_S, rounds = _further_copies(token_K, own_T)
        copies = GatheredKeys(
            on_device(token_K), on_device(own_T), on_device(shared_S), tuple(map(on_device, rounds))
        )
    return VarlenLayout(
        query_ends=on_device(starts.astype(np.int32)),
        key_ends=on_device(ends.astype(np.int32)),
        max_queries=int(count.max()),
        max_keys=int(keys.max()),
        pairs=int((count * (keys - count) + count * (count + 1) // 2).sum()),
        copies=copies,
        capability=capability,
    )


def _further_copies(token_K: np.ndarray, own_T: np.ndarray) -> tuple[np.ndarray, list[np.ndarray]]:
    """`shared_S` and `rounds` of `GatheredKeys`."""
    inherited = np.ones(len(token_K), dtype=bool)
    inherited[own_T] = False
    keys = np.flatnonzero(inherited)
    keys = keys[np.argsort(token_K[keys], kind="stable")]  # by token, then in the order of segments
    tokens, firsts, counts = np.unique(token_K[keys], return_index=True, return_counts=True)
    order = np.argsort(-counts, kind="stable")
    tokens, firsts, counts = tokens[order], firsts[order], counts[order]
    rounds = [keys[firsts[counts > n] + n] for n in range(int(counts[0]))]
    return tokens, rounds


def _lay_out(shape: ForestShape) -> VarlenLayout | None:
    if shape.capability is None or shape.capability < MIN_CAPABILITY or varlen_attention() is None:
        return None
    return varlen_layout(shape.lengths, shape.paths, shape.device, shape.capability)


def _supports(call: LayerCall, layout: VarlenLayout) -> bool:
    if call.dropout or call.softcap is not None or call.sinks is not None or call.query.dtype not in HALF:
        return False
    width = call.query.shape[-1]
    if width != call.value.shape[-1] or width % 8 or width > MAX_HEAD_WIDTH:
        return False
    return width <= WIDE_HEAD or layout.capability in DATA_CENTRE


def _attend(call: LayerCall, layout: VarlenLayout) -> torch.Tensor:
    return varlen_forest_attention(
        call.query, call.key, call.value, layout, scaling=call.scaling, sliding_window=call.sliding_window
    )


def varlen_forest_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    layout: VarlenLayout,
    *,
    scaling: float | None,
    sliding_window: int | None,
    kernel: Callable[..., torch.Tensor] | None = None,
) -> torch.Tensor:
    """query (1, heads, T, D), key and value (1, key heads, T, D) -> (1, T, heads, D).

    `kernel` replaces PyTorch's `varlen_attn` in tests.
    """
    kernel = kernel or varlen_attention()
    assert kernel is not None  # otherwise there is no layout
    q, k, v = (states[0].transpose(0, 1) for states in (query, key, value))
    if layout.copies is not None:
        k, v = (_Gather.apply(states, layout.copies) for states in (k, v))
    # a window includes the query; for one that covers all keys, the causal kernel is faster
    left = -1 if sliding_window is None or sliding_window >= layout.max_keys else sliding_window - 1
    output = kernel(
        q,
        k,
        v,
        layout.query_ends,
        layout.key_ends,
        layout.max_queries,
        layout.max_keys,
        scale=scaling,
        window_size=(left, 0),
        enable_gqa=q.shape[1] != k.shape[1],
    )
    return output.unsqueeze(0)


class _Gather(torch.autograd.Function):
    """Tokens' states (T, heads, D) -> gathered copies (K, heads, D)."""

    @staticmethod
    def forward(ctx: Any, states: torch.Tensor, copies: GatheredKeys) -> torch.Tensor:
        ctx.copies = copies
        return states.index_select(0, copies.token_K)

    @staticmethod
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor, None]:
        copies: GatheredKeys = ctx.copies
        gradient = upstream.index_select(0, copies.own_T)
        total = gradient.index_select(0, copies.shared_S)
        total = total.to(torch.promote_types(total.dtype, torch.float32))
        for keys in copies.rounds:
            total[: len(keys)] += upstream.index_select(0, keys)
        return gradient.index_copy_(0, copies.shared_S, total.to(gradient.dtype)), None


VARLEN = Backend("varlen", _lay_out, _supports, _attend)
