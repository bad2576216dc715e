"""The last decoder layer computes what is read, no more: behind its attention tokens no longer mix, and of the final
hidden states only those are used that a trained token is predicted from.

Its output projection and its MLP run at these positions; at all others their results are zeros, which nobody reads.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from yeonma.batch.forest import lay_out
from yeonma.model.forest_support import in_eval_mode, tiny_sequences
from yeonma.model.logprobs import READ, ForestSupport, trained_logprobs
from yeonma.model.quantized import is_rounded
from yeonma.model.sharding import recover

PARTS = ("self_attn", "self_attn.o_proj", "mlp")
"""Of transformers' decoder layers: what learns which positions are read, and the large layers behind the mixing."""
TRAINED = (2, 4)  # tokens at the end of each sequence of the trials
TOLERANCE, ROUNDED_TOLERANCE = 1e-4, 0.05
"""Of the mean difference of log-probabilities. Products of other sizes round otherwise; mixed rows differ by units."""


def trim_last_layer(model: Any) -> bool:
    """Have the last layer leave out what is not read, wherever a forward pass says what is (READ).

    False for models that have no such layer, or trim it already.
    """
    layers = getattr(model.get_decoder(), "layers", None)
    if not isinstance(layers, nn.ModuleList) or not len(layers):
        return False
    attention, *behind = parts = [_part_of(layers[-1], name) for name in PARTS]
    if None in parts or _is_trimmed(attention):
        return False
    read: list[torch.Tensor] = []  # from the attention on
    attention.forward = partial(_attention, attention.forward, read)
    for part in behind:
        part.forward = partial(_at_what_is_read, part.forward, read)
    return True


def trim_where_equal(model: Any, support: ForestSupport) -> bool:
    """The same, where a few log-probabilities are those of the whole layer."""
    if not support.forest or not trim_last_layer(model):
        return False
    ids = tiny_sequences(model.config.get_text_config().vocab_size, 0)

    def look(last: int, **what: Any) -> torch.Tensor:
        forest = lay_out(ids, [np.arange(len(each)) >= len(each) - last for each in ids])
        return trained_logprobs(model, forest, support.head, support.capability, **what)

    exact = model.dtype == torch.float32 and not is_rounded(model)
    tolerance = TOLERANCE if exact else ROUNDED_TOLERANCE
    with torch.no_grad(), in_eval_mode(model):
        whole = [look(last, **{READ: None}) for last in TRAINED]
        try:  # one after the other: nothing of the first may be left for the second
            found = [look(last) for last in TRAINED]
            same = all(bool((a - b).abs().mean() <= tolerance) for a, b in zip(found, whole, strict=True))
        except Exception:  # whatever a model's code may raise
            recover(model)
            same = False
    if not same:
        for part in (_part_of(model.get_decoder().layers[-1], name) for name in PARTS):
            part.forward = part.forward.args[0]
    return same


def _is_trimmed(attention: nn.Module) -> bool:
    forward = attention.__dict__.get("forward")
    return isinstance(forward, partial) and forward.func is _attention


def _part_of(layer: nn.Module, name: str) -> Any:
    try:
        return layer.get_submodule(name)
    except AttributeError:
        return None


def _attention(forward: Callable[..., Any], read: list[torch.Tensor], *arguments: Any, **more: Any) -> Any:
    """It is the first in the layer to run, also where gradient checkpointing computes the layer again."""
    positions = more.pop(READ, None)
    read[:] = [] if positions is None else [positions]
    return forward(*arguments, **more)


def _at_what_is_read(forward: Callable[..., Any], read: list[torch.Tensor], x: torch.Tensor) -> Any:
    """x (1, T, H) -> (1, T, H'), zeros but at the positions that are read."""
    if not read:
        return forward(x)
    result = forward(x.index_select(1, read[0]))
    first, *rest = result if isinstance(result, tuple) else (result,)
    whole = first.new_zeros(1, x.shape[1], first.shape[-1]).index_copy(1, read[0], first)
    return (whole, *rest) if isinstance(result, tuple) else whole
