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


def model_pair(dtype: torch.dtype = torch.float32, **config: Any) -> tuple[Any, Any]:
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


def outputs_and_gradients(model: Any, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """The output, and the gradients of the input and of A and B of both layers, with dropout from a fixed seed."""
    rng = torch.Generator().manual_seed(1)
    x = torch.randn(2, 15, 12, generator=rng).to(dtype).requires_grad_()
    torch.manual_seed(7)
    output = model(x)
    upstream = torch.randn(output.shape, generator=rng).to(dtype)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    gradients = torch.autograd.grad((output * upstream).sum(), [x, *trained], allow_unused=True)
    return [output.detach(), *(g if g is not None else torch.zeros(()) for g in gradients)]


def assert_same(ours: list[torch.Tensor], theirs: list[torch.Tensor], tolerance: float = 1e-6) -> None:
    """Compare up to `tolerance` times the largest number of a tensor, because sums over rows are rounded."""
    for actual, expected in zip(ours, theirs, strict=True):
        assert actual.dtype == expected.dtype
        limit = tolerance * max(1.0, float(expected.abs().max()))
        torch.testing.assert_close(actual, expected, rtol=0, atol=limit)


@pytest.mark.parametrize(
    "config", [{}, {"use_rslora": True}, {"lora_dropout": 0.5}], ids=["plain", "rslora", "dropout"]
)
def test_outputs_and_gradients_equal_pefts(config: dict) -> None:
    peft, ours = model_pair(**config)
    assert patch_linear(ours)["LoRA"] == 2
    theirs = outputs_and_gradients(peft)
    assert len(theirs) == 6 and all(float(tensor.abs().max()) > 0.1 for tensor in theirs)
    assert_same(outputs_and_gradients(ours), theirs)


def test_dropout_is_off_in_eval_mode() -> None:
    peft, ours = model_pair(lora_dropout=0.5)
    patch_linear(ours)
    trained = outputs_and_gradients(ours)
    ours.eval()
    assert not torch.allclose(outputs_and_gradients(ours)[0], trained[0])
    assert_same(outputs_and_gradients(ours), outputs_and_gradients(peft.eval()))


@pytest.mark.parametrize("config", [{}, {"lora_dropout": 0.5}], ids=["plain", "dropout"])
def test_bfloat16_base_matches_peft_with_float32_adapter_gradients(config: dict) -> None:
    peft, ours = model_pair(torch.bfloat16, **config)
    patch_linear(ours)
    theirs = outputs_and_gradients(peft, torch.bfloat16)
    assert [tensor.dtype for tensor in theirs] == [torch.bfloat16] * 2 + [torch.float32] * 4
    assert_same(outputs_and_gradients(ours, torch.bfloat16), theirs, tolerance=0.02)


def test_input_without_gradient_gives_pefts_adapter_gradients() -> None:
    peft, ours = model_pair()
    patch_linear(ours)
    x = torch.ones(3, 12)
    for model in (peft, ours):
        model(x).sum().backward()
    for actual, expected in zip(ours.parameters(), peft.parameters(), strict=True):
        assert (actual.grad is None) == (expected.grad is None)
        if actual.grad is not None:
            torch.testing.assert_close(actual.grad, expected.grad, **CLOSE)


def test_outputs_may_be_changed_in_place() -> None:
    _, model = model_pair()
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


def test_no_grad_output_equals_pefts_and_has_no_graph() -> None:
    peft, ours = model_pair()
    patch_linear(ours)
    with torch.no_grad():
        output = ours(torch.ones(3, 12))
        torch.testing.assert_close(output, peft(torch.ones(3, 12)), **CLOSE)
    assert output.grad_fn is None


def test_state_dict_names_stay_pefts() -> None:
    peft, ours = model_pair()
    patch_linear(ours)
    assert list(ours.state_dict()) == list(peft.state_dict())


def test_a_disabled_adapter_gives_the_base_alone() -> None:
    peft, ours = model_pair()
    patch_linear(ours)
    x = torch.ones(3, 12)
    with ours.disable_adapter(), peft.disable_adapter():
        base = peft(x)
        torch.testing.assert_close(ours(x), base, **CLOSE)
    assert not torch.allclose(ours(x), base)


def test_a_merged_adapter_is_not_added_twice() -> None:
    _, ours = model_pair()
    patch_linear(ours)
    before = ours(torch.ones(3, 12))
    ours.merge_adapter()
    torch.testing.assert_close(ours(torch.ones(3, 12)), before, rtol=1e-5, atol=1e-5)
    ours.unmerge_adapter()
    torch.testing.assert_close(ours(torch.ones(3, 12)), before, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("config", [{"use_dora": True}, {"lora_bias": True}], ids=["dora", "lora bias"])
def test_dora_and_lora_bias_layers_keep_pefts_forward(config: dict) -> None:
    if config.get("lora_bias"):  # needs a base layer with a bias
        config = {**config, "target_modules": ["first"]}
    peft, ours = model_pair(**config)
    assert patch_linear(ours)["LoRA"] == 0
    assert_same(outputs_and_gradients(ours), outputs_and_gradients(peft))


def test_conv1d_layers_keep_pefts_forward() -> None:
    model = get_peft_model(tiny_model("gpt2"), LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True))
    assert any(isinstance(layer, LoraLinear) for layer in model.modules())
    assert patch_linear(model)["LoRA"] == 0


def test_layer_with_a_trainable_base_keeps_pefts_forward() -> None:
    peft, ours = model_pair()
    for model in (peft, ours):
        model.base_model.model.first.base_layer.weight.requires_grad_(True)
    assert patch_linear(ours)["LoRA"] == 1
    assert_same(outputs_and_gradients(ours), outputs_and_gradients(peft))


def test_adapters_added_after_patching_match_peft() -> None:
    peft, ours = model_pair()
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
            assert_same(outputs_and_gradients(ours), outputs_and_gradients(peft))


def test_adapter_names_in_the_call_give_pefts_output() -> None:
    peft, ours = model_pair()
    patch_linear(ours)
    peft.eval(), ours.eval()
    x = torch.ones(2, 12)
    for model in (peft, ours):
        model.add_adapter("two", LoraConfig(r=2, target_modules=["second"], init_lora_weights="gaussian"))
    names = ["default", "__base__"]
    torch.testing.assert_close(ours(x, adapter_names=names), peft(x, adapter_names=names), **CLOSE)


def test_patching_twice_changes_nothing() -> None:
    peft, ours = model_pair()
    patch_linear(ours)
    patch_linear(ours)
    assert_same(outputs_and_gradients(ours), outputs_and_gradients(peft))
