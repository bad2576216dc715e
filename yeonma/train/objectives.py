"""Objectives: from the log-probabilities of a micro-batch to sums of loss and metrics. The step divides, once.

Shapes: N trained tokens, E examples, P pairs, M metrics.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from yeonma.tokens.example import Role
from yeonma.tokens.store import TokenStore
from yeonma.train.preference import (
    KTO_METRICS,
    PAIR_METRICS,
    REFERENCE_FREE,
    LabelledLogprobs,
    Logprobs,
    PreferenceOptions,
    ReferenceLogprobs,
    kto_losses,
    kto_metric_sums,
    kto_reference_point,
    pair_losses,
    pair_metric_sums,
)

References = Mapping[str, np.ndarray]
"""Of each token store, by its key: what the reference gives its examples' answers, float64, shape (examples,)."""


Sums = tuple[torch.Tensor, torch.Tensor]
"""The loss, a scalar, and M metrics, each summed."""


@dataclass(frozen=True)
class Objective:
    """What differs between one loss and another, for the loop.

    `sums(logprob_N, store, examples, point)` takes the log-probabilities of the trained tokens of some examples, by
    their positions in the store, and gives the loss summed over them, a scalar with its gradient, and M sums of
    metrics. `point` is a mean over all of the step, where the objective has a `measure`.
    """

    name: str
    per_token: bool
    """Whether the step divides by its trained tokens; otherwise by its units (pairs)."""
    sums: Callable[[torch.Tensor, TokenStore, np.ndarray, torch.Tensor | None], Sums]
    metrics: tuple[str, ...] = ()
    """Names of the M sums of metrics."""
    report: Callable[[Mapping[str, float]], dict[str, float]] = dict
    """From each metric's mean over the units to what is logged."""
    measure: Callable[[torch.Tensor, TokenStore, np.ndarray], torch.Tensor] | None = None
    """What the objective wants to know of a whole step before any of it is trained: from the log-probabilities of some
    mismatched answers, without gradient, to a sum over them."""
    at_start: Objective | None = None
    """The same objective for what is looked at before the first update, where it learns something there."""
    settle: Callable[[], None] = lambda: None
    """Called in every process when all of a pass is through the model and found finite, before any update."""
    wants: Callable[[TokenStore, np.ndarray], bool] = lambda store, units: False
    """Whether some of these units have something to tell it still."""


def sft_loss(logprob_N: torch.Tensor) -> torch.Tensor:
    """Sum of the negative log-likelihood over the trained tokens, a float32 scalar; to be divided by their count."""
    return -logprob_N.sum()


def _sft_sums(
    logprob_N: torch.Tensor, store: TokenStore, examples: np.ndarray, point: torch.Tensor | None
) -> Sums:
    return sft_loss(logprob_N), logprob_N.new_zeros(0)


SFT = Objective("sft", per_token=True, sums=_sft_sums)


def pair_objective(loss: str, options: PreferenceOptions, references: References) -> Objective:
    """A loss of `yeonma.train.preference` over pairs. `references` may be empty for one that needs none."""

    def sums(
        logprob_N: torch.Tensor, store: TokenStore, examples: np.ndarray, point: torch.Tensor | None
    ) -> Sums:
        roles, units = store.roles[examples], store.units[examples]
        chosen, rejected = (np.flatnonzero(roles == role) for role in (Role.CHOSEN, Role.REJECTED))
        if not np.array_equal(units[chosen], units[rejected]):
            raise ValueError("a micro-batch parts a pair")
        counts = store.trained_counts[examples]
        logprob_E = answer_logprobs(logprob_N, counts)
        policy = Logprobs(
            chosen_P=_at(logprob_E, chosen),
            rejected_P=_at(logprob_E, rejected),
            chosen_tokens_P=_like(logprob_E, counts[chosen]),
            rejected_tokens_P=_like(logprob_E, counts[rejected]),
        )
        reference = None
        if loss not in REFERENCE_FREE:
            known = references[store.key]
            reference = ReferenceLogprobs(
                chosen_P=_like(logprob_E, known[examples[chosen]]),
                rejected_P=_like(logprob_E, known[examples[rejected]]),
            )
        loss_P = pair_losses(loss, policy, reference, options)
        return loss_P.sum(), pair_metric_sums(loss, policy, reference, options)

    return Objective("dpo", per_token=False, sums=sums, metrics=PAIR_METRICS)


def label_objective(options: PreferenceOptions, references: References) -> Objective:
    """KTO over answers with labels. Its reference point is measured over the whole step."""

    def measure(logprob_N: torch.Tensor, store: TokenStore, examples: np.ndarray) -> torch.Tensor:
        logprob_E = answer_logprobs(logprob_N, store.trained_counts[examples])
        return (logprob_E - _like(logprob_E, references[store.key][examples])).sum()

    def sums(
        logprob_N: torch.Tensor, store: TokenStore, examples: np.ndarray, point: torch.Tensor | None
    ) -> Sums:
        assert point is not None
        counts = store.trained_counts[examples]
        logprob_R = answer_logprobs(logprob_N, counts)
        rows = LabelledLogprobs(
            logprob_R=logprob_R,
            reference_R=_like(logprob_R, references[store.key][examples]),
            tokens_R=_like(logprob_R, counts),
            desirable_R=torch.from_numpy(store.roles[examples] == Role.DESIRABLE).to(logprob_R.device),
        )
        z = kto_reference_point(point.to(logprob_R), 1)
        metrics = torch.cat([kto_metric_sums(rows, z, options).to(logprob_R), z.reshape(1) * len(examples)])
        return kto_losses(rows, z, options).sum(), metrics

    names = (*KTO_METRICS, "reference_point")
    return Objective("dpo", per_token=False, sums=sums, metrics=names, report=_of_each_label, measure=measure)


def _of_each_label(means: Mapping[str, float]) -> dict[str, float]:
    """KTO's metrics, those of one label over the rows with that label: NaN where a step has none of them."""

    def of(name: str, value: float) -> float:
        what, _, label = name.rpartition("_")
        if not what or label not in ("desirable", "undesirable"):
            return value
        return value / means[label] if means[label] else math.nan

    return {name: of(name, value) for name, value in means.items()}


def answer_logprobs(logprob_N: torch.Tensor, counts: Sequence[int] | np.ndarray) -> torch.Tensor:
    """logprob_E: the log-probability of each example's answer whole; `counts` are its trained tokens.

    Each sum is of the example's own tokens alone, in their order: what stands beside it changes nothing.
    """
    return torch.stack([part.sum() for part in logprob_N.split([int(count) for count in counts])])


def _at(values_E: torch.Tensor, examples: np.ndarray) -> torch.Tensor:
    return values_E[torch.from_numpy(examples).to(values_E.device)]


def _like(values_E: torch.Tensor, numbers: np.ndarray) -> torch.Tensor:
    """Numbers where and as the log-probabilities are."""
    return torch.from_numpy(np.asarray(numbers, dtype=np.float64)).to(values_E)
