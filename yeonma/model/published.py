"""Weights that a base model is published with in fewer bits: how config.json names them. Imports no torch.

Yeonma reads four kinds. What bitsandbytes packed stays packed, with the products of `--quantization`. FP8, MXFP4 and
compressed-tensors are dequantised as they are read. Any other kind is an error.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from yeonma.config.settings import Quantization
from yeonma.config.yaml_text import read_front_matter
from yeonma.errors import UserError
from yeonma.messages import tr
from yeonma.packages import install

Method = Literal["bitsandbytes", "fp8", "mxfp4", "compressed-tensors"]
QUANTIZATION_KEYS = ("quantization_config", "compression_config", "quantization")
"""Keys of config.json. The second is of early versions of compressed-tensors, the third of MLX."""
_NAMES = {
    "gptq": "GPTQ",
    "awq": "AWQ",
    "hqq": "HQQ",
    "torchao": "torchao",
    "aqlm": "AQLM",
    "eetq": "EETQ",
    "quanto": "quanto",
    "auto-round": "AutoRound",
    "intel/auto-round": "AutoRound",
    "fbgemm_fp8": "FBGEMM FP8",
    "bitnet": "BitNet",
    "higgs": "HIGGS",
    "vptq": "VPTQ",
    "spqr": "SpQR",
    "quark": "Quark",
    "exl2": "EXL2",
    "exl3": "EXL3",
    "modelopt": "ModelOpt",
    "mxfp8": "MXFP8",
    "nvfp4": "NVFP4",
    "mlx": "MLX",
}
"""Kinds that are not read, by `quant_method`: their names in messages."""
_FILES = {"quantize_config.json": "gptq", "quant_config.json": "awq", "hf_quant_config.json": "modelopt"}
"""Files beside config.json in which older versions of quantisers say what config.json does not."""


@dataclass(frozen=True)
class Published:
    """How the weights of a base are stored."""

    method: Method
    kind: str
    """The number format: nf4, fp4, int8, fp8, mxfp4, int4 ..."""
    bits: int
    """Bits of a number, without scales."""
    about: str
    """What else describes it, in words; may be empty."""
    config: Mapping[str, Any]
    """The quantisation as config.json has it."""

    @property
    def stays_packed(self) -> bool:
        """Whether the weights are held in memory as they are published."""
        return self.method == "bitsandbytes"

    def packs_experts(self, quantization: Quantization) -> bool:
        """Whether fused experts stay as they are published, while `quantization` packs the other layers."""
        return self.method == "mxfp4" and quantization != "none"

    def __str__(self) -> str:
        method = f"{self.method} " if self.method != self.kind else ""
        kind = f"{method}{self.kind}"
        if not self.about:
            return tr("{kind} ({bits} bits)", kind=kind, bits=self.bits)
        return tr("{kind} ({bits} bits, {about})", kind=kind, bits=self.bits, about=self.about)

    def held(self, quantization: Quantization, dtype: str) -> str:
        """How the weights are held in memory, in words."""
        if self.stays_packed:
            return tr("held in these bits")
        if self.method == "mxfp4" and quantization != "none":
            return tr("experts held in these bits, dense layers in {quantization}", quantization=quantization)
        if quantization == "none":
            return tr("dequantised as they are read, held in {dtype}", dtype=dtype)
        return tr(
            "dequantised as they are read, dense layers held in {quantization}", quantization=quantization
        )

    def record(self) -> dict[str, Any]:
        """What yeonma.json records."""
        return {"method": self.method, "kind": self.kind, "bits": self.bits}


def published_in(config: Mapping[str, Any], place: str, unquantised: str | None = None) -> Published | None:
    """The quantisation that a config names; None for weights that are not quantised.

    `config`: the contents of config.json. `place`: the model's folder or name. `unquantised`: the name of the model
    that was quantised, if it is known. Raises UserError for a kind that Yeonma does not read.
    """
    found = quantization_of(config)
    if found is None:
        return None
    method = _method(found)
    reader = _READERS.get(method)
    if reader is None:
        raise _not_read(method, found, place, unquantised)
    try:
        return reader(found)
    except (AttributeError, KeyError, TypeError, ValueError, IndexError) as error:
        problem = tr(
            "its quantisation by {method} is not described as Yeonma knows it ({error})",
            method=method,
            error=error,
        )
        raise UserError(problem, place=place, cure=_cure(place, unquantised)) from error


def quantization_of(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The part of a config that describes quantised weights, its own or that of its language model."""
    for part in (config, config.get("text_config"), config.get("llm_config")):
        for key in QUANTIZATION_KEYS:
            found = part.get(key) if isinstance(part, Mapping) else None
            if isinstance(found, Mapping) and found and (key != "quantization" or "bits" in found):
                return found
    return None


def published_in_folder(folder: Path) -> Published | None:
    """How a local model's weights are quantised; None if they are not.

    Raises UserError for a kind that Yeonma does not read, and if the package that reads it is missing.
    """
    try:
        config = json.loads((folder / "config.json").read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        return None  # reported by those who read it
    if not isinstance(config, Mapping):
        return None
    unquantised = unquantised_base(folder, config)
    published = published_in(config, str(folder), unquantised)
    if published is not None:
        check_package(published, str(folder))
        return published
    for name, method in _FILES.items():
        if (folder / name).is_file():
            raise _not_read(method, {}, str(folder / name), unquantised)
    return None


def check_not_packed(published: Published | None, quantization: Quantization, place: str) -> None:
    """Raises UserError for a base to quantise whose weights stay packed as they are published."""
    if published is not None and published.stays_packed and quantization != "none":
        problem = tr("{place} is quantised already: {published}", place=place, published=published)
        cure = tr("leave it out: the weights are held in these bits, or give the unquantised model")
        raise UserError(problem, place=f"quantization {quantization}", cure=cure)


def check_package(published: Published, place: str) -> None:
    """Raises UserError if the package that reads the weights is not installed."""
    package = published.method
    if package in ("bitsandbytes", "compressed-tensors") and find_spec(package.replace("-", "_")) is None:
        problem = tr(
            "its weights are {published}, and the package {package} is not installed",
            published=published,
            package=package,
        )
        raise UserError(problem, place=place, cure=install(package))


def unquantised_base(folder: Path, config: Mapping[str, Any]) -> str | None:
    """The model that was quantised, as the folder's README.md or config.json names it; None if neither does."""
    for name in (_base_of_readme(folder / "README.md"), config.get("_name_or_path")):
        if isinstance(name, str) and name and not _is_same(name, folder):
            return name
    return None


def _is_same(name: str, folder: Path) -> bool:
    return name == str(folder) or Path(name).name == folder.name


def _base_of_readme(path: Path) -> str | None:
    """The first `base_model` of the front matter of a model card."""
    front = read_front_matter(path)
    named = front and re.search(r"^base_model:\s*(?:-\s*)?[\[\"']*([\w./-]+)", front, re.MULTILINE)
    return named.group(1) if named else None


_UNNAMED = "an unnamed method"


def _method(found: Mapping[str, Any]) -> str:
    if found.get("load_in_4bit") or found.get("load_in_8bit"):
        return "bitsandbytes"
    method = found.get("quant_method")
    if isinstance(method, str) and method:
        return method.lower()
    if "config_groups" in found:
        return "compressed-tensors"
    return "mlx" if "group_size" in found and "bits" in found else _UNNAMED


def _not_read(method: str, found: Mapping[str, Any], place: str, unquantised: str | None) -> UserError:
    bits = next((found[key] for key in ("bits", "w_bit", "nbits") if isinstance(found.get(key), int)), None)
    name = tr("an unnamed method") if method == _UNNAMED else _NAMES.get(method, method)
    problem = (
        tr(
            "its weights are quantised by {method} in {bits} bits, which Yeonma does not read",
            method=name,
            bits=bits,
        )
        if bits
        else tr("its weights are quantised by {method}, which Yeonma does not read", method=name)
    )
    return UserError(problem, place=place, cure=_cure(place, unquantised))


def _cure(place: str, unquantised: str | None) -> str:
    if unquantised is None:
        return tr("give the unquantised model, and --quantization nf4 if it is too large")
    return tr(
        "give {unquantised}, which it was made from, and --quantization nf4 if that is too large",
        unquantised=unquantised,
    )


def _bitsandbytes(found: Mapping[str, Any]) -> Published:
    if found.get("load_in_8bit"):
        return Published("bitsandbytes", "int8", 8, "", found)
    kind = found.get("bnb_4bit_quant_type", "fp4")
    if kind not in ("nf4", "fp4"):
        raise ValueError(f"bnb_4bit_quant_type is {kind!r:.50}")
    about = tr("double quantisation") if found.get("bnb_4bit_use_double_quant") else ""
    return Published("bitsandbytes", kind, 4, about, found)


def _fp8(found: Mapping[str, Any]) -> Published:
    block = found.get("weight_block_size")
    if block is None:
        return Published("fp8", "fp8", 8, tr("one scale per weight"), found)
    rows, columns = (int(size) for size in block)
    if rows < 1 or columns < 1:
        raise ValueError(f"weight_block_size is {block!r:.50}")
    return Published("fp8", "fp8", 8, tr("blocks of {rows} x {columns}", rows=rows, columns=columns), found)


def _mxfp4(found: Mapping[str, Any]) -> Published:
    return Published("mxfp4", "mxfp4", 4, tr("blocks of 32"), found)


def _compressed_tensors(found: Mapping[str, Any]) -> Published:
    if found.get("transform_config"):
        raise ValueError(tr("it rotates activations (transform_config)"))
    sparsity = found.get("sparsity_config") or {}
    if sparsity.get("format", "dense") != "dense":
        raise ValueError(tr("sparse weights ({format})", format=sparsity["format"]))
    weights = [group["weights"] for group in found["config_groups"].values() if group.get("weights")]
    if not weights:
        raise ValueError(tr("no group of weights"))
    kinds = sorted({f"{'fp' if one.get('type') == 'float' else 'int'}{one['num_bits']}" for one in weights})
    bits = max(int(one["num_bits"]) for one in weights)
    return Published("compressed-tensors", " and ".join(kinds), bits, str(found.get("format", "")), found)


_READERS: Mapping[str, Callable[[Mapping[str, Any]], Published]] = {
    "bitsandbytes": _bitsandbytes,
    "fp8": _fp8,
    "mxfp4": _mxfp4,
    "compressed-tensors": _compressed_tensors,
}
