"""The last layer behind its attention: only where a final hidden state is read, with the same numbers and gradients."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from tests.models import FOREST_FAMILIES, VOCABULARY, tiny_model, with_lora
from yeonma.batch.forest import Forest, lay_out
from yeonma.model.forest_support import check_forest_support
from yeonma.model.kernels.last_layer import trim_last_layer, trim_where_equal
from yeonma.model.kernels.patch import patch_kernels
from yeonma.model.logprobs import READ_POSITIONS, ForestSupport, trained_logprobs

SPARED = [
    family for family in FOREST_FAMILIES if family != "gpt2"
]  # whose decoder names its layers otherwise


def adapted(family: str, short: bool = True) -> tuple[Any, ForestSupport]:
    model = with_lora(tiny_model(family))
    how = check_forest_support(model.get_base_model())
    if short:
        patch_kernels(model)
    return model, how


def forest() -> Forest:
    """Long prompts, short answers, and two answers to one prompt: one position is read for both."""
    random = np.random.default_rng(3)
    frame = random.integers(3, VOCABULARY, 20)
    ids = [np.concatenate([frame, random.integers(3, VOCABULARY, n)]).astype(np.int32) for n in (4, 3, 5)]
    return lay_out(ids, [np.arange(len(each)) >= 20 for each in ids])


def look(model: Any, how: ForestSupport, **more: Any) -> tuple[torch.Tensor, list[torch.Tensor]]:
    result = trained_logprobs(model.get_base_model(), forest(), how.head, how.capability, **more)
    weights = [each for each in model.parameters() if each.requires_grad]
    found = torch.autograd.grad(result.sum(), weights, allow_unused=True)
    return result.detach(), [each for each in found if each is not None]


@pytest.mark.parametrize("short", [False, True])
@pytest.mark.parametrize("family", SPARED)
def test_logprobs_and_gradients_are_those_of_the_whole_layer(family: str, short: bool) -> None:
    model, how = adapted(family, short)
    expected, gradients = look(model, how)
    assert trim_where_equal(model.get_base_model(), how)
    found, others = look(model, how)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    largest = max(float(each.abs().max()) for each in gradients)
    for ours, theirs in zip(others, gradients, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5 * largest, rtol=1e-4)


def rows_through_mlps(model: Any, how: ForestSupport, **more: Any) -> list[int]:
    rows: list[int] = []
    handles = [
        each.mlp.down_proj.base_layer.register_forward_pre_hook(lambda _, x: rows.append(x[0].shape[-2]))
        for each in model.get_base_model().model.layers
    ]
    look(model, how, **more)
    for handle in handles:
        handle.remove()
    return rows


def test_only_what_is_read_goes_through_the_last_mlp() -> None:
    model, how = adapted("llama", short=False)
    laid = forest()
    trim_last_layer(model.get_base_model())
    read = len(np.unique(laid.source_U))
    assert read < len(laid.source_U) < len(laid.token_ids_T)
    assert rows_through_mlps(model, how) == [len(laid.token_ids_T), read]
    assert rows_through_mlps(model, how, **{READ_POSITIONS: None}) == [len(laid.token_ids_T)] * 2


def test_gradient_checkpointing_leaves_the_same_out() -> None:
    model, how = adapted("llama")
    trim_last_layer(model.get_base_model())
    expected, gradients = look(model, how)
    model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    found, others = look(model, how)
    assert torch.equal(found, expected)
    assert all(torch.equal(a, b) for a, b in zip(others, gradients, strict=True))


def test_other_passes_through_the_model_are_whole() -> None:
    model, how = adapted("llama")
    base = model.get_base_model()
    ids = torch.arange(3, 27).unsqueeze(0)
    base.set_attn_implementation("sdpa")
    expected = base(ids).logits
    base.set_attn_implementation("yeonma_forest")
    assert trim_where_equal(base, how)
    look(model, how)
    base.set_attn_implementation("sdpa")
    assert torch.equal(base(ids).logits, expected)


def test_a_model_whose_last_mlp_mixes_tokens_keeps_it_whole() -> None:
    model, how = adapted("llama")
    base = model.get_base_model()
    mlp = base.model.layers[-1].mlp
    before = mlp.forward
    mlp.forward = lambda x: before(x - x.mean(1, keepdim=True))
    expected, _ = look(model, how)
    assert not trim_where_equal(base, how)
    assert torch.equal(look(model, how)[0], expected)
    assert "forward" in mlp.__dict__ and mlp.forward.__name__ == "<lambda>"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_half_precision_too(dtype: torch.dtype) -> None:
    base = tiny_model("llama").to(dtype)
    how = check_forest_support(base)
    assert trim_where_equal(base, how)
    mixing = tiny_model("llama").to(dtype)
    mlp = mixing.model.layers[-1].mlp
    before = mlp.forward
    mlp.forward = lambda x: before(x - x.mean(1, keepdim=True))
    assert not trim_where_equal(mixing, how)


def test_layers_of_other_names_and_a_second_time_change_nothing() -> None:
    assert not trim_last_layer(tiny_model("gpt2"))
    model = tiny_model("llama")
    assert trim_last_layer(model)
    assert not trim_last_layer(model)
