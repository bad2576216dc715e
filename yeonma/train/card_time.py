"""About how long the answers of the card will take, for the time left of a run. A rough estimate: decoding is measured
only when it happens."""

from __future__ import annotations

import math
from typing import Any

from yeonma.run_folder.progress import CardWork
from yeonma.tokenization.dataset import Dataset
from yeonma.train.model_card import MAX_NEW_TOKENS, asked_sets

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
    usual = min(MAX_NEW_TOKENS, 2 * math.ceil(counts.trained_tokens / max(counts.examples, 1)))
    answer = (usual + MAX_NEW_TOKENS) // 2  # whether the model has learned to end its answers is not known
    layers = getattr(config.get_text_config(), "num_hidden_layers", 0)
    return CardWork(
        prompt_tokens=(1 + base_is_left) * rows * counts.tokens // max(counts.examples, 1),
        # a base seldom ends its answer before the limit
        decoded_tokens=answer + MAX_NEW_TOKENS * base_is_left,
        tokens_per_step=max(rows, TOKENS_PER_STEP),
        least_seconds=SECONDS_PER_LAYER[device_type] * layers,
    )
