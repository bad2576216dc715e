"""Preference objectives: small pure functions from the log-probabilities of answers to losses. The step sums, and
divides once by the pairs (KTO: rows) of the whole step.

Shapes: P pairs, R rows of one answer each. Log-probabilities are natural, float32 or better, summed over an answer's
trained tokens, its end token included. A log-ratio is the policy's log-probability less the reference's; beta times it
is the answer's implicit reward (Rafailov et al. 2023, arXiv:2305.18290, section 4).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from yeonma.tokenization.example import AnswerRole
from yeonma.tokenization.store import TokenStore

LOG_BELOW_ONE = -1e-6  # the highest log of a probability that ORPO takes the odds of; at 0 they are infinite


@dataclass(frozen=True)
class Logprobs:
    """What the model in training gives P pairs, with its gradient, and how many tokens each sum has."""

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
    """What the frozen reference gives the same pairs: constants."""

    chosen_P: Tensor
    rejected_P: Tensor


@dataclass(frozen=True)
class PreferenceOptions:
    """The numbers that the losses depend on; which loss reads which is in OPTIONS_READ."""

    beta: float = 0.1
    label_smoothing: float = 0.0  # the probability that a pair is labelled the wrong way round, below 0.5
    sft_weight: float | None = (
        None  # of `sft_term`; None: the paper's own, which is 1 for cpo and orpo, else 0
    )
    simpo_gamma: float = 0.5  # the margin that SimPO wants between rewards
    kto_desirable_weight: float = 1.0
    kto_undesirable_weight: float = 1.0


PairLoss = Callable[[Logprobs, ReferenceLogprobs | None, PreferenceOptions], Tensor]
"""-> loss_P. The reference is None for the losses in REFERENCE_FREE, which do not look at it."""


def pair_losses(
    name: str, policy: Logprobs, reference: ReferenceLogprobs | None, options: PreferenceOptions
) -> Tensor:
    """loss_P of the loss of that name, the supervised term included; to be summed and divided by the step's pairs."""
    loss_P = PAIR_LOSSES[name](policy, reference, options)
    weight = SFT_WEIGHT.get(name, 0.0) if options.sft_weight is None else options.sft_weight
    return loss_P + weight * sft_term(policy) if weight else loss_P


def sft_term(policy: Logprobs) -> Tensor:
    """Negative log-likelihood of the chosen answer, a mean over its tokens, as Pang et al. 2024,
    arXiv:2404.19733, add it to DPO. A pair weighs the same whatever its answer's length and whatever else is in its
    micro-batch."""
    return -policy.chosen_mean_P


def log_ratios(policy: Logprobs, reference: ReferenceLogprobs | None) -> tuple[Tensor, Tensor]:
    """(chosen_P, rejected_P) of log policy - log reference."""
    if reference is None:
        raise ValueError("this loss compares with a reference; give its log-probabilities")
    return policy.chosen_P - reference.chosen_P, policy.rejected_P - reference.rejected_P


def smoothed_logistic(margin_P: Tensor, label_smoothing: float) -> Tensor:
    """-log sigmoid(margin), the mean over both ways round that the pair may truly stand: "conservative DPO"
    (Mitchell 2023, "A note on DPO with noisy preferences & relationship to IPO")."""
    return -(1 - label_smoothing) * logsigmoid(margin_P) - label_smoothing * logsigmoid(-margin_P)


def sigmoid_loss(policy: Logprobs, reference: ReferenceLogprobs | None, options: PreferenceOptions) -> Tensor:
    """DPO: Rafailov et al. 2023, arXiv:2305.18290, equation 7; with label smoothing the conservative form of it."""
    chosen_P, rejected_P = log_ratios(policy, reference)
    return smoothed_logistic(options.beta * (chosen_P - rejected_P), options.label_smoothing)


def hinge_loss(policy: Logprobs, reference: ReferenceLogprobs | None, options: PreferenceOptions) -> Tensor:
    """The hinge of SLiC-HF (Zhao et al. 2023, arXiv:2305.10425) on implicit rewards, with a reference as in RSO
    (Liu et al. 2023, arXiv:2309.06657)."""
    chosen_P, rejected_P = log_ratios(policy, reference)
    return torch.relu(1 - options.beta * (chosen_P - rejected_P))


def ipo_loss(policy: Logprobs, reference: ReferenceLogprobs | None, options: PreferenceOptions) -> Tensor:
    """IPO: Azar et al. 2023, arXiv:2310.12036, equation 17 with tau = beta, on log-ratios per token of each answer.

    The paper's equation has the sums; TRL averages, and says that the paper's authors did too.
    """
    chosen_P, rejected_P = log_ratios(policy, reference)
    margin_P = chosen_P / policy.chosen_tokens_P - rejected_P / policy.rejected_tokens_P
    return (margin_P - 1 / (2 * options.beta)) ** 2


def robust_loss(policy: Logprobs, reference: ReferenceLogprobs | None, options: PreferenceOptions) -> Tensor:
    """Robust DPO: Chowdhury et al. 2024, arXiv:2403.00409. Unlike the conservative form it is an unbiased estimate of
    the loss without noise, when labels are flipped with a probability of `label_smoothing`."""
    chosen_P, rejected_P = log_ratios(policy, reference)
    margin_P, flipped = options.beta * (chosen_P - rejected_P), options.label_smoothing
    both = -(1 - flipped) * logsigmoid(margin_P) + flipped * logsigmoid(-margin_P)
    return both / (1 - 2 * flipped)


def apo_zero_loss(
    policy: Logprobs, reference: ReferenceLogprobs | None, options: PreferenceOptions
) -> Tensor:
    """APO-zero: D'Oosterlinck et al. 2024, arXiv:2408.06266, equation 7, plus 1, so that it is never negative.

    For chosen answers that are better than the model's own: makes them likelier and the rejected less likely.
    """
    chosen_P, rejected_P = log_ratios(policy, reference)
    return 1 - torch.sigmoid(options.beta * chosen_P) + torch.sigmoid(options.beta * rejected_P)


def apo_down_loss(
    policy: Logprobs, reference: ReferenceLogprobs | None, options: PreferenceOptions
) -> Tensor:
    """APO-down: D'Oosterlinck et al. 2024, arXiv:2408.06266, equation 8, plus 1, so that it is never negative.

    For chosen answers that are worse than the model's own: makes both less likely, the rejected more so.
    """
    chosen_P, rejected_P = log_ratios(policy, reference)
    return 1 + torch.sigmoid(options.beta * chosen_P) - torch.sigmoid(options.beta * (chosen_P - rejected_P))


def simpo_loss(policy: Logprobs, reference: ReferenceLogprobs | None, options: PreferenceOptions) -> Tensor:
    """SimPO: Meng et al. 2024, arXiv:2405.14734, equation 6: log-probabilities per token, no reference, a margin
    gamma between rewards. The paper's runs have a beta of 2 to 10."""
    margin_P = options.beta * (policy.chosen_mean_P - policy.rejected_mean_P) - options.simpo_gamma
    return smoothed_logistic(margin_P, options.label_smoothing)


def cpo_loss(policy: Logprobs, reference: ReferenceLogprobs | None, options: PreferenceOptions) -> Tensor:
    """CPO's preference term: Xu et al. 2024, arXiv:2401.08417, equation 3. The paper adds the supervised term, with a
    weight of 1, which is the default here; the term is a mean over tokens, see `sft_term`."""
    return smoothed_logistic(options.beta * (policy.chosen_P - policy.rejected_P), options.label_smoothing)


def orpo_loss(policy: Logprobs, reference: ReferenceLogprobs | None, options: PreferenceOptions) -> Tensor:
    """ORPO's odds ratio term: Hong et al. 2024, arXiv:2403.07691, equations 3, 4 and 7, times the paper's lambda, here
    beta; an answer's probability is the geometric mean over its tokens. The paper adds the supervised term, with a
    weight of 1, which is the default here; it is taken over the answer alone, not over the prompt."""
    odds_P = log_odds(policy.chosen_mean_P) - log_odds(policy.rejected_mean_P)
    return -options.beta * logsigmoid(odds_P)


def log_odds(logprob: Tensor) -> Tensor:
    """log(p / (1 - p)) for log p; a p nearer to 1 than LOG_BELOW_ONE counts as that, with no gradient."""
    logprob = logprob.clamp(max=LOG_BELOW_ONE)
    return logprob - torch.log(-torch.expm1(logprob))


PAIR_LOSSES: Mapping[str, PairLoss] = {
    "sigmoid": sigmoid_loss,
    "hinge": hinge_loss,
    "ipo": ipo_loss,
    "robust": robust_loss,
    "apo_zero": apo_zero_loss,
    "apo_down": apo_down_loss,
    "simpo": simpo_loss,
    "cpo": cpo_loss,
    "orpo": orpo_loss,
}
"""The preference term alone; `pair_losses` adds the supervised one."""

REFERENCE_FREE = frozenset({"simpo", "cpo", "orpo"})
SFT_WEIGHT: Mapping[str, float] = {"cpo": 1.0, "orpo": 1.0}  # the papers' own
PER_TOKEN_REWARD = frozenset({"simpo", "orpo"})  # whose losses look at log-probabilities per token

OPTIONS_READ: Mapping[str, frozenset[str]] = {
    **{name: frozenset({"beta", "sft_weight"}) for name in PAIR_LOSSES},
    **{name: frozenset({"beta", "sft_weight", "label_smoothing"}) for name in ("sigmoid", "robust", "cpo")},
    "simpo": frozenset({"beta", "sft_weight", "label_smoothing", "simpo_gamma"}),
    "kto": frozenset({"beta", "kto_desirable_weight", "kto_undesirable_weight"}),
}
"""Which fields of PreferenceOptions change a loss: setting another one is a mistake."""


def rewards(
    name: str, policy: Logprobs, reference: ReferenceLogprobs | None, options: PreferenceOptions
) -> tuple[Tensor, Tensor]:
    """(chosen_P, rejected_P), without gradient: beta times the log-ratio; beta times the log-probability for losses
    without a reference, per token where the loss is."""
    if name not in REFERENCE_FREE:
        chosen_P, rejected_P = log_ratios(policy, reference)
    elif name in PER_TOKEN_REWARD:
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
    name: str, policy: Logprobs, reference: ReferenceLogprobs | None, options: PreferenceOptions
) -> Tensor:
    """PAIR_METRICS summed over the pairs, in that order, without gradient; to be divided by their count."""
    chosen_P, rejected_P = rewards(name, policy, reference, options)
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
    """R answers that are each known to be wanted or not, with what the policy (its gradient too) and the reference
    give them."""

    logprob_R: Tensor
    reference_R: Tensor
    tokens_R: Tensor
    desirable_R: Tensor  # bool


def kto_reference_point(mismatched_log_ratio_sum: Tensor, count: int) -> Tensor:
    """KTO's z, a scalar without gradient: max(0, the mean log-ratio over the whole step of prompts with
    answers that belong to other prompts of it), an estimate of the policy's divergence from the reference.

    `mismatched_log_ratio_sum` is summed over the step's micro-batches and processes, `count` the number of its terms.
    """
    return (mismatched_log_ratio_sum.detach() / count).clamp(min=0)


def kto_losses(rows: LabelledLogprobs, reference_point: Tensor, options: PreferenceOptions) -> Tensor:
    """loss_R of KTO: Ethayarajh et al. 2024, arXiv:2402.01306: lambda - value of each row; to be summed and divided by
    the step's rows. The same `reference_point` for every micro-batch of the step."""
    gain_R = options.beta * (rows.logprob_R - rows.reference_R - reference_point)
    desirable_R = options.kto_desirable_weight * (1 - torch.sigmoid(gain_R))
    undesirable_R = options.kto_undesirable_weight * (1 - torch.sigmoid(-gain_R))
    return torch.where(rows.desirable_R, desirable_R, undesirable_R)


KTO_METRICS = (
    "reward_desirable",
    "logprob_desirable",
    "tokens_desirable",
    "desirable",  # rows: what the three before are to be divided by
    "reward_undesirable",
    "logprob_undesirable",
    "tokens_undesirable",
    "undesirable",
    "reward_accuracy",  # rows whose log-ratio is on the side of the reference point that their label says; of all
)


def kto_metric_sums(rows: LabelledLogprobs, reference_point: Tensor, options: PreferenceOptions) -> Tensor:
    """KTO_METRICS summed over the rows, in that order, without gradient. The reward is beta times the
    log-ratio, as for pairs."""
    log_ratio_R = (rows.logprob_R - rows.reference_R).detach()
    columns = (
        options.beta * log_ratio_R,
        rows.logprob_R.detach(),
        rows.tokens_R,
        torch.ones_like(log_ratio_R),
    )
    sums = [(column * wanted).sum() for wanted in (rows.desirable_R, ~rows.desirable_R) for column in columns]
    right_R = torch.where(rows.desirable_R, log_ratio_R > reference_point, log_ratio_R < reference_point)
    return torch.stack([*sums, right_R.to(log_ratio_R.dtype).sum()])


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
    """A loss of `yeonma.train.losses` over pairs. `references` may be empty for one that needs none."""

    def sums(
        logprob_N: torch.Tensor, store: TokenStore, examples: np.ndarray, point: torch.Tensor | None
    ) -> Sums:
        roles, units = store.roles[examples], store.units[examples]
        chosen, rejected = (
            np.flatnonzero(roles == role) for role in (AnswerRole.CHOSEN, AnswerRole.REJECTED)
        )
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
            desirable_R=torch.from_numpy(store.roles[examples] == AnswerRole.DESIRABLE).to(logprob_R.device),
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
