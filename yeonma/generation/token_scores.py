"""Log-probabilities of an answer's tokens as they are generated, and of a prompt's.

They are those of the model's own distribution, before temperature, penalties, bias and grammar, as in training.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from yeonma.model.attention.dispatch import FOREST
from yeonma.model.forest_support import attention
from yeonma.model.logprobs import ForestSupport, TokenScores, example_scores

FOREST_TOKENS = 4096
"""Prompts of so many tokens are scored at once; a single longer one is not split."""


@dataclass(frozen=True)
class ScoredToken:
    """A token, its log-probability, and the most likely tokens in its place."""

    token_id: int
    logprob: float | None
    """None for the first token of a prompt, which nothing precedes."""
    top: tuple[tuple[int, float], ...] = ()
    """(token id, log-probability), the most likely first."""


@dataclass
class ScoreLog:
    """The scored tokens of an answer that grows. `top`: how many of the most likely tokens to keep for each."""

    top: int
    tokens: list[ScoredToken] = field(default_factory=list)

    def add(self, logits_V: torch.Tensor, token_id: int) -> None:
        """Add a token that was chosen where the model's logits were these."""
        target = torch.tensor([token_id], device=logits_V.device)
        self.tokens += _scored([token_id], TokenScores.of(logits_V.unsqueeze(0), target, self.top))


def score_prompts(
    model: Any, support: ForestSupport, prompts: Sequence[Sequence[int]], top: int
) -> list[list[ScoredToken]]:
    """The scored tokens of the prompts. `model` is in eval mode and not a PeftModel, but its layers may contain an
    adapter. Numbers differ with the company of a prompt by rounding only."""
    scored: list[list[ScoredToken]] = []
    implementation = FOREST if support.forest else support.plain_attention
    while len(scored) < len(prompts):
        group = [np.array(prompts[len(scored)], dtype=np.int64)]
        for prompt in prompts[len(scored) + 1 :]:
            if sum(map(len, group)) + len(prompt) > FOREST_TOKENS:
                break
            group.append(np.array(prompt, dtype=np.int64))
        longer = [ids for ids in group if len(ids) > 1]
        with attention(model, implementation):  # while others are decoded, it is another
            found = iter(example_scores(model, support, longer, top) if longer else ())
        for ids in group:
            rest = _scored(ids[1:].tolist(), next(found)) if len(ids) > 1 else []
            scored.append([ScoredToken(int(ids[0]), None), *rest])
    return scored


def _scored(token_ids: Sequence[int], scores: TokenScores) -> list[ScoredToken]:
    return [
        ScoredToken(token_id, logprob, tuple(zip(top_ids, top_logprobs, strict=True)))
        for token_id, logprob, top_ids, top_logprobs in zip(
            token_ids,
            scores.logprob_N.tolist(),
            scores.top_id_NK.tolist(),
            scores.top_logprob_NK.tolist(),
            strict=True,
        )
    ]
