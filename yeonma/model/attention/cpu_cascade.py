"""Attention over a forest on the CPU, without gathering or copying keys: all segments below a segment attend to its
keys in one call, and its own queries in a few.

A query's outputs over its own segment's keys and over those of its ancestors are combined by their sums of exponentials
(Juravsky et al. 2024, arXiv:2402.05099, section 3.1). Gradients need no such step: given the total sum and the final
output, every part of the keys gives its part of the gradient (Dao et al. 2022, arXiv:2205.14135, appendix B).

PyTorch's kernel for the CPU computes the scores of up to 512 keys before it masks any. Therefore a segment's own
queries go through it in chunks, with the keys up to the chunk's end.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import accumulate
from typing import Any

import torch

from yeonma.model.attention.backend import Backend, ForestShape, LayerCall

CHUNK = 96
"""Queries of a segment per call. Smaller chunks compute fewer masked scores, in more calls."""


@cache
def cpu_kernels() -> tuple[Callable[..., Any], Callable[..., Any]] | None:
    """PyTorch's attention for the CPU, forward and backward, with the log-sum-exps of the scores.

    None if this version of PyTorch does not have these private operators.
    """
    try:
        return (
            torch.ops.aten._scaled_dot_product_flash_attention_for_cpu,
            torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward,
        )
    except AttributeError:
        return None


@dataclass(frozen=True)
class SegmentSlices:
    """A segment and the queries that see its keys, as slices of the T tokens."""

    own: slice
    chunks: tuple[slice, ...]  # of `own`; a chunk sees the keys from the segment's start to its own end
    below: slice | None  # all segments below, which see all of its keys


@dataclass(frozen=True, eq=False)
class CascadeLayout:
    """A forest laid out for `cascade_attention`."""

    segments: tuple[SegmentSlices, ...]  # parents before their children
    mask: torch.Tensor
    """(queries, keys) for the longest chunk and segment, added to the scores. Smaller chunks use its lower right
    corner."""
    max_keys: int  # the largest number of keys that a token sees


def cascade_layout(
    lengths: Sequence[int], paths: Sequence[Sequence[int]], device: torch.device, chunk: int = CHUNK
) -> CascadeLayout | None:
    """The layout for `ForestShape`'s lengths and paths; None if the segments below a segment are not contiguous."""
    ends = list(accumulate(lengths))
    descendants_of: list[list[int]] = [[] for _ in lengths]
    for index, path in enumerate(paths):
        for ancestor in path[:-1]:
            descendants_of[ancestor].append(index)
    segments = []
    for end, length, descendants in zip(ends, lengths, descendants_of, strict=True):
        if descendants and descendants[-1] - descendants[0] + 1 != len(descendants):
            return None
        even = math.ceil(length / math.ceil(length / chunk))
        step = min(chunk, 16 * math.ceil(even / 16))  # the kernel computes 16 numbers at once
        chunks = tuple(slice(start, min(end, start + step)) for start in range(end - length, end, step))
        below = None
        if descendants:
            below = slice(ends[descendants[0]] - lengths[descendants[0]], ends[descendants[-1]])
        segments.append(SegmentSlices(slice(end - length, end), chunks, below))
    queries, keys = min(chunk, max(lengths)), max(lengths)
    mask = torch.zeros(queries, keys, device=device)
    mask[:, keys - queries :] = torch.full((queries, queries), -math.inf, device=device).triu(1)
    return CascadeLayout(tuple(segments), mask, max(sum(lengths[i] for i in path) for path in paths))


def _lay_out(shape: ForestShape) -> CascadeLayout | None:
    if shape.computed_on != "cpu" or shape.capability is not None or cpu_kernels() is None:
        return None
    return cascade_layout(shape.lengths, shape.paths, shape.device)


def _supports(call: LayerCall, layout: CascadeLayout) -> bool:
    """Not in half precision: partial outputs would be rounded before they are combined."""
    if call.softcap is not None or call.sinks is not None or call.dropout:
        return False
    if call.sliding_window is not None and call.sliding_window < layout.max_keys:
        return False
    exact = call.query.dtype in (torch.float32, torch.float64)
    return exact and call.query.shape[-1] == call.value.shape[-1]


def _attend(call: LayerCall, layout: CascadeLayout) -> torch.Tensor:
    return cascade_attention(call.query, call.key, call.value, layout, call.scaling)


def cascade_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layout: CascadeLayout, scaling: float | None
) -> torch.Tensor:
    """query (1, heads, T, D), key and value (1, key heads, T, D) -> (1, T, heads, D)."""
    layout = replace(layout, mask=layout.mask.to(query.dtype))
    output: torch.Tensor = _Cascade.apply(*map(_with_contiguous_rows, (query, key, value)), layout, scaling)
    return output.transpose(1, 2)


class _Cascade(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        layout: CascadeLayout,
        scale: float | None,
    ) -> torch.Tensor:
        kernels = cpu_kernels()
        assert kernels is not None  # otherwise there is no layout
        forward, _ = kernels
        _, heads, tokens, width = q.shape
        output = q.new_empty(1, tokens, heads, width).transpose(1, 2)
        log_sums = q.new_empty(1, heads, tokens)
        for segment in layout.segments:
            for rows in segment.chunks:
                keys = slice(segment.own.start, rows.stop)
                mask = _mask(layout, segment.own, rows)
                part = forward(q[:, :, rows], k[:, :, keys], v[:, :, keys], attn_mask=mask, scale=scale)
                output[:, :, rows], log_sums[:, :, rows] = part
        for segment in layout.segments:
            if segment.below is None:
                continue
            rows, own = segment.below, segment.own
            # without a mask, heads that share a key head can be one head with all of their queries
            grouped = q[:, :, rows].reshape(1, k.shape[1], -1, width)
            part, sums = forward(grouped, k[:, :, own], v[:, :, own], scale=scale)
            sums = sums.reshape(1, heads, -1)
            total = torch.logaddexp(log_sums[:, :, rows], sums)
            weight = torch.exp(sums - total).unsqueeze(-1)
            output[:, :, rows].lerp_(part.reshape(1, heads, -1, width), weight)
            log_sums[:, :, rows] = total
        ctx.save_for_backward(q, k, v, output, log_sums)
        ctx.layout, ctx.scale = layout, scale
        return output

    @staticmethod
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, k, v, output, log_sums = ctx.saved_tensors
        layout: CascadeLayout = ctx.layout
        kernels = cpu_kernels()
        assert kernels is not None
        _, backward = kernels
        upstream, groups = _with_contiguous_rows(upstream), q.shape[1] // k.shape[1]
        to_q, to_k, to_v = (torch.empty_like(states) for states in (q, k, v))

        def part(rows: slice, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor | None) -> Any:
            """The gradients of these queries, keys and values."""
            inputs = q[:, :, rows], keys, values, output[:, :, rows], log_sums[:, :, rows]
            return backward(upstream[:, :, rows], *inputs, 0.0, False, attn_mask=mask, scale=ctx.scale)

        for segment in reversed(layout.segments):  # children first: parents add to their queries' gradients
            own, below = segment.own, segment.below
            # the kernel distributes key heads over threads; repeating them gives it enough
            keys, values = (states[:, :, own].repeat_interleave(groups, 1) for states in (k, v))
            *chunks, last = segment.chunks
            to_q[:, :, last], to_keys, to_values = part(last, keys, values, _mask(layout, own, last))
            for rows in chunks:
                count = rows.stop - own.start
                mask = _mask(layout, own, rows)
                to_q[:, :, rows], more_k, more_v = part(rows, keys[:, :, :count], values[:, :, :count], mask)
                to_keys[:, :, :count] += more_k
                to_values[:, :, :count] += more_v
            if below is not None:
                more_q, more_k, more_v = part(below, keys, values, None)
                to_q[:, :, below] += more_q
                to_keys += more_k
                to_values += more_v
            to_k[:, :, own], to_v[:, :, own] = (
                gradient.unflatten(1, (-1, groups)).sum(2) for gradient in (to_keys, to_values)
            )
        return to_q, to_k, to_v, None, None


def _mask(layout: CascadeLayout, own: slice, rows: slice) -> torch.Tensor:
    """The mask of a chunk, whose queries are the last of the keys that they see."""
    queries, keys = layout.mask.shape
    return layout.mask[queries - (rows.stop - rows.start) :, keys - (rows.stop - own.start) :]


def _with_contiguous_rows(states: torch.Tensor) -> torch.Tensor:
    """The kernel needs the numbers of a head to be contiguous."""
    return states if states.stride(-1) == 1 else states.contiguous()


CPU_CASCADE = Backend("cpu_cascade", _lay_out, _supports, _attend)
