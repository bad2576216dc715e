"""The adapter's weights added to the base's, by PEFT: one shard after the other, or with the whole base in memory."""

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
from yeonma.model.load import keep_the_console_clean, load_config, outline
from yeonma.model.source import BaseSource

WEIGHTS, INDEX, GENERATION = "model.safetensors", "model.safetensors.index.json", "generation_config.json"


class OnlyInMemory(Exception):
    """The base's files name or lay out weights otherwise than the model does; the text says where."""


def weight_files(source: BaseSource) -> list[Path]:
    """The base's safetensors files, fetched where they are on the hub. Raises UserError where there are none."""
    if (whole := _file_of(source, WEIGHTS)) is not None:
        return [whole]
    index = _file_of(source, INDEX)
    if index is None:
        raise UserError(
            "it has no safetensors weights", place=source.name, cure="give a base model that has them"
        )
    names = sorted(set(json.loads(index.read_text("utf-8"))["weight_map"].values()))
    found = [_file_of(source, name) for name in names]
    if missing := [name for name, path in zip(names, found, strict=True) if path is None]:
        raise UserError(
            f"missing shards: {', '.join(missing)}", place=source.name, cure="download them again"
        )
    return [path for path in found if path is not None]


def _file_of(source: BaseSource, name: str) -> Path | None:
    try:
        path = cached_file(
            source.name, name, revision=source.revision, _raise_exceptions_for_missing_entries=False
        )
    except OSError as error:
        first = str(error).splitlines()[0]
        raise UserError(
            f"cannot fetch {name} ({first})", place=source.name, cure="check your network"
        ) from error
    return None if path is None else Path(path)


def dtype_of(config: Any, files: Sequence[Path]) -> torch.dtype:
    """The base's own number format: its config's, else that of its first weights."""
    if isinstance(dtype := config.get_text_config().dtype, torch.dtype):
        return dtype
    return next(tensor.dtype for _, tensor in _tensors(files) if tensor.is_floating_point())


def merge_in_memory(peft_model: Any, folder: Path, max_shard_bytes: int) -> None:
    """PEFT's merge, and the whole model written into `folder`. The model is of no use afterwards."""
    _untie(peft_model)
    model = peft_model.merge_and_unload()
    model.generation_config = (
        GenerationConfig()
    )  # saved strictly; `write_generation_config` has the base's own
    model.save_pretrained(str(folder), max_shard_size=max_shard_bytes)


def _untie(peft_model: Any) -> None:
    """Give a head that shares the embedding's weight one of its own, where the adapter changes either."""
    model = peft_model.get_base_model()
    layers = {"input": model.get_input_embeddings(), "output": model.get_output_embeddings()}
    if not any(hasattr(layer, "get_base_layer") for layer in layers.values()):
        return
    inner = [
        layer.get_base_layer() if hasattr(layer, "get_base_layer") else layer for layer in layers.values()
    ]
    if inner[0] is not None and inner[1] is not None and inner[0].weight is inner[1].weight:
        inner[1].weight = nn.Parameter(inner[1].weight.detach().clone(), requires_grad=False)
        model.config.get_text_config().tie_word_embeddings = model.config.tie_word_embeddings = False


def merge_by_shard(
    source: BaseSource, files: Sequence[Path], adapter: str, folder: Path, max_shard_bytes: int
) -> None:
    """The same without the base in memory: tensor after tensor of its files, each layer merged by PEFT when its weight
    comes along. No more than a shard of `max_shard_bytes` is held.

    Raises OnlyInMemory, before it has merged all, and UserError where PEFT's result is not finite.
    """
    keep_the_console_clean()
    config = load_config(source)
    model = outline(config, source)
    if model is None:
        raise OnlyInMemory("it cannot be laid out without its weights")
    peft_model = _adapter_on(model, adapter)
    layers = {
        f"{name.removeprefix('base_model.model.')}.weight": module
        for name, module in peft_model.named_modules()
        if hasattr(module, "get_base_layer")
    }
    writer = _Shards(folder, max_shard_bytes)
    merged = set()
    for name, tensor in _tensors(files):
        layer = layers.get(name)
        if layer is not None:
            tensor = _merged(layer, tensor, name, source)
            merged.add(name)
        writer.add(name, tensor)
    if left := sorted(layers.keys() - merged):
        raise OnlyInMemory(f"its files have no {left[0]}")
    writer.finish()
    config.architectures = config.architectures or [type(model).__name__]
    config.save_pretrained(str(folder))


def _adapter_on(model: Any, adapter: str) -> Any:
    """The adapter, with its weights, on an outline. PEFT would put them where the base's are, which here is nowhere."""
    from peft import PeftConfig, get_peft_model, load_peft_weights, set_peft_model_state_dict

    peft_model = get_peft_model(model, PeftConfig.from_pretrained(adapter))
    for module in peft_model.modules():
        if hasattr(module, "get_base_layer"):
            for name, own in module.named_children():
                if name != "base_layer":
                    own.to_empty(device="cpu")
    set_peft_model_state_dict(peft_model, load_peft_weights(adapter, device="cpu"))
    return peft_model


def _merged(layer: Any, tensor: torch.Tensor, name: str, source: BaseSource) -> torch.Tensor:
    base = layer.get_base_layer()
    if tuple(getattr(base, "weight", torch.empty(0)).shape) != tuple(tensor.shape):
        raise OnlyInMemory(f"its files lay {name} out otherwise")
    outlined = base.weight
    base.weight = nn.Parameter(tensor.clone(), requires_grad=False)
    layer.merge()  # PEFT's safe way rounds twice: the product, then the sum
    result: torch.Tensor = base.weight.data
    base.weight = outlined
    if not result.isfinite().all():
        raise UserError(f"NaN or infinity in {name} with the adapter", place=source.name)
    return result


def _tensors(files: Sequence[Path]) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor of the files, read when it is used."""
    for path in files:
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118
                yield name, file.get_tensor(name)


class _Shards:
    """Safetensors files of at most so many bytes each, or of one tensor, as transformers names them."""

    def __init__(self, folder: Path, most_bytes: int) -> None:
        self.folder, self.most_bytes = folder, most_bytes
        self.waiting: dict[str, torch.Tensor] = {}
        self.written: list[tuple[list[str], int]] = []

    def add(self, name: str, tensor: torch.Tensor) -> None:
        held = sum(each.nbytes for each in self.waiting.values())
        if self.waiting and held + tensor.nbytes > self.most_bytes:
            self._write()
        self.waiting[name] = tensor.contiguous()

    def _write(self) -> None:
        save_file(self.waiting, self._beside(len(self.written)), {"format": "pt"})
        self.written.append((list(self.waiting), sum(each.nbytes for each in self.waiting.values())))
        self.waiting = {}

    def _beside(self, number: int) -> Path:
        return self.folder / f"{number}.safetensors"

    def finish(self) -> None:
        if self.waiting:
            self._write()
        count = len(self.written)
        if count == 1:
            self._beside(0).rename(self.folder / WEIGHTS)
            return
        files = dict[str, str]()
        for number, (names, _) in enumerate(self.written):
            name = f"model-{number + 1:05}-of-{count:05}.safetensors"
            self._beside(number).rename(self.folder / name)
            files |= dict.fromkeys(names, name)
        total = sum(size for _, size in self.written)
        text = json.dumps({"metadata": {"total_size": total}, "weight_map": files}, indent=2)
        (self.folder / INDEX).write_text(text + "\n", "utf-8")


def write_generation_config(source: BaseSource, folder: Path, stop_ids: Sequence[int]) -> None:
    """The base's own, if it has one, with the tokens that end a trained answer among those that end generation."""
    path, own = folder / GENERATION, _file_of(source, GENERATION)
    content = {} if own is None else json.loads(own.read_text("utf-8"))
    ends = content.get("eos_token_id")
    ends = ends if isinstance(ends, list) else [] if ends is None else [ends]
    ends += [number for number in stop_ids if number not in ends]
    content["eos_token_id"] = ends if len(ends) != 1 else ends[0]
    path.write_text(json.dumps(content, indent=2) + "\n", "utf-8")


def copy_code(source: BaseSource, folder: Path) -> None:
    """The Python code that a local base brings along, without which its config leads nowhere."""
    for path in sorted(Path(source.name).glob("*.py")) if Path(source.name).is_dir() else ():
        shutil.copyfile(path, folder / path.name)
