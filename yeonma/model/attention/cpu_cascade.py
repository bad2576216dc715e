"""Attention over a forest on the CPU, without gathering or copying keys: all segments below another read its keys in
one call, and its own tokens in a few.

A query's outputs over its own segment's keys and over each ancestor's are joined by the sums of their exponentials
(Juravsky et al. 2024, arXiv:2402.05099, section 3.1). The gradient needs no joining: given the whole sum and the whole
output, each part of the keys yields its part of the gradient (Dao et al. 2022, arXiv:2205.14135, appendix B).

PyTorch's kernel for the CPU computes the scores of up to 512 keys before it masks any, so a segment's own queries go
through it in chunks, each with the keys up to its end.
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
    """PyTorch's attention for the CPU, forward and backward, with the logarithms of the sums of exponentials.

    None where this version of PyTorch does not have these private operators.
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
    chunks: tuple[slice, ...]  # of `own`; each sees the keys from the segment's start to the chunk's end
    below: slice | None  # all segments below, which see all of its keys


@dataclass(frozen=True, eq=False)
class CascadeLayout:
    """A forest as `cascade_attention` takes it."""

    segments: tuple[SegmentSlices, ...]  # parents before their children
    mask: torch.Tensor
    """(queries, keys) for the longest chunk and segment, added to the scores; a smaller chunk uses its lower right
    corner."""
    most_keys: int  # the most keys that a token sees


def cascade_layout(
    lengths: Sequence[int], paths: Sequence[Sequence[int]], device: torch.device, chunk: int = CHUNK
) -> CascadeLayout | None:
    """From `ForestShape`'s lengths and paths; None where the segments below one are not next to each other."""
    ends = list(accumulate(lengths))
    below: list[list[int]] = [[] for _ in lengths]
    for index, path in enumerate(paths):
        for ancestor in path[:-1]:
            below[ancestor].append(index)
    segments = []
    for end, length, under in zip(ends, lengths, below, strict=True):
        if under and under[-1] - under[0] + 1 != len(under):
            return None
        even = math.ceil(length / math.ceil(length / chunk))
        step = min(chunk, 16 * math.ceil(even / 16))  # the kernel computes 16 numbers at once
        chunks = tuple(slice(first, min(end, first + step)) for first in range(end - length, end, step))
        seen_by = slice(ends[under[0]] - lengths[under[0]], ends[under[-1]]) if under else None
        segments.append(SegmentSlices(slice(end - length, end), chunks, seen_by))
    queries, keys = min(chunk, max(lengths)), max(lengths)
    mask = torch.zeros(queries, keys, device=device)
    mask[:, keys - queries :] = torch.full((queries, queries), -math.inf, device=device).triu(1)
    return CascadeLayout(tuple(segments), mask, max(sum(lengths[i] for i in path) for path in paths))


def _lay_out(shape: ForestShape) -> CascadeLayout | None:
    if shape.computed_on != "cpu" or shape.capability is not None or cpu_kernels() is None:
        return None
    return cascade_layout(shape.lengths, shape.paths, shape.device)


def _supports(call: LayerCall, laid: CascadeLayout) -> bool:
    """In half precision the partial outputs would have been rounded before they are joined."""
    if call.softcap is not None or call.sinks is not None or call.dropout:
        return False
    if call.sliding_window is not None and call.sliding_window < laid.most_keys:
        return False
    exact = call.query.dtype in (torch.float32, torch.float64)
    return exact and call.query.shape[-1] == call.value.shape[-1]


def _attend(call: LayerCall, laid: CascadeLayout) -> torch.Tensor:
    return cascade_attention(call.query, call.key, call.value, laid, call.scaling)


def cascade_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, laid: CascadeLayout, scaling: float | None
) -> torch.Tensor:
    """query (1, heads, T, D), key and value (1, key heads, T, D) -> (1, T, heads, D)."""
    laid = replace(laid, mask=laid.mask.to(query.dtype))
    output: torch.Tensor = _Cascade.apply(*map(_with_contiguous_rows, (query, key, value)), laid, scaling)
    return output.transpose(1, 2)


class _Cascade(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, laid: CascadeLayout, scale: float | None
    ) -> torch.Tensor:
        kernels = cpu_kernels()
        assert kernels is not None  # else there is no layout
        forward, _ = kernels
        _, heads, tokens, width = q.shape
        output = q.new_empty(1, tokens, heads, width).transpose(1, 2)
        log_sums = q.new_empty(1, heads, tokens)
        for segment in laid.segments:
            for rows in segment.chunks:
                seen = slice(segment.own.start, rows.stop)
                mask = _mask(laid, segment.own, rows)
                part = forward(q[:, :, rows], k[:, :, seen], v[:, :, seen], attn_mask=mask, scale=scale)
                output[:, :, rows], log_sums[:, :, rows] = part
        for segment in laid.segments:
            if segment.below is None:
                continue
            rows, own = segment.below, segment.own
            # without a mask, the heads that share a key head can be one head with all their queries
            grouped = q[:, :, rows].reshape(1, k.shape[1], -1, width)
            part, sums = forward(grouped, k[:, :, own], v[:, :, own], scale=scale)
            sums = sums.reshape(1, heads, -1)
            total = torch.logaddexp(log_sums[:, :, rows], sums)
            share = torch.exp(sums - total).unsqueeze(-1)
            output[:, :, rows].lerp_(part.reshape(1, heads, -1, width), share)
            log_sums[:, :, rows] = total
        ctx.save_for_backward(q, k, v, output, log_sums)
        ctx.laid, ctx.scale = laid, scale
        return output

    @staticmethod
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, k, v, output, log_sums = ctx.saved_tensors
        laid: CascadeLayout = ctx.laid
        kernels = cpu_kernels()
        assert kernels is not None
        _, backward = kernels
        upstream, groups = _with_contiguous_rows(upstream), q.shape[1] // k.shape[1]
        to_q, to_k, to_v = (torch.empty_like(states) for states in (q, k, v))

        def part(rows: slice, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor | None) -> Any:
            """The gradients of these queries, keys and values."""
            inputs = q[:, :, rows], keys, values, output[:, :, rows], log_sums[:, :, rows]
            return backward(upstream[:, :, rows], *inputs, 0.0, False, attn_mask=mask, scale=ctx.scale)

        for segment in reversed(laid.segments):  # children first: parents add to their queries' gradients
            own, below = segment.own, segment.below
            # the kernel distributes key heads over threads; repeated, there are enough of them
            keys, values = (states[:, :, own].repeat_interleave(groups, 1) for states in (k, v))
            *chunks, last = segment.chunks
            to_q[:, :, last], to_keys, to_values = part(last, keys, values, _mask(laid, own, last))
            for rows in chunks:
                count = rows.stop - own.start
                mask = _mask(laid, own, rows)
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


def _mask(laid: CascadeLayout, own: slice, rows: slice) -> torch.Tensor:
    """The mask of a chunk's queries, which are the last of the keys that they see."""
    queries, keys = laid.mask.shape
    return laid.mask[queries - (rows.stop - rows.start) :, keys - (rows.stop - own.start) :]


def _with_contiguous_rows(states: torch.Tensor) -> torch.Tensor:
    """The kernel needs a head's numbers next to each other."""
    return states if states.stride(-1) == 1 else states.contiguous()


CPU_CASCADE = Backend("cpu_cascade", _lay_out, _supports, _attend)
