"""fp8 with a scale per row, compared with the formulas in double precision and with dense products."""

from __future__ import annotations

import math

import pytest
import torch

from yeonma.model.kernels.linear import frozen_linear
from yeonma.model.quantized import (
    E4M3_MAX,
    Fp8Weight,
    ScaledRows,
    multiplies_fp8,
    quantise_rows,
    rows_product,
)

N, K, M = 24, 48, 32


def random_rows(*shape: int, seed: int = 0) -> torch.Tensor:
    """Rows of very different magnitude, like activations."""
    rng = torch.Generator().manual_seed(seed)
    magnitudes = torch.logspace(-3, 3, shape[0]).unsqueeze(1)
    return torch.randn(*shape, generator=rng) * magnitudes


def dequantised(rows: ScaledRows) -> torch.Tensor:
    return rows.bits.double() * rows.scale.double()


def test_quantised_values_are_within_a_sixteenth_and_row_maxima_exact() -> None:
    values = random_rows(N, K)
    rows = quantise_rows(values)
    assert rows.bits.dtype == torch.float8_e4m3fn and rows.scale.shape == (N, 1)
    error = (dequantised(rows) - values).abs()
    step = rows.scale.double() * 2**-10  # half of the smallest distance between two numbers
    assert bool((error <= torch.maximum(values.abs() / 16, step) * 1.001).all())
    torch.testing.assert_close(
        dequantised(rows).abs().amax(1), values.abs().amax(1).double(), rtol=1e-6, atol=0
    )
    assert bool((rows.bits.float().abs().amax(1) == E4M3_MAX).all())


def test_zero_rows_stay_zero_and_non_finite_rows_get_non_finite_scales() -> None:
    values = torch.ones(4, 8)
    values[0] = 0
    values[1, 3], values[2, 5] = math.nan, math.inf
    rows = quantise_rows(values)
    assert bool((dequantised(rows)[0] == 0).all())
    assert rows.scale.isfinite().squeeze(1).tolist() == [True, False, False, True]


def test_row_is_quantised_independently_of_the_others() -> None:
    values = random_rows(N, K)
    together, alone = quantise_rows(values), quantise_rows(values[7:8])
    assert torch.equal(together.bits[7:8].float(), alone.bits.float())
    assert torch.equal(together.scale[7:8], alone.scale)


@pytest.mark.parametrize("with_bias", [True, False])
def test_fp8_output_and_gradient_equal_the_formulas(with_bias: bool) -> None:
    weight, x = (
        quantise_rows(random_rows(M, K, seed=1)),
        random_rows(2 * N, K, seed=2).view(2, N, K).requires_grad_(),
    )
    bias = torch.randn(M) if with_bias else None
    upstream = random_rows(N, M, seed=3).expand(2, N, M)
    output = frozen_linear(x, Fp8Weight(weight, by_device=False), bias)
    (gradient,) = torch.autograd.grad(output, x, upstream)
    for number in range(2):
        expected = dequantised(quantise_rows(x[number].detach())) @ dequantised(weight).t()
        expected = expected if bias is None else expected + bias
        _assert_close_by_rows(output[number].detach(), expected)
        scaled = quantise_rows(upstream[number] * weight.scale.t())
        _assert_close_by_rows(gradient[number], dequantised(scaled) @ weight.bits.double())


def _assert_close_by_rows(result: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-5) -> None:
    distance = (result.double() - expected).norm(dim=1) / expected.norm(dim=1)
    assert float(distance.max()) < tolerance


def test_fp8_output_and_gradient_are_within_a_sixteenth_of_dense() -> None:
    dense, x, upstream = torch.randn(M, K), random_rows(N, K, seed=2), random_rows(N, M, seed=3)
    weight = Fp8Weight(quantise_rows(dense), by_device=False)
    _assert_close_by_rows(weight.product(x, None), (x @ dense.t()).double(), 1 / 16)
    _assert_close_by_rows(weight.input_gradient(upstream), (upstream @ dense).double(), 1 / 16)
    assert not torch.allclose(weight.product(x, None), x @ dense.t(), rtol=1e-3)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.01), (torch.float16, 0.002)])
def test_half_precision_inputs_give_the_same_up_to_rounding(dtype: torch.dtype, tolerance: float) -> None:
    weight, x = (
        Fp8Weight(quantise_rows(random_rows(M, K) / 1000), by_device=False),
        random_rows(N, K, seed=2).to(dtype),
    )
    for result, exact in (
        (weight.product(x, None), weight.product(x.float(), None)),
        (weight.input_gradient(x[:, :M]), weight.input_gradient(x[:, :M].float())),
    ):
        assert result.dtype == dtype
        # A scale rounded differently could move values by one fp8 step; here the rows' maxima are the same.
        _assert_close_by_rows(result, exact.double(), tolerance)


def test_cpu_does_not_multiply_fp8() -> None:
    assert not multiplies_fp8(torch.device("cpu"))


@pytest.mark.gpu
def test_gpu_products_equal_the_emulated_ones() -> None:
    device = torch.device("cuda", 0)
    if not multiplies_fp8(device):
        pytest.skip("the device has no products of fp8")
    a, b = (quantise_rows(random_rows(rows, 64, seed=rows).to(device, torch.bfloat16)) for rows in (33, 48))
    result, expected = (
        rows_product(a, b, torch.bfloat16, by_device=by_device) for by_device in (True, False)
    )
    assert result.dtype == torch.bfloat16
    _assert_close_by_rows(result.cpu(), expected.cpu().double(), 0.01)
    weight = random_rows(48, 64).to(device, torch.bfloat16)
    upstream = random_rows(33, 48, seed=5).to(device, torch.bfloat16)
    on_device, emulated = (
        Fp8Weight(quantise_rows(weight), by_device).input_gradient(upstream) for by_device in (True, False)
    )
    _assert_close_by_rows(on_device.cpu(), emulated.cpu().double(), 0.01)
