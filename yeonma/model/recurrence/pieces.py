"""A forest of segments as a forest of pieces: runs of at most `MAX_PIECE` tokens, each of which continues from the
state behind another piece.

A chunked rule computes all pieces of a forest at once, except for what the state before a piece adds. Pieces of equal
depth form a level; the levels go one after the other, whatever the number of segments. Pieces are stored with equal
lengths. The places behind a piece's last token hold zeros, which leave the state alone and are not read.

Shapes: T tokens, P pieces, C places of a piece.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

MAX_PIECE = 64
"""Tokens of a piece. A rule computes a matrix of this width and height for each head and piece."""
_PIECES = (16, 32, 48, MAX_PIECE)
_LEVEL_COST, _TOKEN_COST = 4096, 128
"""The time of a level and of a place, in units of one number of a piece's matrix: rough, for speed alone."""


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

    @property
    def count(self) -> int:
        return sum(level.pieces for level in self.levels)


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
        return int(count_S.sum() * length * (length + _TOKEN_COST) + depth_S.max() * _LEVEL_COST)

    return min(_PIECES, key=cost)


def _index(numbers: Any, device: torch.device) -> torch.Tensor:
    return torch.from_numpy(np.asarray(numbers, dtype=np.int64)).to(device)


def to_pieces(x_T: torch.Tensor, pieces: Pieces) -> torch.Tensor:
    """(T, ...) -> (P, C, ...), with zeros behind the last token of a piece."""
    places = x_T.new_zeros(pieces.count * pieces.length, *x_T.shape[1:])
    return places.index_copy(0, pieces.place_T, x_T).unflatten(0, (pieces.count, pieces.length))


def to_tokens(x_PC: torch.Tensor, pieces: Pieces) -> torch.Tensor:
    """(P, C, ...) -> (T, ...): the inverse of `to_pieces`."""
    result: torch.Tensor = _TokensOfPieces.apply(x_PC.flatten(0, 1), pieces.place_T)
    return result


class _TokensOfPieces(torch.autograd.Function):
    """No place is read twice, so the gradient is a copy and no sum."""

    @staticmethod
    def forward(ctx: Any, places: torch.Tensor, place_T: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(place_T)
        ctx.count = len(places)
        return places.index_select(0, place_T)

    @staticmethod
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor, None]:
        (place_T,) = ctx.saved_tensors
        return upstream.new_zeros(ctx.count, *upstream.shape[1:]).index_copy_(0, place_T, upstream), None


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
        if upstream.device.type == "cuda":  # `index_add_` sums in any order there
            return total.index_put_((index,), upstream, accumulate=True), None
        return total.index_add_(0, index, upstream), None
