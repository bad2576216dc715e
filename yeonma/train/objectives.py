"""Objectives: small pure functions from log-probabilities to a loss sum. The step divides, once, globally.

Shapes: N trained tokens.
"""

from __future__ import annotations

import torch


def sft_loss(logprob_N: torch.Tensor) -> torch.Tensor:
    """Sum of the negative log-likelihood over the trained tokens, a float32 scalar; to be divided by their count."""
    return -logprob_N.sum()
