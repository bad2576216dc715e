"""Attention over a whole forest in one call on CUDA, by FlexAttention, for what `varlen_attn` does not offer:
soft-capping, attention sinks, float32, and values of another width than the queries (Dong et al. 2024,
arXiv:2412.05496).

A token sees the tokens of its segment's ancestors, and its own segment up to itself. The blocks of the T x T matrix
with such pairs are computed once per forest and window, on the CPU, from the segments alone. No T x T mask is built.

The flat sequence is padded to whole blocks, at least two, by a segment of zeros. The compiler would make separate
kernels for other lengths.

A process compiles one kernel per kind of layer (`LayerSpec`), on zeros of a fixed length, so that it does not depend on
which forest comes first. Nothing is chosen by timing if PyTorch has a setting against it, and sums use no atomic
additions. Not guaranteed: equal bits on another kind of GPU, or with another version of PyTorch or Triton.

Shapes: T tokens, P tokens with the padding.
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

from yeonma.model.attention.backend import HALF, MIN_CAPABILITY, Backend, ForestShape, LayerCall
from yeonma.model.kernels.elementwise import kernel_settings
from yeonma.model.transfer import to_device

BLOCK = 128
MIN_BLOCKS = 2
"""The compiler makes separate kernels for sizes 0 and 1."""
FIRST_BLOCKS = 7
"""Length of the sequence that a kernel is compiled with."""
MIN_WIDTH, MAX_WIDTH = 16, 256
"""Head widths that the kernel and its blocks support."""


@dataclass(frozen=True)
class MaskTensors:
    """The mask of a forest and a window. All tensors are int32, on one device.

    Token q sees token k where `enter_P[k] <= enter_P[q] < leave_P[k]` (k's segment is an ancestor of q's, or its own)
    and `first_P[q] <= position_P[k] <= position_P[q]`.
    """

    enter_P: torch.Tensor
    leave_P: torch.Tensor
    position_P: torch.Tensor
    first_P: torch.Tensor
    blocks: tuple[torch.Tensor, ...]
    """For blocks of queries: counts and indices of the key blocks that they see partly, then of those that they see
    fully. Then the same for blocks of keys."""

    def tensors(self) -> tuple[torch.Tensor, ...]:
        return (self.enter_P, self.leave_P, self.position_P, self.first_P, *self.blocks)


@dataclass(frozen=True, eq=False)
class FlexLayout:
    """A forest laid out for FlexAttention. One object serves all layers. Masks are computed at first use."""

    lengths: tuple[int, ...]
    paths: tuple[tuple[int, ...], ...]
    device: torch.device
    _masks: dict[int | None, MaskTensors] = field(default_factory=dict)

    def mask(self, window: int | None) -> MaskTensors:
        if window is not None and window >= sum(self.lengths):
            window = None
        if window not in self._masks:
            self._masks[window] = mask_of(self.lengths, self.paths, window, self.device)
        return self._masks[window]


@dataclass(frozen=True)
class LayerSpec:
    """The kind of layer for which a kernel is compiled."""

    device: torch.device
    dtype: torch.dtype
    heads: int
    key_heads: int
    query_width: int
    value_width: int
    scale: float
    softcap: float | None
    sums: bool  # whether the kernel also returns the log-sum-exps of the scores


Kernel = Callable[..., Any]


@cache
def has_flex() -> bool:
    """Whether this PyTorch has FlexAttention with all options used here, and Triton is installed."""
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


def _lay_out(shape: ForestShape) -> FlexLayout | None:
    """None on the meta device as well: a memory forecast uses backends that need no compiler."""
    if shape.capability is None or shape.capability < MIN_CAPABILITY:
        return None
    return (
        FlexLayout(shape.lengths, shape.paths, shape.device)
        if shape.device.type == "cuda" and has_flex()
        else None
    )


def _supports(call: LayerCall, layout: FlexLayout) -> bool:
    widths = call.query.shape[-1], call.value.shape[-1]
    if call.dropout or not all(MIN_WIDTH <= width <= MAX_WIDTH for width in widths):
        return False
    return call.query.dtype in (*HALF, torch.float32)


def _attend(call: LayerCall, layout: FlexLayout) -> torch.Tensor:
    return flex_forest_attention(
        call.query,
        call.key,
        call.value,
        layout,
        scaling=call.scaling,
        sliding_window=call.sliding_window,
        softcap=call.softcap,
        s_aux=call.sinks,
    )


def mask_of(
    lengths: Sequence[int], paths: Sequence[Sequence[int]], window: int | None, device: torch.device
) -> MaskTensors:
    """The mask for `ForestShape`'s lengths and paths. `window`: number of positions that a token sees."""
    total = sum(lengths)
    padded = max(-(-total // BLOCK), MIN_BLOCKS) * BLOCK
    if padded > total:
        lengths, paths = (*lengths, padded - total), (*paths, (len(lengths),))
    count = np.asarray(lengths, dtype=np.int64)
    begin = np.asarray([sum(lengths[i] for i in path[:-1]) for path in paths], dtype=np.int64)
    enter, leave = _visits(paths)
    segment_P = np.repeat(np.arange(len(count)), count)
    starts = np.cumsum(count) - count
    position_P = begin[segment_P] + np.arange(padded) - starts[segment_P]
    first_P = np.zeros_like(position_P) if window is None else np.maximum(position_P - window + 1, 0)

    # A run is the part of a segment in one block. Its positions, and the differences of two runs, have no gaps.
    run_starts = np.union1d(starts[count > 0], np.arange(0, padded, BLOCK))
    run_ends = np.append(run_starts[1:], padded)
    segment_R = segment_P[run_starts]
    low_R, high_R = position_P[run_starts], position_P[run_ends - 1]
    below = (enter[segment_R][None] <= enter[segment_R][:, None]) & (
        enter[segment_R][:, None] < leave[segment_R][None]
    )
    nearest, farthest = low_R[:, None] - high_R[None], high_R[:, None] - low_R[None]
    reach = padded if window is None else window
    some = below & (farthest >= 0) & (nearest < reach)
    every = below & (nearest >= 0) & (farthest < reach)
    firsts = np.searchsorted(run_starts, np.arange(0, padded, BLOCK))
    some = np.logical_or.reduceat(np.logical_or.reduceat(some, firsts, 0), firsts, 1)
    every = np.logical_and.reduceat(np.logical_and.reduceat(every, firsts, 0), firsts, 1)
    blocks = [
        array
        for visible in (some & ~every, every, (some & ~every).T, every.T)
        for array in (visible.sum(1), np.argsort(~visible, axis=1, kind="stable"))
    ]

    def on_device(array: np.ndarray) -> torch.Tensor:
        return to_device(np.ascontiguousarray(array, dtype=np.int32), device)

    return MaskTensors(
        on_device(enter[segment_P]),
        on_device(leave[segment_P]),
        on_device(position_P),
        on_device(first_P),
        tuple(on_device(array[None, None]) for array in blocks),
    )


def _visits(paths: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    """The times at which a depth-first walk enters and leaves the segments. Descendants are entered in between."""
    below = np.ones(len(paths), dtype=np.int64)  # segments in the subtree; parents come before children
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


@torch.compiler.disable  # a separate graph, even if the model is compiled
def flex_forest_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    layout: FlexLayout,
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    kernel: Kernel | None = None,
) -> torch.Tensor:
    """query (1, heads, T, D), key (1, key heads, T, D), value (1, key heads, T, E) -> (1, T, heads, E).

    `s_aux`: attention sinks, (heads,). `kernel`: PyTorch's `flex_attention` or a replacement, called uncompiled; None
    for the compiled one. Compiling raises whatever the compiler raises.
    """
    tokens = query.shape[2]
    mask = layout.mask(sliding_window)
    padding = mask.enter_P.shape[0] - tokens
    inputs = [F.pad(states, (0, 0, 0, padding)).contiguous() for states in (query, key, value)]
    spec = LayerSpec(
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
        output, sums = _with_masks(spec, kernel)(*inputs, *mask.tensors())
    else:
        needs_gradient = torch.is_grad_enabled() and any(states.requires_grad for states in inputs)
        if needs_gradient:  # for all three inputs: other combinations would need other kernels
            inputs = [
                states if states.requires_grad else states.detach().requires_grad_() for states in inputs
            ]
        else:
            inputs = [states.detach() for states in inputs]
        output, sums = compiled(spec)[needs_gradient](*inputs, *mask.tensors())
    output = output[:, :, :tokens]
    if s_aux is not None:
        sink = s_aux.to(sums.dtype).reshape(1, -1, 1)
        output = (output * torch.sigmoid(sums[:, :, :tokens] - sink).unsqueeze(-1)).to(output.dtype)
    return output.transpose(1, 2)


@cache
def compiled(spec: LayerSpec) -> tuple[Kernel, Kernel]:
    """The kernels (without gradient, with gradient). Both run once, including backward, so that failures show here."""
    from torch.nn.attention.flex_attention import flex_attention

    settings = kernel_settings()
    without, with_gradient = (
        compile_for(spec, flex_attention, needs_gradient, options=settings)
        for needs_gradient in (False, True)
    )
    return without, with_gradient


def compile_for(spec: LayerSpec, function: Kernel, needs_gradient: bool, **compile_options: Any) -> Kernel:
    """A kernel for all lengths and windows. `compile_options`: keywords of `torch.compile`."""
    plain = _with_masks(spec, function)
    # a copy of the code: for the same code object, the compiler would make the next kernel with dynamic widths
    copy = FunctionType(
        plain.__code__.replace(), plain.__globals__, plain.__name__, closure=plain.__closure__
    )
    kernel: Kernel = torch.compile(copy, fullgraph=True, **compile_options)
    length = FIRST_BLOCKS * BLOCK
    shapes = (
        (spec.heads, spec.query_width),
        (spec.key_heads, spec.query_width),
        (spec.key_heads, spec.value_width),
    )
    inputs = [
        torch.zeros(1, heads, length, width, dtype=spec.dtype, device=spec.device) for heads, width in shapes
    ]
    masks = mask_of((length,), ((0,),), None, spec.device).tensors()
    for states in inputs:
        torch._dynamo.mark_dynamic(states, 2)
        states.requires_grad_(needs_gradient)
    for mask in masks:
        for dimension in range(0 if mask.ndim == 1 else 2, mask.ndim):
            torch._dynamo.mark_dynamic(mask, dimension)
    # hides these tensors from the saved-tensor hooks of a layer with gradient checkpointing that is running
    with torch.set_grad_enabled(needs_gradient), saved_tensors_hooks(_identity, _identity):
        output, sums = kernel(*inputs, *masks)
        if needs_gradient:
            torch.autograd.grad(output.sum() if sums is None else output.sum() + sums.sum(), inputs)
    return kernel


def _identity(saved: torch.Tensor) -> torch.Tensor:
    return saved


def _with_masks(spec: LayerSpec, kernel: Kernel) -> FunctionType:
    """The kernel as a function of queries, keys, values and `MaskTensors.tensors()`. It returns the output and, if
    `spec` says so, the log-sum-exps."""
    from torch.nn.attention.flex_attention import AuxRequest, BlockMask

    # constants of the compiled function
    scale, sums, is_grouped = spec.scale, spec.sums, spec.heads != spec.key_heads
    cap, is_capped = spec.softcap or 0.0, spec.softcap is not None
    # excludes a kernel for short sequences only
    options = {"BACKEND": "TRITON"} if spec.device.type == "cuda" else {}

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
            is_ancestor = (enter_P[k] <= enter_P[q]) & (enter_P[q] < leave_P[k])
            return is_ancestor & (position_P[k] <= position_P[q]) & (position_P[k] >= first_P[q])

        def capped(score: Any, batch: Any, head: Any, q: Any, k: Any) -> Any:
            return cap * torch.tanh(score / cap)

        lengths = (query.shape[2], key.shape[2])
        mask = BlockMask(lengths, *blocks, BLOCK_SIZE=(BLOCK, BLOCK), mask_mod=sees)  # type: ignore[misc]
        result = kernel(
            query,
            key,
            value,
            score_mod=capped if is_capped else None,
            block_mask=mask,
            scale=scale,
            enable_gqa=is_grouped,
            kernel_options=options,
            return_aux=AuxRequest(lse=True) if sums else None,
        )
        return (result[0], result[1].lse) if sums else (result, None)

    return attend  # type: ignore[return-value]


FLEX = Backend("flex", _lay_out, _supports, _attend)
