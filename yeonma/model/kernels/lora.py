"""PEFT's LoRA layers with fewer passes over memory: the same mathematics in one autograd node per layer, or in one for
SwiGLU and the layer after it.

Only plain layers are patched (a frozen `nn.Linear`, dense or quantised, one active adapter, no DoRA, no LoRA bias, not
merged). Other layers keep PEFT's forward. Weights, names and saving remain PEFT's. Hu et al. 2021, arXiv:2106.09685.
"""

from __future__ import annotations

from collections import Counter
from functools import partial
from typing import Any

import torch
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora import LoraLayer
from torch import nn

from yeonma.model.kernels.elementwise import Kernels
from yeonma.model.kernels.linear import Dense, Weight, frozen_forward, has_onednn, is_frozen_linear, product
from yeonma.model.quantized import packed_weight


def patch_linear(model: nn.Module) -> Counter[str]:
    """Patch the forward of every plain LoRA layer and, if the machine has oneDNN's product, of every frozen dense
    layer.

    Returns their numbers as `LoRA` and `oneDNN`.
    """
    patched: Counter[str] = Counter()
    for layer in model.modules():
        if isinstance(layer, LoraLayer) and _is_plain(layer):
            layer.forward = partial(_forward, layer, layer.forward)
            patched["LoRA"] += 1
        elif has_onednn() and is_frozen_linear(layer):
            layer.forward = partial(frozen_forward, layer)  # type: ignore[method-assign]
            patched["oneDNN"] += 1
    return patched


def _is_plain(layer: Any) -> bool:
    """Checked at every call, because adapters may be added, switched and merged later."""
    if layer.disable_adapters or layer.merged or len(layer.active_adapters) != 1:
        return False
    (adapter,) = layer.active_adapters
    base = layer.get_base_layer()
    # for bitsandbytes' layers, PEFT has other LoRA classes with the same attributes
    dense = type(layer) is LoraLinear and type(base) is nn.Linear
    return (
        adapter in layer.lora_A
        and (dense or packed_weight(base) is not None)
        and not base.weight.requires_grad
        and (base.bias is None or not base.bias.requires_grad)
        and adapter not in layer.lora_variant
        and layer.lora_B[adapter].bias is None
        and not layer.fan_in_fan_out
    )


def _forward(layer: Any, peft_forward: Any, x: torch.Tensor, *args: Any, **keywords: Any) -> torch.Tensor:
    """x (..., H_in) -> (..., H_out). Calls of other layers or with more arguments go to PEFT."""
    if args or keywords or not _is_plain(layer):
        return peft_forward(x, *args, **keywords)
    (adapter,) = layer.active_adapters
    flat = x.reshape(-1, x.shape[-1])
    dropped = layer.lora_dropout[adapter](flat)
    result = _LoraLinear.apply(flat, dropped, *_parts(layer, x.dtype))
    # the view is outside of the function, because some models modify the result in place
    return result.view(*x.shape[:-1], -1)


def _parts(
    layer: Any, dtype: torch.dtype
) -> tuple[Weight, torch.Tensor | None, torch.Tensor, torch.Tensor, float]:
    """Weight, bias, A, B and scale of a plain layer."""
    (adapter,) = layer.active_adapters
    base = layer.get_base_layer()
    a, b = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
    weight = packed_weight(base) or Dense(base.weight)
    return weight, base.bias, a.to(dtype), b.to(dtype), layer.scaling[adapter]


def supports_gated(layer: nn.Module) -> bool:
    """Whether `gated_lora` may replace a call of this layer: a plain LoRA layer without dropout and hooks."""
    if (
        not isinstance(layer, LoraLayer)
        or layer._forward_hooks
        or layer._forward_pre_hooks
        or not _is_plain(layer)
    ):
        return False
    (adapter,) = layer.active_adapters
    dropout = layer.lora_dropout[adapter]
    return isinstance(dropout, nn.Identity) or not dropout.training or bool(dropout.p == 0)


def gated_lora(layer: Any, gate: torch.Tensor, up: torch.Tensor, kernels: Kernels) -> torch.Tensor:
    """layer(silu(gate) * up) for gate and up (..., H_in) -> (..., H_out). Saves gate and up for the backward pass, but
    not their product."""
    width = gate.shape[-1]
    result = _GatedLora.apply(
        gate.reshape(-1, width), up.reshape(-1, width), *_parts(layer, gate.dtype), kernels
    )
    return result.view(*gate.shape[:-1], -1)


class _LoraLinear(torch.autograd.Function):
    """x @ W.T + b + s * (dropped @ A.T) @ B.T for x (N, H_in). Without dropout, `dropped` is x."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        dropped: torch.Tensor,
        weight: Weight,
        bias: torch.Tensor | None,
        a: torch.Tensor,
        b: torch.Tensor,
        scale: float,
    ) -> torch.Tensor:
        low_rank = product(dropped, a)
        result = weight.product(x, bias)
        result.addmm_(low_rank, b.t(), alpha=scale)
        ctx.save_for_backward(dropped, low_rank, a, b)
        ctx.weight, ctx.scale, ctx.has_no_dropout = weight, scale, dropped is x
        return result

    @staticmethod
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        dropped, low_rank, a, b = ctx.saved_tensors
        low_rank_gradient = product(upstream, b.t()).mul_(ctx.scale)
        to_a, to_b = _adapter_gradients(low_rank_gradient, dropped, low_rank, upstream, ctx.scale)
        to_x = to_dropped = None
        if ctx.needs_input_grad[0]:
            to_x = ctx.weight.input_gradient(upstream)
            if ctx.has_no_dropout:
                to_x.addmm_(low_rank_gradient, a)
        if ctx.needs_input_grad[1] and not ctx.has_no_dropout:
            to_dropped = low_rank_gradient @ a
        return to_x, to_dropped, None, None, to_a, to_b, None


def _adapter_gradients(
    low_rank_gradient: torch.Tensor,
    x: torch.Tensor,
    low_rank: torch.Tensor,
    upstream: torch.Tensor,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients of A (r, H_in) and B (H_out, r)."""
    to_a = product(low_rank_gradient.t(), x.t())
    return to_a, product(low_rank.t(), upstream.t()).t().mul(scale)


class _GatedLora(torch.autograd.Function):
    """x @ W.T + b + s * (x @ A.T) @ B.T for x = silu(gate) * up (N, H_in), which the backward pass recomputes."""

    @staticmethod
    def forward(
        ctx: Any,
        gate: torch.Tensor,
        up: torch.Tensor,
        weight: Weight,
        bias: torch.Tensor | None,
        a: torch.Tensor,
        b: torch.Tensor,
        scale: float,
        kernels: Kernels,
    ) -> torch.Tensor:
        x = kernels.swiglu_forward(gate, up)
        low_rank = product(x, a)
        result = weight.product(x, bias)
        result.addmm_(low_rank, b.t(), alpha=scale)
        ctx.save_for_backward(gate, up, low_rank, a, b)
        ctx.weight, ctx.scale, ctx.kernels = weight, scale, kernels
        return result

    @staticmethod
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        gate, up, low_rank, a, b = ctx.saved_tensors
        low_rank_gradient = product(upstream, b.t()).mul_(ctx.scale)
        x_gradient = ctx.weight.input_gradient(upstream).addmm_(low_rank_gradient, a)
        to_gate, to_up, x = ctx.kernels.swiglu_backward_recomputing(x_gradient, gate, up)
        to_a, to_b = _adapter_gradients(low_rank_gradient, x, low_rank, upstream, ctx.scale)
        return to_gate, to_up, None, None, to_a, to_b, None, None
