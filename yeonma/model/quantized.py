"""Frozen dense layers whose weights are held in 8 or 4 bits: making them, and their products.

int8: a scale for each row (Dettmers et al. 2022, arXiv:2208.07339). nf4: 4 bits for each number, a scale for every 64,
and those scales in 8 bits themselves, "double quantisation" (Dettmers et al. 2023, arXiv:2305.14314). bitsandbytes
makes both, through transformers. fp8: see `yeonma.model.quantized`.

int8 and nf4 weights are multiplied as numbers of the activations' own format, made anew for each product. bitsandbytes'
own int8 product is not used: which activations it rounds to 8 bits depends on all tokens of a call, so that a token's
numbers would depend on what else is in its micro-batch.

The layers stay what PEFT and transformers know them as; they get a `packed` weight and a `forward` that uses it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from yeonma.config.settings import Quantization
from yeonma.errors import UserError
from yeonma.model.kernels.linear import Weight, frozen_linear, product

NF4_BLOCK, NF4_BLOCKS = 64, 256  # numbers that share a scale; scales that share one of their own
NF4_TABLES = 4 * (16 + 256 + 1)  # bytes that a layer's scales come with: two code books and a mean


class Packed(Weight, Protocol):
    @property
    def scale(self) -> torch.Tensor:
        """Not finite where the weight was not."""
        ...


@dataclass(frozen=True, eq=False)
class Dequantised:
    """A weight that is made whole for every product: `whole` gives (M, K) in a format."""

    whole: Callable[[torch.dtype], torch.Tensor]
    scale: torch.Tensor

    def product(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return product(x, self.whole(x.dtype), bias)

    def input_gradient(self, upstream: torch.Tensor) -> torch.Tensor:
        return product(upstream, self.whole(upstream.dtype).t())


def packed_weight(layer: nn.Module) -> Packed | None:
    """None for a layer that is not quantised."""
    found: Packed | None = getattr(layer, "packed", None)
    return found


def packed_layers(model: nn.Module) -> Iterator[tuple[str, Packed]]:
    for name, layer in model.named_modules():
        weight = packed_weight(layer)
        if weight is not None:
            yield name, weight


def is_rounded(model: nn.Module) -> bool:
    """Whether activations are rounded too, so that a last bit more or less may become a difference of an eighth."""
    return any(isinstance(weight, Fp8Weight) for _, weight in packed_layers(model))


def pack(layer: Any, weight: Packed) -> None:
    layer.packed = weight
    layer.forward = partial(_forward, layer)


def _forward(layer: Any, x: torch.Tensor) -> torch.Tensor:
    return frozen_linear(x, layer.packed, layer.bias)


def quantised_layers(model: Any, quantization: Quantization) -> list[Any]:
    """The dense layers that are held in fewer bits: all but the head. Those of fp8 are `nn.Linear` alone."""
    kinds = (nn.Linear,) if quantization == "fp8" else (nn.Linear, Conv1D)
    head = model.get_output_embeddings()
    return [each for each in model.modules() if isinstance(each, kinds) and each is not head]


def bitsandbytes_config(quantization: Quantization, dtype: torch.dtype) -> Any:
    """What transformers makes the layers by as it reads their weights; None where bitsandbytes plays no part."""
    from transformers import BitsAndBytesConfig

    if quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    if quantization == "nf4":
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    return None


def adopt(model: nn.Module) -> None:
    """Give the layers that bitsandbytes has made our products."""
    import bitsandbytes as bnb

    for layer in model.modules():
        if isinstance(layer, bnb.nn.Linear8bitLt):
            bits, scale = layer.weight.data, layer.weight.SCB / 127
            pack(layer, Dequantised(partial(_of_int8, bits, scale), scale))
        elif isinstance(layer, bnb.nn.Linear4bit):
            state = layer.weight.quant_state
            whole = partial(_of_nf4, bnb.functional.dequantize_4bit, layer.weight.data, state)
            pack(layer, Dequantised(whole, state.offset))


def _of_int8(bits: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return bits.to(dtype).mul_(scale.unsqueeze(1))  # in place, so that no float32 copy is held


def _of_nf4(
    dequantise: Callable[..., torch.Tensor], bits: torch.Tensor, state: Any, dtype: torch.dtype
) -> torch.Tensor:
    return dequantise(bits, state).to(dtype)


def check_layers(model: Any, quantization: Quantization, name: str) -> None:
    """Raises UserError where the model has no layer to quantise."""
    if quantization != "none" and not quantised_layers(model, quantization):
        what, place = f"{name} has no dense layers that it serves", f"quantization {quantization}"
        raise UserError(
            what, place=place, cure="use int8 or nf4" if quantization == "fp8" else "leave it out"
        )


def to_fp8(model: Any, device: torch.device, name: str) -> None:
    """Quantise layer by layer, on `device`, where the layers then stay; no more than one is there whole.

    Raises UserError as `check_layers`.
    """
    check_layers(model, "fp8", name)
    for layer in quantised_layers(model, "fp8"):
        _pack_fp8(layer, layer.weight.data.to(device), has_products(device))


def _pack_fp8(layer: Any, weight: torch.Tensor, by_device: bool) -> None:
    rows = quantise_rows(weight)
    # as bytes: nobody is to take them for numbers that trained weights or activations should be like
    layer.weight = nn.Parameter(rows.bits.view(torch.uint8), requires_grad=False)
    layer.register_buffer("scale", rows.scale, persistent=False)
    pack(layer, Fp8Weight(rows, by_device))


def sketch(model: Any, quantization: Quantization, by_device: bool) -> None:
    """Quantise a model on the meta device: the layers get the bytes that they will hold, and products without numbers.
    `by_device` as for `Fp8Weight`."""
    names = {module: name for name, module in model.named_modules()}
    for layer in quantised_layers(model, quantization):
        if quantization == "fp8":
            _pack_fp8(layer, layer.weight.data, by_device)
            continue
        rows, columns = layer.weight.shape[:: -1 if isinstance(layer, Conv1D) else 1]
        bits = torch.empty(held_bytes_of(quantization, rows, columns), dtype=torch.uint8, device="meta")
        dense = nn.Linear(columns, rows, bias=False, device="meta")
        dense.bias, dense.weight = layer.bias, nn.Parameter(bits, requires_grad=False)
        parent, _, name = names[layer].rpartition(".")
        setattr(model.get_submodule(parent), name, dense)
        pack(dense, Dequantised(partial(_unfilled, rows, columns), bits))


def _unfilled(rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(rows, columns, dtype=dtype, device="meta")


def held_bytes_of(quantization: Quantization, rows: int, columns: int) -> int:
    """Bytes of a weight (rows, columns) in int8 or nf4 with its scales, as bitsandbytes holds it."""
    numbers = rows * columns
    if quantization == "nf4":
        scales = math.ceil(numbers / NF4_BLOCK)
        return (numbers + 1) // 2 + scales + 4 * math.ceil(scales / NF4_BLOCKS) + NF4_TABLES
    return numbers + 4 * rows


def numbers_of(parameter: nn.Parameter) -> int:
    """How many weights a parameter stands for: two to a byte in nf4."""
    state = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else math.prod(state.shape)


HIGHEST = torch.finfo(torch.float8_e4m3fn).max
LEAST = 1e-30  # of a row's largest number: a row of zeros has a scale, too
DIVISOR = 16  # of K and M, for the device's products


@dataclass(frozen=True, eq=False)
class Rows:
    """Rows in 8 bits, and what to multiply each with: bits (N, K) e4m3, scale (N, 1) float32."""

    bits: torch.Tensor
    scale: torch.Tensor


def quantise_rows(values: torch.Tensor) -> Rows:
    """values (N, K); NaN or infinity in a row make its scale NaN or infinite."""
    scale = values.abs().amax(dim=1, keepdim=True).float().clamp_(min=LEAST).div_(HIGHEST)
    return Rows((values / scale).clamp_(-HIGHEST, HIGHEST).to(torch.float8_e4m3fn), scale)


@dataclass(frozen=True, eq=False)
class Fp8Weight:
    """A weight W (M, K) with a scale a row, as `yeonma.model.kernels.linear.Weight` wants it; `by_device`: multiplied
    by the device's own products."""

    rows: Rows
    by_device: bool

    @property
    def scale(self) -> torch.Tensor:
        return self.rows.scale

    def product(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        result = rows_product(quantise_rows(x), self.rows, x.dtype, by_device=self.by_device)
        return result if bias is None else result.add_(bias)

    def input_gradient(self, upstream: torch.Tensor) -> torch.Tensor:
        # for the device W must stand column by column, and a second copy of it would be held all the time
        columns = self.rows.bits.view(torch.uint8).t().contiguous().view(torch.float8_e4m3fn)
        ones = torch.ones(len(columns), 1, dtype=torch.float32, device=columns.device)
        rows = quantise_rows(upstream * self.scale.t())
        return rows_product(rows, Rows(columns, ones), upstream.dtype, by_device=self.by_device)


def rows_product(a: Rows, b: Rows, dtype: torch.dtype, *, by_device: bool) -> torch.Tensor:
    """a (N, K) @ b (M, K) transposed -> (N, M) in `dtype`."""
    scaled_mm = getattr(torch, "_scaled_mm", None)  # private; without it a forecast takes the plain products
    if by_device and scaled_mm and dtype == torch.bfloat16 and not any(n % DIVISOR for n in b.bits.shape):
        result: torch.Tensor = scaled_mm(
            a.bits, b.bits.t(), a.scale, b.scale.t().contiguous(), out_dtype=dtype
        )
        return result
    return emulated(a, b, dtype)


def emulated(a: Rows, b: Rows, dtype: torch.dtype) -> torch.Tensor:
    """The same by plain products. Sums of float16 would overflow before they are scaled."""
    kind = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
    return product(a.bits.to(kind), b.bits.to(kind)).float().mul_(a.scale).mul_(b.scale.t()).to(dtype)


def has_products(device: torch.device) -> bool:
    """Whether the device multiplies e4m3 by itself, and this PyTorch has the private operator for it."""
    if device.type != "cuda" or not hasattr(torch, "_scaled_mm"):
        return False
    return torch.cuda.get_device_capability(device) >= (8, 9)
