"""A forest of segments as a forest of pieces: runs of at most `MAX_PIECE` tokens, each of which continues from the
state behind another piece.

A chunked rule computes all pieces of a forest at once, except for what the state before a piece adds. Pieces of equal
depth form a level; the levels go one after the other, whatever the number of segments. Pieces are stored with equal
lengths. The places behind a piece's last token hold zeros, which leave the state alone and are not read.

Shapes: T tokens, H heads, P pieces, C places of a piece.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from yeonma.model.transfer import to_device

MAX_PIECE = 96
"""Tokens of a piece. A rule computes a matrix of this width and height for each head and piece."""
_PIECES = range(16, MAX_PIECE + 1, 16)
_LEVEL_COST, _PLACE_COST, _STATE_COST = 26_000, 335, 241
"""The time of a level, of a place, and of a place with a state before it, in units of one number of a piece's matrix.
They were fitted to measured times of a delta rule with 5 heads of 128 on a CPU, and decide nothing but speed."""


@dataclass(frozen=True, eq=False)
class Level:
    """Pieces of equal depth, which are consecutive."""

    pieces: int
    kept: int
    """How many of them have a state that is used later: the first ones."""
    parent: torch.Tensor | None
    """(pieces,) where the state before each lies: among the kept ones of the level above, in level 0 among those that
    the recurrence starts with. None if all start from nothing."""


@dataclass(frozen=True, eq=False)
class Pieces:
    """A forest laid out in pieces."""

    length: int
    """Places of a piece (C)."""
    place_T: torch.Tensor
    """Where a token lies among the P * C places."""
    levels: tuple[Level, ...]
    last_S: torch.Tensor | None
    """The last piece of every segment, if all states are kept."""
    _places: dict[int, torch.Tensor] = field(default_factory=dict)

    @property
    def count(self) -> int:
        return sum(level.pieces for level in self.levels)

    def places(self, heads: int) -> torch.Tensor:
        """(T * heads,) where each head of a token lies among the P * heads * C places of a layer."""
        if heads not in self._places:
            piece_T, place_T = self.place_T // self.length, self.place_T % self.length
            head = torch.arange(heads, device=self.place_T.device)
            places = (piece_T[:, None] * heads + head) * self.length + place_T[:, None]
            self._places[heads] = places.flatten()
        return self._places[heads]


def lay_out_pieces(
    lengths: Sequence[int],
    parents: Sequence[int | None],
    device: torch.device,
    *,
    origins: Sequence[int] | None = None,
    keep_all: bool = False,
    length: int | None = None,
) -> Pieces:
    """The pieces of segments in flat order, parents before their children.

    `origins`: for every segment without a parent, the state that it starts from, by its number; others ignore it.
    `keep_all`: keep the states behind all segments. `length`: of the pieces, by default what takes least time.
    """
    length = length or _piece_length(lengths, parents)
    depth_P, parent_P, segment_P, last_S = _piece_tree(lengths, parents, length)
    has_child = np.full(len(depth_P), keep_all)
    has_child[parent_P[parent_P >= 0]] = True
    order = np.lexsort((np.arange(len(depth_P)), ~has_child, depth_P))
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    levels: list[Level] = []
    start = above = 0  # of this level and of the one above it
    for depth in range(int(depth_P.max()) + 1):
        own = order[start : start + int((depth_P == depth).sum())]
        parent: torch.Tensor | None = None
        if depth:
            parent = _index(rank[parent_P[own]] - above, device)
        elif origins is not None:
            parent = _index([origins[segment_P[piece]] for piece in own], device)
        levels.append(Level(len(own), int(has_child[own].sum()), parent))
        start, above = start + len(own), start
    first_P = np.concatenate([np.arange(0, n, length) for n in lengths])  # within the segment
    place = [
        rank[piece] * length + np.arange(min(length, lengths[segment] - first))
        for piece, (segment, first) in enumerate(zip(segment_P, first_P, strict=True))
    ]
    last = _index(rank[last_S], device) if keep_all else None
    return Pieces(length, _index(np.concatenate(place), device), tuple(levels), last)


def _piece_tree(
    lengths: Sequence[int], parents: Sequence[int | None], length: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Of all pieces, segment by segment: depth, parent (-1 for none) and segment; and every segment's last piece."""
    depth: list[int] = []
    above: list[int] = []
    segment: list[int] = []
    last: list[int] = []
    for index, (tokens, parent) in enumerate(zip(lengths, parents, strict=True)):
        before = -1 if parent is None else last[parent]
        for _ in range(0, tokens, length):
            above.append(before)
            depth.append(0 if before < 0 else depth[before] + 1)
            segment.append(index)
            before = len(depth) - 1
        last.append(before)
    return np.asarray(depth), np.asarray(above), np.asarray(segment), np.asarray(last)


def _piece_length(lengths: Sequence[int], parents: Sequence[int | None]) -> int:
    """The length of pieces that takes least time for these segments."""
    longest = max(lengths)
    if longest == 1:
        return 1
    length_S = np.asarray(lengths)

    def cost(length: int) -> int:
        count_S = -(-length_S // length)
        depth_S = np.zeros_like(count_S)
        for index, parent in enumerate(parents):
            depth_S[index] = count_S[index] + (0 if parent is None else depth_S[parent])
        count = int(count_S.sum())
        after_a_state = count - sum(parent is None for parent in parents)
        place_costs = count * (length + _PLACE_COST) + after_a_state * _STATE_COST
        return place_costs * length + int(depth_S.max()) * _LEVEL_COST

    return min(_PIECES, key=cost)


def _index(numbers: Any, device: torch.device) -> torch.Tensor:
    return to_device(np.asarray(numbers, dtype=np.int64), device)


def to_pieces(x_TH: torch.Tensor, pieces: Pieces) -> torch.Tensor:
    """(T, H, N) -> (P, H, C, N), with zeros behind the last token of a piece."""
    heads = x_TH.shape[1]
    shape = (pieces.count, heads, pieces.length)
    result: torch.Tensor = _Spread.apply(x_TH.flatten(0, 1), pieces.places(heads), math.prod(shape))
    return result.unflatten(0, shape)


def to_tokens(x_PHC: torch.Tensor, pieces: Pieces) -> torch.Tensor:
    """(P, H, C, N) -> (T, H, N): the inverse of `to_pieces`."""
    heads = x_PHC.shape[1]
    result: torch.Tensor = _RowsAt.apply(x_PHC.flatten(0, 2), pieces.places(heads))
    return result.unflatten(0, (-1, heads))


class _Spread(torch.autograd.Function):
    """Rows at their places among `count`, zeros elsewhere. No place is taken twice, so the gradient is a copy."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, places: torch.Tensor, count: int) -> torch.Tensor:
        ctx.save_for_backward(places)
        return x.new_zeros(count, *x.shape[1:]).index_copy_(0, places, x)

    @staticmethod
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (places,) = ctx.saved_tensors
        return upstream.index_select(0, places), None, None


class _RowsAt(torch.autograd.Function):
    """The rows at these places, none of which stands twice: the gradient is a copy and no sum."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(places)
        ctx.count = len(x)
        return x.index_select(0, places)

    @staticmethod
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor, None]:
        (places,) = ctx.saved_tensors
        return upstream.new_zeros(ctx.count, *upstream.shape[1:]).index_copy_(0, places, upstream), None


def rows(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """`x[index]` for an index that may have a row several times. The order in which their gradients are summed is
    fixed on every device."""
    result: torch.Tensor = _RepeatedRows.apply(x, index)
    return result


class _RepeatedRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(index)
        ctx.count = len(x)
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor, None]:
        (index,) = ctx.saved_tensors
        total = upstream.new_zeros(ctx.count, *upstream.shape[1:])
        return add_rows_(total, index, upstream), None


def add_rows_(total: torch.Tensor, index: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """`total[index] += values` for an index that may have a row several times, summed in a fixed order."""
    if total.device.type == "cuda":  # `index_add_` sums in any order there
        return total.index_put_((index,), values, accumulate=True)
    return total.index_add_(0, index, values)
