"""The trimmed last layer computes only positions that are read, with the same log-probabilities and gradients."""

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
from yeonma.model.load import checkpoint_activations
from yeonma.model.logprobs import READ_POSITIONS, ForestSupport, trained_logprobs

# the decoders of gpt2 and lfm2 have other names for their parts
TRIMMABLE = [family for family in FOREST_FAMILIES if family not in ("gpt2", "lfm2")]


def adapted(family: str, patched: bool = True) -> tuple[Any, ForestSupport]:
    model = with_lora(tiny_model(family))
    support = check_forest_support(model.get_base_model())
    if patched:
        patch_kernels(model)
    return model, support


def forest() -> Forest:
    """Long prompts, short answers, and two answers to one prompt: one position is read for both."""
    random = np.random.default_rng(3)
    prefix = random.integers(3, VOCABULARY, 20)
    ids = [np.concatenate([prefix, random.integers(3, VOCABULARY, n)]).astype(np.int32) for n in (4, 3, 5)]
    return lay_out(ids, [np.arange(len(sequence)) >= 20 for sequence in ids])


def logprobs_and_gradients(
    model: Any, support: ForestSupport, **keywords: Any
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    result = trained_logprobs(model.get_base_model(), forest(), support.head, support.capability, **keywords)
    weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
    gradients = torch.autograd.grad(result.sum(), weights, allow_unused=True)
    return result.detach(), [gradient for gradient in gradients if gradient is not None]


@pytest.mark.parametrize("patched", [False, True])
@pytest.mark.parametrize("family", TRIMMABLE)
def test_trimmed_layer_gives_the_same_logprobs_and_gradients(family: str, patched: bool) -> None:
    model, support = adapted(family, patched)
    expected_logprobs, expected_gradients = logprobs_and_gradients(model, support)
    assert trim_where_equal(model.get_base_model(), support)
    logprobs, gradients = logprobs_and_gradients(model, support)
    torch.testing.assert_close(logprobs, expected_logprobs, atol=1e-5, rtol=1e-5)
    largest = max(float(gradient.abs().max()) for gradient in expected_gradients)
    for ours, theirs in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5 * largest, rtol=1e-4)


def rows_through_mlps(model: Any, support: ForestSupport, **keywords: Any) -> list[int]:
    rows: list[int] = []
    handles = [
        layer.mlp.down_proj.base_layer.register_forward_pre_hook(lambda _, x: rows.append(x[0].shape[-2]))
        for layer in model.get_base_model().model.layers
    ]
    logprobs_and_gradients(model, support, **keywords)
    for handle in handles:
        handle.remove()
    return rows


def test_only_read_positions_pass_through_the_last_mlp() -> None:
    model, support = adapted("llama", patched=False)
    tree = forest()
    trim_last_layer(model.get_base_model())
    read = len(np.unique(tree.source_U))
    assert read < len(tree.source_U) < len(tree.token_ids_T)
    assert rows_through_mlps(model, support) == [len(tree.token_ids_T), read]
    assert rows_through_mlps(model, support, **{READ_POSITIONS: None}) == [len(tree.token_ids_T)] * 2


def test_trimmed_layer_gives_identical_results_with_gradient_checkpointing() -> None:
    model, support = adapted("llama")
    trim_last_layer(model.get_base_model())
    expected_logprobs, expected_gradients = logprobs_and_gradients(model, support)
    checkpoint_activations(model.get_base_model())
    model.train()
    logprobs, gradients = logprobs_and_gradients(model, support)
    assert torch.equal(logprobs, expected_logprobs)
    assert all(torch.equal(a, b) for a, b in zip(gradients, expected_gradients, strict=True))


def test_other_forward_passes_are_not_trimmed() -> None:
    model, support = adapted("llama")
    base = model.get_base_model()
    ids = torch.arange(3, 27).unsqueeze(0)
    base.set_attn_implementation("sdpa")
    expected = base(ids).logits
    base.set_attn_implementation("yeonma_forest")
    assert trim_where_equal(base, support)
    logprobs_and_gradients(model, support)
    base.set_attn_implementation("sdpa")
    assert torch.equal(base(ids).logits, expected)


def test_last_mlp_that_mixes_tokens_is_not_trimmed() -> None:
    model, support = adapted("llama")
    base = model.get_base_model()
    mlp = base.model.layers[-1].mlp
    original_forward = mlp.forward
    mlp.forward = lambda x: original_forward(x - x.mean(1, keepdim=True))
    expected, _ = logprobs_and_gradients(model, support)
    assert not trim_where_equal(base, support)
    assert torch.equal(logprobs_and_gradients(model, support)[0], expected)
    assert "forward" in mlp.__dict__ and mlp.forward.__name__ == "<lambda>"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_trimming_check_works_in_half_precision(dtype: torch.dtype) -> None:
    base = tiny_model("llama").to(dtype)
    support = check_forest_support(base)
    assert trim_where_equal(base, support)
    mixing = tiny_model("llama").to(dtype)
    mlp = mixing.model.layers[-1].mlp
    original_forward = mlp.forward
    mlp.forward = lambda x: original_forward(x - x.mean(1, keepdim=True))
    assert not trim_where_equal(mixing, support)


def test_unknown_layer_names_and_repeated_trimming_change_nothing() -> None:
    assert not trim_last_layer(tiny_model("gpt2"))
    model = tiny_model("llama")
    assert trim_last_layer(model)
    assert not trim_last_layer(model)
