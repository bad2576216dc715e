"""Whether two models agree: their greedy answers to a few prompts, and their logits along the first model's answers.

Shapes: A answer tokens of a row, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from yeonma.errors import UserError
from yeonma.generation.completion import generate
from yeonma.generation.sampling import SamplingParams

MAX_NEW_TOKENS = 32
WEIGHT_ROUNDING = {torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 2.5e-2}
"""What rounding the weights to a number format may change in a logit, with float32 arithmetic, as a fraction of the
largest logit. On SmolLM2 it changes at most a third of that."""
COMPUTE_ROUNDING = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 8e-2}
"""The same for arithmetic in the format."""


@dataclass(frozen=True)
class GreedyAnswers:
    """A model's greedy answer to each prompt."""

    answers: tuple[tuple[int, ...], ...]
    logits: tuple[torch.Tensor, ...]
    """One float32 tensor of shape (A + 1, V) a prompt, on the CPU: before the answer's first token, and after each."""


@dataclass(frozen=True)
class Agreement:
    """How far two models agree. Differences are the largest of any single logit."""

    rows: int
    same_answers: int
    max_difference: float
    tolerance: float
    adapter_effect: float
    """The difference that the adapter itself makes."""
    max_gap: float
    """Where answers diverge: the largest gap, in the first model's logits, between the two tokens chosen."""

    @property
    def is_close(self) -> bool:
        """False for NaN, too. Answers may diverge only where the two tokens are almost equally likely."""
        return self.max_difference <= self.tolerance and self.max_gap <= 2 * self.tolerance


def greedy_answers(
    model: Any, tokenizer: Any, prompts: Sequence[Sequence[int]], stop_ids: Sequence[int]
) -> GreedyAnswers:
    """Answers the prompts one by one, and takes the logits along the answers.

    Raises UserError if the device's memory does not hold the model.
    """
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 2**31
    max_new_tokens = max(1, min(MAX_NEW_TOKENS, positions - max(map(len, prompts))))
    sampling = SamplingParams(tuple(stop_ids), max_new_tokens)
    try:
        answers = generate(model, tokenizer, prompts, sampling, by_forest=False)
    except torch.OutOfMemoryError as error:
        raise UserError("the model does not fit into the device's memory", cure="use --device cpu") from error
    token_ids = tuple(answer.token_ids for answer in answers)
    return GreedyAnswers(token_ids, logits_along(model, prompts, token_ids))


def logits_along(
    model: Any, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]], *, adapter: bool = True
) -> tuple[torch.Tensor, ...]:
    """Logits of shape (A + 1, V) a row. Without `adapter`, those of a PeftModel's base alone."""
    rows = []
    with torch.no_grad(), nullcontext() if adapter else model.disable_adapter():
        for prompt, answer in zip(prompts, answers, strict=True):
            ids = torch.tensor([[*prompt, *answer]], device=model.device)
            count = len(answer) + 1
            logits = model(input_ids=ids, use_cache=False, logits_to_keep=count).logits[0, -count:]
            rows.append(logits.float().cpu())
    return tuple(rows)


def measure_agreement(
    first: GreedyAnswers,
    second: GreedyAnswers,
    base: Sequence[torch.Tensor],
    weights_dtype: torch.dtype,
    compute_dtype: torch.dtype,
) -> Agreement:
    """Compares two models. The logits of `second`, and those of the base alone, are along the answers of `first`.

    The tolerance follows from the number formats of the merged weights and of the arithmetic.
    """
    pairs = list(zip(first.logits, second.logits, strict=True))
    largest_logit = max(float(logits.abs().max()) for logits in first.logits)
    gaps = [
        _gap(logits, one, other)
        for logits, one, other in zip(first.logits, first.answers, second.answers, strict=True)
        if one != other
    ]
    rounding = max(WEIGHT_ROUNDING.get(weights_dtype, 1e-4), COMPUTE_ROUNDING[compute_dtype])
    return Agreement(
        rows=len(pairs),
        same_answers=len(pairs) - len(gaps),
        max_difference=_max_difference(pairs),
        tolerance=rounding * max(1.0, largest_logit),
        adapter_effect=_max_difference(list(zip(first.logits, base, strict=True))),
        max_gap=max(gaps, default=0.0),
    )


def _max_difference(pairs: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> float:
    """NaN if there is one, which Python's max() would lose."""
    return float(torch.stack([(one - other).abs().max() for one, other in pairs]).max())


def _gap(logits: torch.Tensor, one: Sequence[int], other: Sequence[int]) -> float:
    """By how much, in logits, the first token where two answers diverge exceeds the other answer's token.

    If one answer is the beginning of the other, the token that ended it is not known here: the gap of the two best.
    """
    at = next((at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), None)
    if at is None:
        best_two = torch.topk(logits[min(len(one), len(other))], 2).values
        return float(best_two[0] - best_two[1])
    return float(logits[at, one[at]] - logits[at, other[at]])
