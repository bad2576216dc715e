"""Weights that are published in fewer bits, read as the whole ones that the bits stand for, tensor by tensor.

- fp8: `weight` in 8-bit floating point, multiplied by a scale for each block of rows and columns, for each row or for
  all (DeepSeek-V3, arXiv:2412.19437, section 3.3).
- mxfp4: blocks of 32 numbers in 4-bit floating point with a power of two for each (OCP Microscaling Formats 1.0).
- compressed-tensors and bitsandbytes: by the packages of these names, layer by layer.

The names and shapes are those of the unquantised model's files, so that transformers reads them as such, may quantise
them again layer by layer, and Yeonma merges adapters into them. Memory holds the layers that are being read.

Shapes: E experts, M outputs, K inputs, G blocks of a row.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from yeonma.errors import UserError
from yeonma.messages import tr
from yeonma.model.published import Method, Published
from yeonma.model.weight_files import LazyTensor, stored_tensors

Tensors = dict[str, LazyTensor]
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
"""The numbers of 4-bit floating point, by their bits."""
ACTIVATION_SCALES = re.compile(
    r"\.(activation_scale|input_scale|input_zero_point|input_global_scale|output_scale|qscale_act|[qkv]_scale)$"
)
"""Scales of activations, which are not rounded here."""


PACKED_BYTES = 17
"""Of a block of 32 numbers in MXFP4: 16 for the numbers, one for their exponent."""


def whole_tensors(
    files: Sequence[Path],
    published: Published | None,
    transposed: Collection[str] = (),
    *,
    pack_experts: bool = False,
) -> Tensors:
    """The tensors of the files, dequantised when they are read. `transposed`: names of weights of layers that hold
    them as (K, M), as GPT-2 does; bitsandbytes stores these as (M, K). `pack_experts`: leave MXFP4 as it is, with each
    block's exponent after its numbers: (E, M, G, PACKED_BYTES).

    Raises UserError for tensors that do not fit the published format.
    """
    stored = stored_tensors(files)
    if published is None:
        return stored
    place = str(files[0].parent)
    if pack_experts and published.method == "mxfp4":
        return _mxfp4(stored, published, place, packed=True)
    whole = _WHOLE[published.method](stored, published, place)
    kept = {name: tensor for name, tensor in whole.items() if not ACTIVATION_SCALES.search(name)}
    if published.method == "bitsandbytes":
        for name in transposed:
            if name in kept and kept[name] is not stored.get(name):
                kept[name] = LazyTensor(partial(_transposed, kept[name]), kept[name].dtype)
    return kept


def _transposed(tensor: LazyTensor) -> torch.Tensor:
    return tensor[...].t().contiguous()


def _unfit(name: str, why: str, place: str) -> UserError:
    cure = tr("download the model again, or give the unquantised one")
    return UserError(tr("{name} cannot be dequantised: {why}", name=name, why=why), place=place, cure=cure)


# fp8


def _fp8(stored: Tensors, published: Published, place: str) -> Tensors:
    block = published.config.get("weight_block_size")
    scales = {
        name: scale for name in stored if (scale := _scale_name(name, stored)) is not None and scale != name
    }
    whole: Tensors = {}
    for name, tensor in stored.items():
        if name in scales.values():
            continue
        if name not in scales:
            if tensor.dtype.startswith("F8"):
                raise _unfit(name, tr("it has no scale"), place)
            whole[name] = tensor
        elif tensor.dtype not in ("F8_E4M3", "F8_E5M2"):
            raise _unfit(name, tr("its numbers are {dtype}, not fp8", dtype=tensor.dtype), place)
        else:
            read = partial(_read_fp8, name, tensor, stored[scales[name]], block, place)
            whole[name] = LazyTensor(read, "F32")
    return whole


def _scale_name(name: str, stored: Mapping[str, LazyTensor]) -> str | None:
    """The name of a weight's scale in the files of DeepSeek, Qwen, Mistral and transformers."""
    layer = name.removesuffix(".weight")
    names = [f"{name}_scale_inv", f"{name}_scale"]
    if layer != name:
        names += [f"{layer}.scale", f"{layer}.scale_inv", f"{layer}.qscale_weight"]
    return next((scale for scale in names if scale in stored), None)


def _read_fp8(
    name: str, weight: LazyTensor, scale: LazyTensor, block: Sequence[int] | None, place: str
) -> torch.Tensor:
    numbers = weight[...].float()
    factors = _float_scale(scale[...])
    try:
        return numbers.mul_(_expanded(factors, numbers.shape, block))
    except (ValueError, RuntimeError) as error:
        why = tr(
            "weight {weight}, scale {scale}, and blocks of {block}",
            weight=tuple(numbers.shape),
            scale=tuple(factors.shape),
            block=block,
        )
        raise _unfit(name, why, place) from error


def _float_scale(scale: torch.Tensor) -> torch.Tensor:
    """In float32. Bytes are exponents of two, as E8M0 stores them."""
    if scale.dtype == torch.uint8:
        return (scale.float() - 127).exp2()
    return scale.float()


def _expanded(scale: torch.Tensor, shape: torch.Size, block: Sequence[int] | None) -> torch.Tensor:
    """A scale for each number of a weight of this shape (..., M, K), or that broadcasts to it.

    Raises ValueError for another number of scales than the blocks need.
    """
    if scale.numel() == 1:
        return scale.reshape(())
    rows, columns = shape[-2:]
    if scale.ndim < len(shape) or scale.shape[-2:] == (1, 1):  # one for each row, or for each expert
        wanted = (*shape[:-1], 1) if scale.numel() == shape[:-1].numel() else (*shape[:-2], 1, 1)
        return scale.reshape(wanted)
    if scale.shape[-2:] == (rows, 1):
        return scale
    if block is None:
        raise ValueError("no blocks")
    height, width = block
    if scale.shape[-2:] != (-(-rows // height), -(-columns // width)):
        raise ValueError("other blocks")
    by_row = scale.repeat_interleave(height, dim=-2)[..., :rows, :]
    return by_row.repeat_interleave(width, dim=-1)[..., :columns]


# mxfp4


def _mxfp4(stored: Tensors, published: Published, place: str, *, packed: bool = False) -> Tensors:
    whole: Tensors = {}
    for name, tensor in stored.items():
        weight = name.removesuffix("_blocks")
        if weight != name:
            scales = stored.get(f"{weight}_scales")
            if scales is None:
                raise _unfit(weight, tr("{weight}_scales is missing", weight=weight), place)
            read = partial(_read_mxfp4, weight, tensor, scales, place, packed)
            whole[weight] = LazyTensor(read, "U8" if packed else "BF16")
        elif f"{name.removesuffix('_scales')}_blocks" not in stored:
            whole[name] = tensor
    return whole


def _read_mxfp4(
    name: str, blocks: LazyTensor, scales: LazyTensor, place: str, is_packed: bool
) -> torch.Tensor:
    packed, exponents = blocks[...], scales[...]
    if packed.ndim != 4 or exponents.shape != packed.shape[:-1] or packed.dtype != torch.uint8:
        why = tr(
            "blocks {shape} and scales {shape2} do not belong together",
            shape=tuple(packed.shape),
            shape2=tuple(exponents.shape),
        )
        raise _unfit(name, why, place)
    if is_packed:
        return torch.cat([packed, exponents.unsqueeze(-1)], dim=-1)
    return unpack_mxfp4(packed, exponents, torch.bfloat16)  # which holds all of their numbers


def unpack_mxfp4(blocks: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """blocks (E, M, G, 16) bytes of two numbers, scales (E, M, G) exponents -> (E, K, M), as gpt-oss multiplies."""
    experts, rows, groups, half = blocks.shape
    numbers = torch.tensor(E2M1, dtype=dtype, device=blocks.device)
    whole = torch.empty(experts, groups * half * 2, rows, dtype=dtype, device=blocks.device)
    for expert in range(experts):  # one at a time: indices take eight bytes a number
        pairs = torch.stack([blocks[expert] & 15, blocks[expert] >> 4], dim=-1).flatten(-2).int()
        factors = _float_scale(scales[expert]).to(dtype).unsqueeze(-1)
        whole[expert] = numbers[pairs].mul_(factors).reshape(rows, -1).t()
    return whole


# compressed-tensors


def _compressed(stored: Tensors, published: Published, place: str) -> Tensors:
    from compressed_tensors.quantization import QuantizationConfig

    config = QuantizationConfig.model_validate(dict(published.config))
    layers: dict[str, dict[str, LazyTensor]] = {}
    for name, tensor in stored.items():
        layer, _, part = name.rpartition(".")
        if part.startswith("weight"):
            layers.setdefault(layer, {})[part] = tensor
    packed = {layer: parts for layer, parts in layers.items() if "weight_scale" in parts}
    whole: Tensors = {}
    for name, tensor in stored.items():
        layer, _, part = name.rpartition(".")
        if layer not in packed or not part.startswith("weight"):
            whole[name] = tensor
        elif part == "weight_scale":
            scheme = _scheme(layer, config.config_groups)
            if scheme is None:
                raise _unfit(layer, tr("no group of the quantisation names it"), place)
            read = partial(_decompress, layer, packed[layer], scheme, str(config.format), place)
            whole[f"{layer}.weight"] = LazyTensor(read, "BF16")
    return whole


def _scheme(layer: str, groups: Mapping[str, Any]) -> Any:
    """The scheme of a layer: of the group that names it, else of one for all linear layers."""
    for_classes = None
    for scheme in groups.values():
        if scheme.weights is None:
            continue
        for target in scheme.targets:
            if target.startswith("re:"):
                if re.match(target.removeprefix("re:"), layer):
                    return scheme
            elif target == layer or layer.endswith(f".{target}"):
                return scheme
            elif "." not in target and target[:1].isupper():
                for_classes = for_classes or scheme
    return for_classes


def _decompress(
    layer: str, parts: Mapping[str, LazyTensor], scheme: Any, usual_format: str, place: str
) -> torch.Tensor:
    from compressed_tensors.compressors import BaseCompressor

    tensors = {name: tensor[...] for name, tensor in parts.items()}
    form = scheme.format or usual_format
    try:
        compressor = BaseCompressor.get_value_from_registry(getattr(form, "value", form))
        weight: torch.Tensor = compressor.decompress(tensors, scheme)["weight"]
    except Exception as error:  # whatever the package raises for tensors of another form
        raise _unfit(
            layer, tr("compressed-tensors fails on it ({error!s:.200})", error=error), place
        ) from error
    return weight.data if isinstance(weight, torch.nn.Parameter) else weight


# bitsandbytes


def _bitsandbytes(stored: Tensors, published: Published, place: str) -> Tensors:
    four_bits = {name.removesuffix(".absmax") for name in stored if name.endswith(".absmax")}
    whole: Tensors = {}
    for name, tensor in stored.items():
        layer, _, part = name.rpartition(".")
        if name in four_bits:
            state = {key: one for key, one in stored.items() if key.startswith(f"{name}.")}
            whole[name] = LazyTensor(partial(_read_4bit, name, tensor, state), "F32")
        elif part == "weight" and tensor.dtype == "I8":
            scale = stored.get(f"{layer}.SCB")
            if scale is None:
                raise _unfit(name, tr("{layer}.SCB is missing", layer=layer), place)
            whole[name] = LazyTensor(partial(_read_int8, tensor, scale), "F32")
        elif (
            part not in ("SCB", "weight_format")
            and f"{name.partition('.weight.')[0]}.weight" not in four_bits
        ):
            whole[name] = tensor
    return whole


def _read_int8(bits: LazyTensor, scale: LazyTensor) -> torch.Tensor:
    return bits[...].float().mul_(scale[...].float().unsqueeze(1) / 127)


def _read_4bit(name: str, bits: LazyTensor, parts: Mapping[str, LazyTensor]) -> torch.Tensor:
    from bitsandbytes.functional import QuantState, dequantize_4bit

    tensors = {key.removeprefix(f"{name}."): tensor[...] for key, tensor in parts.items()}
    state = QuantState.from_dict(tensors, device=torch.device("cpu"))
    state.dtype = torch.float32
    weight: torch.Tensor = dequantize_4bit(bits[...], state)
    return weight


_WHOLE: Mapping[Method, Callable[[Tensors, Published, str], Tensors]] = {
    "bitsandbytes": _bitsandbytes,
    "fp8": _fp8,
    "mxfp4": _mxfp4,
    "compressed-tensors": _compressed,
}
