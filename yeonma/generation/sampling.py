"""The next token: the likeliest one, or one drawn by a number that follows from prompt and seed alone.

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
class SamplingParams:
    """How the next token is chosen, and what ends an answer.

    At `temperature` 0 the likeliest token is taken. `top_k` 0 and `top_p` 1 leave all tokens possible. `stop_ids` may
    be empty: then only `max_new_tokens` ends an answer.
    """

    stop_ids: tuple[int, ...]
    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    seed: int = 42

    @classmethod
    def of(cls, settings: AnswerSettings, stop_ids: Sequence[int]) -> SamplingParams:
        """What a user asked for, with the tokens that end an answer of this model."""
        return cls(
            stop_ids=tuple(stop_ids),
            max_new_tokens=settings.max_new_tokens,
            temperature=settings.temperature,
            top_p=settings.top_p,
            top_k=settings.top_k,
            repetition_penalty=settings.repetition_penalty,
            seed=settings.seed,
        )


def uniforms(prompt: Sequence[int], seed: int, count: int) -> np.ndarray:
    """(count,) numbers in [0, 1) that follow from prompt and seed, the same on every device and with every NumPy."""
    content = np.array([seed, *prompt], dtype="<i8").tobytes()
    key = int.from_bytes(hashlib.sha256(content).digest()[:16], "little")
    raw = np.random.Philox(key=key).random_raw(count)
    return (raw >> np.uint64(11)) * 2.0**-53


def sample(
    logits_BV: torch.Tensor, uniform_B: torch.Tensor, temperature: float, top_p: float, top_k: int
) -> torch.Tensor:
    """ids_B (B,): of each row the token that its number in [0, 1) falls on, when the probabilities are laid end to
    end, the highest first."""
    logits_BV = logits_BV.double()
    highest = logits_BV.amax(dim=1, keepdim=True)  # subtracted first: a low temperature must not overflow
    probability = torch.softmax((logits_BV - highest) / temperature, dim=1)
    likeliest, order = probability.sort(dim=1, descending=True, stable=True)
    if top_k:
        likeliest[:, top_k:] = 0
        likeliest /= likeliest.sum(dim=1, keepdim=True)
    if top_p < 1:
        likeliest = likeliest.where(likeliest.cumsum(dim=1) - likeliest < top_p, 0.0)
    total = likeliest.cumsum(dim=1)
    point = uniform_B.unsqueeze(1) * total[:, -1:]
    place = torch.searchsorted(total, point, right=True).clamp(max=logits_BV.shape[1] - 1)
    return order.gather(1, place).squeeze(1)


def penalised(logits_BV: torch.Tensor, seen_BV: torch.Tensor, penalty: float) -> torch.Tensor:
    """Logits with those of tokens seen before made lower by the factor (Keskar et al. 2019, arXiv:1909.05858)."""
    lower = torch.where(logits_BV < 0, logits_BV * penalty, logits_BV / penalty)
    return torch.where(seen_BV, lower, logits_BV)
