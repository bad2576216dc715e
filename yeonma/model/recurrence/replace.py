"""Puts this package's functions into the modules of transformers' recurrent models.

Their layers call a convolution and a rule by name, and hand the forward's keywords on to both. A function of ours in
the place of one of these computes a forest if it finds one among its keywords, and otherwise calls what was there. So
nothing changes for a model that is used in the ordinary way, and no layer is rewritten. Whether a model's functions
mean what ours do is decided by the trial in `yeonma.model.forest_support`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from yeonma.model.recurrence.layout import RecurrentPass
from yeonma.model.recurrence.pieces import Pieces
from yeonma.model.recurrence.rules import delta_rule, mamba2_scan
from yeonma.model.sharding import own_class

OnRecurrence = Callable[[], None]
"""Called by every convolution and rule, for the check at loading."""
_MARK = "computes_forests"


def let_recurrences_take_forests(model: nn.Module) -> None:
    """Put our functions into the Python modules of a model's layers, where they have functions of these names. What is
    called without a forest is what was there."""
    for name in dict.fromkeys(own_class(module).__module__ for module in model.modules()):
        python_module = sys.modules.get(name)
        for function_name, replacement in _REPLACEMENTS.items():
            original = getattr(python_module, function_name, None)
            if callable(original) and not hasattr(original, _MARK):
                setattr(python_module, function_name, _for_forests(original, replacement))


def _for_forests(original: Callable[..., Any], replacement: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(original)
    def function(*args: Any, **keywords: Any) -> Any:
        forest = keywords.get("forest", keywords.get("forest_cache"))
        if forest is None:
            return original(*args, **keywords)
        if (on_recurrence := keywords.get("on_recurrence")) is not None:
            on_recurrence()
        return replacement(forest.recurrence, *args, **keywords)

    setattr(function, _MARK, True)
    return function


def _convolution(
    segments: RecurrentPass,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    activation: str | None = None,
    **_: Any,
) -> torch.Tensor:
    return segments.convolve(x, weight, bias, activation)


def _delta_rule(
    segments: RecurrentPass,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    g: torch.Tensor,
    beta: torch.Tensor,
    use_qk_l2norm_in_kernel: bool = False,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    def compute(tokens: slice, pieces: Pieces, initial: torch.Tensor | None) -> Any:
        q, k, v, decay, strength = (x[:, tokens] for x in (query, key, value, g, beta))
        return delta_rule(q, k, v, decay, strength, pieces, initial, normed=use_qk_l2norm_in_kernel)

    return segments.recur(compute, query.shape[1], query.device), None


def _mamba2(
    segments: RecurrentPass,
    x: torch.Tensor,
    dt: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    c: torch.Tensor,
    *,
    D: torch.Tensor | None = None,
    dt_bias: torch.Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    z: torch.Tensor | None = None,
    **_: Any,
) -> torch.Tensor:
    if z is not None:
        raise ValueError("the scan has a gate")
    if dt_bias is not None:
        dt = dt + dt_bias.to(dt.dtype)
    step = (F.softplus(dt) if dt_softplus else dt).clamp(*dt_limit)

    def compute(tokens: slice, pieces: Pieces, initial: torch.Tensor | None) -> Any:
        return mamba2_scan(x[:, tokens], step[:, tokens], a, b[:, tokens], c[:, tokens], D, pieces, initial)

    return segments.recur(compute, x.shape[1], x.device)


def _no_fused_layer(segments: RecurrentPass, *_: Any, **__: Any) -> None:
    """Mamba2's whole layer in one kernel, which transformers uses where it does not give None."""
    return None


_REPLACEMENTS: dict[str, Callable[..., Any]] = {
    "causal_conv1d_fn": _convolution,
    "torch_chunk_gated_delta_rule": _delta_rule,
    "chunk_kimi_delta_attention": _delta_rule,
    "mamba2_chunk_scan": _mamba2,
    "mamba2_split_conv1d_scan_combined": _no_fused_layer,
}
