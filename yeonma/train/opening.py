"""What the reference gives the first step's answers, and the held-out ones: taken from the run's own look at them.

Before the first update the policy is the reference, so their log-probabilities are those of the first step's forward
passes and of the evaluation before it. They are on disk before the first update. Where they are missing later, because
the cache was removed, the same passes are made again: by the same function, in the same micro-batches, with the same
number of processes, so that a run which is continued gets the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from yeonma.batch.plan import Plan
from yeonma.model.forest_support import in_eval_mode, tiny_sequences
from yeonma.model.logprobs import ForestSupport, example_logprobs
from yeonma.tokenization.store import TokenStore
from yeonma.train.distributed import Processes
from yeonma.train.losses import Objective, answer_logprobs
from yeonma.train.reference import summed, write_reference
from yeonma.train.step import TrainState, evaluate, forward_alone


@dataclass(frozen=True)
class Opening:
    """The examples of one store whose reference is still to be taken from the policy."""

    path: Path  # of the reference's file; the first process writes it
    known: np.ndarray  # float64 (examples,), which the objective reads; NaN where nothing is known yet
    wanted: np.ndarray  # bool (examples,)


def is_reference(
    model: Any, how: ForestSupport, reference: Callable[[], AbstractContextManager[Any]], group: Processes
) -> bool:
    """Whether the model, training, gives the bits that it gives as the reference: tried on a few tokens.

    Not so with dropout that changes anything, with noise of the model's own, and where a fresh adapter is no exact
    zero (DoRA). Uses no random state; every process gets the same answer.
    """
    ids = tiny_sequences(model.config.get_text_config().vocab_size, 0)
    trained = [np.arange(len(each)) > 0 for each in ids]

    def look() -> torch.Tensor:
        return example_logprobs(model, how, ids, trained, share_prefix=True).detach()

    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices), in_eval_mode(model):
        torch.manual_seed(0)
        with torch.no_grad(), reference():
            expected = look()
        model.train()
        same = torch.equal(look(), expected)
        model.eval()
    return bool(summed(np.array([float(not same)]), group, model.device)[0] == 0)


def with_opening(
    objective: Objective, openings: Mapping[str, Opening], group: Processes, device: torch.device
) -> Objective:
    """The objective, to which the policy at the start tells the reference of the wanted examples, by store key.

    Only the objective in `at_start` takes what it is told; any other reads NaN where nothing was told.
    """
    told = {key: np.zeros(len(each.known), dtype=bool) for key, each in openings.items()}

    def sums(
        logprob_N: torch.Tensor, store: TokenStore, examples: np.ndarray, point: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if store.key in openings:
            opening = openings[store.key]
            values = answer_logprobs(logprob_N.detach().double(), store.trained_counts[examples])
            wanted = opening.wanted[examples]
            opening.known[examples[wanted]] = values.cpu().numpy()[wanted]  # again, where a step is repeated
            told[store.key][examples[wanted]] = True
        return objective.sums(logprob_N, store, examples, point)

    def settle() -> None:
        for key, opening in openings.items():
            if not opening.wanted.any():
                continue
            mine = told[key]
            holders = summed(mine.astype(np.float64), group, device)
            values = summed(np.where(mine, opening.known, 0.0), group, device)
            known = holders > 0
            opening.known[known] = values[known] / holders[known]
            opening.wanted[known], told[key][:] = False, False
            if group.first and known.any():
                write_reference(opening.path, opening.known)

    def wants(store: TokenStore, units: np.ndarray) -> bool:
        return store.key in openings and bool(openings[store.key].wanted[store.examples_of(units)].any())

    return replace(objective, at_start=replace(objective, sums=sums, settle=settle, wants=wants))


def look_again(
    tuning: TrainState, plan: Plan, store: TokenStore, validation: tuple[TokenStore, np.ndarray] | None
) -> None:
    """Before a checkpoint is read: what the run looked at before its first update, as far as the cache has lost it."""
    first = tuning.objective.at_start
    if first is None:
        return
    tuning = replace(tuning, objective=first)
    if validation is not None and first.wants(*validation):
        evaluate(tuning, *validation, 0, 0.0)
    units = next(plan.steps())
    if first.wants(store, units):
        tuning.model.train()
        forward_alone(tuning, store, units)
