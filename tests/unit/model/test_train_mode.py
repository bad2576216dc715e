from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig

from tests.models import tiny_model, with_lora
from yeonma.batch.forest import lay_out
from yeonma.model.forest_support import check_forest_support, in_eval_mode
from yeonma.model.load import checkpoint_activations
from yeonma.model.logprobs import trained_logprobs
from yeonma.model.train_mode import base_noise, train_adapter

ROWS = [np.arange(3, 30), np.arange(40, 60)]


def noisy(family: str, **lora: Any) -> Any:
    """A model with an adapter, whose base has dropout wherever its family has it."""
    model = tiny_model(family)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
        for name, value in list(vars(module).items()):
            if "drop" in name and isinstance(value, float):
                setattr(module, name, 0.5)
    return with_lora(model, **lora)


def logprobs(model: Any) -> torch.Tensor:
    base = model.get_base_model()
    forest = lay_out(ROWS, [np.ones(len(row), dtype=bool) for row in ROWS])
    torch.manual_seed(0)
    return trained_logprobs(base, forest, None)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", ["gpt2", "opt", "phi", "llama", "qwen3_moe"])
def test_training_has_the_logprobs_of_evaluation_whatever_dropout_the_base_names(
    family: str, checkpointing: bool
) -> None:
    model = noisy(family)
    base = model.get_base_model()
    assert check_forest_support(base).forest
    if checkpointing:
        checkpoint_activations(base)
    expected = logprobs(model.eval()).detach()
    base.train()
    assert (logprobs(model) - expected).abs().max() > 0.1  # the base's dropout shows
    train_adapter(base)
    ours = logprobs(model)
    torch.testing.assert_close(ours.detach(), expected, rtol=0, atol=1e-6)
    ours.sum().backward()


def test_lora_dropout_stays_on() -> None:
    model = with_lora(tiny_model("llama"), lora_dropout=0.5)
    base = model.get_base_model()
    check_forest_support(base)
    train_adapter(base)
    first = logprobs(model).detach()
    with in_eval_mode(base):
        assert not torch.allclose(logprobs(model), first, atol=1e-3)
    assert torch.equal(logprobs(model), first)  # training mode is restored, and the masks depend on the seed


def test_checkpointing_still_recomputes_activations() -> None:
    model = with_lora(tiny_model("llama"))
    base = model.get_base_model()
    check_forest_support(base)
    checkpoint_activations(base)
    train_adapter(base)
    calls: list[int] = []
    base.model.layers[0].self_attn.register_forward_pre_hook(lambda *_: calls.append(1))
    logprobs(model).sum().backward()
    assert len(calls) == 2


def test_noise_is_named_as_in_the_config() -> None:
    assert base_noise(AutoConfig.for_model("gpt2")) == {
        "resid_pdrop": 0.1,
        "embd_pdrop": 0.1,
        "attn_pdrop": 0.1,
    }
    assert base_noise(AutoConfig.for_model("opt")) == {"dropout": 0.1}
    assert base_noise(AutoConfig.for_model("llama")) == {}
    assert base_noise(AutoConfig.for_model("mixtral", router_jitter_noise=0.01)) == {
        "router_jitter_noise": 0.01
    }
