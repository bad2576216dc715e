"""The folder of a fully fine-tuned model: what transformers loads, the template, the tokenizer, and yeonma.json."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import GenerationConfig

from yeonma.adapter.adapter_folder import write_template_files
from yeonma.adapter.samples import Samples
from yeonma.data.template import Template
from yeonma.errors import UserError, system_reason
from yeonma.messages import tr
from yeonma.model.saved_config import keep_config_keys, write_generation_config
from yeonma.model.source import BaseSource
from yeonma.model.weight_files import weight_files
from yeonma.tokenization.chat_template_export import ExportedChatTemplate

SHARD_BYTES = 5_000_000_000
"""The size of one file of weights, as `yeonma merge` has it by default."""


def write_full_model(
    folder: Path,
    model: Any,
    weights: Mapping[torch.Tensor, torch.Tensor],
    source: BaseSource,
    tokenizer: Any,
    template: Template,
    stop_ids: Sequence[int],
    details: Mapping[str, Any],
    exported: ExportedChatTemplate,
    samples: Samples | None = None,
) -> None:
    """Writes the model's files into an existing folder. The callers make that atomic.

    `weights`: what to write in place of a parameter of the model, which itself may be in another number format. Tied
    weights are written once. `source`: the base, whose config has keys that are kept.
    `stop_ids`: the tokens that end an answer, for the generation config.
    """
    tensors = {
        name: weights.get(tensor, tensor).detach()
        for name, tensor in model.state_dict(keep_vars=True).items()
    }
    generation_config = model.generation_config
    model.generation_config = (
        GenerationConfig()
    )  # saving validates it strictly; the base's own is written below
    try:
        model.save_pretrained(str(folder), state_dict=tensors, max_shard_size=SHARD_BYTES)
    finally:
        model.generation_config = generation_config
    keep_config_keys(source, folder)
    write_generation_config(source, folder, stop_ids)
    write_template_files(folder, tokenizer, template, details, exported, samples)


def stored_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """The shapes of the tensors in a model's weight files, from their headers. Raises UserError if one cannot be
    read."""
    shapes = {}
    for path in weight_files(BaseSource(str(folder))):
        try:
            with safe_open(path, "pt") as file:
                for name in file.keys():  # noqa: SIM118
                    shapes[name] = tuple(file.get_slice(name).get_shape())
        except (SafetensorError, OSError) as error:
            raise UserError(
                tr("cannot be read ({error})", error=system_reason(error)), place=str(path)
            ) from error
    return shapes


def not_finite_in(folder: Path) -> list[str]:
    """The names of tensors in a model's weight files with numbers that are not finite, read one at a time."""
    found = []
    for path in weight_files(BaseSource(str(folder))):
        with safe_open(path, "pt") as file:
            found += [name for name in file.keys() if not file.get_tensor(name).isfinite().all()]  # noqa: SIM118
    return found
