"""Folders of tiny models as they are published in fewer bits: written by transformers, or in the published format."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from tests.models import tiny_model
from tests.runs import characters, model_folder
from yeonma.model.whole_weights import E2M1

Tensors = dict[str, torch.Tensor]


def packed_folder(place: Path, base: Path, dtype: torch.dtype = torch.float32, **options: Any) -> Path:
    """A folder that transformers saved after bitsandbytes packed it; `options` of its BitsAndBytesConfig."""
    model = AutoModelForCausalLM.from_pretrained(
        base, quantization_config=BitsAndBytesConfig(**options), dtype=dtype, device_map={"": "cpu"}
    )
    model.save_pretrained(place)
    characters().save_pretrained(place)
    return place


def rewritten(
    place: Path, base: Path, quantization: Mapping[str, Any] | None, change: Callable[[Tensors], Tensors]
) -> Path:
    """A copy of a model folder with other tensors, and with a `quantization_config` or without."""
    shutil.copytree(base, place)
    config = json.loads((place / "config.json").read_text())
    config.pop("quantization_config", None)
    if quantization is not None:
        config["quantization_config"] = dict(quantization)
    (place / "config.json").write_text(json.dumps(config))
    save_file(change(load_file(base / "model.safetensors")), place / "model.safetensors", {"format": "pt"})
    return place


def is_dense(name: str) -> bool:
    return "proj.weight" in name


def fp8_folders(
    place: Path,
    family: str = "llama",
    block: tuple[int, int] | None = (20, 12),
    *,
    make: Callable[[Path, str], Path] = model_folder,
) -> tuple[Path, Path]:
    """A folder in fp8 and one with the same weights dequantised. Blocks do not divide the rows and columns evenly.
    `make` writes the base."""
    base = make(place / "base", family)
    config = {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": block,
    }
    whole: Tensors = {}

    def quantised(tensors: Tensors) -> Tensors:
        stored: Tensors = {}
        for name, weight in tensors.items():
            if not is_dense(name):
                stored[name] = whole[name] = weight
                continue
            height, width = block or weight.shape
            rows, columns = weight.shape
            scales = torch.empty(math.ceil(rows / height), math.ceil(columns / width))
            bits, exact = torch.empty_like(weight, dtype=torch.float8_e4m3fn), torch.empty_like(weight)
            for i in range(scales.shape[0]):
                for j in range(scales.shape[1]):
                    part = (slice(i * height, (i + 1) * height), slice(j * width, (j + 1) * width))
                    scales[i, j] = weight[part].abs().max() / 448
                    bits[part] = (weight[part] / scales[i, j]).to(torch.float8_e4m3fn)
                    exact[part] = bits[part].float() * scales[i, j]
            stored[name], stored[f"{name}_scale_inv"] = bits, scales if block else scales.reshape(())
            if block is None:
                stored[name.replace("weight", "activation_scale")] = torch.ones(())
            whole[name] = exact
        return stored

    published = rewritten(place / "fp8", base, config, quantised)
    return published, rewritten(place / "whole", base, None, lambda _: whole)


def mxfp4_folders(place: Path) -> tuple[Path, Path]:
    """gpt-oss with its experts in MXFP4, and the same weights dequantised."""
    base = model_folder(place / "base", "gpt_oss")
    config = tiny_model("gpt_oss").config
    config.intermediate_size, config.max_position_embeddings = 64, 512  # whole blocks
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(base)
    whole: Tensors = {}
    numbers = torch.tensor(E2M1)

    def quantised(tensors: Tensors) -> Tensors:
        stored: Tensors = {}
        draw = torch.Generator().manual_seed(3)
        for name, weight in tensors.items():
            if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
                stored[name] = whole[name] = weight
                continue
            experts, columns, rows = weight.shape
            nibbles = torch.randint(16, (experts, rows, columns // 32, 32), generator=draw)
            scales = torch.randint(122, 126, (experts, rows, columns // 32), generator=draw)
            stored[f"{name}_blocks"] = (nibbles[..., 0::2] | (nibbles[..., 1::2] << 4)).to(torch.uint8)
            stored[f"{name}_scales"] = scales.to(torch.uint8)
            exact = numbers[nibbles] * 2.0 ** (scales - 127).unsqueeze(-1)
            whole[name] = exact.reshape(experts, rows, columns).transpose(1, 2).contiguous()
        return stored

    quantization = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]}
    published = rewritten(place / "mxfp4", base, quantization, quantised)
    return published, rewritten(place / "whole", base, None, lambda _: whole)


def compressed_folders(place: Path, bits: int = 4) -> tuple[Path, Path]:
    """A folder that the package compressed-tensors compressed, in int4 by groups of 16 or in fp8 by rows, and the same
    weights dequantised."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationScheme

    base = model_folder(place / "base")
    arguments: dict[str, Any] = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 16}
    form = "pack-quantized"
    if bits == 8:
        arguments, form = {"num_bits": 8, "type": "float", "strategy": "channel"}, "float-quantized"
    group = {"targets": ["Linear"], "weights": {"symmetric": True, **arguments}}
    config = {
        "quant_method": "compressed-tensors",
        "format": form,
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
        "quantization_status": "compressed",
    }
    scheme = QuantizationScheme.model_validate(group)
    whole: Tensors = {}

    def quantised(tensors: Tensors) -> Tensors:
        stored: Tensors = {}
        compressor = BaseCompressor.get_value_from_registry(form)
        for name, weight in tensors.items():
            if not is_dense(name):
                stored[name] = whole[name] = weight
                continue
            groups = weight.reshape(len(weight), -1, 16) if bits == 4 else weight.unsqueeze(1)
            scale = groups.abs().amax(-1) / (7 if bits == 4 else 448)
            parts = compressor.compress({"weight": weight, "weight_scale": scale}, scheme)
            layer = name.removesuffix("weight")
            stored |= {layer + key: tensor.detach().clone() for key, tensor in parts.items()}
            rounded = groups / scale.unsqueeze(-1)
            rounded = rounded.round().clamp(-8, 7) if bits == 4 else rounded.to(torch.float8_e4m3fn).float()
            whole[name] = (rounded * scale.unsqueeze(-1)).reshape(weight.shape)
        return stored

    published = rewritten(place / "compressed", base, config, quantised)
    return published, rewritten(place / "whole", base, None, lambda _: whole)
