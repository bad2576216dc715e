"""The interface of attention backends: a backend lays out a forest once, tells which layers it supports, and computes
them.

A new backend is a module with a `Backend` record, and an entry in `yeonma.model.attention.dispatch.BACKENDS`.

Shapes: T tokens, D head width of queries and keys, E head width of values (usually D).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from yeonma.model.recurrence.layout import RecurrentLayout

Capability = tuple[int, int]
"""CUDA compute capability, (major, minor)."""

HALF = (torch.bfloat16, torch.float16)
MIN_CAPABILITY = (8, 0)
"""Of devices for the kernels of `varlen` and `flex`."""


@dataclass(frozen=True)
class ForestShape:
    """The segments of a forest, and the device that computes attention over them."""

    lengths: tuple[int, ...]
    """Tokens of the segments, in flat order. They sum to T."""
    paths: tuple[tuple[int, ...], ...]
    """For every segment, the segments that it sees: its ancestors from the root down, then itself."""
    device: torch.device
    """The device of the layouts' tensors."""
    computed_on: str
    """The device type that runs the kernels: `device.type`, or the one that a forecast on the meta device simulates."""
    capability: Capability | None
    """Of a CUDA device that may compute all segments in one call; None to compute segment by segment."""


@dataclass(frozen=True, eq=False)
class LayerCall:
    """The arguments of one layer's attention, as transformers passes them."""

    query: torch.Tensor
    """(1, heads, T, D)"""
    key: torch.Tensor
    """(1, key heads, T, D)"""
    value: torch.Tensor
    """(1, key heads, T, E)"""
    scaling: float | None = None
    """Factor of the scores; None for D ** -0.5."""
    dropout: float = 0.0
    sliding_window: int | None = None
    """Number of positions that a token sees, including its own."""
    softcap: float | None = None
    """Scores become softcap * tanh(score / softcap)."""
    sinks: torch.Tensor | None = None
    """(heads,) attention sinks: a learned score per head that takes part in the softmax and has no value."""


@dataclass(frozen=True)
class Backend:
    """A way to compute attention over a forest."""

    name: str
    lay_out: Callable[[ForestShape], Any]
    """Computes what all layers need of a forest; None if the backend does not support the forest or the device."""
    supports: Callable[[LayerCall, Any], bool]
    """Whether it can compute this layer, given the result of `lay_out`."""
    attend: Callable[[LayerCall, Any], torch.Tensor]
    """The output (1, T, heads, E), given the result of `lay_out`."""


@dataclass(frozen=True)
class ForestLayout:
    """A forest laid out for attention and recurrences. One object serves all layers of a forward pass."""

    by_backend: Mapping[str, Any] = field(default_factory=dict)
    """Backend name -> the result of its `lay_out`, for backends that support the forest."""
    recurrence: RecurrentLayout | None = None
    """For recurrent layers."""
