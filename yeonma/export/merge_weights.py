"""Adds the adapter's weights to the base's with PEFT, either shard by shard or with the whole base in memory."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from transformers import GenerationConfig
from transformers.utils.hub import cached_file

from yeonma.errors import UserError
from yeonma.model.load import add_lora_of, hide_loading_noise, load_config, outline
from yeonma.model.source import BaseSource

WEIGHTS, INDEX, GENERATION = "model.safetensors", "model.safetensors.index.json", "generation_config.json"


class NeedsWholeModel(Exception):
    """The base's files name or arrange weights differently from the model, as the message says."""


def weight_files(source: BaseSource) -> list[Path]:
    """The base's safetensors files, downloaded if they are on the hub. Raises UserError if there are none."""
    if (whole := _file_of(source, WEIGHTS)) is not None:
        return [whole]
    index = _file_of(source, INDEX)
    if index is None:
        raise UserError("no safetensors weights", place=source.name, cure="give a base model that has them")
    names = sorted(set(json.loads(index.read_text("utf-8"))["weight_map"].values()))
    paths = [_file_of(source, name) for name in names]
    if missing := [name for name, path in zip(names, paths, strict=True) if path is None]:
        raise UserError(
            f"missing shards: {', '.join(missing)}", place=source.name, cure="download them again"
        )
    return [path for path in paths if path is not None]


def _file_of(source: BaseSource, name: str) -> Path | None:
    try:
        path = cached_file(
            source.name, name, revision=source.revision, _raise_exceptions_for_missing_entries=False
        )
    except OSError as error:
        first = str(error).splitlines()[0]
        raise UserError(
            f"cannot download {name} ({first})", place=source.name, cure="check your network"
        ) from error
    return None if path is None else Path(path)


def dtype_of(config: Any, files: Sequence[Path]) -> torch.dtype:
    """The base's number format: from its config, else that of its first weights."""
    if isinstance(dtype := config.get_text_config().dtype, torch.dtype):
        return dtype
    return next(tensor.dtype for _, tensor in _tensors(files) if tensor.is_floating_point())


def merge_in_memory(peft_model: Any, folder: Path, max_shard_bytes: int) -> None:
    """Merges with PEFT and saves the whole model into `folder`. The model must not be used afterwards."""
    _untie(peft_model)
    model = peft_model.merge_and_unload()
    # saving validates it strictly; `write_generation_config` writes the base's own
    model.generation_config = GenerationConfig()
    model.save_pretrained(str(folder), max_shard_size=max_shard_bytes)


def _untie(peft_model: Any) -> None:
    """Unties the head from the embedding if the adapter changes either of them."""
    model = peft_model.get_base_model()
    layers = {"input": model.get_input_embeddings(), "output": model.get_output_embeddings()}
    if not any(hasattr(layer, "get_base_layer") for layer in layers.values()):
        return
    base_layers = [
        layer.get_base_layer() if hasattr(layer, "get_base_layer") else layer for layer in layers.values()
    ]
    if (
        base_layers[0] is not None
        and base_layers[1] is not None
        and base_layers[0].weight is base_layers[1].weight
    ):
        base_layers[1].weight = nn.Parameter(base_layers[1].weight.detach().clone(), requires_grad=False)
        model.config.get_text_config().tie_word_embeddings = model.config.tie_word_embeddings = False


def merge_by_shard(
    source: BaseSource, files: Sequence[Path], adapter: str, folder: Path, max_shard_bytes: int
) -> None:
    """Merges without the whole base in memory: reads its files tensor by tensor, and merges each layer with PEFT when
    its weight comes. Memory holds no more than one shard of `max_shard_bytes`.

    Raises NeedsWholeModel, possibly with some shards written, and UserError if a merged weight is not finite.
    """
    hide_loading_noise()
    config = load_config(source)
    model = outline(config, source)
    if model is None:
        raise NeedsWholeModel("it cannot be built without its weights")
    peft_model = _adapter_on(model, adapter)
    layers = {
        f"{name.removeprefix('base_model.model.')}.weight": module
        for name, module in peft_model.named_modules()
        if hasattr(module, "get_base_layer")
    }
    writer = _ShardWriter(folder, max_shard_bytes)
    merged = set()
    for name, tensor in _tensors(files):
        layer = layers.get(name)
        if layer is not None:
            tensor = _merged(layer, tensor, name, source)
            merged.add(name)
        writer.add(name, tensor)
    if missing := sorted(layers.keys() - merged):
        raise NeedsWholeModel(f"its files have no {missing[0]}")
    writer.finish()
    config.architectures = config.architectures or [type(model).__name__]
    config.save_pretrained(str(folder))


def _adapter_on(model: Any, adapter: str) -> Any:
    """The adapter with its weights on a base without. PEFT alone would put the adapter on the meta device too."""
    from peft import load_peft_weights, set_peft_model_state_dict

    peft_model = add_lora_of(model, adapter)
    for module in peft_model.modules():
        if hasattr(module, "get_base_layer"):
            for name, child in module.named_children():
                if name != "base_layer":
                    child.to_empty(device="cpu")
    set_peft_model_state_dict(peft_model, load_peft_weights(adapter, device="cpu"))
    return peft_model


def _merged(layer: Any, tensor: torch.Tensor, name: str, source: BaseSource) -> torch.Tensor:
    base = layer.get_base_layer()
    if tuple(getattr(base, "weight", torch.empty(0)).shape) != tuple(tensor.shape):
        raise NeedsWholeModel(f"its files arrange {name} differently")
    meta_weight = base.weight
    base.weight = nn.Parameter(tensor.clone(), requires_grad=False)
    layer.merge()  # with safe_merge PEFT would round twice: the product, then the sum
    result: torch.Tensor = base.weight.data
    base.weight = meta_weight
    if not result.isfinite().all():
        raise UserError(f"NaN or infinity in {name} after merging the adapter", place=source.name)
    return result


def _tensors(files: Sequence[Path]) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor of the files, read lazily."""
    for path in files:
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118
                yield name, file.get_tensor(name)


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


def write_generation_config(source: BaseSource, folder: Path, stop_ids: Sequence[int]) -> None:
    """Writes the base's generation config, if it has one, with the stop tokens of training added to its EOS tokens."""
    path, own = folder / GENERATION, _file_of(source, GENERATION)
    content = {} if own is None else json.loads(own.read_text("utf-8"))
    ends = content.get("eos_token_id")
    ends = ends if isinstance(ends, list) else [] if ends is None else [ends]
    ends += [number for number in stop_ids if number not in ends]
    content["eos_token_id"] = ends if len(ends) != 1 else ends[0]
    path.write_text(json.dumps(content, indent=2) + "\n", "utf-8")


def copy_code(source: BaseSource, folder: Path) -> None:
    """Copies the Python code of a local base, which its config refers to."""
    for path in sorted(Path(source.name).glob("*.py")) if Path(source.name).is_dir() else ():
        shutil.copyfile(path, folder / path.name)
