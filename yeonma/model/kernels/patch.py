"""Patches a model's modules with the faster forwards of this package, and counts the patched modules.

A norm, MLP or attention module is patched if a trial shows that its own code computes the same as
`yeonma.model.kernels.elementwise`. The trial runs the module's code on the CPU, with a few random numbers instead of
its weights: it is cheap and works for a model without weights. A module that differs, fails or takes other arguments
keeps its own code.
"""

from __future__ import annotations

import copy
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache, partial
from inspect import signature
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.lora import LoraLayer
from peft.tuners.trainable_tokens import TrainableTokensLayer
from torch import nn

from yeonma.config.settings import TorchCompile
from yeonma.errors import Log, UserError, first_line
from yeonma.messages import later, tr
from yeonma.model.kernels.elementwise import MIN_ROWS, PLAIN, Kernels, compiled, norm, rotate, swiglu
from yeonma.model.kernels.last_layer import trim_last_layer, trim_where_equal
from yeonma.model.kernels.lora import gated_lora, patch_linear, supports_gated
from yeonma.model.kernels.new_rows import patch_trained_rows
from yeonma.model.logprobs import ForestSupport
from yeonma.model.sharding import own_class

ROTATION = "apply_rotary_pos_emb"
"""The function with which transformers' attention modules rotate queries and keys."""
EPSILON = ("variance_epsilon", "eps")
"""Names of the epsilon in transformers' norms."""
MLP = ("gate_proj", "up_proj", "down_proj")
WIDTH = 16
ROWS = 5
TOLERANCE = 1e-5

KINDS = ("RMSNorm", "SwiGLU", "rotary", "LoRA", later("trained rows"), "oneDNN", later("last layer"))
"""Kinds of modules, in the order of a report. Shown by `tr`."""

ForwardFunction = Callable[..., Any]


@dataclass(frozen=True)
class KernelCount:
    """Number of patched modules of a kind, and of modules that look as if they could be patched."""

    kind: str
    patched: int
    candidates: int

    def __str__(self) -> str:
        return f"{tr(self.kind)} {self.patched}/{self.candidates}"


@dataclass(frozen=True)
class KernelReport:
    """The result of `patch_kernels`: `RMSNorm 49/49, SwiGLU 24/24, rotary 24/24, LoRA 168/168, attention varlen`.

    A count below its total means that the model's code computes something else, or uses unknown names.
    """

    counts: tuple[KernelCount, ...]
    """Only kinds of which the model has candidates."""
    attention: tuple[str, ...]
    """The backends of the layers; empty if unknown."""
    is_compiled: bool
    """Whether norms, SwiGLU and rotary positions are compiled."""

    def __str__(self) -> str:
        parts = [str(count) for count in self.counts]
        layers = Counter(self.attention)
        if len(layers) == 1:
            parts.append(f"{tr('attention')} {self.attention[0]}")
        elif layers:
            parts += [
                f"{tr('attention')} {name} {count}/{len(self.attention)}" for name, count in layers.items()
            ]
        return ", ".join([*parts, tr("compiled by PyTorch")] if self.is_compiled else parts)


def patch_kernels(
    model: nn.Module,
    kernels: Kernels = PLAIN,
    *,
    support: ForestSupport | None = None,
    trim_last: bool = False,
) -> KernelReport:
    """Patch every module that passes its trial with a faster forward, and report the numbers.

    `model`: a transformers model with its LoRA layers. `support`: from `check_forest_support`, for the report and for
    `trim_last`. With `trim_last`, the last layer computes only the positions that are read (`last_layer.py`), if a
    trial succeeds; on the meta device there is no trial.
    """
    has_rotary = any("Rotary" in own_class(module).__name__ for module in model.modules())
    candidates = Counter(kind for module in model.modules() for kind in _kinds_of(module, has_rotary))
    patched = patch_linear(model) + patch_elementwise(model, kernels)
    patched["trained rows"] = patch_trained_rows(model)
    if trim_last and support is not None and support.forest:
        on_meta = next(model.parameters()).device.type == "meta"
        candidates["last layer"] = 1
        patched["last layer"] = int(trim_last_layer(model) if on_meta else trim_where_equal(model, support))
    totals = {kind: max(patched[kind], candidates[kind]) for kind in KINDS}
    counts = [KernelCount(kind, patched[kind], total) for kind, total in totals.items() if total]
    return KernelReport(tuple(counts), support.attention if support else (), kernels is not PLAIN)


def _kinds_of(module: nn.Module, has_rotary: bool) -> Iterator[str]:
    """The kinds that a module may be, by its class name and structure. Only a trial decides whether it is patched."""
    name, children = own_class(module).__name__, module._modules
    weights = [weight for weight in module._parameters.values() if weight is not None]
    if "norm" in name.lower() and "layernorm" not in name.lower() and not children:
        if len(weights) == 1 and weights[0].ndim == 1:
            yield "RMSNorm"
    gated = any("gate" in child for child in children) and any("down" in child for child in children)
    layers = [child for child in children.values() if child and next(child.parameters(), None) is not None]
    if gated or (re.search(r"MLP|FeedForward", name) and len(layers) == 3 and not weights):
        yield "SwiGLU"
    if name.endswith("Attention") and children and has_rotary:
        yield "rotary"
    if isinstance(module, LoraLayer):
        yield "LoRA"
    if isinstance(module, TrainableTokensLayer):
        yield "trained rows"


def patch_elementwise(model: nn.Module, kernels: Kernels = PLAIN) -> Counter[str]:
    """Patch every norm, MLP and attention module that passes its trial, and return their numbers by kind. A second call
    replaces the kernels."""
    patched: Counter[str] = Counter()
    for module in model.modules():
        if not _is_own(module.__dict__.get("forward")):
            continue
        for kind, faster in (
            ("RMSNorm", _faster_norm),
            ("SwiGLU", _faster_mlp),
            ("rotary", _faster_attention),
        ):
            forward = faster(module, kernels)
            if forward is not None:
                module.forward = forward
                patched[kind] += 1
                break
    return patched


def pick_kernels(torch_compile: TorchCompile, device: torch.device, dtype: torch.dtype, log: Log) -> Kernels:
    """The kernels for the setting: compiled for `true` and, on CUDA, for `auto`. They are tried once on a few rows,
    forward and backward.

    If the compiler fails, `auto` logs it and uses the plain functions; `true` raises UserError.
    """
    if torch_compile is False or (torch_compile == "auto" and device.type != "cuda"):
        return PLAIN
    try:
        _run_all(compiled(strict=True), device, dtype)
    except Exception as error:  # a compiler may raise anything
        problem = tr(
            "PyTorch's compiler fails here ({name}: {error})",
            name=type(error).__name__,
            error=first_line(error),
        )
        if torch_compile == "auto":
            log(tr("{problem}; norms, SwiGLU and rotary positions run uncompiled", problem=problem))
            return PLAIN
        raise UserError(
            problem, place="torch_compile", cure=tr("use --torch_compile false, or install a C++ compiler")
        ) from error
    return compiled()


def _run_all(kernels: Kernels, device: torch.device, dtype: torch.dtype) -> None:
    x = torch.ones(MIN_ROWS, WIDTH, device=device, dtype=dtype, requires_grad=True)
    heads = x.view(1, 1, MIN_ROWS, WIDTH)
    q, k = rotate(heads, heads, heads[0], heads[0], kernels)
    (norm(swiglu(x, x, kernels), x[0], 1e-6, kernels) + q[0, 0] + k[0, 0]).sum().backward()


def _is_own(forward: object) -> bool:
    """Whether a module has the forward of its class or one of ours. Forwards that other code has set are kept."""
    return forward is None or (isinstance(forward, partial) and forward.func in (_norm, _mlp, _attention))


def _faster_norm(module: Any, kernels: Kernels) -> ForwardFunction | None:
    """A faster forward for an RMSNorm with a frozen gain, which is `weight` or `1 + weight`; None for other modules."""
    weight = module._parameters.get("weight")
    epsilon = next((getattr(module, name) for name in EPSILON if hasattr(module, name)), None)
    if not isinstance(weight, nn.Parameter) or weight.ndim != 1 or weight.requires_grad:
        return None
    if not isinstance(epsilon, float) or len(module._parameters) != 1 or module._modules:
        return None
    if "gate" in signature(type(module).forward).parameters:  # without one it is as an ordinary norm
        return None
    random = torch.Generator().manual_seed(0)
    gain = torch.randn(len(weight), generator=random)
    stand_in = _stand_in(module, parameters={"weight": nn.Parameter(gain, requires_grad=False)})
    # one row is about as small as the epsilon, so that an epsilon added elsewhere shows
    sizes = torch.tensor([[1.0], [epsilon**0.5], [30.0]])
    x = torch.randn(3, len(weight), generator=random) * sizes
    for offset in (0.0, 1.0):
        if _agree(partial(type(module).forward, stand_in, x), partial(norm, x, gain + offset, epsilon)):
            return partial(_norm, module, offset, epsilon, kernels)
    return None


def _norm(module: Any, offset: float, epsilon: float, kernels: Kernels, x: torch.Tensor) -> Any:
    weight = module.weight
    if weight.dtype != x.dtype or weight.requires_grad:
        return type(module).forward(module, x)
    return norm(x, weight.float() + offset if offset else weight, epsilon, kernels)


def _faster_mlp(module: Any, kernels: Kernels) -> ForwardFunction | None:
    if not set(MLP) <= module._modules.keys() or module._parameters:
        return None
    random = torch.Generator().manual_seed(0)
    # on the meta device: initialising weights would advance PyTorch's random state
    layers = {name: nn.Linear(WIDTH, WIDTH, bias=False, device="meta") for name in MLP}
    for layer in layers.values():
        layer.weight = nn.Parameter(torch.randn(WIDTH, WIDTH, generator=random))
    stand_in = _stand_in(module, modules={**module._modules, **layers})
    x = torch.randn(ROWS, WIDTH, generator=random)
    gate, up, down = (layers[name] for name in MLP)
    is_swiglu = _agree(partial(type(module).forward, stand_in, x), lambda: down(F.silu(gate(x)) * up(x)))
    return partial(_mlp, module, kernels) if is_swiglu else None


def _mlp(module: Any, kernels: Kernels, x: torch.Tensor) -> Any:
    gate, up = module.gate_proj(x), module.up_proj(x)
    if supports_gated(module.down_proj):
        return gated_lora(module.down_proj, gate, up, kernels)
    return module.down_proj(swiglu(gate, up, kernels))


def _faster_attention(module: Any, kernels: Kernels) -> ForwardFunction | None:
    """The class's forward with our function in place of the one named ROTATION."""
    forward = type(module).forward
    if not isinstance(forward, FunctionType) or ROTATION not in forward.__code__.co_names:
        return None
    original = forward.__globals__.get(ROTATION)
    if original is None or not _rotates_halves(original):
        return None
    return partial(_attention, _with_rotation(forward, original, kernels), module)


def _attention(forward: ForwardFunction, module: Any, *arguments: Any, **keywords: Any) -> Any:
    return forward(module, *arguments, **keywords)


@cache
def _with_rotation(forward: FunctionType, original: ForwardFunction, kernels: Kernels) -> ForwardFunction:
    global_names = {**forward.__globals__, ROTATION: partial(_rotation, original, kernels)}
    copied = FunctionType(
        forward.__code__, global_names, forward.__name__, forward.__defaults__, forward.__closure__
    )
    copied.__kwdefaults__ = forward.__kwdefaults__
    return copied


def _rotation(original: ForwardFunction, kernels: Kernels, *args: Any, **keywords: Any) -> Any:
    """The rotation of (q, k, cos, sin) for one sequence whose heads are rotated in full; any other call goes to the
    `original`."""
    if len(args) != 4 or keywords:
        return original(*args, **keywords)
    q, k, cos, sin = args
    shape = (1, *q.shape[2:])
    is_plain = len(q) == 1 and cos.shape == shape and k.shape[2:] == shape[1:] and cos.dtype == q.dtype
    return rotate(q, k, cos, sin, kernels) if is_plain else original(q, k, cos, sin)


@cache
def _rotates_halves(function: ForwardFunction) -> bool:
    random = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, heads, ROWS, WIDTH, generator=random) for heads in (4, 2))
    cos, sin = (torch.randn(1, ROWS, WIDTH, generator=random) for _ in "cs")

    def joined(rotated: Any) -> torch.Tensor:
        rotated_q, rotated_k = rotated
        return torch.cat([rotated_q, rotated_k], dim=1)

    return _agree(lambda: joined(function(q, k, cos, sin)), lambda: joined(rotate(q, k, cos, sin)))


def _stand_in(
    module: nn.Module,
    parameters: Mapping[str, nn.Parameter] | None = None,
    modules: Mapping[str, nn.Module | None] | None = None,
) -> nn.Module:
    """A copy of the module with these parameters and children, in training mode, so that dropout shows."""
    stand_in = copy.copy(module)
    stand_in.__dict__.pop("forward", None)
    stand_in.__dict__.update(_parameters=dict(parameters or {}), _modules=dict(modules or {}), training=True)
    return stand_in


def _agree(theirs: Callable[[], Any], ours: Callable[[], torch.Tensor]) -> bool:
    try:
        with torch.no_grad():
            their_result, our_result = theirs(), ours()
    except Exception:  # a model's code may raise anything
        return False
    if not isinstance(their_result, torch.Tensor) or their_result.shape != our_result.shape:
        return False
    return bool((their_result - our_result).abs().max() <= TOLERANCE * our_result.abs().max())
