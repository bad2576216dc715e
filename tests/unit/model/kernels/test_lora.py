from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import Linear as LoraLinear
from torch import nn

from tests.models import tiny_model
from yeonma.model.kernels.lora import patch_linear

CLOSE = {"rtol": 1e-6, "atol": 1e-6}


class Net(nn.Module):
    """Two layers for LoRA, one with a bias, and a frozen layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(12, 20)
        self.second = nn.Linear(20, 9, bias=False)
        self.third = nn.Linear(9, 7)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.third(self.second(torch.tanh(self.first(x))))


def pair(dtype: torch.dtype = torch.float32, **config: Any) -> tuple[Any, Any]:
    """Two equal models: one with PEFT's forward, one to patch."""
    torch.manual_seed(0)
    net = Net().to(dtype)
    options = {
        "r": 4,
        "lora_alpha": 6,
        "target_modules": ["first", "second"],
        "init_lora_weights": False,
        **config,
    }
    model = get_peft_model(net, LoraConfig(**options))
    model.train()
    return model, copy.deepcopy(model)


def run(model: Any, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """The output, and the gradients of the input and of A and B of both layers, with dropout from a fixed seed."""
    draw = torch.Generator().manual_seed(1)
    x = torch.randn(2, 15, 12, generator=draw).to(dtype).requires_grad_()
    torch.manual_seed(7)
    output = model(x)
    upstream = torch.randn(output.shape, generator=draw).to(dtype)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    gradients = torch.autograd.grad((output * upstream).sum(), [x, *trained], allow_unused=True)
    return [output.detach(), *(g if g is not None else torch.zeros(()) for g in gradients)]


def assert_same(ours: list[torch.Tensor], theirs: list[torch.Tensor], tolerance: float = 1e-6) -> None:
    """Up to `tolerance` times the largest number of a tensor, because sums over rows are rounded."""
    for ours_, theirs_ in zip(ours, theirs, strict=True):
        assert ours_.dtype == theirs_.dtype
        limit = tolerance * max(1.0, float(theirs_.abs().max()))
        torch.testing.assert_close(ours_, theirs_, rtol=0, atol=limit)


@pytest.mark.parametrize(
    "config", [{}, {"use_rslora": True}, {"lora_dropout": 0.5}], ids=["plain", "rslora", "dropout"]
)
def test_outputs_and_gradients_are_pefts_own(config: dict) -> None:
    peft, ours = pair(**config)
    assert patch_linear(ours)["LoRA"] == 2
    theirs = run(peft)
    assert len(theirs) == 6 and all(float(tensor.abs().max()) > 0.1 for tensor in theirs)
    assert_same(run(ours), theirs)


def test_dropout_is_off_in_eval_mode() -> None:
    peft, ours = pair(lora_dropout=0.5)
    patch_linear(ours)
    trained = run(ours)
    ours.eval()
    assert not torch.allclose(run(ours)[0], trained[0])
    assert_same(run(ours), run(peft.eval()))


@pytest.mark.parametrize("config", [{}, {"lora_dropout": 0.5}], ids=["plain", "dropout"])
def test_a_bfloat16_base_gives_what_peft_gives_up_to_bfloat16_and_float32_gradients(config: dict) -> None:
    peft, ours = pair(torch.bfloat16, **config)
    patch_linear(ours)
    theirs = run(peft, torch.bfloat16)
    assert [tensor.dtype for tensor in theirs] == [torch.bfloat16] * 2 + [torch.float32] * 4
    assert_same(run(ours, torch.bfloat16), theirs, tolerance=0.02)


def test_an_input_that_needs_no_gradient_is_taken() -> None:
    peft, ours = pair()
    patch_linear(ours)
    x = torch.ones(3, 12)
    for model in (peft, ours):
        model(x).sum().backward()
    for ours_, theirs_ in zip(ours.parameters(), peft.parameters(), strict=True):
        assert (ours_.grad is None) == (theirs_.grad is None)
        if ours_.grad is not None:
            torch.testing.assert_close(ours_.grad, theirs_.grad, **CLOSE)


def test_outputs_may_be_changed_in_place() -> None:
    _, model = pair()
    patch_linear(model)
    gradients = []
    for in_place in (True, False):
        x = torch.full((2, 10, 12), 0.1, requires_grad=True)
        layers = model.base_model.model
        hidden = layers.first(x)
        hidden = hidden.mul_(3) if in_place else hidden * 3
        output = layers.third(layers.second(hidden))
        output = output.add_(output.detach()) if in_place else output + output.detach()
        gradients.append(torch.autograd.grad(output.square().sum(), x)[0])
    torch.testing.assert_close(*gradients)


def test_without_gradients_nothing_is_recorded() -> None:
    peft, ours = pair()
    patch_linear(ours)
    with torch.no_grad():
        output = ours(torch.ones(3, 12))
        torch.testing.assert_close(output, peft(torch.ones(3, 12)), **CLOSE)
    assert output.grad_fn is None


def test_names_and_weights_stay_pefts() -> None:
    peft, ours = pair()
    patch_linear(ours)
    assert list(ours.state_dict()) == list(peft.state_dict())


def test_a_disabled_adapter_gives_the_base_alone() -> None:
    peft, ours = pair()
    patch_linear(ours)
    x = torch.ones(3, 12)
    with ours.disable_adapter(), peft.disable_adapter():
        base = peft(x)
        torch.testing.assert_close(ours(x), base, **CLOSE)
    assert not torch.allclose(ours(x), base)


def test_a_merged_adapter_is_not_added_twice() -> None:
    _, ours = pair()
    patch_linear(ours)
    before = ours(torch.ones(3, 12))
    ours.merge_adapter()
    torch.testing.assert_close(ours(torch.ones(3, 12)), before, rtol=1e-5, atol=1e-5)
    ours.unmerge_adapter()
    torch.testing.assert_close(ours(torch.ones(3, 12)), before, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("config", [{"use_dora": True}, {"lora_bias": True}], ids=["dora", "lora bias"])
def test_layers_that_are_not_plain_keep_pefts_forward(config: dict) -> None:
    if config.get("lora_bias"):  # wants a base layer with a bias
        config = {**config, "target_modules": ["first"]}
    peft, ours = pair(**config)
    assert patch_linear(ours)["LoRA"] == 0
    assert_same(run(ours), run(peft))


def test_conv1d_layers_keep_pefts_forward() -> None:
    model = get_peft_model(tiny_model("gpt2"), LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True))
    assert any(isinstance(layer, LoraLinear) for layer in model.modules())
    assert patch_linear(model)["LoRA"] == 0


def test_a_base_layer_that_is_trained_itself_keeps_pefts_forward() -> None:
    peft, ours = pair()
    for model in (peft, ours):
        model.base_model.model.first.base_layer.weight.requires_grad_(True)
    assert patch_linear(ours)["LoRA"] == 1
    assert_same(run(ours), run(peft))


def test_adapters_that_come_later_get_what_peft_gives_them() -> None:
    peft, ours = pair()
    patch_linear(ours)
    for model in (peft, ours):
        torch.manual_seed(3)
        model.add_adapter("two", LoraConfig(r=2, target_modules=["second"], init_lora_weights=False))
        model.add_adapter(
            "dora", LoraConfig(r=2, target_modules=["first"], init_lora_weights=False, use_dora=True)
        )
    for choice in ("two", "dora", "default", ["default", "two"], []):
        for model in (peft, ours):
            model.base_model.set_adapter(choice)
        if choice == []:
            torch.testing.assert_close(ours(torch.ones(1, 12)), peft(torch.ones(1, 12)), **CLOSE)
        else:
            assert_same(run(ours), run(peft))


def test_an_adapter_named_in_the_call_is_pefts_business() -> None:
    peft, ours = pair()
    patch_linear(ours)
    peft.eval(), ours.eval()
    x = torch.ones(2, 12)
    for model in (peft, ours):
        model.add_adapter("two", LoraConfig(r=2, target_modules=["second"], init_lora_weights="gaussian"))
    names = ["default", "__base__"]
    torch.testing.assert_close(ours(x, adapter_names=names), peft(x, adapter_names=names), **CLOSE)


def test_speeding_up_twice_changes_nothing() -> None:
    peft, ours = pair()
    patch_linear(ours)
    patch_linear(ours)
    assert_same(run(ours), run(peft))
