"""All weights of a model as trained parameters (full fine-tuning), and their float32 copies where the model computes in
bfloat16.

In bfloat16 an update of less than 1/256 of a weight is lost, and so are small gradients in a sum of large ones. So the
optimizer updates a float32 copy of each weight, and the model gets it rounded (Micikevicius et al. 2018,
arXiv:1710.03740). The gradient of each weight is added to a float32 sum as soon as the backward pass has it, so that
the model never holds more than a layer's gradients in bfloat16.

Bytes per parameter: weight, copy, gradient and AdamW's two averages have 4 + 0 + 4 + 8 in float32, 2 + 4 + 4 + 8 in
bfloat16. With an 8-bit optimizer the averages have 2.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

from yeonma.messages import tr
from yeonma.model.sharding import like

Parameters = Mapping[str, nn.Parameter]


def trained_weights(model: nn.Module) -> tuple[Parameters, Parameters]:
    """(what the optimizer updates, the model's weights that are rounded from it), by the names in the model. The second
    is empty if the model's own weights are updated, which is so in float32.

    All weights of the model must require a gradient. Tied weights stand once, under their first name.
    """
    weights = dict(model.named_parameters())
    if all(weight.dtype == torch.float32 for weight in weights.values()):
        return weights, {}
    copies: dict[str, nn.Parameter] = {}
    for name, weight in weights.items():
        copies[name] = nn.Parameter(weight.detach().float())
        weight.register_post_accumulate_grad_hook(partial(_add_gradient, copies[name]))
    return copies, weights


def decay_groups(trained: Parameters, weight_decay: float) -> list[dict[str, Any]]:
    """The groups of an optimizer: matrices have weight decay, biases and the gains of norms have none."""
    matrices = [weight for weight in trained.values() if weight.ndim > 1]
    others = [weight for weight in trained.values() if weight.ndim < 2]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def _add_gradient(copy: nn.Parameter, weight: torch.Tensor) -> None:
    """Moves a weight's gradient to the sum in float32."""
    gradient, weight.grad = weight.grad, None
    if gradient is None:
        return
    if copy.grad is None:
        copy.grad = gradient.float()
    else:
        copy.grad += gradient


def round_weights(copies: Parameters, weights: Parameters) -> None:
    """Gives the model its weights, rounded from their float32 copies."""
    with torch.no_grad():
        for name, weight in weights.items():
            weight.copy_(copies[name])


def load_trained(trained: Parameters, rounded: Parameters, model: Any) -> None:
    """Takes the weights over from another model of the same class, in float32. Raises KeyError or RuntimeError if
    its own do not fit."""
    weights = dict(model.named_parameters())
    with torch.no_grad():
        for name, weight in trained.items():
            if weights[name].shape != weight.shape:
                raise RuntimeError(
                    tr("{name} has the shape {shape}", name=name, shape=tuple(weights[name].shape))
                )
            weight.copy_(like(weights[name], weight))
    round_weights(trained, rounded)
