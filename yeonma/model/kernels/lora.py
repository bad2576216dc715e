"""PEFT's LoRA layers with fewer passes over memory: the same mathematics, one autograd node a layer, or one for SwiGLU
and the layer behind it.

Only plain cases are taken over (a frozen `nn.Linear`, dense or quantised, one active adapter, no DoRA, no bias, not
merged); every other layer keeps PEFT's own forward. Weights, names and saving stay PEFT's. Hu et al. 2021,
arXiv:2106.09685.
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
from yeonma.model.kernels.linear import Dense, Weight, frozen_linear, has_onednn, is_frozen_linear, product
from yeonma.model.quantized import packed_weight


def patch_linear(model: nn.Module) -> Counter[str]:
    """Give every plain LoRA layer of `model` the short forward, and every frozen dense layer oneDNN's product where the
    machine has it.

    Returns how many did: `LoRA` and `oneDNN`.
    """
    patched: Counter[str] = Counter()
    for layer in model.modules():
        if isinstance(layer, LoraLayer) and _is_plain(layer):
            layer.forward = partial(_forward, layer, layer.forward)
            patched["LoRA"] += 1
        elif has_onednn() and is_frozen_linear(layer):
            layer.forward = partial(_frozen_forward, layer)  # type: ignore[method-assign]
            patched["oneDNN"] += 1
    return patched


def _frozen_forward(layer: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    return frozen_linear(
        x, Dense(layer.weight), layer.bias
    )  # as they are now: weights may be gathered and let go


def _is_plain(layer: Any) -> bool:
    """As the layer stands now: adapters may be added, switched and merged later."""
    if layer.disable_adapters or layer.merged or len(layer.active_adapters) != 1:
        return False
    (adapter,) = layer.active_adapters
    base = layer.get_base_layer()
    # around what bitsandbytes has made PEFT puts layers of other classes, which hold the same
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
    """x (..., H_in) -> (..., H_out). What is not plain, and unknown arguments, are PEFT's business."""
    if args or keywords or not _is_plain(layer):
        return peft_forward(x, *args, **keywords)
    (adapter,) = layer.active_adapters
    flat = x.reshape(-1, x.shape[-1])
    dropped = layer.lora_dropout[adapter](flat)
    result = _LoraLinear.apply(flat, dropped, *_parts(layer, x.dtype))
    # viewed out here: a view made inside could not be changed in place, as some models do
    return result.view(*x.shape[:-1], -1)


def _parts(
    layer: Any, dtype: torch.dtype
) -> tuple[Weight, torch.Tensor | None, torch.Tensor, torch.Tensor, float]:
    """Weight, bias, A, B and scale of a plain layer."""
    (adapter,) = layer.active_adapters
    base = layer.get_base_layer()
    down, up = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
    weight = packed_weight(base) or Dense(base.weight)
    return weight, base.bias, down.to(dtype), up.to(dtype), layer.scaling[adapter]


def takes_gated(layer: nn.Module) -> bool:
    """Whether `gated` may stand for the layer's call: with a plain LoRA layer, no dropout, and no hooks."""
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


def gated(layer: Any, gate: torch.Tensor, up: torch.Tensor, kernels: Kernels) -> torch.Tensor:
    """layer(silu(gate) * up) for gate and up (..., H_in) -> (..., H_out). Keeps gate and up for the backward, and not
    their product."""
    width = gate.shape[-1]
    flat = gate.reshape(-1, width), up.reshape(-1, width)
    result = _GatedLora.apply(*flat, *_parts(layer, gate.dtype), kernels)
    return result.view(*gate.shape[:-1], -1)


class _LoraLinear(torch.autograd.Function):
    """x @ W.T + b + s * (dropped @ A.T) @ B.T for x (N, H_in), where `dropped` is x itself without dropout."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        dropped: torch.Tensor,
        weight: Weight,
        bias: torch.Tensor | None,
        down: torch.Tensor,
        up: torch.Tensor,
        scale: float,
    ) -> torch.Tensor:
        inner = product(dropped, down)
        result = weight.product(x, bias)
        result.addmm_(inner, up.t(), alpha=scale)
        ctx.save_for_backward(dropped, inner, down, up)
        ctx.weight, ctx.scale, ctx.same = weight, scale, dropped is x
        return result

    @staticmethod
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        dropped, inner, down, up = ctx.saved_tensors
        inner_gradient = product(upstream, up.t()).mul_(ctx.scale)
        down_gradient, up_gradient = _adapter_gradients(inner_gradient, dropped, inner, upstream, ctx.scale)
        x_gradient = dropped_gradient = None
        if ctx.needs_input_grad[0]:
            x_gradient = ctx.weight.input_gradient(upstream)
            if ctx.same:
                x_gradient.addmm_(inner_gradient, down)
        if ctx.needs_input_grad[1] and not ctx.same:
            dropped_gradient = inner_gradient @ down
        return x_gradient, dropped_gradient, None, None, down_gradient, up_gradient, None


def _adapter_gradients(
    inner_gradient: torch.Tensor, x: torch.Tensor, inner: torch.Tensor, upstream: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of A (r, H_in) and B (H_out, r)."""
    to_down = product(inner_gradient.t(), x.t())
    return to_down, product(inner.t(), upstream.t()).t().mul(scale)


class _GatedLora(torch.autograd.Function):
    """x @ W.T + b + s * (x @ A.T) @ B.T for x = silu(gate) * up (N, H_in), made again for the backward."""

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
        inner = product(x, a)
        result = weight.product(x, bias)
        result.addmm_(inner, b.t(), alpha=scale)
        ctx.save_for_backward(gate, up, inner, a, b)
        ctx.weight, ctx.scale, ctx.kernels = weight, scale, kernels
        return result

    @staticmethod
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        gate, up, inner, a, b = ctx.saved_tensors
        inner_gradient = product(upstream, b.t()).mul_(ctx.scale)
        x_gradient = ctx.weight.input_gradient(upstream).addmm_(inner_gradient, a)
        to_gate, to_up, x = ctx.kernels.swiglu_backward_again(x_gradient, gate, up)
        to_a, to_b = _adapter_gradients(inner_gradient, x, inner, upstream, ctx.scale)
        return to_gate, to_up, None, None, to_a, to_b, None, None
