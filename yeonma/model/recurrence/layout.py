"""What recurrent layers need of a forest, computed once for all layers, and how they run over it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch

from yeonma.model.recurrence.convolution import Taps, causal_convolution, lay_out_taps
from yeonma.model.recurrence.pieces import Pieces, lay_out_pieces

Rule = Callable[[slice, Pieces, torch.Tensor | None], tuple[torch.Tensor, torch.Tensor | None]]
"""A layer's recurrence over some of the flat tokens: (tokens, their pieces, the states that these start from) -> output
(1, tokens, heads, V) and the states behind the segments, if the pieces keep them."""


class RecurrentPass(Protocol):
    """A forward pass over segments, as its recurrent layers see it. Training has one, and decoding another."""

    def convolve(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        activation: str | None,
    ) -> torch.Tensor:
        """A layer's convolution: x (1, W, T), weight (W, K), bias (W,) -> (1, W, T)."""

    def recur(self, rule: Rule, tokens: int, device: torch.device) -> torch.Tensor:
        """A layer's recurrence over all tokens, whose number and device are given: the output (1, T, heads, V)."""


@dataclass(eq=False)
class RecurrentLayout:
    """The segments of a forest in flat order, parents before their children. They are laid out when the first layer
    asks for it."""

    lengths: Sequence[int]
    parents: Sequence[int | None]
    device: torch.device
    _pieces: Pieces | None = None
    _taps: dict[int, Taps] = field(default_factory=dict)

    def convolve(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        activation: str | None,
    ) -> torch.Tensor:
        width = weight.shape[-1]
        if width not in self._taps:
            self._taps[width] = lay_out_taps(self.lengths, self.parents, width, self.device)
        return causal_convolution(x, weight, bias, activation, self._taps[width])

    def recur(self, rule: Rule, tokens: int, device: torch.device) -> torch.Tensor:
        if self._pieces is None:
            self._pieces = lay_out_pieces(self.lengths, self.parents, self.device)
        return rule(slice(None), self._pieces, None)[0]
