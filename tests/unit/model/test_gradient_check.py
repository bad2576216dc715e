"""The check that gradients pass through frozen layers: which layers it lets through, and which it stops."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.models import FOREST_FAMILIES, OTHER_FAMILIES, tiny_model
from tests.quantised import KINDS, loaded
from tests.runs import articles, model_folder, sft, write_jsonl
from yeonma.config.settings import Quantization
from yeonma.errors import UserError
from yeonma.model import load
from yeonma.model.gradient_check import check_input_gradients


class Detached(nn.Linear):
    """A layer whose gradient gets lost."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.detach())


class Doubled(nn.Linear):
    """A layer whose gradient is another one's."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = super().forward(x)
        return 2 * y - y.detach()


class LostExperts(nn.Module):
    """Fused experts whose gradient gets lost."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden_size = 8
        self.weight = nn.Parameter(torch.randn(4, 8, 8), requires_grad=False)

    def forward(
        self, hidden_states: torch.Tensor, chosen: torch.Tensor, shares: torch.Tensor
    ) -> torch.Tensor:
        return (hidden_states.detach().unsqueeze(1) @ self.weight[chosen[:, 0]]).squeeze(1) * shares


def frozen(layer: nn.Module) -> nn.Module:
    return nn.ModuleDict({"good": nn.Linear(8, 6), "last": layer}).requires_grad_(False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", [*FOREST_FAMILIES, *OTHER_FAMILIES])
def test_every_family_passes(family: str, dtype: torch.dtype) -> None:
    check_input_gradients(tiny_model(family).to(dtype), family)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_every_quantization_passes(tmp_path: Path, kind: Quantization, dtype: torch.dtype) -> None:
    check_input_gradients(loaded(model_folder(tmp_path / "llama"), kind, dtype), "llama")


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (Detached(8, 6), "gives no gradient"),
        (Doubled(8, 6), "gives a gradient that is not that of its product"),
        (LostExperts(), "give no gradient"),
    ],
)
def test_wrong_layers_are_named(layer: nn.Module, message: str) -> None:
    with pytest.raises(UserError, match=rf"some/model: last \({type(layer).__name__}\) {message}"):
        check_input_gradients(frozen(layer), "some/model")


def test_one_layer_of_each_kind_and_shape_is_tried() -> None:
    calls = []
    layers = nn.ModuleList([nn.Linear(8, 8) for _ in range(300)] + [nn.Linear(8, 4)]).requires_grad_(False)
    for layer in layers:
        layer.register_forward_hook(lambda module, *_: calls.append(module))
    check_input_gradients(layers, "many layers")
    assert calls == [layers[0], layers[300]]


def test_a_run_stops_before_its_first_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load_base = load.load_base

    def broken(*args: Any, **options: Any) -> Any:
        model = load_base(*args, **options)
        model.model.layers[1].mlp.up_proj.__class__ = Detached
        return model

    monkeypatch.setattr(load, "load_base", broken)
    data = write_jsonl(tmp_path / "rows.jsonl", articles(8))
    done = sft(tmp_path / "out", model_folder(tmp_path / "llama"), data)
    assert done.status == 2
    assert "model.layers.1.mlp.up_proj (Detached) gives no gradient" in done.err
