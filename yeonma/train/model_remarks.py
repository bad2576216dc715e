"""What a run should say of its base model: which rotary frequencies its examples have, and what noise is off."""

from __future__ import annotations

from typing import Any

import numpy as np

from yeonma.messages import tr
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
        tr(
            "{name} reads more than text: the adapter is on its language model alone, and its towers "
            "for images and sound stay as they are, also in a merged model",
            name=found.__name__,
        )
    ]


def _frequencies(config: Any, dataset: Dataset) -> list[str]:
    borders = length_borders(config)
    if not borders:
        return []
    parts = [dataset.train, *dataset.validation.values()]
    lengths = np.concatenate([part.store.lengths[part.store.examples_of(part.units)] for part in parts])
    lines = [
        tr(
            "LongRoPE with original_max_position_embeddings {border}: of this run's {lengths:,} "
            "examples, {int:,} have the short frequencies and {int2:,}, which are longer, the long "
            "ones, each by its own length; vLLM picks one set for all requests: the long one if its "
            "--max-model-len is above {border}",
            border=border,
            lengths=len(lengths),
            int=int((lengths <= border).sum()),
            int2=int((lengths > border).sum()),
        )
        for border in borders.switches
    ]
    if (limit := borders.grows_from) is not None:
        lines.append(
            tr(
                "dynamic NTK scaling above {limit} tokens: {int:,} of this run's {lengths:,} examples "
                "are longer and have frequencies of their own length; vLLM has one set for all requests",
                limit=limit,
                int=int((lengths > limit).sum()),
                lengths=len(lengths),
            )
        )
    return lines


def _noise_off(config: Any) -> list[str]:
    noise = base_noise(config)
    if not noise:
        return []
    named = ", ".join(f"{name} {value:g}" for name, value in noise.items())
    return [
        tr("the base's own dropout is off in training ({named}); lora_dropout is the only one", named=named)
    ]
