"""Adds the adapter's weights to the base's with PEFT, either shard by shard or with the whole base in memory."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import GenerationConfig

from yeonma.adapter.adapter_folder import CHAT_TEMPLATE
from yeonma.errors import UserError
from yeonma.messages import tr
from yeonma.model.adapter_file import read_header
from yeonma.model.adapter_weights import add_lora_of, added_rows, load_weights, plain_layer
from yeonma.model.load import (
    hide_loading_noise,
    load_config,
    outline,
    remove_quantization,
    transposed_weights,
)
from yeonma.model.published import Published
from yeonma.model.source import BaseSource
from yeonma.model.weight_files import INDEX, WEIGHTS, file_of, stored_tensors
from yeonma.model.whole_modules import as_the_base
from yeonma.model.whole_weights import whole_tensors

PROCESSOR_CHAT = "chat_template.json"
PROCESSOR_FILES = (
    *("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json"),
    PROCESSOR_CHAT,
)
FORMATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class NeedsWholeModel(Exception):
    """The base's files name or arrange weights differently from the model, as the message says."""


def dtype_of(config: Any, files: Sequence[Path]) -> torch.dtype:
    """The base's number format: from its config, else that of its first weights."""
    if isinstance(dtype := config.get_text_config().dtype, torch.dtype):
        return dtype
    stored = (tensor.dtype for tensor in stored_tensors(files).values())
    return next((FORMATS[name] for name in stored if name in FORMATS), torch.bfloat16)


def merge_in_memory(peft_model: Any, folder: Path, max_shard_bytes: int) -> None:
    """Merges with PEFT and saves the whole model into `folder`. The model must not be used afterwards."""
    as_the_base(peft_model)
    _untie(peft_model)
    model = peft_model.merge_and_unload()
    head = model.get_output_embeddings()
    if head is not None and head.weight is model.get_input_embeddings().weight:
        _set_tied(model, True)  # an adapter may keep them tied, as `ensure_weight_tying` says
    # saving validates it strictly; `write_generation_config` writes the base's own
    model.generation_config = GenerationConfig()
    model.save_pretrained(str(folder), max_shard_size=max_shard_bytes)


def _untie(peft_model: Any) -> None:
    """Unties the head from the embedding if the adapter changes either of them."""
    model = peft_model.get_base_model()
    layers = [model.get_input_embeddings(), model.get_output_embeddings()]
    base_layers = [plain_layer(layer) for layer in layers]
    if all(base is layer for base, layer in zip(base_layers, layers, strict=True)):
        return
    if (
        base_layers[0] is not None
        and base_layers[1] is not None
        and base_layers[0].weight is base_layers[1].weight
    ):
        base_layers[1].weight = nn.Parameter(base_layers[1].weight.detach().clone(), requires_grad=False)
        _set_tied(model, False)


def _set_tied(model: Any, tied: bool) -> None:
    model.config.get_text_config().tie_word_embeddings = model.config.tie_word_embeddings = tied


def merge_by_shard(
    source: BaseSource,
    files: Sequence[Path],
    adapter: str,
    folder: Path,
    max_shard_bytes: int,
    published: Published | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> None:
    """Merges without the whole base in memory: reads its files tensor by tensor, and merges each layer with PEFT when
    its weight comes. Memory holds no more than one shard of `max_shard_bytes`.

    `published`: how the files are quantised. What is dequantised is merged in float32 and rounded to `dtype` once.

    Raises NeedsWholeModel, possibly with some shards written, and UserError if a merged weight is not finite.
    """
    hide_loading_noise()
    config = load_config(source)
    model = outline(config, source)
    if model is None:
        raise NeedsWholeModel(tr("it cannot be built without its weights"))
    stored = stored_tensors(files)
    tensors = whole_tensors(files, published, transposed_weights(model))
    renamed = _names_in_model(model, tensors)
    peft_model = _adapter_on(model, adapter)  # changes the model's names
    layers = {
        f"{name.removeprefix('base_model.model.')}.weight": module
        for name, module in peft_model.named_modules()
        if hasattr(module, "get_base_layer")
    }
    writer = _ShardWriter(folder, max_shard_bytes)
    merged = set()
    for name, lazy in tensors.items():
        tensor, is_whole = lazy[...], published is None or (name in stored and stored[name].dtype in FORMATS)
        layer = layers.get(renamed[name])
        if layer is not None:
            tensor = _merged(layer, tensor, name, source)
            merged.add(renamed[name])
        writer.add(name, tensor if is_whole else tensor.to(dtype))
    if missing := sorted(layers.keys() - merged):
        raise NeedsWholeModel(tr("its files have no {missing}", missing=missing[0]))
    writer.finish()
    remove_quantization(config)
    config.architectures = config.architectures or [type(model).__name__]
    config.save_pretrained(str(folder))


def _names_in_model(model: Any, names: Iterable[str]) -> dict[str, str]:
    """The names of tensors in files -> in the model, where transformers only renames what it reads: checkpoints for
    images from before it had a common layout. Other names stay."""
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
    except ImportError:  # earlier and later versions read the files in other ways
        return {name: name for name in names}
    entries = get_model_conversion_mapping(model)
    renamings = [entry for entry in entries if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in entries if isinstance(entry, WeightConverter)]
    own, result = model.state_dict(), dict[str, str]()
    for name in sorted(names):
        renamed, converted = rename_source_key(name, renamings, converters, model.base_model_prefix, own)
        result[name] = renamed if converted is None and renamed in own else name
    return result


def _adapter_on(model: Any, adapter: str) -> Any:
    """The adapter with its weights on a base without. PEFT alone would put the adapter on the meta device too."""
    header = read_header(adapter)
    if added_rows(model, adapter, header):
        raise NeedsWholeModel(tr("the adapter has tokens of its own"))
    peft_model = add_lora_of(model, adapter, header=header)
    if any(hasattr(module, "original_module") for module in peft_model.modules()):
        raise NeedsWholeModel(tr("the adapter has whole modules, or rows of the embedding"))
    for module in peft_model.modules():
        if hasattr(module, "get_base_layer"):
            for name, child in module.named_children():
                if name != "base_layer":
                    child.to_empty(device="cpu")
    load_weights(peft_model, adapter)
    return peft_model


def _merged(layer: Any, tensor: torch.Tensor, name: str, source: BaseSource) -> torch.Tensor:
    base = layer.get_base_layer()
    if tuple(getattr(base, "weight", torch.empty(0)).shape) != tuple(tensor.shape):
        raise NeedsWholeModel(tr("its files arrange {name} differently", name=name))
    meta_weight = base.weight
    base.weight = nn.Parameter(tensor.clone(), requires_grad=False)
    layer.merge()  # with safe_merge PEFT would round twice: the product, then the sum
    result: torch.Tensor = base.weight.data
    base.weight = meta_weight
    if not result.isfinite().all():
        raise UserError(
            tr("NaN or infinity in {name} after merging the adapter", name=name), place=source.name
        )
    return result


class _ShardWriter:
    """Writes safetensors files of at most `max_bytes`, or of one tensor, with transformers' file names."""

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self.folder, self.max_bytes = folder, max_bytes
        self.pending: dict[str, torch.Tensor] = {}
        self.written: list[tuple[list[str], int]] = []

    def add(self, name: str, tensor: torch.Tensor) -> None:
        if self.pending and self._pending_bytes() + tensor.nbytes > self.max_bytes:
            self._write()
        self.pending[name] = tensor.contiguous()

    def _pending_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.pending.values())

    def _write(self) -> None:
        save_file(self.pending, self._temporary(len(self.written)), {"format": "pt"})
        self.written.append((list(self.pending), self._pending_bytes()))
        self.pending = {}

    def _temporary(self, number: int) -> Path:
        """The final name has the number of files in it, which is known at the end."""
        return self.folder / f"{number}.safetensors"

    def finish(self) -> None:
        if self.pending:
            self._write()
        count = len(self.written)
        if count == 1:
            self._temporary(0).rename(self.folder / WEIGHTS)
            return
        files = dict[str, str]()
        for number, (names, _) in enumerate(self.written):
            name = f"model-{number + 1:05}-of-{count:05}.safetensors"
            self._temporary(number).rename(self.folder / name)
            files |= dict.fromkeys(names, name)
        total = sum(size for _, size in self.written)
        text = json.dumps({"metadata": {"total_size": total}, "weight_map": files}, indent=2)
        (self.folder / INDEX).write_text(text + "\n", "utf-8")


def copy_processor(source: BaseSource, folder: Path) -> None:
    """Copies what a base's processor of images or sound reads. Its chat template is the tokenizer's, unless only
    the processor has one."""
    for name in PROCESSOR_FILES:
        own = file_of(source, name)
        if own is not None and not (name == PROCESSOR_CHAT and (folder / CHAT_TEMPLATE).is_file()):
            shutil.copyfile(own, folder / name)
