"""Patch the modules of a model that compute just what `yeonma.model.kernels.elementwise` does, as a trial shows.

A trial runs the model's own code on the CPU, with a few small random numbers in place of the weights, so that it costs
nothing and tells the same of a model without weights. What differs, fails or takes other arguments keeps its own code.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from functools import cache, partial
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from yeonma.config.settings import Compiling
from yeonma.errors import Log, UserError, first_line
from yeonma.model.kernels.elementwise import FEWEST_ROWS, PLAIN, Kernels, compiled, norm, rotate, swiglu
from yeonma.model.kernels.lora import gated, takes_gated

ROTATION = "apply_rotary_pos_emb"
"""The function that transformers' attention modules turn queries and keys by."""
EPSILON = ("variance_epsilon", "eps")
"""What transformers' norms call it."""
MLP = ("gate_proj", "up_proj", "down_proj")
WIDTH = 16
ROWS = 5
TOLERANCE = 1e-5

ForwardFunction = Callable[..., Any]


def patch(model: nn.Module, kernels: Kernels = PLAIN) -> int:
    """Give every module that a trial allows the short forward; returns how many have it. Called again, it changes the
    kernels."""
    taken = 0
    for module in model.modules():
        if not _is_own(module.__dict__.get("forward")):
            continue
        for short in (_short_norm, _short_mlp, _short_attention):
            forward = short(module, kernels)
            if forward is not None:
                module.forward = forward
                taken += 1
                break
    return taken


def pick_kernels(asked: Compiling, device: torch.device, dtype: torch.dtype, say: Log) -> Kernels:
    """Compiled ones where asked for, and on CUDA by `auto`; tried with a few rows, forward and backward.

    `auto` does without where the compiler fails, and says so. Raises UserError where `true` cannot be had.
    """
    if asked is False or (asked == "auto" and device.type != "cuda"):
        return PLAIN
    try:
        _run_all(compiled(strict=True), device, dtype)
    except Exception as error:  # whatever a compiler may raise
        why = f"PyTorch's compiler fails here ({type(error).__name__}: {first_line(error)})"
        if asked == "auto":
            say(f"{why}; plain operations do its part")
            return PLAIN
        raise UserError(
            why, place="torch_compile", cure="use --torch_compile false, or install a C++ compiler"
        ) from error
    return compiled()


def _run_all(kernels: Kernels, device: torch.device, dtype: torch.dtype) -> None:
    x = torch.ones(FEWEST_ROWS, WIDTH, device=device, dtype=dtype, requires_grad=True)
    heads = x.view(1, 1, FEWEST_ROWS, WIDTH)
    q, k = rotate(heads, heads, heads[0], heads[0], kernels)
    (norm(swiglu(x, x, kernels), x[0], 1e-6, kernels) + q[0, 0] + k[0, 0]).sum().backward()


def _is_own(forward: object) -> bool:
    """Whether a module has its class's forward, or one of ours; hooks of others are left alone."""
    return forward is None or (isinstance(forward, partial) and forward.func in (_norm, _mlp, _attention))


def _short_norm(module: Any, kernels: Kernels) -> ForwardFunction | None:
    """For an RMSNorm with a frozen gain, which is the weight or one more than it."""
    weight = getattr(module, "weight", None)
    epsilon = next((getattr(module, name) for name in EPSILON if hasattr(module, name)), None)
    if not isinstance(weight, nn.Parameter) or weight.ndim != 1 or weight.requires_grad:
        return None
    if not isinstance(epsilon, float) or len(module._parameters) != 1 or module._modules:
        return None
    draw = torch.Generator().manual_seed(0)
    gain = torch.randn(len(weight), generator=draw)
    stand_in = _stand_in(module, parameters={"weight": nn.Parameter(gain, requires_grad=False)})
    # rows of about the epsilon's size, so that one added elsewhere shows
    sizes = torch.tensor([[1.0], [epsilon**0.5], [30.0]])
    x = torch.randn(3, len(weight), generator=draw) * sizes
    for more in (0.0, 1.0):
        if _agree(partial(type(module).forward, stand_in, x), partial(norm, x, gain + more, epsilon)):
            return partial(_norm, module, more, epsilon, kernels)
    return None


def _norm(module: Any, more: float, epsilon: float, kernels: Kernels, x: torch.Tensor) -> Any:
    weight = module.weight
    if weight.dtype != x.dtype or weight.requires_grad:
        return type(module).forward(module, x)
    return norm(x, weight.float() + more if more else weight, epsilon, kernels)


def _short_mlp(module: Any, kernels: Kernels) -> ForwardFunction | None:
    if not set(MLP) <= module._modules.keys() or module._parameters:
        return None
    draw = torch.Generator().manual_seed(0)
    # made without numbers: drawing them would move torch's random state
    layers = {name: nn.Linear(WIDTH, WIDTH, bias=False, device="meta") for name in MLP}
    for layer in layers.values():
        layer.weight = nn.Parameter(torch.randn(WIDTH, WIDTH, generator=draw))
    stand_in = _stand_in(module, modules={**module._modules, **layers})
    x = torch.randn(ROWS, WIDTH, generator=draw)
    gate, up, down = (layers[name] for name in MLP)
    same = _agree(partial(type(module).forward, stand_in, x), lambda: down(F.silu(gate(x)) * up(x)))
    return partial(_mlp, module, kernels) if same else None


def _mlp(module: Any, kernels: Kernels, x: torch.Tensor) -> Any:
    gate, up = module.gate_proj(x), module.up_proj(x)
    if takes_gated(module.down_proj):
        return gated(module.down_proj, gate, up, kernels)
    return module.down_proj(swiglu(gate, up, kernels))


def _short_attention(module: Any, kernels: Kernels) -> ForwardFunction | None:
    """The class's own forward, to which another function goes by the name of ROTATION."""
    forward = type(module).forward
    if not isinstance(forward, FunctionType) or ROTATION not in forward.__code__.co_names:
        return None
    original = forward.__globals__.get(ROTATION)
    if original is None or not _turns_halves(original):
        return None
    return partial(_attention, _with_rotation(forward, original, kernels), module)


def _attention(forward: ForwardFunction, module: Any, *arguments: Any, **more: Any) -> Any:
    return forward(module, *arguments, **more)


@cache
def _with_rotation(forward: FunctionType, original: ForwardFunction, kernels: Kernels) -> ForwardFunction:
    names = {**forward.__globals__, ROTATION: partial(_rotation, original, kernels)}
    copied = FunctionType(
        forward.__code__, names, forward.__name__, forward.__defaults__, forward.__closure__
    )
    copied.__kwdefaults__ = forward.__kwdefaults__
    return copied


def _rotation(
    original: ForwardFunction,
    kernels: Kernels,
    q: torch.Tensor,
    k: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    *rest: Any,
    **more: Any,
) -> Any:
    one = (1, *q.shape[2:])  # one sequence, all of each head turned
    if rest or more or len(q) != 1 or cos.shape != one or k.shape[2:] != one[1:] or cos.dtype != q.dtype:
        return original(q, k, cos, sin, *rest, **more)
    return rotate(q, k, cos, sin, kernels)


@cache
def _turns_halves(function: ForwardFunction) -> bool:
    draw = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, heads, ROWS, WIDTH, generator=draw) for heads in (4, 2))
    cos, sin = (torch.randn(1, ROWS, WIDTH, generator=draw) for _ in "cs")

    def joined(turned: Any) -> torch.Tensor:
        first, second = turned
        return torch.cat([first, second], dim=1)

    return _agree(lambda: joined(function(q, k, cos, sin)), lambda: joined(rotate(q, k, cos, sin)))


def _stand_in(
    module: nn.Module,
    parameters: Mapping[str, nn.Parameter] | None = None,
    modules: Mapping[str, nn.Module | None] | None = None,
) -> nn.Module:
    """A copy with others in place, in training, so that dropout shows."""
    made = copy.copy(module)
    made.__dict__.pop("forward", None)
    made.__dict__.update(_parameters=dict(parameters or {}), _modules=dict(modules or {}), training=True)
    return made


def _agree(theirs: Callable[[], Any], ours: Callable[[], torch.Tensor]) -> bool:
    try:
        with torch.no_grad():
            found, wanted = theirs(), ours()
    except Exception:  # whatever a model's code may raise, it means: not this
        return False
    if not isinstance(found, torch.Tensor) or found.shape != wanted.shape:
        return False
    return bool((found - wanted).abs().max() <= TOLERANCE * wanted.abs().max())
