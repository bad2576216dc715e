"""Whether two models say the same: greedy answers to a few prompts, and the logits along one model's answers.

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

MOST_NEW_TOKENS = 32
ROUNDED = {torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 2.5e-2}
"""Weights in a number format, computed with in float32: what rounding may make of a logit, as a share of the largest
one. On SmolLM2 it makes a third of that, or less."""
COMPUTED = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 8e-2}
"""The same of computing in the format."""


@dataclass(frozen=True)
class GreedyAnswers:
    """What a model said to each prompt."""

    answers: tuple[tuple[int, ...], ...]
    logits: tuple[torch.Tensor, ...]
    """Of each row, float32 of shape (A + 1, V) on the CPU: before the answer's first token, and after each."""


@dataclass(frozen=True)
class Agreement:
    """How two models' words compare. Differences are of single logits, the largest of all."""

    rows: int
    same_answers: int
    largest: float
    tolerance: float
    effect: float
    """What the adapter itself makes of a logit, at most."""
    parted_at: float
    """Where answers part: the largest gap between the two tokens that were taken, by the first model."""

    @property
    def is_close(self) -> bool:
        """False of NaN, too. Answers may part only where two tokens were as good as equal."""
        return self.largest <= self.tolerance and self.parted_at <= 2 * self.tolerance


def answers_of(
    model: Any, tokenizer: Any, prompts: Sequence[Sequence[int]], stop_ids: Sequence[int]
) -> GreedyAnswers:
    """Ask a model, and look at its logits along its own answers."""
    most = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 2**31
    room = max(1, min(MOST_NEW_TOKENS, most - max(map(len, prompts))))
    sampling = SamplingParams(tuple(stop_ids), room)
    try:
        answers = generate(model, tokenizer, prompts, sampling, by_forest=False)
    except torch.OutOfMemoryError as error:
        raise UserError("the model does not fit into the device's memory", cure="use --device cpu") from error
    token_ids = tuple(answer.token_ids for answer in answers)
    return GreedyAnswers(token_ids, logits_along(model, prompts, token_ids))


def logits_along(
    model: Any, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]], *, adapter: bool = True
) -> tuple[torch.Tensor, ...]:
    """Of each row, shape (A + 1, V). Without `adapter`, a PeftModel's base alone."""
    found = []
    with torch.no_grad(), nullcontext() if adapter else model.disable_adapter():
        for prompt, answer in zip(prompts, answers, strict=True):
            ids = torch.tensor([[*prompt, *answer]], device=model.device)
            kept = len(answer) + 1
            logits = model(input_ids=ids, use_cache=False, logits_to_keep=kept).logits[0, -kept:]
            found.append(logits.float().cpu())
    return tuple(found)


def compare(
    before: GreedyAnswers,
    after: GreedyAnswers,
    base: Sequence[torch.Tensor],
    weights: torch.dtype,
    computed: torch.dtype,
) -> Agreement:
    """`after` has its logits along the answers of `before`; `base`: those of the base alone, along the same. The
    tolerance goes by the number formats of the merged weights and of the computation."""
    pairs = list(zip(before.logits, after.logits, strict=True))
    highest = max(float(logits.abs().max()) for logits in before.logits)
    parted = [
        _gap(logits, mine, theirs)
        for logits, mine, theirs in zip(before.logits, before.answers, after.answers, strict=True)
        if mine != theirs
    ]
    return Agreement(
        rows=len(pairs),
        same_answers=len(pairs) - len(parted),
        largest=_largest([(mine, theirs) for mine, theirs in pairs]),
        tolerance=max(ROUNDED.get(weights, 1e-4), COMPUTED[computed]) * max(1.0, highest),
        effect=_largest(list(zip(before.logits, base, strict=True))),
        parted_at=max(parted, default=0.0),
    )


def _largest(pairs: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> float:
    """NaN where one is; max() of Python's would lose it."""
    return float(torch.stack([(mine - theirs).abs().max() for mine, theirs in pairs]).max())


def _gap(logits: torch.Tensor, mine: Sequence[int], theirs: Sequence[int]) -> float:
    """How much the first token where two answers part was likelier by `logits` than the other's, in logits.

    Where one answer ends and the other goes on, the tokens that end it are not known here: the gap to the best.
    """
    at = next((at for at, (one, other) in enumerate(zip(mine, theirs, strict=False)) if one != other), None)
    if at is None:
        at = min(len(mine), len(theirs))
        two = torch.topk(logits[at], 2).values
        return float(two[0] - two[1])
    return float(logits[at, mine[at]] - logits[at, theirs[at]])
