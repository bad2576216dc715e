"""Makes the last decoder layer compute only the positions that are read.

After its attention, tokens no longer mix, and only the final hidden states that predict a trained token are used. The
layer's output projection and MLP run at these positions. At all others they return zeros, which nothing reads.
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
from yeonma.model.logprobs import READ_POSITIONS, ForestSupport, trained_logprobs
from yeonma.model.quantized import is_rounded
from yeonma.model.sharding import recover

PARTS = ("self_attn", "self_attn.o_proj", "mlp")
"""Modules of transformers' decoder layers: the attention, which is told the positions, and the large ones after it."""
TRAINED_TOKENS = (2, 4)  # at the end of the sequences, in the two passes of the trial
TOLERANCE, ROUNDED_TOLERANCE = 1e-4, 0.05
"""Mean difference of log-probabilities. Products of another size round differently; wrong tokens differ by units."""


def trim_last_layer(model: Any) -> bool:
    """Make the last layer skip positions that are not read, in forward passes with the keyword READ_POSITIONS.

    Returns False for a model without such a layer, and for one that is already trimmed.
    """
    layers = getattr(model.get_decoder(), "layers", None)
    if not isinstance(layers, nn.ModuleList) or not len(layers):
        return False
    attention, *after = parts = [_part_of(layers[-1], name) for name in PARTS]
    if None in parts or _is_trimmed(attention):
        return False
    read: list[torch.Tensor] = []  # the positions of the current pass, set by the attention
    attention.forward = partial(_attention, attention.forward, read)
    for part in after:
        part.forward = partial(_at_read_positions, part.forward, read)
    return True


def trim_where_equal(model: Any, support: ForestSupport) -> bool:
    """`trim_last_layer`, undone unless a trial gives the same log-probabilities as the full layer."""
    if not support.forest or not trim_last_layer(model):
        return False
    ids = tiny_sequences(model.config.get_text_config().vocab_size, 0)

    def logprobs(trained: int, **keywords: Any) -> torch.Tensor:
        forest = lay_out(ids, [np.arange(len(sequence)) >= len(sequence) - trained for sequence in ids])
        return trained_logprobs(model, forest, support.head, support.capability, **keywords)

    exact = model.dtype == torch.float32 and not is_rounded(model)
    tolerance = TOLERANCE if exact else ROUNDED_TOLERANCE
    with torch.no_grad(), in_eval_mode(model):
        full = [logprobs(count, **{READ_POSITIONS: None}) for count in TRAINED_TOKENS]
        try:  # two different passes, so that remains of the first would show in the second
            trimmed = [logprobs(count) for count in TRAINED_TOKENS]
            is_equal = all(
                bool((a - b).abs().mean() <= tolerance) for a, b in zip(trimmed, full, strict=True)
            )
        except Exception:  # a model's code may raise anything
            recover(model)
            is_equal = False
    if not is_equal:
        for part in (_part_of(model.get_decoder().layers[-1], name) for name in PARTS):
            part.forward = part.forward.args[0]
    return is_equal


def _is_trimmed(attention: nn.Module) -> bool:
    forward = attention.__dict__.get("forward")
    return isinstance(forward, partial) and forward.func is _attention


def _part_of(layer: nn.Module, name: str) -> Any:
    try:
        return layer.get_submodule(name)
    except AttributeError:
        return None


def _attention(forward: Callable[..., Any], read: list[torch.Tensor], *args: Any, **keywords: Any) -> Any:
    """Stores the positions: the attention runs first in the layer, even when gradient checkpointing reruns it."""
    positions = keywords.pop(READ_POSITIONS, None)
    read[:] = [] if positions is None else [positions]
    return forward(*args, **keywords)


def _at_read_positions(forward: Callable[..., Any], read: list[torch.Tensor], x: torch.Tensor) -> Any:
    """x (1, T, H) -> (1, T, H'), with zeros at positions that are not read."""
    if not read:
        return forward(x)
    result = forward(x.index_select(1, read[0]))
    hidden, *others = result if isinstance(result, tuple) else (result,)
    output = hidden.new_zeros(1, x.shape[1], hidden.shape[-1]).index_copy(1, read[0], hidden)
    return (output, *others) if isinstance(result, tuple) else output
