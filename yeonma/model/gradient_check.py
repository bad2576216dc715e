"""Checks at loading that gradients pass through the frozen layers of a base, for each kind of layer in it.

LoRA trains the layers below a frozen one by the gradient of its input. A quantised layer, or code that comes with a
model, may compute a product well and its gradient wrongly, or not at all: training then goes on with wrong numbers.

A layer is linear but for its bias: z = W x, y = z + b. With the upstream gradient z, the gradient of x is W'z, so that
its product with x is z.z, whatever format W is stored in. Fused experts are not linear: there the loss is computed
again a little further along the gradient, which must raise it as much as the gradient says.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection, Iterator, Set
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from yeonma.errors import UserError
from yeonma.messages import tr
from yeonma.model.quantized import Fp8Weight, packed_weight

ROWS = 4
STEPS = (0.1, 1e-2, 1e-3)
"""How far along the gradient the loss is computed again, as a fraction of the input. One that agrees is enough: a long
step may cross a bend, and a short one drowns in rounding."""
TOLERANCE = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 5e-2}
"""Of a linear layer's z.z, as a fraction of the largest that such numbers could have."""
ROUNDED_TOLERANCE = 0.15
"""Where activations and gradients are rounded to 8 bits."""
EXPERTS_TOLERANCE = 0.3
WRONG = tr("gives a gradient that is not that of its product")


def check_input_gradients(model: nn.Module, name: str, within: Collection[nn.Module] | None = None) -> None:
    """Sends a few random rows forward and backward through one frozen layer of each kind and shape. `within`: those
    to choose from, by default all of the model.

    Raises UserError, naming the layer, if the gradient of its input is missing or is not that of its output.
    """
    draw = torch.Generator().manual_seed(0)
    for path, layer in _one_of_each_kind(model, set(model.modules() if within is None else within)):
        problem = _problem_of_experts(layer, draw) if _is_experts(layer) else _problem(layer, draw)
        if problem:
            weight = packed_weight(layer)
            kind = type(layer).__name__
            if weight is not None:
                kind = tr("{kind}, weights as {weights}", kind=kind, weights=type(weight).__name__)
            what = tr(
                "{path} ({kind}) {problem}, so that LoRA would train on wrong gradients",
                path=path,
                kind=kind,
                problem=problem,
            )
            raise UserError(what, place=name, cure=tr("give the unquantised model, and --quantization nf4"))


def _one_of_each_kind(model: nn.Module, within: Set[nn.Module]) -> Iterator[tuple[str, nn.Module]]:
    seen = set()
    for path, layer in model.named_modules():
        weight = next(iter(layer.parameters(recurse=False)), None) if layer in within else None
        if weight is None or not (_is_linear(layer) or _is_experts(layer)):
            continue
        kind = (type(layer), type(packed_weight(layer)), weight.dtype, tuple(weight.shape))
        if kind not in seen and not weight.requires_grad:
            seen.add(kind)
            yield path, layer


def _is_linear(layer: nn.Module) -> bool:
    """Whether it multiplies its one input by a weight, in any storage format, as its attributes say."""
    return isinstance(layer, Conv1D) or (hasattr(layer, "in_features") and hasattr(layer, "out_features"))


def _is_experts(layer: nn.Module) -> bool:
    """Whether it holds the weights of several experts and is called with those that a router chose."""
    weights = list(layer.parameters(recurse=False))
    if not any(weight.ndim >= 3 for weight in weights):
        return False
    names = list(inspect.signature(type(layer).forward).parameters)
    return len(names) == 4 and names[1] == "hidden_states"  # then the experts of each row, and their shares


def _inputs(layer: Any) -> int:
    if isinstance(layer, Conv1D):
        return int(layer.weight.shape[0])
    return int(layer.in_features)


def _device_and_dtype(layer: nn.Module, model_dtype: torch.dtype | None) -> tuple[torch.device, torch.dtype]:
    weights = list(layer.parameters(recurse=False))
    numbers = [
        weight.dtype
        for weight in weights
        if weight.is_floating_point() and weight.element_size() > 1 and not hasattr(weight, "quant_state")
    ]
    return weights[0].device, numbers[0] if numbers else model_dtype or torch.float32


def _problem(layer: Any, draw: torch.Generator) -> str:
    """What is wrong with a linear layer's gradient, in words; empty if nothing is."""
    bias = getattr(layer, "bias", None)
    device, dtype = _device_and_dtype(layer, None if bias is None else bias.dtype)
    x = torch.randn(ROWS, _inputs(layer), generator=draw).to(device, dtype).requires_grad_()
    try:
        y = layer(x)
    except Exception:  # of code that comes with a model: it is called in another way
        return ""
    if not isinstance(y, torch.Tensor) or y.shape[0] != ROWS:
        return ""
    linear = y.detach() - bias if bias is not None else y.detach()
    if not _goes_back(y, linear) or x.grad is None:
        return tr("gives no gradient")
    gradient, rows = x.grad.float(), x.detach().float()
    by_input, by_output = (gradient * rows).sum(1), linear.float().square().sum(1)
    largest = gradient.norm(dim=1) * rows.norm(dim=1) + by_output  # a sum of one number may be all rounding
    rounded = isinstance(packed_weight(layer), Fp8Weight)
    tolerance = ROUNDED_TOLERANCE if rounded else TOLERANCE.get(dtype, 0.1)
    return "" if bool(((by_output - by_input).abs() <= tolerance * largest + 1e-12).all()) else WRONG


def _goes_back(y: torch.Tensor, upstream: torch.Tensor) -> bool:
    """Whether a backward pass from `y` is possible; runs it."""
    if not y.requires_grad:
        return False
    try:
        y.backward(upstream)
    except (RuntimeError, NotImplementedError):
        return False
    return True


def _problem_of_experts(layer: Any, draw: torch.Generator) -> str:
    """The same of fused experts, for rows that go to the first experts with equal weights."""
    hidden = getattr(layer, "hidden_size", None) or getattr(layer, "hidden_dim", None)
    if not isinstance(hidden, int):
        return ""
    device, dtype = _device_and_dtype(layer, None)
    x = torch.randn(ROWS, hidden, generator=draw).to(device, dtype).requires_grad_()
    experts = next(weight.shape[0] for weight in layer.parameters(recurse=False) if weight.ndim >= 3)
    chosen = torch.arange(ROWS, device=device).remainder(experts).unsqueeze(1)
    weights = torch.ones(ROWS, 1, device=device, dtype=dtype)

    def output(rows: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = layer(rows, chosen, weights)
        return result.float()

    try:
        y = output(x)
    except Exception:  # of code that comes with a model: they are called in another way
        return ""
    upstream = torch.randn(y.shape, generator=draw).to(device)
    if not _goes_back(y, upstream) or x.grad is None:
        return tr("give no gradient")
    gradient, rows = x.grad.float(), x.detach()
    for fraction in STEPS:
        step = fraction * rows.float().norm() / gradient.norm().clamp(min=1e-30)
        with torch.no_grad():
            sides = [(output(rows + (sign * step * gradient).to(dtype)) * upstream).sum() for sign in (1, -1)]
        rise, expected = sides[0] - sides[1], 2 * step * gradient.square().sum()
        if bool((rise - expected).abs() <= EXPERTS_TOLERANCE * expected + 1e-12):
            return ""
    return WRONG
