"""PEFT's LoRA layers with fewer passes over memory: the same mathematics, one autograd node a layer.

Only plain cases are taken over (a dense frozen `nn.Linear`, one active adapter, no DoRA, no bias, not merged);
every other layer keeps PEFT's own forward. Weights, names and saving stay PEFT's. Hu et al. 2021, arXiv:2106.09685.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.lora import Linear as LoraLinear
from torch import nn


def speed_up(model: nn.Module) -> int:
    """Give every plain LoRA layer of `model` the short forward. Returns how many layers took it."""
    taken = 0
    for layer in model.modules():
        if type(layer) is LoraLinear and _is_plain(layer):
            layer.forward = partial(_forward, layer, layer.forward)  # type: ignore[method-assign]
            taken += 1
    return taken


def _is_plain(layer: LoraLinear) -> bool:
    (adapter, *more) = layer.active_adapters
    return (
        not more
        and type(layer.get_base_layer()) is nn.Linear
        and not layer.lora_variant.get(adapter)
        and layer.lora_B[adapter].bias is None
        and not getattr(layer, "fan_in_fan_out", False)
    )


def _forward(layer: LoraLinear, peft_forward: Any, x: torch.Tensor, *args: Any, **keywords: Any) -> torch.Tensor:
    """x (..., H_in) -> (..., H_out). Adapters switched off or merged, and unknown arguments, are PEFT's business."""
    if layer.disable_adapters or layer.merged or args or keywords:
        return peft_forward(x, *args, **keywords)
    (adapter,) = layer.active_adapters
    base = layer.get_base_layer()
    down, up = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
    dropped = layer.lora_dropout[adapter](x)
    down, up = down.to(x.dtype), up.to(x.dtype)
    return _LoraLinear.apply(x, dropped, base.weight, base.bias, down, up, layer.scaling[adapter])


class _LoraLinear(torch.autograd.Function):
    """x @ W.T + b + s * (dropped @ A.T) @ B.T, where `dropped` is x itself without dropout."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        dropped: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        down: torch.Tensor,
        up: torch.Tensor,
        scale: float,
    ) -> torch.Tensor:
        same = dropped is x
        flat = dropped.reshape(-1, dropped.shape[-1])
        inner = flat @ down.t()
        result = F.linear(x.reshape(-1, x.shape[-1]), weight, bias)
        result.addmm_(inner, up.t(), alpha=scale)
        ctx.save_for_backward(flat, inner, weight, down, up)
        ctx.scale, ctx.same, ctx.shape = scale, same, x.shape
        return result.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        flat, inner, weight, down, up = ctx.saved_tensors
        upstream = upstream.reshape(-1, upstream.shape[-1])
        inner_gradient = torch.mm(upstream, up).mul_(ctx.scale)
        down_gradient = inner_gradient.t() @ flat
        up_gradient = (upstream.t() @ inner).mul_(ctx.scale)
        x_gradient = dropped_gradient = None
        if ctx.needs_input_grad[0]:
            x_gradient = upstream @ weight
            if ctx.same:
                x_gradient.addmm_(inner_gradient, down)
            x_gradient = x_gradient.view(ctx.shape)
        if ctx.needs_input_grad[1] and not ctx.same:
            dropped_gradient = (inner_gradient @ down).view(ctx.shape)
        return x_gradient, dropped_gradient, None, None, down_gradient, up_gradient, None
