"""What an attention backend is: it lays a forest out once, says which layers it supports, and computes those.

A new backend is a module with a `Backend` record, and an entry in `yeonma.model.attention.dispatch.BACKENDS`.

Shapes: T tokens, D head width of queries and keys, E head width of values (mostly D).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

Capability = tuple[int, int]
"""CUDA compute capability, (major, minor)."""

HALF = (torch.bfloat16, torch.float16)
LEAST_CAPABILITY = (8, 0)
"""Of devices that have the kernels of `varlen` and `flex`."""


@dataclass(frozen=True)
class ForestShape:
    """The segments of a forest, and where attention over them is computed."""

    lengths: tuple[int, ...]
    """Tokens of each segment, in flat order; they sum to T."""
    paths: tuple[tuple[int, ...], ...]
    """For each segment, the segments it sees: its ancestors from the root down, then itself."""
    device: torch.device
    """Holds the layouts' tensors."""
    computed_on: str
    """Device type that runs the kernels: `device.type`, or the one that a forecast on the meta device stands for."""
    capability: Capability | None
    """Of a CUDA device on which all segments may go through one call; None to compute segment by segment."""


@dataclass(frozen=True, eq=False)
class LayerCall:
    """What one layer asks of its attention, as transformers passes it."""

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
    """Positions that a token sees, itself included."""
    softcap: float | None = None
    """Scores become softcap * tanh(score / softcap)."""
    sinks: torch.Tensor | None = None
    """(heads,): a learned score of each head that takes part in the softmax and has no value."""


@dataclass(frozen=True)
class Backend:
    """One way to compute attention over a forest."""

    name: str
    lay_out: Callable[[ForestShape], Any]
    """What the backend needs to know of a forest, made once for all layers; None where it cannot serve the forest or
    the device."""
    supports: Callable[[LayerCall, Any], bool]
    """Whether it computes this layer, given what `lay_out` returned."""
    attend: Callable[[LayerCall, Any], torch.Tensor]
    """The output (1, T, heads, E), given what `lay_out` returned."""


@dataclass(frozen=True)
class ForestLayout:
    """A forest as attention takes it; one object serves every layer of a forward pass."""

    by_backend: Mapping[str, Any] = field(default_factory=dict)
    """Backend name -> what its `lay_out` returned, for those that can serve the forest."""
