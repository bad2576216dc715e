from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from yeonma.model.kernels import linear
from yeonma.model.kernels.linear import decoding_products, frozen_linear, product

ROWS = (1, 2, 7, 15, 16, 40, 64, 65)


def frozen(*layers: nn.Module) -> nn.Sequential:
    return nn.Sequential(*layers).requires_grad_(False)


@pytest.fixture
def transposed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Records the number of rows of each product that is computed transposed."""
    rows: list[int] = []
    compute = linear._transposed_linear

    def recorded(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        rows.append(len(x))
        return compute(x, weight, bias)

    monkeypatch.setattr(linear, "_transposed_linear", recorded)
    return rows


@pytest.mark.parametrize("onednn", [False, True])
def test_decoding_multiplies_few_rows_transposed_with_equal_results(
    onednn: bool, transposed: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linear, "has_onednn", lambda: onednn)
    monkeypatch.setattr(linear, "_onednn_linear", F.linear)
    model = frozen(nn.Linear(48, 96), nn.Tanh(), nn.Linear(96, 32, bias=False))
    for count in ROWS:
        x = torch.randn(1, count, 48)
        plain = model(x)
        with torch.no_grad(), decoding_products(model):
            decoded = model(x)
        assert decoded.shape == plain.shape and decoded.is_contiguous()
        torch.testing.assert_close(decoded, plain, rtol=0, atol=1e-5)
    few = [count for count in ROWS if 1 < count <= (15 if onednn else 64)]
    assert transposed == [count for count in few for _ in range(2)]  # in both layers


def test_products_outside_of_decoding_are_not_transposed(transposed: list[int]) -> None:
    layer = nn.Linear(48, 96)
    model, x = frozen(layer), torch.randn(7, 48)
    with pytest.raises(KeyError), decoding_products(model):
        raise KeyError
    assert "forward" not in vars(layer)
    assert torch.equal(product(x, layer.weight, layer.bias), F.linear(x, layer.weight, layer.bias))
    x.requires_grad_()
    frozen_linear(x, linear.Dense(layer.weight), layer.bias).sum().backward()
    assert transposed == []


def test_trained_and_half_precision_layers_keep_their_forward(transposed: list[int]) -> None:
    x = torch.randn(7, 48)
    for model, model_input in (
        (nn.Sequential(nn.Linear(48, 48)), x),
        (frozen(nn.Linear(48, 48)).bfloat16(), x.bfloat16()),
    ):
        expected = copy.deepcopy(model)(model_input)
        with decoding_products(model):
            assert torch.equal(model(model_input), expected)
    assert transposed == []
