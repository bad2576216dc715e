"""The next token: the most likely one, or one sampled with a random number that depends only on prompt and seed.

Shapes: B rows, V vocabulary.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from yeonma.config.settings import AnswerSettings


@dataclass(frozen=True)
class LogitChanges:
    """What may change a row's logits besides the answer settings, in the words of OpenAI's API and vLLM."""

    logit_bias: tuple[tuple[int, float], ...] = ()
    """(token id, what is added to its logit)."""
    presence_penalty: float = 0.0
    """Taken from the logits of the tokens that the answer has."""
    frequency_penalty: float = 0.0
    """The same, times how often the answer has the token."""
    min_p: float = 0.0
    """Sample only from tokens with at least this share of the most likely token's probability."""


NO_CHANGES = LogitChanges()


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are sampled and what ends an answer.

    `temperature` 0 means greedy decoding. `top_k` 0 and `top_p` 1 turn these filters off. If `stop_ids` is empty, only
    `max_new_tokens` ends an answer.
    """

    stop_ids: tuple[int, ...]
    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    seed: int = 42
    shown_ids: tuple[int, ...] = ()
    """Special tokens that stay in an answer's text, such as those around reasoning."""
    changes: LogitChanges = NO_CHANGES

    @classmethod
    def of(
        cls,
        settings: AnswerSettings,
        stop_ids: Sequence[int],
        shown_ids: Sequence[int] = (),
        changes: LogitChanges = NO_CHANGES,
    ) -> SamplingParams:
        """The parameters of the user's settings, and the tokens that end an answer of this model or stay in its
        text."""
        return cls(
            stop_ids=tuple(stop_ids),
            shown_ids=tuple(shown_ids),
            max_new_tokens=settings.max_new_tokens,
            temperature=settings.temperature,
            top_p=settings.top_p,
            top_k=settings.top_k,
            repetition_penalty=settings.repetition_penalty,
            seed=settings.seed,
            changes=changes,
        )


def uniforms(prompt: Sequence[int], seed: int, count: int) -> np.ndarray:
    """(count,) random numbers in [0, 1) for a prompt and seed; the same on any device, with any version of NumPy."""
    content = np.array([seed, *prompt], dtype="<i8").tobytes()
    key = int.from_bytes(hashlib.sha256(content).digest()[:16], "little")
    raw = np.random.Philox(key=key).random_raw(count)
    return (raw >> np.uint64(11)) * 2.0**-53


def sample(
    logits_BV: torch.Tensor,
    uniform_B: torch.Tensor,
    temperature: float,
    top_p: float,
    top_k: int,
    min_p: float = 0.0,
) -> torch.Tensor:
    """Sample ids_B (B,) by inverse transform: the token at which the cumulative probability, from the most likely token
    on, exceeds the row's number in [0, 1). `min_p` (Nguyen et al. 2024, arXiv:2407.01082) comes before top_k and top_p,
    as in vLLM."""
    logits_BV = logits_BV.double()
    highest = logits_BV.amax(
        dim=1, keepdim=True
    )  # subtracted first, so that a low temperature does not overflow
    probability = torch.softmax((logits_BV - highest) / temperature, dim=1)
    descending, order = probability.sort(dim=1, descending=True, stable=True)
    if min_p:
        descending = descending.where(descending >= min_p * descending[:, :1], 0.0)
        descending /= descending.sum(dim=1, keepdim=True)
    if top_k:
        descending[:, top_k:] = 0
        descending /= descending.sum(dim=1, keepdim=True)
    if top_p < 1:
        descending = descending.where(descending.cumsum(dim=1) - descending < top_p, 0.0)
    cumulative = descending.cumsum(dim=1)
    threshold = uniform_B.unsqueeze(1) * cumulative[:, -1:]
    rank = torch.searchsorted(cumulative, threshold, right=True).clamp(max=logits_BV.shape[1] - 1)
    return order.gather(1, rank).squeeze(1)


def apply_repetition_penalty(logits_BV: torch.Tensor, seen_BV: torch.Tensor, penalty: float) -> torch.Tensor:
    """Lower the logits of tokens that already occurred (Keskar et al. 2019, arXiv:1909.05858)."""
    penalised = torch.where(logits_BV < 0, logits_BV * penalty, logits_BV / penalty)
    return torch.where(seen_BV, penalised, logits_BV)
