"""The losses of labelled answers, as pure functions of log-probabilities.

Shapes: R labelled answers. A log-ratio is the policy's log-probability of an answer less the reference's; beta times it
is the answer's implicit reward.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import logsigmoid

from yeonma.batch.batch import Batch, Extras
from yeonma.train.losses import Carried, StepMeasure
from yeonma.train.pair_losses import PreferenceOptions

REFERENCE_POINT = "reference_point"
"""Extra of a batch, and a metric: the log-ratio at which an answer's gain is 0."""
REWARD_SUM, REWARD_COUNT = "reward_sum", "reward_count"
"""Extras of a batch, and what `bco` carries: the rewards of all answers of the steps before, and their number."""


@dataclass(frozen=True)
class LabelledLogprobs:
    """Log-probabilities of R answers, each labelled desirable or not: the policy's, with their gradient, and the
    reference's."""

    logprob_R: Tensor
    reference_R: Tensor
    tokens_R: Tensor
    """Trained tokens of each answer."""
    desirable_R: Tensor
    """bool"""
    step: Mapping[str, Tensor]
    """Numbers that follow from the whole step (`StepMeasure`) or from earlier ones, scalars."""


def kto_point(answers: LabelledLogprobs, options: PreferenceOptions) -> Tensor:
    """KTO's z, a scalar without gradient, the same for every micro-batch of the step (`KTO_MEASURE`)."""
    return answers.step[REFERENCE_POINT]


def no_point(answers: LabelledLogprobs, options: PreferenceOptions) -> Tensor:
    return answers.logprob_R.new_zeros(())


def bco_point(answers: LabelledLogprobs, options: PreferenceOptions) -> Tensor:
    """BCO's reward shift as a log-ratio: the mean reward of the steps before, divided by beta; 0 in the first step."""
    count = answers.step[REWARD_COUNT].clamp(min=1)
    return answers.step[REWARD_SUM] / count / options.beta


def _weighted(
    answers: LabelledLogprobs, desirable_R: Tensor, undesirable_R: Tensor, options: PreferenceOptions
) -> Tensor:
    """loss_R: each answer's loss by its label, times the label's weight."""
    return torch.where(
        answers.desirable_R,
        options.kto_desirable_weight * desirable_R,
        options.kto_undesirable_weight * undesirable_R,
    )


def kto_loss(answers: LabelledLogprobs, options: PreferenceOptions) -> Tensor:
    """loss_R of KTO: Ethayarajh et al. 2024, arXiv:2402.01306: lambda - value of each answer."""
    gain_R = options.beta * (answers.logprob_R - answers.reference_R - kto_point(answers, options))
    return _weighted(answers, 1 - torch.sigmoid(gain_R), 1 - torch.sigmoid(-gain_R), options)


def apo_zero_unpaired_loss(answers: LabelledLogprobs, options: PreferenceOptions) -> Tensor:
    """loss_R of APO-zero (D'Oosterlinck et al. 2024, arXiv:2408.06266, equation 7) on single answers: KTO's with a
    reference point of 0."""
    reward_R = options.beta * (answers.logprob_R - answers.reference_R)
    return _weighted(answers, 1 - torch.sigmoid(reward_R), torch.sigmoid(reward_R), options)


def bco_loss(answers: LabelledLogprobs, options: PreferenceOptions) -> Tensor:
    """loss_R of BCO: Jung et al. 2024, arXiv:2404.04656: a binary classifier of good and bad answers, whose logit is
    the reward less a shift, the running mean of all rewards so far (`bco_point`).

    The paper's second part, weights of undesirable answers by a classifier of their prompts (density ratio), is not
    here: it needs a second model. `kto_undesirable_weight` is one weight for all of them.
    """
    logit_R = options.beta * (answers.logprob_R - answers.reference_R - bco_point(answers, options))
    return _weighted(answers, -logsigmoid(logit_R), -logsigmoid(-logit_R), options)


def bco_carry(carried: Carried, means: Mapping[str, float], units: int) -> Carried:
    """The sum of all rewards so far and their number."""
    rewards = units * (means["reward_desirable"] + means["reward_undesirable"])
    return {REWARD_SUM: carried[REWARD_SUM] + rewards, REWARD_COUNT: carried[REWARD_COUNT] + units}


BCO_START: Carried = {REWARD_SUM: 0.0, REWARD_COUNT: 0.0}


LABEL_METRICS = (
    "reward_desirable",
    "logprob_desirable",
    "tokens_desirable",
    "desirable",  # the number of such answers, by which `report_by_label` divides the three above
    "reward_undesirable",
    "logprob_undesirable",
    "tokens_undesirable",
    "undesirable",
    "reward_accuracy",  # answers whose log-ratio lies on their label's side of the reference point
    REFERENCE_POINT,
)


def label_metric_sums(
    answers: LabelledLogprobs, reference_point: Tensor, options: PreferenceOptions
) -> Tensor:
    """LABEL_METRICS summed over the answers, in that order, without gradient. The reward is beta times the
    log-ratio."""
    log_ratio_R = (answers.logprob_R - answers.reference_R).detach()
    columns = (
        options.beta * log_ratio_R,
        answers.logprob_R.detach(),
        answers.tokens_R,
        torch.ones_like(log_ratio_R),
    )
    labels = (answers.desirable_R, ~answers.desirable_R)
    sums = [(column * label_R).sum() for label_R in labels for column in columns]
    right_R = torch.where(answers.desirable_R, log_ratio_R > reference_point, log_ratio_R < reference_point)
    right = right_R.to(log_ratio_R.dtype).sum()
    return torch.stack([*sums, right, reference_point * len(log_ratio_R)])


def report_by_label(means: Mapping[str, float]) -> dict[str, float]:
    """LABEL_METRICS, where those of a label are averaged over the answers with that label; NaN if there are none."""

    def mean(name: str, value: float) -> float:
        metric, _, label = name.rpartition("_")
        if not metric or label not in ("desirable", "undesirable"):
            return value
        return value / means[label] if means[label] else math.nan

    return {name: mean(name, value) for name, value in means.items()}


def other_answers(prompts: Sequence[Hashable]) -> NDArray[np.int64]:
    """For each row of a step, the row whose answer its prompt is paired with to estimate KTO's reference point: the row
    before, and the last one for the first. Empty for a single row.

    No prompt meets an answer to itself while the step has another prompt: rows with one prompt are put side by side and
    turned by as many as the most frequent prompt has. Every answer is then taken once. That is impossible for a prompt
    of more than half of the rows: its rows take the others' answers in turn, and the others take answers of its rows.
    """
    count = len(prompts)
    if count < 2:
        return np.zeros(0, dtype=np.int64)
    rows_by_prompt: dict[Hashable, list[int]] = {}
    for row, prompt in enumerate(prompts):
        rows_by_prompt.setdefault(prompt, []).append(row)
    largest = max(rows_by_prompt.values(), key=len)
    order = np.array([row for rows in rows_by_prompt.values() for row in rows])
    found = np.empty(count, dtype=np.int64)
    if len(largest) == count or 2 * len(largest) <= count:
        found[order] = np.roll(order, 1 if len(largest) == count else len(largest))
        return found
    others = [row for row in range(count) if row not in set(largest)]
    found[largest] = np.resize(np.array(others), len(largest))
    found[others] = largest[: len(others)]
    return found


def mismatched_answers(batch: Batch, cutoff_len: int) -> Batch:
    """Each prompt of the step with the answer of another row (`other_answers`), cut to `cutoff_len` tokens."""
    ends = batch.starts_E + batch.prompt_lengths_E
    prompts = [
        batch.flat_token_ids[start:end].tobytes()
        for start, end in zip(batch.starts_E.tolist(), ends.tolist(), strict=True)
    ]
    return batch.with_answers_of(other_answers(prompts), cutoff_len)


def _kto_extras(batch: Batch, logprob_E: NDArray[np.float64], reference_E: NDArray[np.float64]) -> Extras:
    mean = float((logprob_E - reference_E).mean()) if len(logprob_E) else 0.0
    return {REFERENCE_POINT: np.full(len(batch), max(0.0, mean))}


KTO_MEASURE = StepMeasure(mismatched_answers, True, _kto_extras, (REFERENCE_POINT,))
"""KTO's z: max(0, the step's mean log-ratio of prompts with answers to other prompts), an estimate of the policy's
divergence from the reference. The answers are those of the step, so that its noise is that of the step's own
log-ratios, for the most part."""
