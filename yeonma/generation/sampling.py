"""Which token comes next: the likeliest, or one drawn by a number that follows from the prompt and a seed alone.

Shapes: B rows, V vocabulary.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch


def uniforms(prompt: Sequence[int], seed: int, count: int) -> np.ndarray:
    """(count,) numbers in [0, 1) that follow from prompt and seed, the same on every device and with every NumPy."""
    content = np.array([seed, *prompt], dtype="<i8").tobytes()
    key = int.from_bytes(hashlib.sha256(content).digest()[:16], "little")
    raw = np.random.Philox(key=key).random_raw(count)
    return (raw >> np.uint64(11)) * 2.0**-53


def drawn(
    scores_BV: torch.Tensor, uniform_B: torch.Tensor, temperature: float, top_p: float, top_k: int
) -> torch.Tensor:
    """ids_B (B,), each the token that its row's number in [0, 1) falls on, over the probabilities in falling order."""
    scores_BV = scores_BV.double()
    highest = scores_BV.amax(dim=1, keepdim=True)  # taken off first: a low temperature must not overflow
    probability = torch.softmax((scores_BV - highest) / temperature, dim=1)
    likeliest, order = probability.sort(dim=1, descending=True, stable=True)
    if top_k:
        likeliest[:, top_k:] = 0
        likeliest /= likeliest.sum(dim=1, keepdim=True)
    if top_p < 1:
        likeliest = likeliest.where(likeliest.cumsum(dim=1) - likeliest < top_p, 0.0)
    total = likeliest.cumsum(dim=1)
    aim = uniform_B.unsqueeze(1) * total[:, -1:]
    place = torch.searchsorted(total, aim, right=True).clamp(max=scores_BV.shape[1] - 1)
    return order.gather(1, place).squeeze(1)


def penalised(scores_BV: torch.Tensor, seen_BV: torch.Tensor, penalty: float) -> torch.Tensor:
    """Scores with those of tokens seen before made worse by the factor (Keskar et al. 2019, arXiv:1909.05858)."""
    worse = torch.where(scores_BV < 0, scores_BV * penalty, scores_BV / penalty)
    return torch.where(seen_BV, worse, scores_BV)


@dataclass(frozen=True)
class SamplingParams:
    """How the next token is chosen, and what ends an answer. `stop_ids` may be empty."""

    stop_ids: tuple[int, ...]
    max_new_tokens: int
    temperature: float
    top_p: float
    top_k: int
    repetition_penalty: float
    seed: int
