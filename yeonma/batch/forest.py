"""Lay out examples as a forest: a prefix that several examples share becomes one segment, the parent of what follows.

Shapes: T tokens in the forest, N trained tokens counted once per example, U distinct (source, target) pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

MIN_SHARED_TOKENS = 16  # sharing fewer tokens costs more in attention calls than it saves


@dataclass(frozen=True)
class Segment:
    """A run of tokens. A token sees all tokens of the segment's ancestors, and its own segment up to itself."""

    start: int
    length: int
    parent: int | None


@dataclass(frozen=True)
class Forest:
    """The segments of one micro-batch in one flat sequence. Parents come before their children.

    A trained token is a pair: the flat position whose hidden state predicts it (`source`) and its token id (`target`).
    The last token of a shared segment may be the source of several targets, so targets are not the sequence shifted by
    one. A pair that several examples share is predicted once and counted once per example.
    """

    token_ids_T: np.ndarray  # int64
    position_T: np.ndarray  # int64, position ids: a segment continues from its parent's end
    segments: tuple[Segment, ...]
    source_U: np.ndarray  # int64
    target_U: np.ndarray  # int64
    pair_N: np.ndarray  # int64, index into U
    answer_N: np.ndarray  # int64, index of the example of the trained token, in the order given
    rotary_length_T: np.ndarray | None = (
        None  # int64, a length with the rotary frequencies of the token's sequence
    )

    @property
    def trained_tokens(self) -> int:
        return len(self.pair_N)


def lay_out(
    token_ids: Sequence[np.ndarray],
    trained: Sequence[np.ndarray],
    *,
    share_prefix: bool = True,
    units: Sequence[int] | np.ndarray | None = None,
    input_keys: Sequence[np.ndarray] | None = None,
    rotary_lengths: Sequence[int] | None = None,
    last_is_input: bool = True,
) -> Forest:
    """The forest of one micro-batch's examples. Without `share_prefix`, every example is a segment of its own.

    Examples share a common prefix of at least MIN_SHARED_TOKENS tokens. Those of one unit, such as the two of a pair,
    share a prefix of any length; `units` holds the unit of every example.

    Prefixes are equal if the model sees the same: equal token ids and, if given, equal `input_keys`, integers that
    stand for whatever else the model sees at a token.

    `rotary_lengths`: for every example, a length with the rotary frequencies of its sequence, for models whose
    frequencies depend on it. Examples with different frequencies share nothing.

    `trained[i][t]` says whether example i is trained to predict its token t. The first token of an example is never
    trained, because no token precedes it. Without `last_is_input`, the last token of every example is predicted only
    and has no place in the forest; all else is that of the examples without it.
    """
    predicted_ids = token_ids
    if not last_is_input:
        token_ids = [ids[:-1] for ids in token_ids]
        input_keys = None if input_keys is None else [keys[:-1] for keys in input_keys]
    inputs = [
        _model_inputs(ids, None if input_keys is None else input_keys[i]) for i, ids in enumerate(token_ids)
    ]
    kind_of = [0] * len(token_ids) if rotary_lengths is None else list(rotary_lengths)
    order = sorted(range(len(token_ids)), key=lambda i: (kind_of[i], inputs[i].tobytes()))
    # The length of the prefix that a sorted example shares with the next one.
    common = np.zeros(len(order), dtype=np.int64)
    if share_prefix:
        common[:-1] = [
            _common(inputs[a], inputs[b]) if kind_of[a] == kind_of[b] else 0 for a, b in pairwise(order)
        ]

    unit_of = list(range(len(order))) if units is None else [int(unit) for unit in units]
    minimum = [1 if unit_of[a] == unit_of[b] else MIN_SHARED_TOKENS for a, b in pairwise(order)]

    segments: list[Segment] = []
    chunks: list[np.ndarray] = []
    # Example -> the flat positions of its tokens, segment by segment.
    paths: list[list[np.ndarray]] = [[] for _ in token_ids]
    positions: list[np.ndarray] = []
    kinds: list[np.ndarray] = []
    pending: list[tuple[int, int, int, int | None]] = [(0, len(order), 0, None)]
    while pending:  # sorted examples [low, high) that agree up to `depth`, where `parent` ends
        low, high, depth, parent = pending.pop()
        for first, last in _runs(common, minimum, low, high, depth):
            is_alone = last - first == 1
            stop = len(token_ids[order[first]]) if is_alone else int(common[first : last - 1].min())
            if stop == depth:
                continue  # the example ends where its parent does
            flat = np.arange(depth, stop, dtype=np.int64) - depth + sum(map(len, chunks))
            segments.append(Segment(int(flat[0]), stop - depth, parent))
            chunks.append(token_ids[order[first]][depth:stop])
            positions.append(np.arange(depth, stop, dtype=np.int64))
            kinds.append(np.full(stop - depth, kind_of[order[first]], dtype=np.int64))
            for member in order[first:last]:
                paths[member].append(flat)
            if not is_alone:
                pending.append((first, last, stop, len(segments) - 1))
    source, target, answer = _trained_pairs(predicted_ids, trained, paths)
    pairs, pair_N = np.unique(np.stack([source, target]), axis=1, return_inverse=True)
    return Forest(
        token_ids_T=np.concatenate(chunks).astype(np.int64),
        position_T=np.concatenate(positions),
        segments=tuple(segments),
        source_U=pairs[0],
        target_U=pairs[1],
        pair_N=pair_N.reshape(-1),
        answer_N=answer,
        rotary_length_T=None if rotary_lengths is None else np.concatenate(kinds),
    )


def _model_inputs(token_ids: np.ndarray, input_keys: np.ndarray | None) -> np.ndarray:
    """What the model sees, shape (tokens,): elements are equal if it sees the same at both tokens."""
    ids = token_ids.astype(">u4")
    if input_keys is None:
        return ids
    pairs = np.empty(len(ids), dtype=[("id", ">u4"), ("key", ">u8")])
    pairs["id"], pairs["key"] = ids, input_keys.astype(np.int64).view(np.uint64)
    return pairs


def _common(a: np.ndarray, b: np.ndarray) -> int:
    """Length of the common prefix of two sequences."""
    length = min(len(a), len(b))
    differ = np.flatnonzero(a[:length] != b[:length])
    return int(differ[0]) if len(differ) else length


def _runs(
    common: np.ndarray, minimum: Sequence[int], low: int, high: int, depth: int
) -> list[tuple[int, int]]:
    """Maximal runs of sorted examples in [low, high) that share enough tokens after `depth` with their neighbours."""
    breaks = [low] + [i + 1 for i in range(low, high - 1) if common[i] < depth + minimum[i]] + [high]
    return list(pairwise(breaks))


def _trained_pairs(
    token_ids: Sequence[np.ndarray], trained: Sequence[np.ndarray], paths: Sequence[Sequence[np.ndarray]]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(source, target, example) of every trained token, example by example."""
    sources, targets, answers = [], [], []
    for example, (ids, mask) in enumerate(zip(token_ids, trained, strict=True)):
        predicted = np.flatnonzero(mask[1:]) + 1
        sources.append(np.concatenate(paths[example])[predicted - 1])
        targets.append(ids[predicted].astype(np.int64))
        answers.append(np.full(len(predicted), example, dtype=np.int64))
    return np.concatenate(sources), np.concatenate(targets), np.concatenate(answers)
