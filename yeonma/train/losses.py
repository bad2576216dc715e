"""The training losses, as pure functions of log-probabilities, and a record of what each preference loss needs.

A new preference loss is a function, its record in LOSSES and its name in config/settings.py (docs/extending.md). All
losses are summed over a micro-batch; the step divides once, by its trained tokens, pairs or labelled answers.

Shapes: N trained tokens, P pairs, R labelled answers. Log-probabilities are natural, float32 or better; those of an
answer are summed over its trained tokens, its end token included. A log-ratio is the policy's log-probability less the
reference's; beta times it is the answer's implicit reward (Rafailov et al. 2023, arXiv:2305.18290, section 4).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from yeonma.batch.batch import TOKEN_WEIGHT, Batch
from yeonma.data.task import LABELLED, PAIRS, Task
from yeonma.errors import UserError
from yeonma.tokenization.example import AnswerRole

LOG_BELOW_ONE = -1e-6
"""The highest log-probability for which ORPO computes odds. At 0 they are infinite."""

Sums = tuple[Tensor, Tensor]
"""The loss, a scalar, and M metrics, each summed."""

REFERENCE_LOGPROB = "reference_logprob"
"""Extra of a batch, per example: the reference's log-probability of the whole answer."""
MEASURED_MEAN = "measured_mean"
"""Extra of a batch, per example: the step's mean of the objective's `measure`, the same number for every example."""


@dataclass(frozen=True)
class Objective:
    """A loss as the training step sees it."""

    name: str
    per_token: bool
    """Whether the step divides by the weights of its trained tokens (their number, if none has a weight), or by its
    units."""
    sums: Callable[[Tensor, Batch], Sums]
    """(logprob_N of a micro-batch, the micro-batch) -> sums of the loss and of M metrics."""
    metrics: tuple[str, ...] = ()
    """Names of the M metrics."""
    report: Callable[[Mapping[str, float]], dict[str, float]] = dict
    """The metrics' means over the step -> the metrics to log."""
    measure: Callable[[Tensor, Batch], Tensor] | None = None
    """(logprob_N of mismatched answers, their batch) -> a sum over these answers, without gradient. For a loss that
    needs a mean over the whole step: every micro-batch gets it as the extra MEASURED_MEAN."""


def sft_loss(logprob_N: Tensor, weight_N: Tensor | None = None) -> Tensor:
    """Negative log-likelihood summed over the trained tokens, times their weights if given: a scalar, to be divided by
    the number of tokens or the sum of weights."""
    return -logprob_N.sum() if weight_N is None else -(logprob_N * weight_N).sum()


def _sft_sums(logprob_N: Tensor, batch: Batch) -> Sums:
    weights = batch.token_extras.get(TOKEN_WEIGHT)
    weight_N = None if weights is None else torch.as_tensor(weights).to(logprob_N)
    return sft_loss(logprob_N, weight_N), logprob_N.new_zeros(0)


SFT = Objective("sft", per_token=True, sums=_sft_sums)


@dataclass(frozen=True)
class PreferenceOptions:
    """Hyperparameters of the losses. Each loss reads those in its record's `options`."""

    beta: float = 0.1
    label_smoothing: float = 0.0
    """Assumed fraction of pairs whose labels are flipped, below 0.5."""
    sft_weight: float | None = None
    """Weight of `sft_term`. None: the weight in the loss's paper, which is 1 for cpo and orpo, else 0."""
    simpo_gamma: float = 0.5
    """SimPO's target margin between the two rewards."""
    kto_desirable_weight: float = 1.0
    kto_undesirable_weight: float = 1.0


@dataclass(frozen=True)
class PairLogprobs:
    """The trained model's log-probabilities of P pairs, with their gradient, and the tokens of each answer."""

    chosen_P: Tensor
    rejected_P: Tensor
    chosen_tokens_P: Tensor
    rejected_tokens_P: Tensor

    @property
    def chosen_mean_P(self) -> Tensor:
        """Per token."""
        return self.chosen_P / self.chosen_tokens_P

    @property
    def rejected_mean_P(self) -> Tensor:
        return self.rejected_P / self.rejected_tokens_P


@dataclass(frozen=True)
class ReferenceLogprobs:
    """The frozen reference's log-probabilities of the same pairs."""

    chosen_P: Tensor
    rejected_P: Tensor


def sft_term(policy: PairLogprobs) -> Tensor:
    """Negative log-likelihood of the chosen answer, averaged over its tokens, which Pang et al. 2024, arXiv:2404.19733,
    add to DPO. A pair's weight depends neither on the answer's length nor on other pairs of the micro-batch."""
    return -policy.chosen_mean_P


def log_ratios(policy: PairLogprobs, reference: ReferenceLogprobs | None) -> tuple[Tensor, Tensor]:
    """(chosen_P, rejected_P) of log policy - log reference."""
    if reference is None:
        raise ValueError("this loss needs the reference's log-probabilities")
    return policy.chosen_P - reference.chosen_P, policy.rejected_P - reference.rejected_P


def smoothed_logistic(margin_P: Tensor, label_smoothing: float) -> Tensor:
    """-log sigmoid(margin), its expectation when labels are flipped with that probability: "conservative DPO"
    (Mitchell 2023, "A note on DPO with noisy preferences & relationship to IPO")."""
    return -(1 - label_smoothing) * logsigmoid(margin_P) - label_smoothing * logsigmoid(-margin_P)


def sigmoid_loss(
    policy: PairLogprobs, reference: ReferenceLogprobs | None, options: PreferenceOptions
) -> Tensor:
    """DPO: Rafailov et al. 2023, arXiv:2305.18290, equation 7; with label smoothing the conservative form of it."""
    chosen_P, rejected_P = log_ratios(policy, reference)
    return smoothed_logistic(options.beta * (chosen_P - rejected_P), options.label_smoothing)


def hinge_loss(
    policy: PairLogprobs, reference: ReferenceLogprobs | None, options: PreferenceOptions
) -> Tensor:
    """The hinge loss of SLiC-HF (Zhao et al. 2023, arXiv:2305.10425) on implicit rewards, with a reference as in RSO
    (Liu et al. 2023, arXiv:2309.06657)."""
    chosen_P, rejected_P = log_ratios(policy, reference)
    return torch.relu(1 - options.beta * (chosen_P - rejected_P))


def ipo_loss(policy: PairLogprobs, reference: ReferenceLogprobs | None, options: PreferenceOptions) -> Tensor:
    """IPO: Azar et al. 2023, arXiv:2310.12036, equation 17 with tau = beta, on log-ratios per token of each answer.

    The paper's equation has sums; TRL averages, and says that the paper's authors do too.
    """
    chosen_P, rejected_P = log_ratios(policy, reference)
    margin_P = chosen_P / policy.chosen_tokens_P - rejected_P / policy.rejected_tokens_P
    return (margin_P - 1 / (2 * options.beta)) ** 2


def robust_loss(
    policy: PairLogprobs, reference: ReferenceLogprobs | None, options: PreferenceOptions
) -> Tensor:
    """Robust DPO: Chowdhury et al. 2024, arXiv:2403.00409. Unlike the conservative form it is an unbiased estimate of
    the loss without noise when labels are flipped with probability `label_smoothing`."""
    chosen_P, rejected_P = log_ratios(policy, reference)
    margin_P, flipped = options.beta * (chosen_P - rejected_P), options.label_smoothing
    both = -(1 - flipped) * logsigmoid(margin_P) + flipped * logsigmoid(-margin_P)
    return both / (1 - 2 * flipped)


def apo_zero_loss(
    policy: PairLogprobs, reference: ReferenceLogprobs | None, options: PreferenceOptions
) -> Tensor:
    """APO-zero: D'Oosterlinck et al. 2024, arXiv:2408.06266, equation 7, plus 1, so that it is never negative.

    For chosen answers that are better than the model's own: it raises their probability and lowers the rejected ones'.
    """
    chosen_P, rejected_P = log_ratios(policy, reference)
    return 1 - torch.sigmoid(options.beta * chosen_P) + torch.sigmoid(options.beta * rejected_P)


def apo_down_loss(
    policy: PairLogprobs, reference: ReferenceLogprobs | None, options: PreferenceOptions
) -> Tensor:
    """APO-down: D'Oosterlinck et al. 2024, arXiv:2408.06266, equation 8, plus 1, so that it is never negative.

    For chosen answers that are worse than the model's own: it lowers both probabilities, the rejected one's more.
    """
    chosen_P, rejected_P = log_ratios(policy, reference)
    return 1 + torch.sigmoid(options.beta * chosen_P) - torch.sigmoid(options.beta * (chosen_P - rejected_P))


def simpo_loss(
    policy: PairLogprobs, reference: ReferenceLogprobs | None, options: PreferenceOptions
) -> Tensor:
    """SimPO: Meng et al. 2024, arXiv:2405.14734, equation 6: log-probabilities per token, no reference, a target margin
    gamma between rewards. The paper uses a beta of 2 to 10."""
    margin_P = options.beta * (policy.chosen_mean_P - policy.rejected_mean_P) - options.simpo_gamma
    return smoothed_logistic(margin_P, options.label_smoothing)


def cpo_loss(policy: PairLogprobs, reference: ReferenceLogprobs | None, options: PreferenceOptions) -> Tensor:
    """CPO's preference term: Xu et al. 2024, arXiv:2401.08417, equation 3. The paper adds the supervised term with a
    weight of 1, the default here; that term is a mean over tokens, see `sft_term`."""
    return smoothed_logistic(options.beta * (policy.chosen_P - policy.rejected_P), options.label_smoothing)


def orpo_loss(
    policy: PairLogprobs, reference: ReferenceLogprobs | None, options: PreferenceOptions
) -> Tensor:
    """ORPO's odds ratio term: Hong et al. 2024, arXiv:2403.07691, equations 3, 4 and 7, times the paper's lambda, here
    beta; an answer's probability is the geometric mean over its tokens. The paper adds the supervised term with a
    weight of 1, the default here; it covers the answer alone, not the prompt."""
    odds_P = log_odds(policy.chosen_mean_P) - log_odds(policy.rejected_mean_P)
    return -options.beta * logsigmoid(odds_P)


def log_odds(logprob: Tensor) -> Tensor:
    """log(p / (1 - p)) of log p, which is clamped to LOG_BELOW_ONE; beyond that it has no gradient."""
    logprob = logprob.clamp(max=LOG_BELOW_ONE)
    return logprob - torch.log(-torch.expm1(logprob))


def rewards(
    loss: PreferenceLoss,
    policy: PairLogprobs,
    reference: ReferenceLogprobs | None,
    options: PreferenceOptions,
) -> tuple[Tensor, Tensor]:
    """(chosen_P, rejected_P), without gradient: beta times the log-ratio; for losses without a reference beta times the
    log-probability, per token where the loss is."""
    if loss.needs_reference:
        chosen_P, rejected_P = log_ratios(policy, reference)
    elif loss.per_token_reward:
        chosen_P, rejected_P = policy.chosen_mean_P, policy.rejected_mean_P
    else:
        chosen_P, rejected_P = policy.chosen_P, policy.rejected_P
    return options.beta * chosen_P.detach(), options.beta * rejected_P.detach()


PAIR_METRICS = (
    "reward_chosen",
    "reward_rejected",
    "reward_margin",
    "reward_accuracy",  # pairs whose chosen answer has the higher reward
    "logprob_chosen",
    "logprob_rejected",
    "tokens_chosen",
    "tokens_rejected",
)


def pair_metric_sums(
    loss: PreferenceLoss,
    policy: PairLogprobs,
    reference: ReferenceLogprobs | None,
    options: PreferenceOptions,
) -> Tensor:
    """PAIR_METRICS summed over the pairs, in that order, without gradient; to be divided by the number of pairs."""
    chosen_P, rejected_P = rewards(loss, policy, reference, options)
    columns = (
        chosen_P,
        rejected_P,
        chosen_P - rejected_P,
        (chosen_P > rejected_P).float(),
        policy.chosen_P.detach(),
        policy.rejected_P.detach(),
        policy.chosen_tokens_P.float(),
        policy.rejected_tokens_P.float(),
    )
    return torch.stack([column.sum() for column in columns])


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


def kto_reference_point(mismatched_log_ratio_sum: Tensor, count: int) -> Tensor:
    """KTO's z, a scalar without gradient: max(0, the step's mean log-ratio of prompts with answers to other prompts),
    an estimate of the policy's divergence from the reference.

    `mismatched_log_ratio_sum` is summed over the step's micro-batches and processes; `count` is the number of terms.
    """
    return (mismatched_log_ratio_sum.detach() / count).clamp(min=0)


def kto_losses(answers: LabelledLogprobs, reference_point: Tensor, options: PreferenceOptions) -> Tensor:
    """loss_R of KTO: Ethayarajh et al. 2024, arXiv:2402.01306: lambda - value of each answer. `reference_point` is the
    same for every micro-batch of the step."""
    gain_R = options.beta * (answers.logprob_R - answers.reference_R - reference_point)
    desirable_R = options.kto_desirable_weight * (1 - torch.sigmoid(gain_R))
    undesirable_R = options.kto_undesirable_weight * (1 - torch.sigmoid(-gain_R))
    return torch.where(answers.desirable_R, desirable_R, undesirable_R)


KTO_METRICS = (
    "reward_desirable",
    "logprob_desirable",
    "tokens_desirable",
    "desirable",  # the number of such answers, by which `report_by_label` divides the three above
    "reward_undesirable",
    "logprob_undesirable",
    "tokens_undesirable",
    "undesirable",
    "reward_accuracy",  # answers whose log-ratio lies on their label's side of the reference point
    "reference_point",
)


def kto_metric_sums(answers: LabelledLogprobs, reference_point: Tensor, options: PreferenceOptions) -> Tensor:
    """KTO_METRICS summed over the answers, in that order, without gradient. The reward is beta times the log-ratio."""
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
    """KTO's metrics, where those of a label are averaged over the answers with that label; NaN if there are none."""

    def mean(name: str, value: float) -> float:
        metric, _, label = name.rpartition("_")
        if not metric or label not in ("desirable", "undesirable"):
            return value
        return value / means[label] if means[label] else math.nan

    return {name: mean(name, value) for name, value in means.items()}


@dataclass(frozen=True)
class PreferenceLoss:
    """A preference loss: its function, and what it needs."""

    name: str
    """The value of `--loss`."""
    function: Callable[..., Tensor]
    """Pairs: (PairLogprobs, ReferenceLogprobs | None, PreferenceOptions) -> loss_P, without the supervised term.
    Labelled answers: (LabelledLogprobs, reference point, PreferenceOptions) -> loss_R."""
    options: frozenset[str]
    """The fields of PreferenceOptions that the loss reads. Setting any other is an error."""
    needs_reference: bool = True
    sft_weight: float = 0.0
    """Default weight of `sft_term`, from the paper."""
    per_token_reward: bool = False
    """For losses without a reference: whether rewards are means over the answer's tokens instead of sums, as in the
    loss."""
    task: Task = PAIRS
    """The kind of data that it trains on."""
    metrics: tuple[str, ...] = PAIR_METRICS
    """Names of the sums that `metric_sums` returns."""
    metric_sums: Callable[..., Tensor] = pair_metric_sums
    """Pairs: (PreferenceLoss, PairLogprobs, ReferenceLogprobs | None, PreferenceOptions) -> sums over the pairs.
    Labelled answers: (LabelledLogprobs, reference point, PreferenceOptions) -> sums over the answers."""


_PAIR_OPTIONS = frozenset({"beta", "sft_weight"})
"""Options of every pair loss. Its function does not read sft_weight: `pair_losses` adds the supervised term."""
_SMOOTHED = _PAIR_OPTIONS | {"label_smoothing"}

LOSSES: Mapping[str, PreferenceLoss] = {
    loss.name: loss
    for loss in (
        PreferenceLoss("sigmoid", sigmoid_loss, _SMOOTHED),
        PreferenceLoss("hinge", hinge_loss, _PAIR_OPTIONS),
        PreferenceLoss("ipo", ipo_loss, _PAIR_OPTIONS),
        PreferenceLoss("robust", robust_loss, _SMOOTHED),
        PreferenceLoss("apo_zero", apo_zero_loss, _PAIR_OPTIONS),
        PreferenceLoss("apo_down", apo_down_loss, _PAIR_OPTIONS),
        PreferenceLoss(
            "simpo",
            simpo_loss,
            _SMOOTHED | {"simpo_gamma"},
            needs_reference=False,
            per_token_reward=True,
        ),
        PreferenceLoss("cpo", cpo_loss, _SMOOTHED, needs_reference=False, sft_weight=1.0),
        PreferenceLoss(
            "orpo", orpo_loss, _PAIR_OPTIONS, needs_reference=False, sft_weight=1.0, per_token_reward=True
        ),
        PreferenceLoss(
            "kto",
            kto_losses,
            frozenset({"beta", "kto_desirable_weight", "kto_undesirable_weight"}),
            task=LABELLED,
            metrics=KTO_METRICS,
            metric_sums=kto_metric_sums,
        ),
    )
}
"""All preference losses, by name."""


def preference_loss(name: str) -> PreferenceLoss:
    """The record of a loss. Raises UserError if there is none."""
    if name not in LOSSES:
        cure = "add a PreferenceLoss to LOSSES in yeonma/train/losses.py"
        raise UserError("this loss has no record", place=f"loss {name}", cure=cure)
    return LOSSES[name]


def pair_losses(
    loss: PreferenceLoss,
    policy: PairLogprobs,
    reference: ReferenceLogprobs | None,
    options: PreferenceOptions,
) -> Tensor:
    """loss_P, including the supervised term. `reference` may be None for a loss that needs none."""
    loss_P = loss.function(policy, reference, options)
    weight = loss.sft_weight if options.sft_weight is None else options.sft_weight
    return loss_P + weight * sft_term(policy) if weight else loss_P


def preference_objective(loss: PreferenceLoss, options: PreferenceOptions) -> Objective:
    """The objective of a preference loss. If it needs a reference, batches must have the extra REFERENCE_LOGPROB."""
    return _OBJECTIVES[loss.task.name](loss, options)


def _pair_objective(loss: PreferenceLoss, options: PreferenceOptions) -> Objective:
    def sums(logprob_N: Tensor, batch: Batch) -> Sums:
        chosen, rejected = (
            np.flatnonzero(batch.roles_E == role) for role in (AnswerRole.CHOSEN, AnswerRole.REJECTED)
        )
        if not np.array_equal(batch.units_E[chosen], batch.units_E[rejected]):
            raise ValueError("a micro-batch splits a pair")
        logprob_E = answer_logprobs(logprob_N, batch.trained_counts_E)
        policy = PairLogprobs(
            chosen_P=_at(logprob_E, chosen),
            rejected_P=_at(logprob_E, rejected),
            chosen_tokens_P=_like(logprob_E, batch.trained_counts_E[chosen]),
            rejected_tokens_P=_like(logprob_E, batch.trained_counts_E[rejected]),
        )
        reference = None
        if loss.needs_reference:
            reference_E = batch.example_extras[REFERENCE_LOGPROB]
            reference = ReferenceLogprobs(
                chosen_P=_like(logprob_E, reference_E[chosen]),
                rejected_P=_like(logprob_E, reference_E[rejected]),
            )
        loss_P = pair_losses(loss, policy, reference, options)
        return loss_P.sum(), loss.metric_sums(loss, policy, reference, options)

    return Objective("dpo", per_token=False, sums=sums, metrics=loss.metrics)


def _label_objective(loss: PreferenceLoss, options: PreferenceOptions) -> Objective:
    """Measures the reference point over the whole step before the step trains."""

    def measure(logprob_N: Tensor, batch: Batch) -> Tensor:
        logprob_E = answer_logprobs(logprob_N, batch.trained_counts_E)
        return (logprob_E - _like(logprob_E, batch.example_extras[REFERENCE_LOGPROB])).sum()

    def sums(logprob_N: Tensor, batch: Batch) -> Sums:
        logprob_R = answer_logprobs(logprob_N, batch.trained_counts_E)
        answers = LabelledLogprobs(
            logprob_R=logprob_R,
            reference_R=_like(logprob_R, batch.example_extras[REFERENCE_LOGPROB]),
            tokens_R=_like(logprob_R, batch.trained_counts_E),
            desirable_R=torch.from_numpy(batch.roles_E == AnswerRole.DESIRABLE).to(logprob_R.device),
        )
        mean = _like(logprob_R, batch.example_extras[MEASURED_MEAN][:1]).squeeze(0)
        z = kto_reference_point(mean, 1)
        return loss.function(answers, z, options).sum(), loss.metric_sums(answers, z, options).to(logprob_R)

    return Objective(
        "dpo", per_token=False, sums=sums, metrics=loss.metrics, report=report_by_label, measure=measure
    )


_OBJECTIVES = {PAIRS.name: _pair_objective, LABELLED.name: _label_objective}


def answer_logprobs(logprob_N: Tensor, counts: Sequence[int] | np.ndarray) -> Tensor:
    """logprob_E: the log-probability of each example's whole answer. `counts`: the trained tokens of each example.

    Each sum adds only the example's own tokens, in order, so that other examples do not change its bits.
    """
    return torch.stack([part.sum() for part in logprob_N.split([int(count) for count in counts])])


def _at(values_E: Tensor, examples: np.ndarray) -> Tensor:
    return values_E[torch.from_numpy(examples).to(values_E.device)]


def _like(values_E: Tensor, numbers: np.ndarray) -> Tensor:
    """The numbers as a tensor of the same device and dtype."""
    return torch.from_numpy(np.asarray(numbers, dtype=np.float64)).to(values_E)
