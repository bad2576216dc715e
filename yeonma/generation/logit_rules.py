"""What changes the logits of one row before its next token is chosen: a bias, penalties, a grammar.

Shapes: V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from yeonma.generation.sampling import SamplingParams, apply_repetition_penalty


class TokenMask(Protocol):
    """The tokens that may come next in one answer."""

    @property
    def is_over(self) -> bool:
        """Whether the answer is complete, so that nothing may follow but its end."""
        ...

    def allowed(self) -> NDArray[np.bool_] | None:
        """(number of tokens,): whether a token may come next. None: any token may."""
        ...

    def accept(self, token_id: int) -> None:
        """The next token is this one."""
        ...


@dataclass(eq=False)
class LogitRules:
    """The rules of one row, and what they need to know of its tokens so far."""

    sampling: SamplingParams
    prompt: Sequence[int]
    mask: TokenMask | None
    seen_V: torch.Tensor | None = None
    """Whether a token occurs in prompt or answer; only for a repetition penalty."""
    count_V: torch.Tensor | None = None
    """How often a token occurs in the answer; only for the penalties on it."""
    bias_V: torch.Tensor | None = None

    @staticmethod
    def of(sampling: SamplingParams, prompt: Sequence[int], mask: TokenMask | None) -> LogitRules | None:
        """The rules of these parameters; None if they change no logits."""
        changes = sampling.changes
        penalties = (changes.presence_penalty, changes.frequency_penalty, sampling.repetition_penalty - 1.0)
        if mask is None and not any(penalties) and not changes.logit_bias:
            return None
        return LogitRules(sampling, prompt, mask)

    @property
    def is_over(self) -> bool:
        return self.mask is not None and self.mask.is_over

    def apply(self, logits_V: torch.Tensor) -> torch.Tensor:
        """The logits to choose from, in vLLM's order: bias, repetition penalty, frequency and presence, grammar."""
        if self.sampling.changes.logit_bias:
            if self.bias_V is None:
                self.bias_V = torch.zeros_like(logits_V)
                for token_id, bias in self.sampling.changes.logit_bias:
                    self.bias_V[token_id] = bias
            logits_V = logits_V + self.bias_V
        if self.sampling.repetition_penalty != 1.0:
            seen_V = self._seen(logits_V)
            logits_V = apply_repetition_penalty(logits_V, seen_V, self.sampling.repetition_penalty)
        if self._counts:
            if self.count_V is None:
                self.count_V = torch.zeros_like(logits_V)
            changes = self.sampling.changes
            logits_V = logits_V - changes.frequency_penalty * self.count_V
            logits_V = logits_V - changes.presence_penalty * (self.count_V > 0)
        allowed = None if self.mask is None else self.mask.allowed()
        if allowed is not None:
            full = np.zeros(len(logits_V), dtype=bool)
            size = min(len(full), len(allowed))
            full[:size] = allowed[:size]
            logits_V = logits_V.masked_fill(~torch.from_numpy(full).to(logits_V.device), float("-inf"))
        return logits_V

    def accept(self, token_id: int) -> None:
        """The next token is this one."""
        if self.seen_V is not None:
            self.seen_V[token_id] = True
        if self.count_V is not None:
            self.count_V[token_id] += 1
        if self.mask is not None:
            self.mask.accept(token_id)

    @property
    def _counts(self) -> bool:
        changes = self.sampling.changes
        return changes.presence_penalty != 0 or changes.frequency_penalty != 0

    def _seen(self, like_V: torch.Tensor) -> torch.Tensor:
        if self.seen_V is None:
            self.seen_V = torch.zeros(len(like_V), dtype=torch.bool, device=like_V.device)
            self.seen_V[torch.tensor(list(self.prompt), device=like_V.device)] = True
        return self.seen_V
