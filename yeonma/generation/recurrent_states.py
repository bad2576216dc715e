"""The states of recurrent layers while decoding: those behind the shared prefix, and one of each row.

Shapes: T tokens of a forward pass, W channels of a convolution, K its width, B rows that continue.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from yeonma.model.recurrence.convolution import Taps, causal_convolution, last_inputs, lay_out_taps
from yeonma.model.recurrence.layout import Rule
from yeonma.model.recurrence.pieces import Pieces, lay_out_pieces

_PREFIX, _NOTHING = 0, 1
"""Among the states that starting rows may start from."""


@dataclass(eq=False)
class _Call:
    """The states of one convolution or one rule of the model: rows first."""

    shared: torch.Tensor | None = None
    """Behind the shared prefix, one row."""
    own: torch.Tensor | None = None


@dataclass(eq=False)
class RecurrentStates:
    """The states of all recurrent layers. `begin_prefix` or `begin_step` comes before every forward pass.

    Layers do not say who they are: the convolutions and rules of a model are known by their order in the forward pass.
    """

    calls: list[_Call] = field(default_factory=list)
    _number: int = 0
    _lengths: tuple[int, ...] = ()
    """Tokens of the rows of this pass, those that continue first; empty for the pass over the shared prefix."""
    _continuing: int = 0
    _origins: tuple[int, ...] = ()
    """What the starting rows start from."""
    _pieces: list[Pieces] = field(default_factory=list)
    _taps: dict[int, Taps] = field(default_factory=dict)

    def begin_prefix(self) -> None:
        """The next forward pass has the prefix that all rows share."""
        self._begin((), 0, ())

    def begin_step(self, lengths: Sequence[int], continuing: int, own_prefix: Sequence[bool]) -> None:
        """The next forward pass has one token for each row that continues, then the tokens of the starting rows.
        `own_prefix`: per starting row, whether it starts from nothing instead of the shared prefix."""
        origins = tuple(_NOTHING if alone else _PREFIX for alone in own_prefix)
        self._begin(tuple(lengths), continuing, origins)

    def _begin(self, lengths: tuple[int, ...], continuing: int, origins: tuple[int, ...]) -> None:
        self._number, self._lengths, self._continuing, self._origins = 0, lengths, continuing, origins
        self._pieces, self._taps = [], {}

    def copy_rows(self, source: torch.Tensor) -> None:
        """Add rows with the states of the rows `source`."""
        for call in self.calls:
            assert call.own is not None
            call.own = torch.cat([call.own, call.own[source]])

    def remove(self, row: int) -> None:
        """Remove a row. The last one moves into its place."""
        for call in self.calls:
            assert call.own is not None
            call.own[row] = call.own[-1]
            call.own = call.own[:-1]

    def convolve(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        activation: str | None,
    ) -> torch.Tensor:
        """See `yeonma.model.recurrence.layout.RecurrentPass`."""
        call, width = self._next_call(), weight.shape[-1]
        if width not in self._taps:
            self._taps[width] = self._lay_out_taps(x, width)
        taps = self._taps[width]
        if not self._lengths:
            call.shared = last_inputs(x, taps)
            return causal_convolution(x, weight, bias, activation, taps)
        nothing = x.new_zeros(1, width - 1, x.shape[1])
        before = [nothing if call.shared is None else call.shared, nothing]
        if self._continuing:
            assert call.own is not None
            before.insert(0, call.own)
        initial = torch.cat(before)
        call.own = last_inputs(x, taps, initial)
        return causal_convolution(x, weight, bias, activation, taps, initial)

    def _lay_out_taps(self, x: torch.Tensor, width: int) -> Taps:
        if not self._lengths:
            return lay_out_taps([x.shape[-1]], [None], width, x.device, keep_last=True)
        origins = [*range(self._continuing), *(self._continuing + origin for origin in self._origins)]
        parents = [None] * len(self._lengths)
        return lay_out_taps(self._lengths, parents, width, x.device, origins=origins, keep_last=True)

    def recur(self, rule: Rule, tokens: int, device: torch.device) -> torch.Tensor:
        """See `yeonma.model.recurrence.layout.RecurrentPass`."""
        call, count = self._next_call(), self._continuing
        if not self._pieces:
            self._pieces = self._lay_out_pieces(tokens, device)
        if not self._lengths:
            output, call.shared = rule(slice(None), self._pieces[0], None)
            return output
        outputs, states, pieces = [], [], list(self._pieces)
        if count:
            output, behind = rule(slice(count), pieces.pop(0), call.own)
            outputs.append(output)
            states.append(behind)
        if pieces:
            initial = None
            if call.shared is not None:
                initial = torch.cat([call.shared, torch.zeros_like(call.shared)])
            output, behind = rule(slice(count, None), pieces[0], initial)
            outputs.append(output)
            states.append(behind)
        call.own = torch.cat([state for state in states if state is not None])
        return torch.cat(outputs, dim=1)

    def _lay_out_pieces(self, tokens: int, device: torch.device) -> list[Pieces]:
        """Those of the continuing rows, which have one token each, and those of the starting ones."""
        if not self._lengths:
            return [lay_out_pieces([tokens], [None], device, keep_all=True)]
        result, count = [], self._continuing
        for lengths, origins in (
            (self._lengths[:count], range(count)),
            (self._lengths[count:], self._origins),
        ):
            if lengths:
                parents = [None] * len(lengths)
                result.append(lay_out_pieces(lengths, parents, device, origins=origins, keep_all=True))
        return result

    def _next_call(self) -> _Call:
        if self._number == len(self.calls):
            self.calls.append(_Call())
        self._number += 1
        return self.calls[self._number - 1]
