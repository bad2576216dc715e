"""Frozen weights in 8-bit floating point (e4m3: 4 bits of exponent, 3 of fraction), quantised once with a scale for
each output row; what they are multiplied by is quantised on the fly, with a scale for each token.

A row of numbers r is held as q = round(r / s) with s = max |r| / 448, the largest number of e4m3. Scales of rows come
out of a product: x @ W.T = (x_q @ W_q.T) * s_x * s_W.T. In the gradient of the input the sum runs over the weight's
rows, so their scales go into what is quantised: g @ W = (q(g * s_W.T) @ W_q) * s. Micikevicius et al. 2022,
arXiv:2209.05433.

The device multiplies them where it can (compute capability 8.9 and above, in bfloat16). Elsewhere the same numbers are
multiplied as bfloat16 or float32, which hold all of e4m3: equal up to the order of sums and bfloat16's own rounding,
and no faster than dense.

Shapes: N tokens, K inputs, M outputs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from yeonma.model.linear import product

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
    """A weight W (M, K) with a scale a row, as `yeonma.model.linear.Weight` wants it; `by_device`: multiplied by the
    device's own products."""

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
    if by_device and dtype == torch.bfloat16 and not any(n % DIVISOR for n in b.bits.shape):
        return torch._scaled_mm(a.bits, b.bits.t(), a.scale, b.scale.t().contiguous(), out_dtype=dtype)
    return emulated(a, b, dtype)


def emulated(a: Rows, b: Rows, dtype: torch.dtype) -> torch.Tensor:
    """The same by plain products. Sums of float16 would overflow before they are scaled."""
    kind = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
    return product(a.bits.to(kind), b.bits.to(kind)).float().mul_(a.scale).mul_(b.scale.t()).to(dtype)


def has_products(device: torch.device) -> bool:
    """Whether the device multiplies e4m3 by itself."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)
