"""The losses of learning from rewards, as pure functions of log-probabilities and rewards.

A group is the answers that were drawn for one prompt. Advantages say how much better than expected an answer was; every
token of an answer has its answer's. Shapes: N drawn tokens, A answers, G answers of a group, P prompts of a step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from yeonma.batch.batch import Batch
from yeonma.train.losses import Objective, Sums, like

SAMPLED_LOGPROB = "sampled_logprob"
"""Token extra: the log-probability of a token when it was drawn."""
TOKEN_SHARE = "share"
"""Token extra: the part that a token's loss has in the loss of the step."""
ADVANTAGE = "advantage"
"""Example extra."""
NEARLY = 0.1
"""A ratio further than this from 1 counts as outside."""
SPREAD_FLOOR = 1e-4
"""Added to a standard deviation before it divides, as in TRL."""

Rewards = NDArray[np.float64]


# ---------------------------------------------------------------------------- advantages


def normalised_by_group(reward_PG: Rewards) -> Rewards:
    """GRPO's advantages (Shao et al. 2024, arXiv:2402.03300): a reward less its group's mean, by the group's standard
    deviation. 0 in a group of equal rewards."""
    spread_P = reward_PG.std(axis=1, ddof=1, keepdims=True) + SPREAD_FLOOR
    return centred_by_group(reward_PG) / spread_P


def centred_by_group(reward_PG: Rewards) -> Rewards:
    """Dr. GRPO's advantages (Liu et al. 2025, arXiv:2503.20783): a reward less its group's mean."""
    equal_P = reward_PG.max(axis=1, keepdims=True) == reward_PG.min(axis=1, keepdims=True)
    return np.where(equal_P, 0.0, reward_PG - reward_PG.mean(axis=1, keepdims=True))


def leave_one_out(reward_PG: Rewards) -> Rewards:
    """RLOO's advantages (Ahmadian et al. 2024, arXiv:2402.14740): a reward less the mean of the group's others."""
    group = reward_PG.shape[1]
    return centred_by_group(reward_PG) * group / (group - 1)


def normalised_by_step(reward_PG: Rewards) -> Rewards:
    """The advantages of REINFORCE++ (Hu et al. 2025, arXiv:2501.03262): a reward less the mean of all of the step's, by
    their standard deviation."""
    if reward_PG.max() == reward_PG.min():
        return np.zeros_like(reward_PG)
    return (reward_PG - reward_PG.mean()) / (reward_PG.std(ddof=1) + SPREAD_FLOOR)


# ---------------------------------------------------------------------------- shares of tokens


def by_answer(tokens_A: NDArray[np.int64], most_tokens: int) -> Rewards:
    """share_A of a token of each answer: the loss is the mean over answers of the mean over an answer's tokens."""
    return 1 / (tokens_A * len(tokens_A))


def by_token(tokens_A: NDArray[np.int64], most_tokens: int) -> Rewards:
    """The loss is the mean over all of the step's drawn tokens (DAPO, Yu et al. 2025, arXiv:2503.14476)."""
    return np.full(len(tokens_A), 1 / tokens_A.sum())


def by_most_tokens(tokens_A: NDArray[np.int64], most_tokens: int) -> Rewards:
    """Every token counts the same, whatever the lengths of the answers (Dr. GRPO): the loss is the mean over answers of
    the sum over an answer's tokens, divided by the most that it may have."""
    return np.full(len(tokens_A), 1 / (most_tokens * len(tokens_A)))


def by_sum(tokens_A: NDArray[np.int64], most_tokens: int) -> Rewards:
    """The loss is the mean over answers of the sum over an answer's tokens."""
    return np.full(len(tokens_A), 1 / len(tokens_A))


# ---------------------------------------------------------------------------- losses of tokens


@dataclass(frozen=True)
class DrawnTokens:
    """Tokens of answers that the policy drew, answer by answer."""

    logprob_N: Tensor
    """The policy's, with gradient."""
    sampled_N: Tensor
    """The same when they were drawn."""
    advantage_N: Tensor
    tokens_A: Sequence[int]
    """How many tokens each answer has."""

    @property
    def ratio_N(self) -> Tensor:
        return (self.logprob_N - self.sampled_N).exp()


@dataclass(frozen=True)
class Clip:
    """The bounds of a ratio: 1 - `low`, 1 + `high`."""

    low: float
    high: float


def clipped(drawn: DrawnTokens, clip: Clip) -> Tensor:
    """loss_N of PPO (Schulman et al. 2017, arXiv:1707.06347): the ratio times the advantage, or the ratio within its
    bounds times the advantage where that is less."""
    ratio_N = drawn.ratio_N
    bounded_N = ratio_N.clamp(1 - clip.low, 1 + clip.high)
    return -torch.minimum(ratio_N * drawn.advantage_N, bounded_N * drawn.advantage_N)


def clipped_by_sequence(drawn: DrawnTokens, clip: Clip) -> Tensor:
    """loss_N of GSPO (Zheng et al. 2025, arXiv:2507.18071): as `clipped`, with one ratio for all tokens of an answer,
    the geometric mean of theirs. Every token carries its part of the ratio's gradient."""
    log_ratio_N = drawn.logprob_N - drawn.sampled_N
    parts = log_ratio_N.split([int(count) for count in drawn.tokens_A])
    ratio_N = torch.cat([part.mean().expand(len(part)) for part in parts]).exp()
    bounded_N = ratio_N.clamp(1 - clip.low, 1 + clip.high)
    return -torch.minimum(ratio_N * drawn.advantage_N, bounded_N * drawn.advantage_N)


def weighted_by_ratio(drawn: DrawnTokens, clip: Clip) -> Tensor:
    """loss_N of CISPO (MiniMax 2025, arXiv:2506.13585): the log-probability times the advantage, weighted by the ratio
    without gradient, which is bounded above alone. No token loses its gradient."""
    weight_N = drawn.ratio_N.detach().clamp(max=1 + clip.high)
    return -weight_N * drawn.advantage_N * drawn.logprob_N


@dataclass(frozen=True)
class PolicyLoss:
    """A loss of learning from rewards."""

    advantages: Callable[[Rewards], Rewards]
    """reward_PG -> advantage_PG"""
    of_tokens: Callable[[DrawnTokens, Clip], Tensor]
    shares: Callable[[NDArray[np.int64], int], Rewards]
    """(tokens of each answer of the step, the most that an answer may have) -> share_A of each of its tokens."""
    clip: Clip = Clip(0.2, 0.2)
    """The bounds of its paper."""


POLICY_LOSSES: Mapping[str, PolicyLoss] = {
    "grpo": PolicyLoss(normalised_by_group, clipped, by_answer),
    "dr_grpo": PolicyLoss(centred_by_group, clipped, by_most_tokens),
    "dapo": PolicyLoss(normalised_by_group, clipped, by_token, Clip(0.2, 0.28)),
    "gspo": PolicyLoss(normalised_by_group, clipped_by_sequence, by_answer, Clip(3e-4, 4e-4)),
    "cispo": PolicyLoss(normalised_by_group, weighted_by_ratio, by_token, Clip(0.2, 4.0)),
    "rloo": PolicyLoss(leave_one_out, clipped, by_sum),
    "reinforce++": PolicyLoss(normalised_by_step, clipped, by_token),
}
"""By the value of `--policy_loss`."""


# ---------------------------------------------------------------------------- the objective

METRICS = ("ratio", "ratio_outside", "clipped", "drawn")


def policy_objective(loss: PolicyLoss, clip: Clip) -> Objective:
    """The objective of answers with the extras ADVANTAGE, SAMPLED_LOGPROB and TOKEN_SHARE."""

    def sums(logprob_N: Tensor, batch: Batch) -> Sums:
        advantages = np.repeat(batch.example_extras[ADVANTAGE], batch.trained_counts_E)
        drawn = DrawnTokens(
            logprob_N,
            like(logprob_N, batch.token_extras[SAMPLED_LOGPROB]),
            like(logprob_N, advantages),
            batch.trained_counts_E.tolist(),
        )
        loss_N = loss.of_tokens(drawn, clip)
        ratio_N = drawn.ratio_N.detach()
        outside_N = (ratio_N - 1).abs() > NEARLY
        beyond_N = torch.where(drawn.advantage_N > 0, ratio_N > 1 + clip.high, ratio_N < 1 - clip.low)
        counts = [ratio_N.sum(), outside_N.sum(), beyond_N.sum(), ratio_N.new_tensor(len(ratio_N))]
        return (loss_N * like(logprob_N, batch.token_extras[TOKEN_SHARE])).sum(), torch.stack(
            [count.to(ratio_N.dtype) for count in counts]
        )

    return Objective("grpo", per_token=False, shares=True, sums=sums, metrics=METRICS, report=_report)


def _report(sums: Mapping[str, float]) -> dict[str, float]:
    """The mean ratio of the step's trained tokens, and the parts of them that lie outside and that are clipped; nothing
    for a step without any."""
    count = sums["drawn"]
    return {name: sums[name] / count for name in METRICS[:-1]} if count else {}
