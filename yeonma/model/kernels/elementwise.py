"""RMSNorm, SwiGLU and rotary positions with fewer passes over memory and fewer saved tensors.

They are pairs of pure functions, forward and gradient, in plain operations that compute in float32 and round once.
`compiled` turns them into kernels with PyTorch's compiler. `yeonma.model.kernels.patch` finds the modules that compute
the same.

Zhang and Sennrich 2019, arXiv:1910.07467 (RMSNorm); Shazeer 2020, arXiv:2002.05202 (SwiGLU); Su et al. 2021,
arXiv:2104.09864 (rotary positions).

Shapes: N rows, H and I hidden, T tokens, D head width.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F

from yeonma.messages import tr

TensorPair = tuple[torch.Tensor, torch.Tensor]

MIN_ROWS = 16
"""With fewer, as when generating single tokens, kernels are not faster, so the plain functions run. The compiler never
sees the sizes 0 and 1, for which it would make separate kernels."""
FIRST_ROWS = 1021
"""Rows of the input that a kernel is compiled with. The kernel may depend on it, so it does not come from data."""


def norm_forward(x_NH: torch.Tensor, gain_H: torch.Tensor, epsilon: float) -> TensorPair:
    """x / rms(x) * gain, and 1 / rms(x) as (N, 1) in float32."""
    wide = x_NH.float()
    length = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
    inverse = torch.rsqrt(length * length / x_NH.shape[-1] + epsilon)
    return (wide * inverse).mul_(gain_H).to(x_NH.dtype), inverse


def norm_backward(
    upstream_NH: torch.Tensor, x_NH: torch.Tensor, gain_H: torch.Tensor, inverse_N1: torch.Tensor
) -> torch.Tensor:
    """The gradient of x."""
    wide, scaled = x_NH.float(), upstream_NH.float() * gain_H
    projection = (scaled * wide).mean(-1, keepdim=True) * inverse_N1 * inverse_N1 * inverse_N1
    return scaled.mul_(inverse_N1).addcmul_(wide, projection, value=-1).to(x_NH.dtype)


def swiglu_forward(gate_NI: torch.Tensor, up_NI: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up."""
    return F.silu(gate_NI.float()).mul_(up_NI).to(gate_NI.dtype)


def _silu_backward(upstream: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """By PyTorch's private operator or, if it is missing, by the formula."""
    if hasattr(torch.ops.aten, "silu_backward"):
        gradient: torch.Tensor = torch.ops.aten.silu_backward(upstream, x)
        return gradient
    sigmoid = torch.sigmoid(x)
    return upstream * sigmoid * (1 + x * (1 - sigmoid))


def swiglu_backward(upstream_NI: torch.Tensor, gate_NI: torch.Tensor, up_NI: torch.Tensor) -> TensorPair:
    """The gradients of gate and up."""
    gate, upstream = gate_NI.float(), upstream_NI.float()
    to_gate = _silu_backward(upstream * up_NI, gate)
    return to_gate.to(gate_NI.dtype), F.silu(gate).mul_(upstream).to(up_NI.dtype)


def swiglu_backward_recomputing(
    upstream_NI: torch.Tensor, gate_NI: torch.Tensor, up_NI: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients of gate and up, and silu(gate) * up, which the forward pass then need not save."""
    gate, upstream = gate_NI.float(), upstream_NI.float()
    to_gate = _silu_backward(upstream * up_NI, gate)
    active = F.silu(gate)
    to_up = (active * upstream).to(up_NI.dtype)
    return to_gate.to(gate_NI.dtype), to_up, active.mul_(up_NI).to(gate_NI.dtype)


def rotate_forward(
    q: torch.Tensor, k: torch.Tensor, cos_TD: torch.Tensor, sin_TD: torch.Tensor
) -> TensorPair:
    """q (T, heads, D) and k (T, key heads, D) with the two halves of every head rotated as pairs."""
    cos, sin = cos_TD.float().unsqueeze(1), sin_TD.float().unsqueeze(1)
    return _rotated(q, cos, sin), _rotated(k, cos, sin)


def rotate_backward(
    q: torch.Tensor, k: torch.Tensor, cos_TD: torch.Tensor, sin_TD: torch.Tensor
) -> TensorPair:
    """The gradients of q and k, given those of the rotated ones: the rotation by the negative angle."""
    cos, sin = cos_TD.float().unsqueeze(1), sin_TD.float().unsqueeze(1)
    # each half with the sine that the forward pass used for the other half
    inverse_sin = -sin.roll(sin.shape[-1] // 2, -1)
    return _rotated(q, cos, inverse_sin), _rotated(k, cos, inverse_sin)


def _rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    half, wide = x.shape[-1] // 2, x.float()
    result = wide * cos
    result[..., :half].addcmul_(wide[..., half:], sin[..., :half], value=-1)
    result[..., half:].addcmul_(wide[..., :half], sin[..., half:])
    return result.to(x.dtype)


@dataclass(frozen=True)
class Kernels:
    """The functions above, plain or compiled."""

    norm_forward: Callable[..., TensorPair] = norm_forward
    norm_backward: Callable[..., torch.Tensor] = norm_backward
    swiglu_forward: Callable[..., torch.Tensor] = swiglu_forward
    swiglu_backward: Callable[..., TensorPair] = swiglu_backward
    swiglu_backward_recomputing: Callable[..., tuple[torch.Tensor, ...]] = swiglu_backward_recomputing
    rotate_forward: Callable[..., TensorPair] = rotate_forward
    rotate_backward: Callable[..., TensorPair] = rotate_backward


PLAIN = Kernels()


@cache
def compiled(strict: bool = False) -> Kernels:
    """The functions, compiled at the first call for a dtype and width. One kernel serves any number of rows.

    If the compiler fails, for example without a C++ compiler or Triton, the plain function runs, with a warning. With
    `strict`, the call raises what the compiler raised.
    """
    return Kernels(**{name: _compiled(function, strict) for name, function in vars(PLAIN).items()})


def _compiled(function: Callable[..., Any], strict: bool) -> Callable[..., Any]:
    kernels: dict[tuple[object, ...], Callable[..., Any]] = {}

    def call(*arguments: Any) -> Any:
        if len(arguments[0]) < MIN_ROWS:
            return function(*arguments)
        key = tuple(
            (value.dtype, value.device, value.shape[1:]) if isinstance(value, torch.Tensor) else value
            for value in arguments
        )
        if key not in kernels:
            kernels[key] = _compile_or_plain(function, arguments, strict)
        return kernels[key](*(_detached_and_contiguous(value) for value in arguments))

    return call


def _compile_or_plain(
    function: Callable[..., Any], arguments: Sequence[Any], strict: bool
) -> Callable[..., Any]:
    try:
        return _compile_for(function, arguments)
    except torch.OutOfMemoryError:  # not the compiler's fault; a later call may succeed
        raise
    except Exception as error:  # a compiler may raise anything
        if strict:
            raise
        message = tr(
            "PyTorch's compiler fails at {name} ({name2}), which runs uncompiled",
            name=function.__name__,
            name2=type(error).__name__,
        )
        warnings.warn(message, RuntimeWarning, stacklevel=2)
        return function


def _compile_for(function: Callable[..., Any], arguments: Sequence[Any]) -> Callable[..., Any]:
    """A kernel for arguments like these, with any number of rows.

    It is compiled from a copy of the function: for the same code object, the compiler would make the next kernel with
    dynamic widths, and the order of kernels would matter.
    """
    copy = FunctionType(function.__code__.replace(), function.__globals__, function.__name__)
    kernel: Callable[..., Any] = torch.compile(copy, fullgraph=True, options=kernel_settings())
    kernel(*map(_with_first_rows, arguments))
    return kernel


KERNEL_SETTINGS: dict[str, Any] = {
    "deterministic": True,  # no choice that affects the numbers depends on timing
    "batch_invariant": True,  # or on the number of rows
    "compile_threads": 1,  # compile in this process, so that a killed run leaves no other processes behind
}
"""Options for PyTorch's compiler."""


def kernel_settings() -> dict[str, Any]:
    """The KERNEL_SETTINGS that this version of the compiler supports."""
    from torch._inductor import list_options

    options = set(list_options())
    return {name: value for name, value in KERNEL_SETTINGS.items() if name in options}


def _with_first_rows(argument: Any) -> Any:
    if not isinstance(argument, torch.Tensor) or argument.ndim < 2:
        return argument
    zeros = argument.new_zeros((FIRST_ROWS, *argument.shape[1:]))
    torch._dynamo.mark_dynamic(zeros, 0)
    return zeros


def _detached_and_contiguous(argument: Any) -> Any:
    """Like the result of `_with_first_rows`: another layout, or a gradient, would need another kernel."""
    return argument.detach().contiguous() if isinstance(argument, torch.Tensor) else argument


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_NH: torch.Tensor, gain_H: torch.Tensor, epsilon: float, kernels: Kernels
    ) -> torch.Tensor:
        result, inverse = kernels.norm_forward(x_NH, gain_H, epsilon)
        ctx.save_for_backward(x_NH, gain_H, inverse)
        ctx.kernels = kernels
        return result

    @staticmethod
    def backward(ctx: Any, upstream_NH: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        return ctx.kernels.norm_backward(upstream_NH, *ctx.saved_tensors), None, None, None


class _Swiglu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_NI: torch.Tensor, up_NI: torch.Tensor, kernels: Kernels) -> torch.Tensor:
        ctx.save_for_backward(gate_NI, up_NI)
        ctx.kernels = kernels
        return kernels.swiglu_forward(gate_NI, up_NI)

    @staticmethod
    def backward(ctx: Any, upstream_NI: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        return *ctx.kernels.swiglu_backward(upstream_NI, *ctx.saved_tensors), None


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        cos_TD: torch.Tensor,
        sin_TD: torch.Tensor,
        kernels: Kernels,
    ) -> TensorPair:
        ctx.save_for_backward(cos_TD, sin_TD)
        ctx.kernels = kernels
        return kernels.rotate_forward(q, k, cos_TD, sin_TD)

    @staticmethod
    def backward(ctx: Any, q: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return *ctx.kernels.rotate_backward(q, k, *ctx.saved_tensors), None, None, None


def norm(x: torch.Tensor, gain_H: torch.Tensor, epsilon: float, kernels: Kernels = PLAIN) -> torch.Tensor:
    """x (..., H) -> (..., H); the gain is frozen."""
    flat = x.reshape(-1, x.shape[-1])
    # the view is outside of the function, because some models modify the result in place
    return _Norm.apply(flat, gain_H.detach(), epsilon, kernels).view(x.shape)


def swiglu(gate: torch.Tensor, up: torch.Tensor, kernels: Kernels = PLAIN) -> torch.Tensor:
    """gate and up (..., I) -> (..., I)."""
    width = gate.shape[-1]
    return _Swiglu.apply(gate.reshape(-1, width), up.reshape(-1, width), kernels).view(gate.shape)


def rotate(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, kernels: Kernels = PLAIN
) -> TensorPair:
    """q (1, heads, T, D), k (1, key heads, T, D), cos and sin (1, T, D) -> q and k rotated."""
    by_token = (states[0].transpose(0, 1) for states in (q, k))
    rotated = _Rotate.apply(*by_token, cos[0], sin[0], kernels)
    rotated_q, rotated_k = (states.transpose(0, 1).unsqueeze(0) for states in rotated)
    return rotated_q, rotated_k
