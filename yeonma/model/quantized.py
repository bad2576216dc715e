"""Frozen dense layers with weights in 8 or 4 bits: quantising them, and their products.

- int8: a scale per row (Dettmers et al. 2022, arXiv:2208.07339). nf4: 4 bits per number, a scale for every 64, and
  these scales in 8 bits: "double quantisation" (Dettmers et al. 2023, arXiv:2305.14314). bitsandbytes quantises both,
  through transformers. A weight is dequantised to the activations' number format for each product. bitsandbytes' own
  int8 product is not used: which activations it rounds to 8 bits depends on all tokens of a call, so a token's numbers
  would depend on the rest of its micro-batch.
- fp8: 8-bit floating point (e4m3), weights with a scale per row, activations with a scale per token. A row r is stored
  as q = round(r / s) with s = max |r| / 448, the largest number of e4m3. Scales factor out of a product:
  x @ W.T = (x_q @ W_q.T) * s_x * s_W.T. In the gradient of the input the sum runs over the weight's rows, so their
  scales go into what is quantised: g @ W = (q(g * s_W.T) @ W_q) * s (Micikevicius et al. 2022, arXiv:2209.05433). The
  device computes these products where it can (compute capability 8.9 and above, in bfloat16). Elsewhere the same
  numbers are multiplied as bfloat16 or float32, which hold all of e4m3: equal up to the order of sums and bfloat16's
  own rounding, and not faster than dense layers.

The layers keep their classes, which PEFT and transformers know. They get a `packed` weight and a `forward` that uses
it. If the weights are to be sharded, bits and scales become parameters of the layer (`hold_in_parameters`), which are
read at every product: FSDP2 has gathered them by then.

Shapes: N tokens, K inputs, M outputs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from copy import copy
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from yeonma.config.settings import Quantization
from yeonma.errors import UserError
from yeonma.messages import tr
from yeonma.model.kernels.linear import Weight, frozen_linear, product
from yeonma.model.published import Published

NF4_BLOCK, NF4_BLOCKS = 64, 256  # numbers per scale; scales per scale of scales
NF4_TABLES = 4 * (16 + 256 + 1)  # bytes of a layer's two code books and a mean
SCALES = "packed_scales"  # the parameter of a layer that holds its scales, see `hold_in_parameters`


class PackedWeight(Weight, Protocol):
    """A weight (M, K) in fewer bits."""

    @property
    def bits(self) -> torch.Tensor: ...

    @property
    def scales(self) -> torch.Tensor: ...

    @property
    def scale(self) -> torch.Tensor:
        """Not finite if the original weight is not."""
        ...

    def with_tensors(self, bits: torch.Tensor, scales: torch.Tensor) -> PackedWeight:
        """The same kind of weight with other bits and scales."""
        ...


@dataclass(frozen=True, eq=False)
class DequantisedWeight:
    """A weight that is dequantised for every product."""

    bits: torch.Tensor
    scales: torch.Tensor
    unpack: Callable[[torch.Tensor, torch.Tensor, torch.dtype], torch.Tensor]
    """Bits, scales and a number format -> (M, K)."""
    mean: torch.Tensor | None = None
    """Of scales that are quantised themselves."""

    @property
    def scale(self) -> torch.Tensor:
        return self.scales if self.mean is None else self.mean

    def with_tensors(self, bits: torch.Tensor, scales: torch.Tensor) -> DequantisedWeight:
        return replace(self, bits=bits, scales=scales)

    def dequantise(self, dtype: torch.dtype) -> torch.Tensor:
        """The whole weight (M, K)."""
        return self.unpack(self.bits, self.scales, dtype)

    def product(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return product(x, self.dequantise(x.dtype), bias)

    def input_gradient(self, upstream: torch.Tensor) -> torch.Tensor:
        return product(upstream, self.dequantise(upstream.dtype).t())


def packed_weight(layer: nn.Module) -> PackedWeight | None:
    """The packed weight of a layer, as it is now; None if it is not quantised."""
    packed: PackedWeight | None = getattr(layer, "packed", None)
    scales: torch.Tensor | None = getattr(layer, SCALES, None)
    if packed is None or scales is None:
        return packed
    return packed.with_tensors(layer.weight, scales)  # type: ignore[arg-type]


def packed_layers(model: nn.Module) -> Iterator[tuple[str, PackedWeight]]:
    for name, layer in model.named_modules():
        weight = packed_weight(layer)
        if weight is not None:
            yield name, weight


def is_rounded(model: nn.Module) -> bool:
    """Whether activations are rounded to 8 bits, which may turn a difference in the last bit into one of an eighth."""
    return any(isinstance(weight, Fp8Weight) for _, weight in packed_layers(model))


def pack(layer: Any, weight: PackedWeight) -> None:
    """Give a layer a packed weight and the forward that uses it."""
    layer.packed = weight
    layer.forward = partial(_forward, layer)


def _forward(layer: Any, x: torch.Tensor) -> torch.Tensor:
    weight = packed_weight(layer)
    assert weight is not None
    return frozen_linear(x, weight, layer.bias)


def hold_in_parameters(model: nn.Module) -> None:
    """Make bits and scales of all packed weights parameters of their layers, so that FSDP2 shards them.

    Of scales that are quantised themselves, what is left (a number per 16,384 weights) stays in every process. PEFT can
    no longer dequantise such a layer, which DoRA needs.
    """
    for layer in model.modules():
        weight: PackedWeight | None = getattr(layer, "packed", None)
        if weight is None or hasattr(layer, SCALES):
            continue
        bits, scales = weight.bits, weight.scales
        if bits.is_floating_point():  # bits, whatever their type says
            bits = bits.view(torch.uint8)
        layer._buffers.pop("scale", None)  # that of fp8
        if hasattr(layer, "quant_state"):
            layer.quant_state = None  # type: ignore[assignment]
        layer.weight = nn.Parameter(bits, requires_grad=False)
        layer.register_parameter(SCALES, nn.Parameter(scales, requires_grad=False))
        layer.packed = weight.with_tensors(bits.new_empty(0), scales.new_empty(0))  # type: ignore[assignment]


def quantised_layers(model: Any, quantization: Quantization) -> list[Any]:
    """The dense layers to quantise: all but the head, and but those that compute something else than their product. As
    transformers has it for bitsandbytes, `nn.Linear` itself and `Conv1D`; for fp8, `nn.Linear` with its own forward."""
    head = model.get_output_embeddings()
    return [layer for layer in model.modules() if layer is not head and _is_dense(layer, quantization)]


def _is_dense(layer: nn.Module, quantization: Quantization) -> bool:
    if quantization == "fp8":
        return isinstance(layer, nn.Linear) and type(layer).forward == nn.Linear.forward
    return type(layer) is nn.Linear or isinstance(layer, Conv1D)


def bitsandbytes_config(quantization: Quantization, dtype: torch.dtype) -> Any:
    """transformers' config for quantising weights while it loads them; None for what does not use bitsandbytes."""
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


def pack_bitsandbytes_layers(model: nn.Module, dtype: torch.dtype) -> None:
    """Replace the products of bitsandbytes' layers by ours. `dtype`: what 4-bit weights are rounded to once."""
    import bitsandbytes as bnb

    for layer in model.modules():
        if isinstance(layer, bnb.nn.Linear8bitLt):
            pack(layer, _int8_weight(layer.weight))
        elif isinstance(layer, bnb.nn.Linear4bit):
            pack(layer, _4_bit_weight(layer.weight, dtype))


def _int8_weight(weight: Any) -> DequantisedWeight:
    """`weight`: bitsandbytes' Int8Params."""
    return DequantisedWeight(weight.data, weight.SCB / 127, _dequantise_int8)


def _4_bit_weight(weight: Any, dtype: torch.dtype) -> DequantisedWeight:
    """`weight`: bitsandbytes' Params4bit."""
    import bitsandbytes as bnb

    weight.quant_state.dtype = dtype  # files have that of their weights before quantisation
    tables = copy(weight.quant_state)
    scales, tables.absmax = tables.absmax, None
    dequantise = partial(_dequantise_4bit, bnb.functional.dequantize_4bit, tables)
    return DequantisedWeight(weight.data, scales, dequantise, tables.offset if tables.nested else None)


def _dequantise_int8(bits: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return bits.to(dtype).mul_(scales.unsqueeze(1))  # in place: no float32 copy


def _dequantise_4bit(
    dequantise_4bit: Callable[..., torch.Tensor],
    tables: Any,
    bits: torch.Tensor,
    scales: torch.Tensor,
    dtype: torch.dtype,
) -> torch.Tensor:
    """`tables`: all of bitsandbytes' QuantState but the scales."""
    state = copy(tables)
    state.absmax = scales
    if state.code.device != bits.device:  # of a model that was read on the CPU to be sharded
        tables.absmax = scales
        tables.to(bits.device)
        state, tables.absmax = copy(tables), None
    return dequantise_4bit(bits, state).to(dtype)


def take_weights_to_pack(model: Any, quantization: Quantization, name: str) -> dict[nn.Module, torch.Tensor]:
    """Take the weights (M, K) of the layers to quantise out of a model on the CPU, for `pack_taken`.

    The layers are left as quantised ones, with bytes for weights but as yet without any. Raises UserError as
    `check_layers`.
    """
    check_layers(model, quantization, name)
    names = {module: path for path, module in model.named_modules()}
    taken: dict[nn.Module, torch.Tensor] = {}
    for layer in quantised_layers(model, quantization):
        weight = layer.weight.data
        if isinstance(layer, Conv1D):  # which transformers replaces, too
            weight = weight.t()
            layer = _replace_by_linear(model, names[layer], *weight.shape)
        layer.weight = nn.Parameter(torch.empty(0, dtype=torch.uint8), requires_grad=False)
        if quantization == "nf4":  # PEFT rounds a new adapter to it, as for bitsandbytes' own layers
            layer.compute_dtype = model.dtype
        taken[layer] = weight
    return taken


def pack_taken(
    part: nn.Module,
    taken: dict[nn.Module, torch.Tensor],
    quantization: Quantization,
    device: torch.device,
    dtype: torch.dtype,
) -> list[nn.Module]:
    """Quantise the layers within `part` on `device`, where they stay, and forget their whole weights. The result is
    that of quantising a model while it is loaded. Returns the layers."""
    layers = [layer for layer in part.modules() if layer in taken]
    for layer in layers:
        _pack_one(layer, taken.pop(layer), quantization, device, dtype)
    return layers


def _pack_one(
    layer: Any, weight: torch.Tensor, quantization: Quantization, device: torch.device, dtype: torch.dtype
) -> None:
    if quantization == "fp8":
        _pack_fp8(layer, weight.to(device), multiplies_fp8(device))
        return
    import bitsandbytes as bnb

    if quantization == "int8":
        layer.weight = bnb.nn.Int8Params(weight, requires_grad=False).to(device)
        pack(layer, _int8_weight(layer.weight))
    else:
        packed = bnb.nn.Params4bit(weight, quant_type="nf4", compress_statistics=True).to(device)
        layer.weight = packed
        pack(layer, _4_bit_weight(packed, dtype))


def _replace_by_linear(model: nn.Module, path: str, rows: int, columns: int) -> nn.Linear:
    """Put a dense layer without a weight in the place of another, whose bias it keeps."""
    dense = nn.Linear(columns, rows, bias=False, device="meta")
    dense.bias = model.get_submodule(path).bias  # type: ignore[assignment]
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, dense)
    return dense


def check_layers(model: Any, quantization: Quantization, name: str) -> None:
    """Raises UserError if the model has no layer that can be quantised."""
    if quantization != "none" and not quantised_layers(model, quantization):
        problem = tr("{name} has no dense layers that it supports", name=name)
        cure = tr("use int8 or nf4") if quantization == "fp8" else tr("leave it out")
        raise UserError(problem, place=f"quantization {quantization}", cure=cure)


def to_fp8(model: Any, device: torch.device, name: str) -> None:
    """Quantise the layers one by one on `device`, where they stay. At most one unquantised weight is there at a time.

    Raises UserError as `check_layers`.
    """
    check_layers(model, "fp8", name)
    for layer in quantised_layers(model, "fp8"):
        _pack_fp8(layer, layer.weight.data.to(device), multiplies_fp8(device))


def _pack_fp8(layer: Any, weight: torch.Tensor, by_device: bool) -> None:
    rows = quantise_rows(weight)
    # stored as bytes, so that no code takes their dtype for that of the model
    layer.weight = nn.Parameter(rows.bits.view(torch.uint8), requires_grad=False)
    layer.register_buffer("scale", rows.scale, persistent=False)
    pack(layer, Fp8Weight(rows, by_device))


def quantise_on_meta(model: Any, quantization: Quantization, by_device: bool) -> None:
    """Quantise a model on the meta device: its layers get weights of the right size, and products on the meta device.

    `by_device` as for `Fp8Weight`.
    """
    layers = quantised_layers(model, quantization)
    if quantization == "fp8":
        for layer in layers:
            _pack_fp8(layer, layer.weight.data, by_device)
        return
    _pack_on_meta(model, layers, partial(quantised_bytes, quantization))


def pack_on_meta(model: Any, published: Published) -> None:
    """Pack the layers of a model on the meta device that bitsandbytes packed in its files."""
    from transformers.quantizers.base import HfQuantizer
    from transformers.quantizers.quantizers_utils import should_convert_module

    patterns = HfQuantizer.get_modules_to_not_convert(
        model, published.config.get("llm_int8_skip_modules"), model._keep_in_fp32_modules
    )
    layers = [
        layer
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear | Conv1D) and should_convert_module(name, patterns)
    ]
    double = bool(published.config.get("bnb_4bit_use_double_quant"))
    kind: Quantization = "int8" if published.bits == 8 else "nf4"
    _pack_on_meta(model, layers, partial(quantised_bytes, kind, double=double))


def _pack_on_meta(model: Any, layers: Sequence[Any], bytes_of: Callable[[int, int], int]) -> None:
    names = {module: name for name, module in model.named_modules()}
    for layer in layers:
        rows, columns = layer.weight.shape[:: -1 if isinstance(layer, Conv1D) else 1]
        bits = torch.empty(bytes_of(rows, columns), dtype=torch.uint8, device="meta")
        dense = _replace_by_linear(model, names[layer], rows, columns)
        dense.weight = nn.Parameter(bits, requires_grad=False)
        pack(dense, DequantisedWeight(bits, bits, partial(_empty_on_meta, rows, columns)))


def _empty_on_meta(
    rows: int, columns: int, bits: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    return torch.empty(rows, columns, dtype=dtype, device="meta")


def quantised_bytes(quantization: Quantization, rows: int, columns: int, *, double: bool = True) -> int:
    """Bytes of a weight (rows, columns) in int8 or nf4 with its scales, as bitsandbytes stores it. `double`: whether
    the scales of nf4 are quantised, too."""
    numbers = rows * columns
    if quantization == "nf4":
        if not double:
            return (numbers + 1) // 2 + 4 * (math.ceil(numbers / NF4_BLOCK) + 16)
        scales = math.ceil(numbers / NF4_BLOCK)
        return (numbers + 1) // 2 + scales + 4 * math.ceil(scales / NF4_BLOCKS) + NF4_TABLES
    return numbers + 4 * rows


def numbers_of(parameter: nn.Parameter) -> int:
    """The number of weights in a parameter: two per byte in nf4."""
    state = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else math.prod(state.shape)


# fp8

E4M3_MAX = torch.finfo(torch.float8_e4m3fn).max
MIN_ABS_MAX = 1e-30  # lower bound on a row's largest number, so that a row of zeros has a scale
DIVISOR = 16  # K and M must be multiples of it for the device's products


@dataclass(frozen=True, eq=False)
class ScaledRows:
    """Rows in 8 bits, with a scale per row."""

    bits: torch.Tensor
    """(N, K) e4m3"""
    scale: torch.Tensor
    """(N, 1) float32"""


def quantise_rows(values: torch.Tensor) -> ScaledRows:
    """values (N, K) -> e4m3 with a scale per row. NaN or infinity in a row makes its scale NaN or infinite."""
    scale = values.abs().amax(dim=1, keepdim=True).float().clamp_(min=MIN_ABS_MAX).div_(E4M3_MAX)
    return ScaledRows((values / scale).clamp_(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn), scale)


@dataclass(frozen=True, eq=False)
class Fp8Weight:
    """A weight W (M, K) in fp8."""

    rows: ScaledRows
    """Its bits may be stored as bytes."""
    by_device: bool
    """Whether the device computes the products in fp8."""

    @property
    def bits(self) -> torch.Tensor:
        return self.rows.bits.view(torch.uint8)

    @property
    def scales(self) -> torch.Tensor:
        return self.rows.scale

    @property
    def scale(self) -> torch.Tensor:
        return self.rows.scale

    def with_tensors(self, bits: torch.Tensor, scales: torch.Tensor) -> Fp8Weight:
        return replace(self, rows=ScaledRows(bits, scales))

    def product(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        weight = ScaledRows(self.bits.view(torch.float8_e4m3fn), self.scales)
        result = rows_product(quantise_rows(x), weight, x.dtype, by_device=self.by_device)
        return result if bias is None else result.add_(bias)

    def input_gradient(self, upstream: torch.Tensor) -> torch.Tensor:
        # the device needs W column by column; computed for every product, since a second copy would take memory
        columns = self.bits.t().contiguous().view(torch.float8_e4m3fn)
        ones = torch.ones(len(columns), 1, dtype=torch.float32, device=columns.device)
        rows = quantise_rows(upstream * self.scales.t())
        return rows_product(rows, ScaledRows(columns, ones), upstream.dtype, by_device=self.by_device)


def rows_product(a: ScaledRows, b: ScaledRows, dtype: torch.dtype, *, by_device: bool) -> torch.Tensor:
    """a (N, K) @ b (M, K) transposed -> (N, M) in `dtype`."""
    scaled_mm = getattr(torch, "_scaled_mm", None)  # private, so it may be missing
    if by_device and scaled_mm and dtype == torch.bfloat16 and not any(n % DIVISOR for n in b.bits.shape):
        result: torch.Tensor = scaled_mm(
            a.bits, b.bits.t(), a.scale, b.scale.t().contiguous(), out_dtype=dtype
        )
        return result
    return emulated(a, b, dtype)


def emulated(a: ScaledRows, b: ScaledRows, dtype: torch.dtype) -> torch.Tensor:
    """`rows_product` by an ordinary product. For float16 it is in float32, since sums would overflow before scaling."""
    product_dtype = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
    return (
        product(a.bits.to(product_dtype), b.bits.to(product_dtype))
        .float()
        .mul_(a.scale)
        .mul_(b.scale.t())
        .to(dtype)
    )


def multiplies_fp8(device: torch.device, planned: tuple[int, int] | None = None) -> bool:
    """Whether the device can multiply e4m3, and this PyTorch has the private operator for it. `planned`: the compute
    capability of a device that is not here, for a forecast."""
    if device.type != "cuda" or not hasattr(torch, "_scaled_mm"):
        return False
    return (planned or torch.cuda.get_device_capability(device)) >= (8, 9)
