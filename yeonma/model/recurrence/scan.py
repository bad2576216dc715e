"""The recurrence that Gated DeltaNet, Kimi Delta Attention and Mamba2 have in common, over the pieces of a forest.

A state is a matrix per head. A token first fades it, then adds the outer product of its key and its value to it, and
reads it with its query. With the delta rule, what the state already gives for the key is taken off the value.

The chunked form is that of Yang et al. 2024 (arXiv:2412.06464, section 3.3) and, without the delta rule, of Dao and Gu
2024 (arXiv:2405.21060, section 6). Within a piece, the delta rule's values solve a triangular system. Here the state
before the piece is taken off its right side, so that one system with the width of the values is solved.

Shapes: P pieces, G groups of heads that share a key and a query, R heads of a group, C places of a piece, K width of
keys and queries, V width of values. G * R heads have a value.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from yeonma.model.recurrence.pieces import Level, Pieces, rows


@dataclass(frozen=True, eq=False)
class PieceInputs:
    """What the pieces of a forest bring along, in float32. Dimensions of size 1 stand for equal numbers."""

    query: torch.Tensor
    """(P, G, 1, C, K), scaled"""
    key: torch.Tensor
    """(P, G, 1, C, K)"""
    value: torch.Tensor
    """(P, G, R, C, V), times the strength of the update"""
    fading: torch.Tensor
    """(P, G, R, C, 1 or K): the sum of the logarithms of the decays from the piece's start to each token, with it"""
    read: torch.Tensor
    """(P, G, R, C, C), lower triangular: how much a query reads of a value"""
    system: torch.Tensor | None = None
    """(P, G, R, C, C), of which the part below the diagonal counts, for the delta rule"""
    strength: torch.Tensor | None = None
    """(P, G, R, C, 1): of the updates, for the delta rule"""


def pairwise_decay(fading: torch.Tensor) -> torch.Tensor:
    """(..., C, 1) -> (..., C, C): what is left of a token's update at a later one; 0 for earlier ones."""
    length = fading.shape[-2]
    earlier = torch.ones(length, length, dtype=torch.bool, device=fading.device).triu(1)
    return (fading - fading.transpose(-1, -2)).masked_fill_(earlier, float("-inf")).exp_()


def scan(
    inputs: PieceInputs, pieces: Pieces, initial: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The outputs (P, G, R, C, V), and the states (S, G, R, K, V) behind every segment if the layout keeps them.

    `initial`: the states that level 0 starts from.
    """
    outputs: list[torch.Tensor] = []
    states: list[torch.Tensor] = []
    state = initial
    for level, own in zip(pieces.levels, _by_level(inputs, pieces.levels), strict=True):
        before = None if level.parent is None or state is None else rows(state, level.parent)
        output, state = _level(own, level, before)
        outputs.append(output)
        if pieces.last_S is not None and state is not None:
            states.append(state)
    behind = torch.cat(states).index_select(0, pieces.last_S) if pieces.last_S is not None else None
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs), behind


def _by_level(inputs: PieceInputs, levels: Sequence[Level]) -> list[PieceInputs]:
    """One split of each tensor, whose gradient is one concatenation; none where there is one level."""
    if len(levels) == 1:
        return [inputs]
    sizes = [level.pieces for level in levels]
    columns = (
        inputs.query,
        inputs.key,
        inputs.value,
        inputs.fading,
        inputs.read,
        inputs.system,
        inputs.strength,
    )
    parts: list[Sequence[torch.Tensor | None]] = [
        [None] * len(sizes) if column is None else column.split(sizes) for column in columns
    ]
    return [PieceInputs(*columns_of_level) for columns_of_level in zip(*parts, strict=True)]


def _level(
    own: PieceInputs, level: Level, before: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The outputs of a level's pieces, and the states behind those that are kept."""
    value, faded = own.value, None
    if before is not None:
        faded = own.fading.exp()
        if own.strength is not None:
            value = value - (own.key * (faded * own.strength)) @ before
    if own.system is not None:
        value = torch.linalg.solve_triangular(own.system, value, upper=False, unitriangular=True)
    output = own.read @ value
    if before is not None:
        assert faded is not None
        output = output + (own.query * faded) @ before
    if not level.kept:
        return output, None
    kept = slice(0, level.kept)
    fading, last = own.fading[kept], own.fading[kept, ..., -1:, :]
    state = (own.key[kept] * (last - fading).exp()).transpose(-1, -2) @ value[kept]
    if before is not None:
        state = state + before[kept] * last.exp().transpose(-1, -2)
    return output, state
