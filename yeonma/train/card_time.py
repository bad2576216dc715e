"""About how long answers take, those of the card and those at evaluations, for the time of a run. A rough estimate:
decoding is measured only when it happens."""

from __future__ import annotations

import math
from typing import Any

from yeonma.adapter.samples import MAX_NEW_TOKENS, asked_sets
from yeonma.run_folder.progress import CardWork
from yeonma.tokenization.dataset import Dataset
from yeonma.train.answer_rows import AnswerPlan

TOKENS_PER_STEP = 120
"""The tokens whose forward pass takes as long as decoding one token of a few rows, which reads all weights. On one core
with SmolLM2-135M and 5 rows in float32, it was 91 in one run and 161 in another."""
SECONDS_PER_LAYER = {"cpu": 0.0, "cuda": 1e-3}
"""What a step of decoding takes at least: on a GPU, the time in which Python calls a layer's operators. An
assumption."""


def card_work(
    dataset: Dataset, config: Any, card_rows: int, device_type: str, *, base_is_left: bool
) -> CardWork | None:
    """The work of answering `card_rows` rows with the trained model, and with the base if that is still to come; None
    if no row is answered. `config`: the base model's."""
    sets = asked_sets(dataset)
    if not card_rows or not sets:
        return None
    counts = dataset.train.store.counts
    rows = min(max(card_rows, len(sets)), counts.rows)
    answer = _answer_tokens(dataset)
    return CardWork(
        prompt_tokens=(1 + base_is_left) * rows * counts.tokens // max(counts.examples, 1),
        # a base seldom ends its answer before the limit
        decoded_tokens=answer + MAX_NEW_TOKENS * base_is_left,
        tokens_per_step=max(rows, TOKENS_PER_STEP),
        least_seconds=_least_seconds(config, device_type),
    )


def answer_work(plan: AnswerPlan | None, dataset: Dataset, config: Any, device_type: str) -> CardWork | None:
    """The work of the answers of one evaluation; None if there are none."""
    if plan is None or not plan.rows:
        return None
    return CardWork(
        prompt_tokens=sum(len(row.prompt.token_ids) for row in plan.rows),
        decoded_tokens=_answer_tokens(dataset),
        tokens_per_step=max(len(plan.rows), TOKENS_PER_STEP),
        least_seconds=_least_seconds(config, device_type),
    )


def _answer_tokens(dataset: Dataset) -> int:
    """Of the longest of a few answers. Whether the model has learned to end its answers is not known."""
    counts = dataset.train.store.counts
    usual = min(MAX_NEW_TOKENS, 2 * math.ceil(counts.trained_tokens / max(counts.examples, 1)))
    return (usual + MAX_NEW_TOKENS) // 2


def _least_seconds(config: Any, device_type: str) -> float:
    return SECONDS_PER_LAYER[device_type] * getattr(config.get_text_config(), "num_hidden_layers", 0)
