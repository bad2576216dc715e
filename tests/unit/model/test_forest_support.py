from __future__ import annotations

import copy
import random
from typing import Any

import numpy as np
import pytest
import torch

from tests.models import FOREST_FAMILIES, VOCABULARY, WINDOW, tiny_model, with_lora
from yeonma.batch.forest import Forest, lay_out
from yeonma.model import forest_support as check
from yeonma.model.attention.dispatch import FOREST
from yeonma.model.forest_support import attention, check_forest_support
from yeonma.model.logprobs import ForestSupport, sequence_logprobs, trained_logprobs

ROW = np.arange(3, 30, dtype=np.int32)


def one_row() -> Forest:
    return lay_out([ROW], [np.ones(len(ROW), dtype=bool)])


def lora_gradients(model: Any) -> list[torch.Tensor]:
    logprob = sequence_logprobs(model, torch.from_numpy(ROW).long(), torch.ones(len(ROW), dtype=torch.bool))
    return list(torch.autograd.grad(logprob.sum(), [p for p in model.parameters() if p.requires_grad]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FOREST_FAMILIES)
def test_forest_families_are_supported_with_a_plain_head(family: str, dtype: torch.dtype) -> None:
    model = tiny_model(family).to(dtype)
    own_attention = model.config._attn_implementation
    support = check_forest_support(model)
    assert support.forest and support.head is not None and support.why_not == ""
    assert support.plain_attention == own_attention
    assert model.config._attn_implementation == FOREST


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        ("mamba", "its linear_attention layers have recurrences that take no forests"),
        ("bloom", "2 of its 2 layers bypass the registered attention"),
        ("phimoe", "its sliding-window layers use their own mask"),
    ],
)
def test_unsupported_families_are_reported_and_can_still_train(family: str, reason: str) -> None:
    targets = {"phimoe": ["q_proj", "o_proj"], "mamba": ["in_proj"]}.get(family, "all-linear")
    expected = lora_gradients(with_lora(tiny_model(family), target_modules=targets))
    model = with_lora(tiny_model(family), target_modules=targets)
    own_attention = model.config._attn_implementation
    support = check_forest_support(model)
    assert support == ForestSupport(forest=False, head=None, plain_attention=own_attention, why_not=reason)
    assert model.config._attn_implementation == own_attention
    assert all(bool(gradient.any()) for gradient in expected)
    for ours, theirs in zip(lora_gradients(model), expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_layer_that_keeps_its_own_attention_is_detected() -> None:
    model = tiny_model("llama")
    layer = model.model.layers[0].self_attn
    layer.config = copy.deepcopy(layer.config)  # so that setting the attention does not reach this layer
    support = check_forest_support(model)
    assert support.why_not == "1 of its 2 layers bypasses the registered attention"


@pytest.mark.parametrize("window", [WINDOW, 64])
def test_window_that_does_not_reach_the_attention_is_detected(
    window: int,
) -> None:
    with_window = tiny_model("gemma2")
    with_window.config.sliding_window = window
    with_window.model.layers[0].self_attn.sliding_window = window
    assert check_forest_support(with_window).forest
    without_window = tiny_model("gemma2")
    without_window.config.sliding_window = window
    without_window.model.layers[0].self_attn.sliding_window = None
    assert check_forest_support(without_window).why_not == "its sliding-window layers use their own mask"


def test_wrong_forest_results_are_detected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "lay_out", _with_positions_from_zero)
    support = check_forest_support(tiny_model("llama"))
    assert not support.forest
    assert "a forest and the same sequences one by one differ by" in support.why_not


def _with_positions_from_zero(*arguments: Any, **keywords: Any) -> Forest:
    forest = lay_out(*arguments, **keywords)
    forest.position_T[:] = np.arange(len(forest.position_T))
    return forest


def test_error_of_model_code_that_rejects_a_forest_is_reported() -> None:
    model = tiny_model("llama")

    def raise_type_error(module: Any, arguments: Any, keywords: dict[str, Any]) -> None:
        if "forest" in keywords:
            raise TypeError("unexpected keyword argument 'forest'\nand more")

    model.register_forward_pre_hook(raise_type_error, with_kwargs=True)
    support = check_forest_support(model)
    assert not support.forest
    assert (
        support.why_not
        == "its code does not accept a forest (TypeError: unexpected keyword argument 'forest')"
    )


def test_model_with_nan_outputs_is_not_supported() -> None:
    model = tiny_model("llama")
    # only the last sequence gives NaN
    model.model.embed_tokens.weight.data[check.tiny_sequences(VOCABULARY, 0)[2]] = float("nan")
    assert not check_forest_support(model).forest


def test_head_that_contradicts_its_config_is_left_to_the_model() -> None:
    model = tiny_model("llama")
    model.config.final_logit_softcapping = 1.0  # llama's own head does not apply it
    support = check_forest_support(model)
    assert support.forest and support.head is None
    logprob = trained_logprobs(model, one_row(), support.head)
    plain_model = tiny_model("llama")
    expected = sequence_logprobs(
        plain_model, torch.from_numpy(ROW).long(), torch.ones(len(ROW), dtype=torch.bool)
    )
    torch.testing.assert_close(logprob, expected, rtol=1e-5, atol=1e-5)


def test_head_is_left_to_a_model_without_a_separate_decoder(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = tiny_model("llama")
    monkeypatch.setattr(model, "get_decoder", lambda: None)
    support = check_forest_support(model)
    assert support.forest and support.head is None


def test_head_with_lora_is_left_to_the_model() -> None:
    support = check_forest_support(with_lora(tiny_model("llama"), target_modules=["lm_head"]))
    assert support.forest and support.head is None


def test_check_disables_dropout_and_restores_training_modes() -> None:
    model = with_lora(tiny_model("llama"), lora_dropout=0.5)
    model.model.model.layers[0].train()
    before = [module.training for module in model.modules()]
    assert True in before and False in before
    assert check_forest_support(model).forest
    assert [module.training for module in model.modules()] == before


def _random_states() -> tuple[object, ...]:
    return random.getstate(), str(np.random.get_state(legacy=False)), torch.get_rng_state().tolist()


def test_check_changes_no_random_state_weight_or_gradient() -> None:
    model = with_lora(tiny_model("qwen3_moe"), target_modules=["q_proj"], lora_dropout=0.5).train()
    weights = {name: weight.clone() for name, weight in model.state_dict().items()}
    before = _random_states()
    check_forest_support(model)
    assert _random_states() == before
    assert all(torch.equal(weight, weights[name]) for name, weight in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_attention_context_restores_the_former_attention() -> None:
    model = tiny_model("llama")
    support = check_forest_support(model)
    with pytest.raises(RuntimeError, match="stop"), attention(model, support.plain_attention):
        assert model.config._attn_implementation == "sdpa"
        raise RuntimeError("stop")
    assert model.config._attn_implementation == FOREST


def test_window_wider_than_the_test_sequences_passes() -> None:
    model = tiny_model("mistral")
    model.config.sliding_window = 1000
    assert check_forest_support(model).forest
