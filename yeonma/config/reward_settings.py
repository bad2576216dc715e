"""The settings of learning from rewards."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from yeonma.config.ranges import BATCH, COUNT, POSITIVE, Range

PolicyLossName = Literal["grpo", "dr_grpo", "dapo", "gspo", "cispo", "rloo", "reinforce++"]


@dataclass(frozen=True, kw_only=True)
class RewardSettings:
    """Learning from rewards of answers that the model draws itself."""

    reward: list[str] | str
    """What an answer is worth: `exact`, 1 if it is the row's own answer, else 0; `math`, the same for mathematical expressions; `regex:PATTERN`, 1 if all of it matches; `json_schema:FILE`, 1 if it is JSON that the schema allows; `FILE.py:function`, what your function `(row, answer)` returns, a number or a dict of numbers; or a list of several."""
    reward_weights: list[float] | None = None
    """One number for each reward, by which it is multiplied before they are added; 1 by default."""
    group_size: int = field(default=8, metadata={"range": Range(at_least=2, limit=10**4)})
    """Answers that are drawn for each prompt. A step trains on `batch_size` prompts with as many answers each."""
    max_new_tokens: int = field(default=256, metadata=COUNT)
    """Most tokens of an answer."""
    rollout_batch_size: int = field(default=32, metadata=BATCH)
    """Answers to draw at once. Affects memory and speed only."""
    policy_loss: PolicyLossName = "dapo"
    """How rewards become a loss. They differ in what a reward is compared with, in what a token of a long answer counts, and in how the ratio of the probabilities now and at drawing is bounded."""
    clip_low: float | None = field(default=None, metadata=POSITIVE)
    """How far a ratio may fall below 1 before it is bounded; by default, that of the loss's paper."""
    clip_high: float | None = field(default=None, metadata=POSITIVE)
    """How far it may rise above 1."""
    updates_per_rollout: int = field(default=1, metadata={"range": Range(at_least=1, limit=100)})
    """Updates of a step with the answers that it drew."""
