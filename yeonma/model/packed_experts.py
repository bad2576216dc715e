"""Fused experts held in the 4 bits in which they are published (MXFP4), as of gpt-oss.

A layer's experts are unpacked for its forward pass and again for its backward pass, and forgotten after each: memory
holds the whole weights of one layer at a time. The backward pass computes the layer once more.

Shapes: E experts, M outputs, K inputs, G blocks of a row.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from yeonma.errors import UserError
from yeonma.messages import tr
from yeonma.model.reading_class import class_with
from yeonma.model.targets import PLACE, ROUTED, TargetLayer
from yeonma.model.whole_weights import PACKED_BYTES, unpack_mxfp4

NAMES = ("gate_up_proj", "down_proj")


@dataclass(frozen=True)
class PackedShape:
    """The shape (E, K, M) of the numbers in a packed weight, under the name that bitsandbytes has for it."""

    shape: torch.Size


def packing_class(model_class: Any) -> Any:
    """The class of a model whose experts have packed weights, for transformers to read them into."""
    return class_with(model_class, _replace_weights)


def pack_experts_on_meta(model: Any) -> None:
    """Gives a model on the meta device packed experts."""
    _replace_weights(model)
    hold_packed_experts(model)


def _experts(model: nn.Module) -> Iterator[Any]:
    for layer in model.modules():
        weights = [layer._parameters.get(name) for name in NAMES]
        if all(weight is not None and weight.ndim >= 3 for weight in weights):
            yield layer


def _replace_weights(model: nn.Module) -> None:
    for layer in _experts(model):
        for name in NAMES:
            weight = getattr(layer, name)
            experts, columns, rows = weight.shape
            shape = (experts, rows, columns // 32, PACKED_BYTES)
            packed = torch.empty(shape, dtype=torch.uint8, device=weight.device)
            setattr(layer, name, nn.Parameter(packed, requires_grad=False))


def hold_packed_experts(model: nn.Module) -> None:
    """Lets the experts compute with the packed weights that were read."""
    for layer in _experts(model):
        for name in NAMES:
            weight = getattr(layer, name)
            experts, rows, blocks, _ = weight.shape
            weight.quant_state = PackedShape(torch.Size((experts, blocks * 32, rows)))
        layer.forward = partial(_forward, layer)


def check_not_adapted(model: nn.Module, reached: Sequence[TargetLayer]) -> None:
    """Raises UserError if packed experts are to have adapters."""
    is_packed = any(hasattr(getattr(layer, NAMES[0]), "quant_state") for layer in _experts(model))
    path = next((layer.path for layer in reached if layer.part == ROUTED), None)
    if is_packed and path is not None:
        what = tr(
            "it reaches {path}, whose weights are held in 4 bits as they are published and take no adapter",
            path=path,
        )
        cure = tr("use --lora_experts false, or leave out --quantization, which holds the experts whole")
        raise UserError(what, place=PLACE, cure=cure)


def _forward(layer: Any, hidden: torch.Tensor, chosen: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
    result: torch.Tensor = _PackedExperts.apply(hidden, shares, chosen, layer)
    return result


def _computed(layer: Any, hidden: torch.Tensor, chosen: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
    """The layer's own forward, with whole weights in place of the packed ones."""
    packed = {name: layer._parameters[name] for name in NAMES}
    try:
        for name, weight in packed.items():
            layer._parameters[name] = unpack_mxfp4(weight[..., :-1], weight[..., -1], hidden.dtype)
        result: torch.Tensor = type(layer).forward(layer, hidden, chosen, shares)
        return result
    finally:
        layer._parameters.update(packed)


class _PackedExperts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, shares: torch.Tensor, chosen: torch.Tensor, layer: Any
    ) -> torch.Tensor:
        ctx.save_for_backward(hidden, shares, chosen)
        ctx.layer = layer
        return _computed(layer, hidden, chosen, shares)

    @staticmethod
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[Any, ...]:
        hidden, shares, chosen = ctx.saved_tensors
        with torch.enable_grad():
            inputs = [hidden.detach().requires_grad_(), shares.detach().requires_grad_()]
            result = _computed(ctx.layer, inputs[0], chosen, inputs[1])
        gradients = torch.autograd.grad(result, inputs, upstream)
        return (*gradients, None, None)
