"""Answers as a run would have drawn them, made up: no model is asked."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tests.models import VOCABULARY
from yeonma.config.reward_settings import PolicyLossName, RewardSettings
from yeonma.train.policy_losses import POLICY_LOSSES
from yeonma.train.rollouts import DrawnAnswer, with_advantages

GROUP = 3
MOST_TOKENS = 9


def reward_settings(loss: PolicyLossName, **more: float) -> RewardSettings:
    return RewardSettings(
        reward="exact", group_size=GROUP, max_new_tokens=MOST_TOKENS, policy_loss=loss, **more
    )


def prompts(count: int, seed: int = 0) -> list[np.ndarray]:
    """Of 20 tokens, of which all share 16."""
    draw = np.random.default_rng(seed)
    start = draw.integers(3, VOCABULARY, 16)
    return [np.concatenate([start, draw.integers(3, VOCABULARY, 4)]).astype(np.int32) for _ in range(count)]


def answers(loss: str, rewards: Sequence[Sequence[float]], seed: int = 0) -> list[DrawnAnswer]:
    """Answers with these rewards, a group a list, and their advantages in a loss. Their log-probabilities are of no
    model."""
    draw = np.random.default_rng(seed + 1)
    made = []
    for unit, group in enumerate(rewards):
        for number, reward in enumerate(group):
            length = int(draw.integers(1, MOST_TOKENS + 1))
            made.append(
                DrawnAnswer(
                    unit=unit,
                    number=number,
                    row=unit + 1,
                    seed=0,
                    token_ids=draw.integers(3, VOCABULARY, length).tolist(),
                    logprobs=(np.log(1 / VOCABULARY) + draw.normal(0, 0.3, length)).tolist(),
                    ended=length < MOST_TOKENS,
                    answer="",
                    reward=reward,
                    rewards={"exact": reward},
                )
            )
    return with_advantages(made, POLICY_LOSSES[loss], GROUP)
