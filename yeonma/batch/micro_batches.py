"""Survey of the micro-batches of a run before it starts: the largest one, and how many tokens are shared."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from yeonma.batch.batch import Batch
from yeonma.batch.forest import Forest
from yeonma.batch.plan import MicroBatchBounds, Plan, micro_batches, shares
from yeonma.tokenization.store import TokenStore

MAX_SURVEYED = 50_000
"""Micro-batches to survey at most."""
ENOUGH_SURVEYED = 10_000
"""Micro-batches to survey if they cover an epoch."""
MAX_LAID_OUT = 64
"""Micro-batches to lay out as forests, which takes far longer than counting tokens."""


@dataclass(frozen=True)
class MicroBatchSurvey:
    """Statistics of the micro-batches of all processes."""

    heaviest: Forest
    """The forest with the most tokens. Shared tokens count once."""
    heaviest_units: int
    """Units in the heaviest forest: examples or pairs."""
    heaviest_step: int
    """The step of the heaviest forest, from 0."""
    several: bool
    """Whether a process has several micro-batches in some step, so that gradients exist while the next is computed."""
    count: int
    """Micro-batches surveyed: those of the whole run, or of its beginning."""
    steps: int
    """Steps surveyed."""
    distinct: int
    """Number of distinct token counts. oneDNN caches routines for each of them."""
    forest_tokens: float
    """Tokens computed per token of the examples: 1, or less if prefixes are shared."""


def survey_micro_batches(
    plan: Plan, store: TokenStore, bounds: MicroBatchBounds, processes: int
) -> MicroBatchSurvey:
    """Counts the tokens of every micro-batch. Lays out those that may be the largest, and a sample."""
    surveyed = list(_micro_batches_of(plan, store, bounds, processes))
    tokens = [int(store.unit_lengths[units].sum()) for _, units, _ in surveyed]
    order = sorted(range(len(surveyed)), key=lambda index: -tokens[index])
    best, best_at = None, 0  # index into surveyed
    for index in order[:MAX_LAID_OUT]:
        if best is not None and tokens[index] <= len(best.token_ids_T):
            break  # sharing can only reduce tokens
        forest = forest_of(store, surveyed[index][1], bounds.share_prefix)
        if best is None or len(forest.token_ids_T) > len(best.token_ids_T):
            best, best_at = forest, index
    assert best is not None  # a plan has a step, and a step an example
    sample = surveyed[:: max(1, len(surveyed) // MAX_LAID_OUT)]
    sample_tokens = sum(
        len(forest_of(store, units, bounds.share_prefix).token_ids_T) for _, units, _ in sample
    )
    return MicroBatchSurvey(
        heaviest=best,
        heaviest_units=len(surveyed[best_at][1]),
        heaviest_step=surveyed[best_at][0],
        several=any(several for *_, several in surveyed),
        count=len(surveyed),
        steps=surveyed[-1][0] + 1,
        distinct=len(set(tokens)),
        forest_tokens=sample_tokens / sum(int(store.unit_lengths[units].sum()) for _, units, _ in sample),
    )


def _micro_batches_of(
    plan: Plan, store: TokenStore, bounds: MicroBatchBounds, processes: int
) -> Iterator[tuple[int, np.ndarray, bool]]:
    """(step, units of the store, whether its process has several in this step) of every process's micro-batches."""
    count = 0
    for step, units in enumerate(plan.steps()):
        for share in shares(store.unit_lengths[units].tolist(), processes):
            process_units = units[share]
            lengths = store.unit_lengths[process_units].tolist()
            batches = micro_batches(lengths, bounds.most_examples, bounds.most_tokens)
            for members in batches:
                yield step, process_units[members], len(batches) > 1
            count += len(batches)
        if count >= (ENOUGH_SURVEYED if step + 1 >= plan.steps_per_epoch else MAX_SURVEYED):
            return


def forest_of(store: TokenStore, units: np.ndarray, share_prefix: bool) -> Forest:
    """The forest of these units, as in the training step."""
    return Batch.from_store(store, units).forest(share_prefix=share_prefix)
