"""The micro-batches that a run will form, before it forms them: which one is the heaviest, and how much is shared."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from yeonma.batch.forest import Forest, lay_out
from yeonma.batch.plan import MicroBatchBounds, Plan, micro_batches, shares
from yeonma.tokenization.store import TokenStore

MOST_LOOKED_AT = 50_000  # micro-batches
ENOUGH_LOOKED_AT = 10_000  # once every row has been seen
MOST_LAID_OUT = 64


@dataclass(frozen=True)
class Batches:
    """Of one process, the one whose heaviest micro-batch is the heaviest of all."""

    heaviest: Forest
    heaviest_units: int
    """Examples, or pairs, in it."""
    heaviest_step: int
    """From 0, the step that it belongs to."""
    several: bool
    """Whether some step has more than one micro-batch, so that gradients wait while the next goes through."""
    count: int
    """Micro-batches looked at: those of the run, or of its beginning (10,000; 50,000 where an epoch has more)."""
    distinct: int
    """Distinct token counts among them: each has routines of its own."""
    forest_tokens: float
    """Tokens computed for each token of the examples: 1, or less where beginnings are shared."""


def look_at_batches(plan: Plan, store: TokenStore, micro: MicroBatchBounds, processes: int) -> Batches:
    """The heaviest is the forest with the most tokens, shared ones counted once."""
    found = list(_batches(plan, store, micro, processes))
    tokens = [int(store.unit_lengths[units].sum()) for _, units, _ in found]
    order = sorted(range(len(found)), key=lambda index: -tokens[index])
    best, best_at = None, 0  # index into found
    for index in order[:MOST_LAID_OUT]:
        if best is not None and tokens[index] <= len(best.token_ids_T):
            break  # it can only lose tokens by sharing
        forest = forest_of(store, found[index][1], micro.share_prefix)
        if best is None or len(forest.token_ids_T) > len(best.token_ids_T):
            best, best_at = forest, index
    assert best is not None  # a plan has a step, and a step an example
    sample = found[:: max(1, len(found) // MOST_LAID_OUT)]
    laid = sum(len(forest_of(store, units, micro.share_prefix).token_ids_T) for _, units, _ in sample)
    return Batches(
        heaviest=best,
        heaviest_units=len(found[best_at][1]),
        heaviest_step=found[best_at][0],
        several=any(several for *_, several in found),
        count=len(found),
        distinct=len(set(tokens)),
        forest_tokens=laid / sum(int(store.unit_lengths[units].sum()) for _, units, _ in sample),
    )


def _batches(
    plan: Plan, store: TokenStore, micro: MicroBatchBounds, processes: int
) -> Iterator[tuple[int, np.ndarray, bool]]:
    """(step, units of the store, whether there are others) of every micro-batch of every process, as in a step."""
    seen = 0
    for step, units in enumerate(plan.steps()):
        for share in shares(store.unit_lengths[units].tolist(), processes):
            mine = units[share]
            lengths = store.unit_lengths[mine].tolist()
            batches = micro_batches(lengths, micro.most_examples, micro.most_tokens)
            for members in batches:
                yield step, mine[members], len(batches) > 1
            seen += len(batches)
        if seen >= (ENOUGH_LOOKED_AT if step + 1 >= plan.steps_per_epoch else MOST_LOOKED_AT):
            return


def forest_of(store: TokenStore, units: np.ndarray, share_prefix: bool) -> Forest:
    """As the training step lays these units out."""
    positions = store.trained_of(units)
    examples = [store.example(int(position)) for position in positions]
    ids, trained = [each.token_ids for each in examples], [each.trained for each in examples]
    return lay_out(ids, trained, share_prefix=share_prefix, units=store.units[positions])
