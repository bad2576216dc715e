"""The losses of preference pairs, as pure functions of log-probabilities.

Shapes: P pairs. A log-ratio is the policy's log-probability of an answer less the reference's; beta times it is the
answer's implicit reward (Rafailov et al. 2023, arXiv:2305.18290, section 4).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import logsigmoid

from yeonma.batch.batch import Batch, Extras
from yeonma.tokenization.example import AnswerRole
from yeonma.train.losses import StepMeasure, at

LOG_BELOW_ONE = -1e-6
"""The highest log-probability for which ORPO computes odds. At 0 they are infinite."""
MOST_EXPONENT = 80.0
"""Exponents of log-ratios are clamped to this."""
AOT_REFERENCE, AOT_CHOSEN, AOT_REJECTED = "aot_reference", "aot_chosen", "aot_rejected"
"""Extras of a batch, see `aot_loss` and `aot_unpaired_loss`."""


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
    discopop_tau: float = 0.05
    """DiscoPOP's temperature."""
    f_divergence: str = "reverse_kl"
    """A name in `DIVERGENCES`."""
    f_alpha: float = 0.5
    """The alpha of the divergence "alpha"."""
    wpo_weights: bool = False
    """Whether pairs have the weights of WPO."""
    kto_desirable_weight: float = 1.0
    kto_undesirable_weight: float = 1.0


@dataclass(frozen=True)
class PairLogprobs:
    """The trained model's log-probabilities of P pairs, with their gradient, and the tokens of each answer."""

    chosen_P: Tensor
    rejected_P: Tensor
    chosen_tokens_P: Tensor
    rejected_tokens_P: Tensor
    weight_P: Tensor | None = None
    """WPO's weights, without gradient (`wpo_weights`)."""
    step: Mapping[str, Tensor] = field(default_factory=dict)
    """Numbers of shape (P,) that follow from the whole step (`StepMeasure`)."""

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


def _forward_kl(log_ratio: Tensor, alpha: float) -> Tensor:
    return 1 - torch.exp((-log_ratio).clamp(max=MOST_EXPONENT))


def _js(log_ratio: Tensor, alpha: float) -> Tensor:
    return math.log(2) + logsigmoid(log_ratio)


def _alpha(log_ratio: Tensor, alpha: float) -> Tensor:
    if abs(alpha - 1) < 1e-6:
        return log_ratio
    return torch.expm1(((alpha - 1) * log_ratio).clamp(max=MOST_EXPONENT)) / (alpha - 1)


DIVERGENCES: Mapping[str, Callable[[Tensor, float], Tensor]] = {
    "reverse_kl": lambda log_ratio, alpha: log_ratio,
    "forward_kl": _forward_kl,
    "js": _js,
    "alpha": _alpha,
}
"""f'(ratio) of each divergence, from the log of the ratio: Wang et al. 2023, arXiv:2309.16240, table 1."""


def wpo_weights(aligned_E: Tensor, chosen: NDArray[np.int64], rejected: NDArray[np.int64]) -> Tensor:
    """weight_P of WPO: Zhou et al. 2024, arXiv:2406.11827, equation 2 with its sampled alignment: the product of both
    answers' weights.

    `aligned_E`: per answer the mean over its tokens of log p - log of the sum of all tokens' p squared, without
    gradient.
    """
    return torch.exp(at(aligned_E, chosen) + at(aligned_E, rejected))


def scores(
    policy: PairLogprobs, reference: ReferenceLogprobs | None, options: PreferenceOptions
) -> tuple[Tensor, Tensor]:
    """(chosen_P, rejected_P): the log-ratios, or f' of the ratios for another divergence than the reverse KL (f-DPO,
    Wang et al. 2023, arXiv:2309.16240). Only their difference means anything: the rest of f-DPO's reward is the same
    for all answers to a prompt."""
    chosen_P, rejected_P = log_ratios(policy, reference)
    slope = DIVERGENCES[options.f_divergence]
    return slope(chosen_P, options.f_alpha), slope(rejected_P, options.f_alpha)


def smoothed_logistic(margin_P: Tensor, label_smoothing: float) -> Tensor:
    """-log sigmoid(margin), its expectation when labels are flipped with that probability: "conservative DPO"
    (Mitchell 2023, "A note on DPO with noisy preferences & relationship to IPO")."""
    return -(1 - label_smoothing) * logsigmoid(margin_P) - label_smoothing * logsigmoid(-margin_P)


def sigmoid_loss(
    policy: PairLogprobs, reference: ReferenceLogprobs | None, options: PreferenceOptions
) -> Tensor:
    """DPO: Rafailov et al. 2023, arXiv:2305.18290, equation 7; with label smoothing the conservative form of it."""
    chosen_P, rejected_P = scores(policy, reference, options)
    return smoothed_logistic(options.beta * (chosen_P - rejected_P), options.label_smoothing)


def hinge_loss(
    policy: PairLogprobs, reference: ReferenceLogprobs | None, options: PreferenceOptions
) -> Tensor:
    """The hinge loss of SLiC-HF (Zhao et al. 2023, arXiv:2305.10425) on implicit rewards, with a reference as in RSO
    (Liu et al. 2023, arXiv:2309.06657)."""
    chosen_P, rejected_P = scores(policy, reference, options)
    return torch.relu(1 - options.beta * (chosen_P - rejected_P))


def ipo_loss(policy: PairLogprobs, reference: ReferenceLogprobs | None, options: PreferenceOptions) -> Tensor:
    """IPO: Azar et al. 2023, arXiv:2310.12036, equation 17 with tau = beta, on log-ratios per token of each answer.

    The paper's equation has sums; TRL averages, and says that the paper's authors do too.
    """
    chosen_P, rejected_P = scores(policy, reference, options)
    margin_P = chosen_P / policy.chosen_tokens_P - rejected_P / policy.rejected_tokens_P
    return (margin_P - 1 / (2 * options.beta)) ** 2


def robust_loss(
    policy: PairLogprobs, reference: ReferenceLogprobs | None, options: PreferenceOptions
) -> Tensor:
    """Robust DPO: Chowdhury et al. 2024, arXiv:2403.00409. Unlike the conservative form it is an unbiased estimate of
    the loss without noise when labels are flipped with probability `label_smoothing`."""
    chosen_P, rejected_P = scores(policy, reference, options)
    margin_P, flipped = options.beta * (chosen_P - rejected_P), options.label_smoothing
    both = -(1 - flipped) * logsigmoid(margin_P) + flipped * logsigmoid(-margin_P)
    return both / (1 - 2 * flipped)


def sigmoid_norm_loss(
    policy: PairLogprobs, reference: ReferenceLogprobs | None, options: PreferenceOptions
) -> Tensor:
    """Length-normalised DPO: Lambert et al. 2024 (Tulu 3), arXiv:2411.15124: DPO on log-ratios per token of each
    answer. The paper uses a beta of 5."""
    chosen_P, rejected_P = scores(policy, reference, options)
    margin_P = chosen_P / policy.chosen_tokens_P - rejected_P / policy.rejected_tokens_P
    return smoothed_logistic(options.beta * margin_P, options.label_smoothing)


def exo_pair_loss(
    policy: PairLogprobs, reference: ReferenceLogprobs | None, options: PreferenceOptions
) -> Tensor:
    """EXO for pairs: Ji et al. 2024, arXiv:2402.00856, equation 16: the reverse KL divergence of the model's preference
    from (1 - e, e), where e is `label_smoothing`, which must be above 0."""
    chosen_P, rejected_P = scores(policy, reference, options)
    margin_P, e = options.beta * (chosen_P - rejected_P), options.label_smoothing
    log_chosen_P, log_rejected_P = logsigmoid(margin_P), logsigmoid(-margin_P)
    return log_chosen_P.exp() * (log_chosen_P - math.log1p(-e)) + log_rejected_P.exp() * (
        log_rejected_P - math.log(e)
    )


def nca_pair_loss(
    policy: PairLogprobs, reference: ReferenceLogprobs | None, options: PreferenceOptions
) -> Tensor:
    """NCA for pairs: Chen et al. 2024, arXiv:2402.05369: it raises the chosen answer's reward and keeps both rewards
    from growing without bound."""
    chosen_P, rejected_P = log_ratios(policy, reference)
    chosen_P, rejected_P = options.beta * chosen_P, options.beta * rejected_P
    return -logsigmoid(chosen_P) - 0.5 * (logsigmoid(-chosen_P) + logsigmoid(-rejected_P))


def bco_pair_loss(
    policy: PairLogprobs, reference: ReferenceLogprobs | None, options: PreferenceOptions
) -> Tensor:
    """BCO (Jung et al. 2024, arXiv:2404.04656) on the two answers of a pair, with a reward shift of 0, as in TRL. The
    labelled form, `bco`, has the paper's reward shift."""
    chosen_P, rejected_P = log_ratios(policy, reference)
    return -logsigmoid(options.beta * chosen_P) - logsigmoid(-options.beta * rejected_P)


def sppo_hard_loss(
    policy: PairLogprobs, reference: ReferenceLogprobs | None, options: PreferenceOptions
) -> Tensor:
    """SPPO: Wu et al. 2024, arXiv:2405.00675, equation 4.7 with the probability that the chosen answer wins set to 1,
    and 1 / beta as the paper's eta."""
    chosen_P, rejected_P = log_ratios(policy, reference)
    return (chosen_P - 0.5 / options.beta) ** 2 + (rejected_P + 0.5 / options.beta) ** 2


def aot_loss(policy: PairLogprobs, reference: ReferenceLogprobs | None, options: PreferenceOptions) -> Tensor:
    """AOT, paired: Melnyk et al. 2024, arXiv:2406.05882. The policy's margins of a step, sorted, should lie above the
    reference's margins, sorted: a pair is compared with the reference's margin of the same rank in the step
    (`AOT_MEASURE`), which is not always its own."""
    margin_P = policy.chosen_P - policy.rejected_P - policy.step[AOT_REFERENCE]
    return smoothed_logistic(options.beta * margin_P, options.label_smoothing)


def aot_unpaired_loss(
    policy: PairLogprobs, reference: ReferenceLogprobs | None, options: PreferenceOptions
) -> Tensor:
    """AOT, unpaired: Melnyk et al. 2024, arXiv:2406.05882. The chosen answers' log-ratios of a step, sorted, should lie
    above the rejected ones', sorted.

    The two of one rank may lie in different micro-batches, so that each is compared with the number measured for the
    other (`AOT_UNPAIRED_MEASURE`). Each side then has half of the loss, and all of its own gradient.
    """
    chosen_P, rejected_P = log_ratios(policy, reference)
    margins_P = (chosen_P - policy.step[AOT_REJECTED], policy.step[AOT_CHOSEN] - rejected_P)
    sides_P = [smoothed_logistic(options.beta * side_P, options.label_smoothing) for side_P in margins_P]
    half_P = (sides_P[0] + sides_P[1]) / 2
    return half_P + (half_P - half_P.detach())


def discopop_loss(
    policy: PairLogprobs, reference: ReferenceLogprobs | None, options: PreferenceOptions
) -> Tensor:
    """DiscoPOP's log-ratio modulated loss: Lu et al. 2024, arXiv:2406.08414, equation 5: between the logistic and the
    exponential loss, by sigmoid(margin / tau). With a small tau it is not monotone: near a margin of 0 it rises."""
    chosen_P, rejected_P = scores(policy, reference, options)
    margin_P = options.beta * (chosen_P - rejected_P)
    scaled_P = margin_P / options.discopop_tau
    # exp(-margin) * sigmoid(scaled), without overflow where the margin is far below 0
    exponential_P = torch.exp(logsigmoid(scaled_P) - margin_P)
    return exponential_P - torch.sigmoid(-scaled_P) * logsigmoid(margin_P)


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


def chosen_sft_loss(
    policy: PairLogprobs, reference: ReferenceLogprobs | None, options: PreferenceOptions
) -> Tensor:
    """Supervised training on the chosen answers alone, for sums with other losses: `sft_term`."""
    return sft_term(policy)


def log_odds(logprob: Tensor) -> Tensor:
    """log(p / (1 - p)) of log p, which is clamped to LOG_BELOW_ONE; beyond that it has no gradient."""
    logprob = logprob.clamp(max=LOG_BELOW_ONE)
    return logprob - torch.log(-torch.expm1(logprob))


def rewards(
    policy: PairLogprobs,
    reference: ReferenceLogprobs | None,
    options: PreferenceOptions,
    *,
    per_token: bool,
) -> tuple[Tensor, Tensor]:
    """(chosen_P, rejected_P), without gradient: beta times the log-ratio; without a reference beta times the
    log-probability, which `per_token` divides by the answer's tokens."""
    if reference is not None:
        chosen_P, rejected_P = log_ratios(policy, reference)
    elif per_token:
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
    policy: PairLogprobs,
    reference: ReferenceLogprobs | None,
    options: PreferenceOptions,
    *,
    per_token: bool,
) -> Tensor:
    """PAIR_METRICS summed over the pairs, in that order, without gradient; to be divided by the number of pairs.
    `per_token` as in `rewards`."""
    chosen_P, rejected_P = rewards(policy, reference, options, per_token=per_token)
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


def pairs_of(batch: Batch) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The positions of the chosen and of the rejected examples, pair by pair."""
    chosen, rejected = (
        np.flatnonzero(batch.roles_E == role) for role in (AnswerRole.CHOSEN, AnswerRole.REJECTED)
    )
    if not np.array_equal(batch.units_E[chosen], batch.units_E[rejected]):
        raise ValueError("a micro-batch splits a pair")
    return chosen, rejected


def _same_rank(values_P: NDArray[np.float64], others_P: NDArray[np.float64]) -> NDArray[np.float64]:
    """For each value the one of `others_P` that has the same rank. Equal values keep their order."""
    found = np.empty_like(others_P)
    found[np.argsort(values_P, kind="stable")] = np.sort(others_P)
    return found


def _by_example(batch: Batch, values_P: NDArray[np.float64]) -> NDArray[np.float64]:
    return values_P[batch.units_E]


def _aot_extras(batch: Batch, logprob_E: NDArray[np.float64], reference_E: NDArray[np.float64]) -> Extras:
    chosen, rejected = pairs_of(batch)
    margins = (values[chosen] - values[rejected] for values in (logprob_E, reference_E))
    return {AOT_REFERENCE: _by_example(batch, _same_rank(*margins))}


def _aot_unpaired_extras(
    batch: Batch, logprob_E: NDArray[np.float64], reference_E: NDArray[np.float64]
) -> Extras:
    chosen, rejected = ((logprob_E - reference_E)[side] for side in pairs_of(batch))
    return {
        AOT_REJECTED: _by_example(batch, _same_rank(chosen, rejected)),
        AOT_CHOSEN: _by_example(batch, _same_rank(rejected, chosen)),
    }


def _itself(batch: Batch, cutoff_len: int) -> Batch:
    return batch


AOT_MEASURE = StepMeasure(_itself, False, _aot_extras, (AOT_REFERENCE,))
"""The reference's margin of the same rank as the pair's own among the step's."""
AOT_UNPAIRED_MEASURE = StepMeasure(_itself, False, _aot_unpaired_extras, (AOT_REJECTED, AOT_CHOSEN))
"""The other side's log-ratio of the same rank as the answer's own among the step's."""
