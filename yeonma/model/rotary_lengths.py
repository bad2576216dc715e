"""Rotary frequencies by the length of each sequence, also where many sequences share a forward pass.

transformers picks frequencies that depend on the length by the largest position of a forward pass. In a forest, whose
sequences have different lengths, `split_by_length` makes the rotary modules run once for every kind of length: a row
gets the numbers that it would get alone. The lengths travel with the tensor of position ids.

Shapes: T tokens, D rotary width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.weak import WeakTensorKeyDictionary

from yeonma.messages import tr
from yeonma.model.position_limits import length_borders
from yeonma.model.transfer import to_device

TRIAL_BORDER = 24
"""The border in a trial: sequences of a few more tokens are on the other side."""


@dataclass(frozen=True, eq=False)
class _Part:
    """The tokens whose sequences have the frequencies of `length`."""

    length: int
    tokens: torch.Tensor
    """Flat positions."""


_parts_of: Any = WeakTensorKeyDictionary()
"""Position ids -> the parts of a forward pass."""


def position_ids(
    positions: Sequence[int] | np.ndarray, rotary_length_T: np.ndarray | None, device: torch.device
) -> torch.Tensor:
    """The position ids of a forward pass, shape (1, T).

    `rotary_length_T`: for every token, a length with the frequencies of its sequence; None if they do not depend on it.
    """
    ids = to_device(np.asarray(positions, dtype=np.int64), device).unsqueeze(0)
    if rotary_length_T is not None:
        _parts_of[ids] = [
            _Part(int(length), to_device(np.flatnonzero(rotary_length_T == length), device))
            for length in np.unique(rotary_length_T)
        ]
    return ids


def split_by_length(model: Any) -> str:
    """Makes the model's rotary modules give every sequence its own frequencies, and keep nothing between calls.

    Returns why that is impossible; empty if it is done, or if no frequencies depend on the length.
    """
    if not length_borders(model.config):
        return ""
    modules = list(_length_dependent(model))
    for module in modules:
        if not _is_split(module):
            module.forward = partial(_split, module, module.forward)
    return "" if modules else tr("code of its own picks rotary frequencies by the length of the sequence")


def _length_dependent(model: nn.Module) -> Iterator[Any]:
    for module in model.modules():
        if any("dynamic" in kind or kind == "longrope" for kind in _rope_types(module)):
            yield module


def _rope_types(module: nn.Module) -> list[str]:
    kinds = getattr(module, "rope_type", None)
    return [str(kind) for kind in kinds.values()] if isinstance(kinds, Mapping) else [str(kinds or "")]


def _is_split(module: nn.Module) -> bool:
    forward = module.__dict__.get("forward")
    return isinstance(forward, partial) and forward.func is _split


def _split(module: Any, forward: Callable[..., Any], *args: Any, **keywords: Any) -> Any:
    """The rotary module's result, (1, T, D) or several of them, with the frequencies of each token's sequence."""
    ids = keywords.get("position_ids", args[1] if len(args) > 1 else None)
    parts = _parts_of.get(ids) if isinstance(ids, torch.Tensor) else None
    if ids is None or parts is None:
        return _without_traces(module, forward, args, keywords)
    results = []
    for part in parts:
        # the frequencies are those for the largest position
        last = ids.new_full((1, 1), part.length - 1)
        positions = torch.cat([ids.index_select(1, part.tokens), last], dim=1)
        if "position_ids" in keywords:
            result = _without_traces(module, forward, args, {**keywords, "position_ids": positions})
        else:
            result = _without_traces(module, forward, (args[0], positions, *args[2:]), keywords)
        results.append(result)
    if isinstance(results[0], tuple):
        return tuple(_joined(parts, tensors) for tensors in zip(*results, strict=True))
    return _joined(parts, results)


def _joined(parts: Sequence[_Part], results: Sequence[torch.Tensor]) -> torch.Tensor:
    """(1, T, D), from (1, tokens of a part + 1, D) of each part."""
    tokens = sum(len(part.tokens) for part in parts)
    joined = results[0].new_empty(results[0].shape[0], tokens, *results[0].shape[2:])
    for part, result in zip(parts, results, strict=True):
        joined.index_copy_(1, part.tokens, result[:, :-1])
    return joined


def _without_traces(
    module: Any, forward: Callable[..., Any], args: Sequence[Any], keywords: Mapping[str, Any]
) -> Any:
    """Calls `forward`, and undoes what dynamic scaling keeps of a long sequence: it would change shorter ones."""
    buffers = dict(module._buffers)
    values = {name: value for name, value in vars(module).items() if not name.startswith("_")}
    try:
        return forward(*args, **keywords)
    finally:
        if any("dynamic" in kind for kind in _rope_types(module)):
            module._buffers.clear()
            module._buffers.update(buffers)
            for name in [name for name in vars(module) if not name.startswith("_") and name not in values]:
                delattr(module, name)
            vars(module).update(values)


@contextmanager
def near_borders(model: Any, window: int) -> Iterator[bool]:
    """Moves the borders that the config names to lengths that a trial can afford: TRIAL_BORDER for rotary frequencies,
    `window` for longer sliding windows. The block gets whether there are any."""
    moves = list(_moves(model, window))
    former = [_get(holder, name) for holder, name, _ in moves]
    try:
        for move in moves:
            _set(*move)
        yield bool(moves)
    finally:
        for (holder, name, _), value in zip(moves, former, strict=True):
            _set(holder, name, value)


def _moves(model: Any, window: int) -> Iterator[tuple[Any, str, int]]:
    """(object or dict, name, value) for all places that hold a border."""
    borders = length_borders(model.config)
    full = getattr(model.config.get_text_config(), "sliding_window", None)
    holders = {id(model.config.get_text_config()): model.config.get_text_config()}
    for module in model.modules():
        holders |= {id(part): part for part in (module, getattr(module, "config", None)) if part is not None}
    for holder in list(holders.values()):
        parameters = getattr(holder, "rope_parameters", None)
        if isinstance(parameters, dict):
            nested = [value for value in parameters.values() if isinstance(value, dict)]
            holders |= {id(one): one for one in nested or [parameters]}
    for holder in holders.values():
        if borders.switches and _get(holder, "original_max_position_embeddings") is not None:
            yield holder, "original_max_position_embeddings", TRIAL_BORDER
        if borders.grows_from is not None:
            for name in ("max_position_embeddings", "original_max_seq_len", "max_seq_len_cached"):
                if _get(holder, name) is not None:
                    yield holder, name, TRIAL_BORDER
        if isinstance(full, int) and full > window and _get(holder, "sliding_window") == full:
            yield holder, "sliding_window", window


def _get(holder: Any, name: str) -> Any:
    return holder.get(name) if isinstance(holder, dict) else getattr(holder, name, None)


def _set(holder: Any, name: str, value: Any) -> None:
    if isinstance(holder, dict):
        holder[name] = value
    else:
        setattr(holder, name, value)
