"""Attention over a whole forest in one call on CUDA, by FlexAttention: for what `varlen_attn` cannot do.

That is soft-capping, attention sinks, float32, and heads whose queries and values are of different widths (Dong et al.
2024, arXiv:2412.05496). A token sees another one where that one's segment is an ancestor of its own or the same, and no
later. Which blocks of the T x T square hold something to see is worked out once a forest and window, on the CPU, from
the segments alone; no T x T mask is ever made.

The flat sequence is filled up to whole blocks, two at least, by a segment of zeros of its own. So the compiler meets
no odd lengths, for which it would make kernels of their own.

A kernel is compiled once in a process for each kind of layer (`LayerSpec`), on zeros of a fixed length, so that it
does not depend on which forest came first. Nothing is chosen by timing where torch has a setting for that, and no sums
are taken by atomic additions. Not guaranteed: equal bits on another kind of GPU, or with another version of torch or
Triton.

Shapes: T tokens, P tokens with those that fill the last block.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.util import find_spec
from types import FunctionType
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch.autograd.graph import saved_tensors_hooks

from yeonma.model.attention.backend import HALF, LEAST_CAPABILITY, Backend, ForestShape, LayerCall
from yeonma.model.kernels.elementwise import kernel_settings

BLOCK = 128
LEAST_BLOCKS = 2
"""The compiler makes kernels of their own for sizes of 0 and 1."""
FIRST_BLOCKS = 7
"""Of the forest that a kernel is compiled with."""
NARROWEST, WIDEST = 16, 256
"""Heads that the kernel takes, and those that its blocks have room for."""


@dataclass(frozen=True)
class Masked:
    """What a call needs of a forest and a window; all on one device, int32.

    Token q sees token k where `enter_P[k] <= enter_P[q] < leave_P[k]` (k's segment is an ancestor of q's, or its own)
    and `first_P[q] <= position_P[k] <= position_P[q]`.
    """

    enter_P: torch.Tensor
    leave_P: torch.Tensor
    position_P: torch.Tensor
    first_P: torch.Tensor
    blocks: tuple[torch.Tensor, ...]
    """Counts and indices of the blocks that a block of queries sees in part, and as a whole; then of keys, by whom."""

    def tensors(self) -> tuple[torch.Tensor, ...]:
        return (self.enter_P, self.leave_P, self.position_P, self.first_P, *self.blocks)


@dataclass(frozen=True, eq=False)
class Tree:
    """A forest as FlexAttention takes it. One object serves all layers; what a window needs is made at its first."""

    lengths: tuple[int, ...]
    paths: tuple[tuple[int, ...], ...]
    device: torch.device
    _made: dict[int | None, Masked] = field(default_factory=dict)

    def masked(self, window: int | None) -> Masked:
        if window is not None and window >= sum(self.lengths):
            window = None
        if window not in self._made:
            self._made[window] = mask_of(self.lengths, self.paths, window, self.device)
        return self._made[window]


@dataclass(frozen=True)
class LayerSpec:
    """What a kernel is compiled for."""

    device: torch.device
    dtype: torch.dtype
    heads: int
    key_heads: int
    query_width: int
    value_width: int
    scale: float
    softcap: float | None
    sums: bool  # whether the logarithms of the sums of exponents are wanted, too


Kernel = Callable[..., Any]


@cache
def has_flex() -> bool:
    """Whether this torch has FlexAttention with all that it is given, and there is a Triton to compile it."""
    if find_spec("triton") is None:
        return False
    try:
        from torch.nn.attention.flex_attention import (  # noqa: F401
            AuxRequest,
            BlockMask,
            FlexKernelOptions,
            flex_attention,
        )
    except ImportError:
        return False
    return "BACKEND" in FlexKernelOptions.__annotations__


def _lay_out(shape: ForestShape) -> Tree | None:
    """None on the meta device too: a memory forecast uses what needs no compiler."""
    if shape.capability is None or shape.capability < LEAST_CAPABILITY:
        return None
    return (
        Tree(shape.lengths, shape.paths, shape.device) if shape.device.type == "cuda" and has_flex() else None
    )


def _supports(call: LayerCall, tree: Tree) -> bool:
    widths = call.query.shape[-1], call.value.shape[-1]
    if call.dropout or not all(NARROWEST <= width <= WIDEST for width in widths):
        return False
    return call.query.dtype in (*HALF, torch.float32)


def _attend(call: LayerCall, tree: Tree) -> torch.Tensor:
    return flex_forest_attention(
        call.query,
        call.key,
        call.value,
        tree,
        scaling=call.scaling,
        sliding_window=call.sliding_window,
        softcap=call.softcap,
        s_aux=call.sinks,
    )


def mask_of(
    lengths: Sequence[int], paths: Sequence[Sequence[int]], window: int | None, device: torch.device
) -> Masked:
    """From `ForestShape`'s lengths and paths. `window`: positions that a token sees, itself counted."""
    total = sum(lengths)
    filled = max(-(-total // BLOCK), LEAST_BLOCKS) * BLOCK
    if filled > total:
        lengths, paths = (*lengths, filled - total), (*paths, (len(lengths),))
    count = np.asarray(lengths, dtype=np.int64)
    begin = np.asarray([sum(lengths[i] for i in path[:-1]) for path in paths], dtype=np.int64)
    enter, leave = _visits(paths)
    segment_P = np.repeat(np.arange(len(count)), count)
    starts = np.cumsum(count) - count
    position_P = begin[segment_P] + np.arange(filled) - starts[segment_P]
    first_P = np.zeros_like(position_P) if window is None else np.maximum(position_P - window + 1, 0)

    # runs: what a segment has of a block. Positions of a run, and their differences, have no gaps
    run_starts = np.union1d(starts[count > 0], np.arange(0, filled, BLOCK))
    run_ends = np.append(run_starts[1:], filled)
    segment_R = segment_P[run_starts]
    low_R, high_R = position_P[run_starts], position_P[run_ends - 1]
    below = (enter[segment_R][None] <= enter[segment_R][:, None]) & (
        enter[segment_R][:, None] < leave[segment_R][None]
    )
    nearest, farthest = low_R[:, None] - high_R[None], high_R[:, None] - low_R[None]
    reach = filled if window is None else window
    some = below & (farthest >= 0) & (nearest < reach)
    every = below & (nearest >= 0) & (farthest < reach)
    firsts = np.searchsorted(run_starts, np.arange(0, filled, BLOCK))
    some = np.logical_or.reduceat(np.logical_or.reduceat(some, firsts, 0), firsts, 1)
    every = np.logical_and.reduceat(np.logical_and.reduceat(every, firsts, 0), firsts, 1)
    blocks = [
        array
        for seen in (some & ~every, every, (some & ~every).T, every.T)
        for array in (seen.sum(1), np.argsort(~seen, axis=1, kind="stable"))
    ]

    def on_device(array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(array, dtype=np.int32)).to(device)

    return Masked(
        on_device(enter[segment_P]),
        on_device(leave[segment_P]),
        on_device(position_P),
        on_device(first_P),
        tuple(on_device(array[None, None]) for array in blocks),
    )


def _visits(paths: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    """When a walk over the trees enters each segment and leaves it: one's descendants are entered in between."""
    below = np.ones(len(paths), dtype=np.int64)  # segments of the subtree; parents stand before children
    for index in reversed(range(len(paths))):
        if len(paths[index]) > 1:
            below[paths[index][-2]] += below[index]
    enter, free, roots = np.zeros_like(below), np.zeros_like(below), 0
    for index, path in enumerate(paths):
        if len(path) > 1:
            enter[index] = free[path[-2]]
            free[path[-2]] += below[index]
        else:
            enter[index] = roots
            roots += int(below[index])
        free[index] = enter[index] + 1
    return enter, enter + below


@torch.compiler.disable  # a graph of its own, whatever the model around it is compiled by
def flex_forest_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    tree: Tree,
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    kernel: Kernel | None = None,
) -> torch.Tensor:
    """query (1, heads, T, D), key (1, key heads, T, D), value (1, key heads, T, E) -> (1, T, heads, E).

    `s_aux`: of each head a score that takes part in the softmax and leads nowhere. `kernel`: torch's `flex_attention`,
    or what stands in for it, called as it is; None for the compiled one. Compiling raises whatever the compiler raises.
    """
    tokens = query.shape[2]
    masked = tree.masked(sliding_window)
    fill = masked.enter_P.shape[0] - tokens
    states = [F.pad(each, (0, 0, 0, fill)).contiguous() for each in (query, key, value)]
    kind = LayerSpec(
        query.device,
        query.dtype,
        query.shape[1],
        key.shape[1],
        query.shape[-1],
        value.shape[-1],
        query.shape[-1] ** -0.5 if scaling is None else float(scaling),
        None if softcap is None else float(softcap),
        s_aux is not None,
    )
    if kernel is not None:
        output, sums = _with_masks(kind, kernel)(*states, *masked.tensors())
    else:
        wants_gradient = torch.is_grad_enabled() and any(each.requires_grad for each in states)
        if wants_gradient:  # of all three: with another choice there would be another kernel
            states = [each if each.requires_grad else each.detach().requires_grad_() for each in states]
        else:
            states = [each.detach() for each in states]
        output, sums = compiled(kind)[wants_gradient](*states, *masked.tensors())
    output = output[:, :, :tokens]
    if s_aux is not None:
        sink = s_aux.to(sums.dtype).reshape(1, -1, 1)
        output = (output * torch.sigmoid(sums[:, :, :tokens] - sink).unsqueeze(-1)).to(output.dtype)
    return output.transpose(1, 2)


@cache
def compiled(kind: LayerSpec) -> tuple[Kernel, Kernel]:
    """Without a gradient and with one; both tried forwards and backwards, so that what fails, fails here."""
    from torch.nn.attention.flex_attention import flex_attention

    settings = kernel_settings()
    without, with_gradient = (
        compile_for(kind, flex_attention, wants_gradient, options=settings)
        for wants_gradient in (False, True)
    )
    return without, with_gradient


def compile_for(kind: LayerSpec, function: Kernel, wants_gradient: bool, **how: Any) -> Kernel:
    """One kernel for all lengths and all windows. `how`: keywords of `torch.compile`."""
    plain = _with_masks(kind, function)
    # of a copy of its code: at one code the compiler would make a second kind's kernel for widths of all sizes
    copy = FunctionType(
        plain.__code__.replace(), plain.__globals__, plain.__name__, closure=plain.__closure__
    )
    kernel: Kernel = torch.compile(copy, fullgraph=True, **how)
    length = FIRST_BLOCKS * BLOCK
    widths = (
        (kind.heads, kind.query_width),
        (kind.key_heads, kind.query_width),
        (kind.key_heads, kind.value_width),
    )
    states = [
        torch.zeros(1, heads, length, width, dtype=kind.dtype, device=kind.device) for heads, width in widths
    ]
    masked = mask_of((length,), ((0,),), None, kind.device).tensors()
    for each in states:
        torch._dynamo.mark_dynamic(each, 2)
        each.requires_grad_(wants_gradient)
    for each in masked:
        for dimension in range(0 if each.ndim == 1 else 2, each.ndim):
            torch._dynamo.mark_dynamic(each, dimension)
    # checkpointing of the layer that is being computed must not take this for a part of it: its hooks are covered
    with torch.set_grad_enabled(wants_gradient), saved_tensors_hooks(_same, _same):
        output, sums = kernel(*states, *masked)
        if wants_gradient:
            torch.autograd.grad(output.sum() if sums is None else output.sum() + sums.sum(), states)
    return kernel


def _same(saved: torch.Tensor) -> torch.Tensor:
    return saved


def _with_masks(kind: LayerSpec, kernel: Kernel) -> FunctionType:
    from torch.nn.attention.flex_attention import AuxRequest, BlockMask

    # constants of the compiled function
    scale, sums, grouped = kind.scale, kind.sums, kind.heads != kind.key_heads
    cap, is_capped = kind.softcap or 0.0, kind.softcap is not None
    options = (
        {"BACKEND": "TRITON"} if kind.device.type == "cuda" else {}
    )  # and none that suits short forests alone

    def attend(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        enter_P: torch.Tensor,
        leave_P: torch.Tensor,
        position_P: torch.Tensor,
        first_P: torch.Tensor,
        *blocks: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        def sees(batch: Any, head: Any, q: Any, k: Any) -> Any:
            above = (enter_P[k] <= enter_P[q]) & (enter_P[q] < leave_P[k])
            return above & (position_P[k] <= position_P[q]) & (position_P[k] >= first_P[q])

        def capped(score: Any, batch: Any, head: Any, q: Any, k: Any) -> Any:
            return cap * torch.tanh(score / cap)

        lengths = (query.shape[2], key.shape[2])
        mask = BlockMask(lengths, *blocks, BLOCK_SIZE=(BLOCK, BLOCK), mask_mod=sees)  # type: ignore[misc]
        found = kernel(
            query,
            key,
            value,
            score_mod=capped if is_capped else None,
            block_mask=mask,
            scale=scale,
            enable_gqa=grouped,
            kernel_options=options,
            return_aux=AuxRequest(lse=True) if sums else None,
        )
        return (found[0], found[1].lse) if sums else (found, None)

    return attend  # type: ignore[return-value]


FLEX = Backend("flex", _lay_out, _supports, _attend)
