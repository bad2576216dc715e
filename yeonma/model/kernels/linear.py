"""Products with frozen weights, by PyTorch's fastest routine for the machine.

On the CPU, PyTorch computes float32 products with MKL, which uses AVX-512 only on Intel's processors. oneDNN, which
PyTorch includes as well, uses it on all (about twice as fast on a Zen 5 EPYC). The choice depends only on the machine
and the shapes, never on a measurement, so that equal runs give equal results.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, Protocol, TypeGuard

import torch
import torch.nn.functional as F
from torch import nn

MIN_ROWS = 16  # with fewer, as when generating single tokens, oneDNN is not faster
MAX_TRANSPOSED_ROWS = 64
"""MKL's products with 2 to 64 rows are up to twice as fast transposed: W @ x.T instead of x @ W.T."""

_is_decoding: ContextVar[bool] = ContextVar("is_decoding", default=False)

# oneDNN compiles a routine per shape, and PyTorch caches 1024 of them, 0.6 MB each. Nearly every micro-batch has its
# own token count and uses its 30 to 60 shapes in all layers, so older routines are rarely used again.
CACHED_ROUTINES = 256
for _name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):  # read at the first product
    os.environ.setdefault(_name, str(CACHED_ROUTINES))


@cache
def has_onednn() -> bool:
    """Whether this machine has AVX-512, and this PyTorch has the operator that its compiler uses for dense layers.

    The operator is private, so it is tried once. If it is missing or takes other arguments, `F.linear` is used.
    """
    if not torch.backends.mkldnn.is_available() or torch.backends.cpu.get_cpu_capability() != "AVX512":
        return False
    x = torch.ones(MIN_ROWS, MIN_ROWS, device="cpu")
    try:
        with torch.no_grad():
            return bool(torch.equal(_onednn_linear(x, x, None), F.linear(x, x)))
    except (AttributeError, RuntimeError, TypeError):
        return False


def _onednn_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    result: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return result


def product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x (N, K) @ weight (M, K) transposed + bias (M,) -> (N, M). Records no gradient."""
    if x.device.type == "cpu" and x.dtype == torch.float32:
        if len(x) >= MIN_ROWS and has_onednn():
            with torch.no_grad():
                return _onednn_linear(x, weight, bias)
        if _is_decoding.get() and 1 < len(x) <= MAX_TRANSPOSED_ROWS:
            return _transposed_linear(x, weight, bias)
    return F.linear(x, weight, bias)


def _transposed_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    result_MN = weight @ x.t() if bias is None else torch.addmm(bias[:, None], weight, x.t())
    return result_MN.t().contiguous()


@contextmanager
def decoding_products(model: nn.Module) -> Iterator[None]:
    """Within the block, this thread computes products with a few rows transposed, in all frozen dense layers.

    Only for decoding: the results differ from those of the other routines by rounding, and training must not depend on
    how few rows a micro-batch has.
    """
    layers = [layer for layer in model.modules() if is_frozen_linear(layer) and "forward" not in vars(layer)]
    for layer in layers:
        layer.forward = partial(frozen_forward, layer)  # type: ignore[method-assign]
    token = _is_decoding.set(True)
    try:
        yield
    finally:
        _is_decoding.reset(token)
        for layer in layers:
            del layer.forward


class Weight(Protocol):
    """A frozen weight W (M, K) in any storage format. The products record no gradient."""

    def product(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """x (N, K) @ W.T + bias (M,) -> (N, M)."""
        ...

    def input_gradient(self, upstream: torch.Tensor) -> torch.Tensor:
        """upstream (N, M) @ W -> (N, K)."""
        ...


@dataclass(frozen=True, eq=False)
class Dense:
    """A weight stored as a dense tensor."""

    weight_MK: torch.Tensor

    def product(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return product(x, self.weight_MK, bias)

    def input_gradient(self, upstream: torch.Tensor) -> torch.Tensor:
        return product(upstream, self.weight_MK.t())


def float32_product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """`product` with a float32 result. On CUDA, the float32 sums of half-precision products are not rounded; elsewhere
    the routine rounds them first."""
    if x.device.type != "cuda" or x.dtype not in (torch.bfloat16, torch.float16):
        return product(x, weight, bias).float()
    with torch.no_grad():
        result = torch.mm(x, weight.t(), out_dtype=torch.float32)
    return result if bias is None else result.add_(bias)


def frozen_linear(x: torch.Tensor, weight: Weight, bias: torch.Tensor | None) -> torch.Tensor:
    """`F.linear` for a frozen weight: x (..., K), weight (M, K) -> (..., M)."""
    flat = _FrozenLinear.apply(x.reshape(-1, x.shape[-1]), weight, bias)
    # the view is outside of the function, because some models modify the result in place
    return flat.view(*x.shape[:-1], -1)


def frozen_forward(layer: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    """`layer(x)` for a frozen dense layer. The weight is read at every call: sharded weights are gathered for it."""
    return frozen_linear(x, Dense(layer.weight), layer.bias)


class _FrozenLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: Weight, bias: torch.Tensor | None) -> torch.Tensor:
        ctx.weight = weight
        return weight.product(x, bias)

    @staticmethod
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return ctx.weight.input_gradient(upstream), None, None


def is_frozen_linear(layer: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether this is a plain float32 `nn.Linear` on the CPU without trained parameters. A sharded head is not: it has
    another class, and its result must not be a view."""
    return (
        type(layer) is nn.Linear
        and layer.weight.device.type == "cpu"
        and layer.weight.dtype == torch.float32
        and not any(parameter.requires_grad for parameter in layer.parameters())
    )
