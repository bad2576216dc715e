"""What a run should say of its base model: which rotary frequencies its examples have, and what noise is off."""

from __future__ import annotations

from typing import Any

import numpy as np

from yeonma.model.language_part import multimodal_class
from yeonma.model.position_limits import length_borders
from yeonma.model.train_mode import base_noise
from yeonma.tokenization.dataset import Dataset


def model_remarks(config: Any, dataset: Dataset) -> list[str]:
    """One line each, for the start of a run, `yeonma inspect` and the model card. `config`: the base model's."""
    return [*_language_part(config), *_frequencies(config, dataset), *_noise_off(config)]


def _language_part(config: Any) -> list[str]:
    found = multimodal_class(config)
    if found is None:
        return []
    return [
        f"{found.__name__} reads more than text: the adapter is on its language model alone, and its towers for images "
        "and sound stay as they are, also in a merged model"
    ]


def _frequencies(config: Any, dataset: Dataset) -> list[str]:
    borders = length_borders(config)
    if not borders:
        return []
    parts = [dataset.train, *dataset.validation.values()]
    lengths = np.concatenate([part.store.lengths[part.store.examples_of(part.units)] for part in parts])
    lines = [
        f"LongRoPE with original_max_position_embeddings {border}: of this run's {len(lengths):,} examples, "
        f"{int((lengths <= border).sum()):,} have the short frequencies and {int((lengths > border).sum()):,}, which "
        "are longer, the long ones, each by its own length; vLLM picks one set for all requests: the long one if its "
        f"--max-model-len is above {border}"
        for border in borders.switches
    ]
    if (limit := borders.grows_from) is not None:
        lines.append(
            f"dynamic NTK scaling above {limit} tokens: {int((lengths > limit).sum()):,} of this run's "
            f"{len(lengths):,} examples are longer and have frequencies of their own length; vLLM has one set for all "
            "requests"
        )
    return lines


def _noise_off(config: Any) -> list[str]:
    noise = base_noise(config)
    if not noise:
        return []
    named = ", ".join(f"{name} {value:g}" for name, value in noise.items())
    return [f"the base's own dropout is off in training ({named}); lora_dropout is the only one"]
