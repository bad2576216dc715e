"""Products with frozen weights, by the fastest routine that PyTorch brings for the machine.

PyTorch gives float32 products on the CPU to MKL, which leaves AVX-512 unused on processors that are not Intel's;
oneDNN, which PyTorch brings too, uses it everywhere (about twice as fast on a Zen 5 EPYC). Which routine is taken
depends on the machine and the shapes alone, never on a measurement: equal runs stay equal.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol, TypeGuard

import torch
import torch.nn.functional as F
from torch import nn

FEWEST_ROWS = 16  # below, as when single tokens are generated, there is nothing to gain

# oneDNN makes a routine for every shape and PyTorch keeps 1024 of them, 0.6 MB each. Nearly every micro-batch has a
# token count of its own and uses its 30 to 60 shapes in all layers: what is kept longer than that is seldom used again.
KEPT_ROUTINES = 256
for _name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):  # read at the first product
    os.environ.setdefault(_name, str(KEPT_ROUTINES))


@cache
def has_onednn() -> bool:
    """Whether this machine has AVX-512 and this PyTorch the operator that its compiler uses for dense layers.

    The operator is private: it is tried once, and where it is gone or takes other arguments `F.linear` does its part.
    """
    if not torch.backends.mkldnn.is_available() or torch.backends.cpu.get_cpu_capability() != "AVX512":
        return False
    x = torch.ones(FEWEST_ROWS, FEWEST_ROWS, device="cpu")
    try:
        with torch.no_grad():
            return bool(torch.equal(_onednn_linear(x, x, None), F.linear(x, x)))
    except (AttributeError, RuntimeError, TypeError):
        return False


def _onednn_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    result: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return result


def product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x (N, K) @ weight (M, K) transposed + bias (M,) -> (N, M); records no gradient."""
    if x.device.type == "cpu" and x.dtype == torch.float32 and len(x) >= FEWEST_ROWS and has_onednn():
        with torch.no_grad():
            return _onednn_linear(x, weight, bias)
    return F.linear(x, weight, bias)


class Weight(Protocol):
    """A weight W (M, K) that is not trained, in whatever form it is held. Neither product records a gradient."""

    def product(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """x (N, K) @ W.T + bias (M,) -> (N, M)."""
        ...

    def input_gradient(self, upstream: torch.Tensor) -> torch.Tensor:
        """upstream (N, M) @ W -> (N, K)."""
        ...


@dataclass(frozen=True, eq=False)
class Dense:
    """A weight as it is."""

    weight_MK: torch.Tensor

    def product(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return product(x, self.weight_MK, bias)

    def input_gradient(self, upstream: torch.Tensor) -> torch.Tensor:
        return product(upstream, self.weight_MK.t())


def float32_product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """As `product`, in float32. On CUDA the sums over half-precision products stay as they are, which are of float32;
    elsewhere the routine has rounded them."""
    if x.device.type != "cuda" or x.dtype not in (torch.bfloat16, torch.float16):
        return product(x, weight, bias).float()
    with torch.no_grad():
        result = torch.mm(x, weight.t(), out_dtype=torch.float32)
    return result if bias is None else result.add_(bias)


def frozen_linear(x: torch.Tensor, weight: Weight, bias: torch.Tensor | None) -> torch.Tensor:
    """`F.linear` for a weight that is not trained: x (..., K), weight (M, K) -> (..., M)."""
    flat = _FrozenLinear.apply(x.reshape(-1, x.shape[-1]), weight, bias)
    # viewed out here: a view made inside could not be changed in place, as some models do
    return flat.view(*x.shape[:-1], -1)


class _FrozenLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: Weight, bias: torch.Tensor | None) -> torch.Tensor:
        ctx.weight = weight
        return weight.product(x, bias)

    @staticmethod
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return ctx.weight.input_gradient(upstream), None, None


def is_frozen_linear(layer: nn.Module) -> TypeGuard[nn.Linear]:
    """A plain dense layer in float32 on the CPU, none of whose parameters is trained; not a head that is sharded by
    itself, whose result must be no view."""
    return (
        type(layer) is nn.Linear
        and layer.weight.device.type == "cpu"
        and layer.weight.dtype == torch.float32
        and not any(parameter.requires_grad for parameter in layer.parameters())
    )
