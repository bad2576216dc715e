"""RMSNorm, SwiGLU and rotary positions with fewer passes over memory, and less kept for the backward.

Each is a pair of pure functions, forward and gradient, in plain operations; they compute in float32 and round once.
PyTorch's compiler can make a kernel of each (`compiled`). `yeonma.model.kernels.patch` finds the modules that compute
just this.
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

Two = tuple[torch.Tensor, torch.Tensor]

FEWEST_ROWS = 16
"""Below, as where single tokens are generated, there is nothing to gain, and the plain functions do; the compiler never
meets the sizes 0 and 1, for which it would make kernels of their own."""
FIRST_ROWS = 1021
"""That the compiler sees first. What it makes of a function may depend on these sizes: they are never those of data."""


def norm_forward(x_NH: torch.Tensor, gain_H: torch.Tensor, epsilon: float) -> Two:
    """x / rms(x) * gain, and 1 / rms(x) as (N, 1) in float32."""
    wide = x_NH.float()
    length = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
    inverse = torch.rsqrt(length * length / x_NH.shape[-1] + epsilon)
    return (wide * inverse).mul_(gain_H).to(x_NH.dtype), inverse


def norm_backward(
    upstream_NH: torch.Tensor, x_NH: torch.Tensor, gain_H: torch.Tensor, inverse_N1: torch.Tensor
) -> torch.Tensor:
    """Its gradient to x."""
    wide, scaled = x_NH.float(), upstream_NH.float() * gain_H
    along = (scaled * wide).mean(-1, keepdim=True) * inverse_N1 * inverse_N1 * inverse_N1
    return scaled.mul_(inverse_N1).addcmul_(wide, along, value=-1).to(x_NH.dtype)


def swiglu_forward(gate_NI: torch.Tensor, up_NI: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up."""
    return F.silu(gate_NI.float()).mul_(up_NI).to(gate_NI.dtype)


def _silu_backward(upstream: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """By PyTorch's operator, which is private, or by the formula where it is gone."""
    if hasattr(torch.ops.aten, "silu_backward"):
        gradient: torch.Tensor = torch.ops.aten.silu_backward(upstream, x)
        return gradient
    sigmoid = torch.sigmoid(x)
    return upstream * sigmoid * (1 + x * (1 - sigmoid))


def swiglu_backward(upstream_NI: torch.Tensor, gate_NI: torch.Tensor, up_NI: torch.Tensor) -> Two:
    """Its gradients to gate and up."""
    gate, upstream = gate_NI.float(), upstream_NI.float()
    to_gate = _silu_backward(upstream * up_NI, gate)
    return to_gate.to(gate_NI.dtype), F.silu(gate).mul_(upstream).to(up_NI.dtype)


def swiglu_backward_again(
    upstream_NI: torch.Tensor, gate_NI: torch.Tensor, up_NI: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The same, and silu(gate) * up, which need not be kept then."""
    gate, upstream = gate_NI.float(), upstream_NI.float()
    to_gate = _silu_backward(upstream * up_NI, gate)
    active = F.silu(gate)
    to_up = (active * upstream).to(up_NI.dtype)
    return to_gate.to(gate_NI.dtype), to_up, active.mul_(up_NI).to(gate_NI.dtype)


def rotate_forward(q: torch.Tensor, k: torch.Tensor, cos_TD: torch.Tensor, sin_TD: torch.Tensor) -> Two:
    """q (T, heads, D) and k (T, key heads, D), the two halves of each head turned against each other."""
    cos, sin = cos_TD.float().unsqueeze(1), sin_TD.float().unsqueeze(1)
    return _turned(q, cos, sin), _turned(k, cos, sin)


def rotate_backward(q: torch.Tensor, k: torch.Tensor, cos_TD: torch.Tensor, sin_TD: torch.Tensor) -> Two:
    """From the upstream gradients of the turned q and k: the other way round."""
    cos, sin = cos_TD.float().unsqueeze(1), sin_TD.float().unsqueeze(1)
    back = -sin.roll(sin.shape[-1] // 2, -1)  # each half by the sine that it was sent to the other half with
    return _turned(q, cos, back), _turned(k, cos, back)


def _turned(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    half, wide = x.shape[-1] // 2, x.float()
    result = wide * cos
    result[..., :half].addcmul_(wide[..., half:], sin[..., :half], value=-1)
    result[..., half:].addcmul_(wide[..., :half], sin[..., half:])
    return result.to(x.dtype)


@dataclass(frozen=True)
class Kernels:
    """The functions above, as they are or compiled."""

    norm_forward: Callable[..., Two] = norm_forward
    norm_backward: Callable[..., torch.Tensor] = norm_backward
    swiglu_forward: Callable[..., torch.Tensor] = swiglu_forward
    swiglu_backward: Callable[..., Two] = swiglu_backward
    swiglu_backward_again: Callable[..., tuple[torch.Tensor, ...]] = swiglu_backward_again
    rotate_forward: Callable[..., Two] = rotate_forward
    rotate_backward: Callable[..., Two] = rotate_backward


PLAIN = Kernels()


@cache
def compiled(strict: bool = False) -> Kernels:
    """Each by PyTorch's compiler, at its first call for each number format and width; then for any number of rows.

    Where the compiler fails, as without a C++ compiler or Triton, the plain function does that kind's part, with a
    warning; `strict`: the call raises whatever the compiler raised.
    """
    return Kernels(**{name: _compiled(function, strict) for name, function in vars(PLAIN).items()})


def _compiled(function: Callable[..., Any], strict: bool) -> Callable[..., Any]:
    kernels: dict[tuple[object, ...], Callable[..., Any]] = {}

    def call(*arguments: Any) -> Any:
        if len(arguments[0]) < FEWEST_ROWS:
            return function(*arguments)
        kind = tuple(
            (each.dtype, each.device, each.shape[1:]) if isinstance(each, torch.Tensor) else each
            for each in arguments
        )
        if kind not in kernels:
            kernels[kind] = _compile_or_not(function, arguments, strict)
        return kernels[kind](*(_plainly_laid(each) for each in arguments))

    return call


def _compile_or_not(
    function: Callable[..., Any], arguments: Sequence[Any], strict: bool
) -> Callable[..., Any]:
    try:
        return _compile_for(function, arguments)
    except torch.OutOfMemoryError:  # not the compiler's fault; a later call may have room
        raise
    except Exception as error:  # whatever a compiler may raise
        if strict:
            raise
        what = f"PyTorch's compiler fails at {function.__name__} ({type(error).__name__}); it runs uncompiled"
        warnings.warn(what, RuntimeWarning, stacklevel=2)
        return function


def _compile_for(function: Callable[..., Any], arguments: Sequence[Any]) -> Callable[..., Any]:
    """For arguments of these kinds, with any number of rows. Of a copy of the function: at one code the compiler
    would make the second kind's kernel for widths of all sizes, so that it mattered which came first."""
    copy = FunctionType(function.__code__.replace(), function.__globals__, function.__name__)
    kernel: Callable[..., Any] = torch.compile(copy, fullgraph=True, options=kernel_settings())
    kernel(*map(_of_first_size, arguments))
    return kernel


KERNEL_SETTINGS: dict[str, Any] = {
    "deterministic": True,  # nothing that the numbers depend on is chosen by timing
    "batch_invariant": True,  # nor by how many rows there are
    "compile_threads": 1,  # in this process: a killed run leaves no others behind
}
"""Of PyTorch's compiler."""


def kernel_settings() -> dict[str, Any]:
    """Those that this version of the compiler knows."""
    from torch._inductor import list_options

    known = set(list_options())
    return {name: value for name, value in KERNEL_SETTINGS.items() if name in known}


def _of_first_size(argument: Any) -> Any:
    if not isinstance(argument, torch.Tensor) or argument.ndim < 2:
        return argument
    first = argument.new_zeros((FIRST_ROWS, *argument.shape[1:]))
    torch._dynamo.mark_dynamic(first, 0)
    return first


def _plainly_laid(argument: Any) -> Any:
    """As `_of_first_size` makes them. For another layout, or where a gradient is due, there would be another kernel."""
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
    ) -> Two:
        ctx.save_for_backward(cos_TD, sin_TD)
        ctx.kernels = kernels
        return kernels.rotate_forward(q, k, cos_TD, sin_TD)

    @staticmethod
    def backward(ctx: Any, q: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return *ctx.kernels.rotate_backward(q, k, *ctx.saved_tensors), None, None, None


def norm(x: torch.Tensor, gain_H: torch.Tensor, epsilon: float, kernels: Kernels = PLAIN) -> torch.Tensor:
    """x (..., H) -> (..., H); the gain is frozen."""
    flat = x.reshape(-1, x.shape[-1])
    # viewed out here: a view made inside could not be changed in place, as some models do
    return _Norm.apply(flat, gain_H.detach(), epsilon, kernels).view(x.shape)


def swiglu(gate: torch.Tensor, up: torch.Tensor, kernels: Kernels = PLAIN) -> torch.Tensor:
    """gate and up (..., I) -> (..., I)."""
    width = gate.shape[-1]
    return _Swiglu.apply(gate.reshape(-1, width), up.reshape(-1, width), kernels).view(gate.shape)


def rotate(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, kernels: Kernels = PLAIN
) -> Two:
    """q (1, heads, T, D), k (1, key heads, T, D), cos and sin (1, T, D) -> as q and k."""
    by_token = (each[0].transpose(0, 1) for each in (q, k))
    turned = _Rotate.apply(*by_token, cos[0], sin[0], kernels)
    first, second = (each.transpose(0, 1).unsqueeze(0) for each in turned)
    return first, second
