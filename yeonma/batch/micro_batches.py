"""The micro-batches of a run, surveyed before it starts: the largest one, and how many tokens are shared."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from yeonma.batch.batch import Batch
from yeonma.batch.forest import Forest
from yeonma.batch.plan import MicroBatchBounds, Plan, micro_batches, shares
from yeonma.tokenization.store import TokenStore

MOST_SURVEYED = 50_000
"""Micro-batches, where an epoch has so many."""
ENOUGH_SURVEYED = 10_000
"""Micro-batches, once every row has been seen."""
MOST_LAID_OUT = 64
"""Micro-batches that become forests, which takes far longer than counting tokens."""


@dataclass(frozen=True)
class MicroBatchSurvey:
    """The micro-batches of all processes."""

    heaviest: Forest
    """The forest with the most tokens, shared ones counted once."""
    heaviest_units: int
    """Units in it: examples or pairs."""
    heaviest_step: int
    """The step that it belongs to, from 0."""
    several: bool
    """Whether some step has more than one micro-batch, so that gradients are held while the next is computed."""
    count: int
    """Micro-batches surveyed: those of the run, or of its beginning (10,000; 50,000 where an epoch has more)."""
    distinct: int
    """Distinct token counts among them; oneDNN keeps routines for each."""
    forest_tokens: float
    """Tokens computed per token of the examples: 1, or less where prefixes are shared."""


def survey_micro_batches(
    plan: Plan, store: TokenStore, micro: MicroBatchBounds, processes: int
) -> MicroBatchSurvey:
    """Counts the tokens of every micro-batch, and lays out those that may be the largest, and a sample."""
    surveyed = list(_micro_batches_of(plan, store, micro, processes))
    tokens = [int(store.unit_lengths[units].sum()) for _, units, _ in surveyed]
    order = sorted(range(len(surveyed)), key=lambda index: -tokens[index])
    best, best_at = None, 0  # index into surveyed
    for index in order[:MOST_LAID_OUT]:
        if best is not None and tokens[index] <= len(best.token_ids_T):
            break  # it can only lose tokens by sharing
        forest = forest_of(store, surveyed[index][1], micro.share_prefix)
        if best is None or len(forest.token_ids_T) > len(best.token_ids_T):
            best, best_at = forest, index
    assert best is not None  # a plan has a step, and a step an example
    sample = surveyed[:: max(1, len(surveyed) // MOST_LAID_OUT)]
    sample_tokens = sum(
        len(forest_of(store, units, micro.share_prefix).token_ids_T) for _, units, _ in sample
    )
    return MicroBatchSurvey(
        heaviest=best,
        heaviest_units=len(surveyed[best_at][1]),
        heaviest_step=surveyed[best_at][0],
        several=any(several for *_, several in surveyed),
        count=len(surveyed),
        distinct=len(set(tokens)),
        forest_tokens=sample_tokens / sum(int(store.unit_lengths[units].sum()) for _, units, _ in sample),
    )


def _micro_batches_of(
    plan: Plan, store: TokenStore, micro: MicroBatchBounds, processes: int
) -> Iterator[tuple[int, np.ndarray, bool]]:
    """(step, units of the store, whether its process has others in this step) of every micro-batch of every process."""
    count = 0
    for step, units in enumerate(plan.steps()):
        for share in shares(store.unit_lengths[units].tolist(), processes):
            mine = units[share]
            lengths = store.unit_lengths[mine].tolist()
            batches = micro_batches(lengths, micro.most_examples, micro.most_tokens)
            for members in batches:
                yield step, mine[members], len(batches) > 1
            count += len(batches)
        if count >= (ENOUGH_SURVEYED if step + 1 >= plan.steps_per_epoch else MOST_SURVEYED):
            return


def forest_of(store: TokenStore, units: np.ndarray, share_prefix: bool) -> Forest:
    """The forest that the training step makes of these units."""
    return Batch.from_store(store, units).trained_part.forest(share_prefix=share_prefix)
