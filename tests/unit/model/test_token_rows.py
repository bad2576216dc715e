"""Rows of new tokens: how they begin, that PEFT computes what the model does, and that only they are trained."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.models import VOCABULARY, tiny_model
from yeonma.errors import UserError
from yeonma.model.load import LoraShape, add_lora
from yeonma.model.targets import coverage

WITHIN, BEYOND = [95, 96], [97, 98, 99]


def with_tokens(model: Any, ids: list[int], **shape: Any) -> Any:
    return add_lora(model, LoraShape(2, 4, 0.0, ["q_proj"], new_token_ids=ids, **shape), seed=0)


def tied_model(family: str = "llama") -> Any:
    config = tiny_model(family).config
    config.tie_word_embeddings = True
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).requires_grad_(False).eval()
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    return model


@pytest.mark.parametrize("ids", [WITHIN, BEYOND])
@pytest.mark.parametrize("tied", [False, True])
def test_rows_begin_as_the_mean_and_are_all_that_is_trained(ids: list[int], tied: bool) -> None:
    model = tied_model() if tied else tiny_model("llama")
    before = model.get_input_embeddings().weight.detach().clone()
    head_before = model.get_output_embeddings().weight.detach().clone()
    peft_model = with_tokens(model, ids)
    trained = {name: weight for name, weight in peft_model.named_parameters() if weight.requires_grad}
    rows = {name: weight for name, weight in trained.items() if "lora_" not in name}
    assert len(rows) == (1 if tied else 2)
    expected = {"embed_tokens": before[: ids[0]].mean(0), "lm_head": head_before[: ids[0]].mean(0)}
    for name, weight in rows.items():
        mean = expected["lm_head" if "lm_head" in name else "embed_tokens"]
        assert weight.shape == (len(ids), 32) and weight.dtype == torch.float32
        torch.testing.assert_close(weight.detach(), mean.expand_as(weight))
    weight = model.get_input_embeddings().token_adapter.base_layer.weight
    assert torch.equal(weight[: ids[0]], before[: ids[0]])
    assert weight.shape[0] == max(VOCABULARY, ids[-1] + 1)
    assert str(coverage(model)).endswith(f"; rows of {len(ids)} tokens")


def test_gradient_reaches_the_rows_of_new_tokens_from_both_ends() -> None:
    model = tiny_model("llama")
    peft_model = with_tokens(model, BEYOND)
    ids = torch.tensor([[5, 97, 7, 99]])
    peft_model(input_ids=ids, labels=ids).loss.backward()
    found = {
        name: weight.grad for name, weight in peft_model.named_parameters() if "trainable_tokens" in name
    }
    embedding, head = (
        next(grad for name, grad in found.items() if part in name) for part in ("embed_tokens", "lm_head")
    )
    assert embedding[0].abs().max() > 0 and embedding[1].abs().max() == 0  # 98 is not read
    assert all(row.abs().max() > 0 for row in head)


def test_embedding_that_multiplies_by_a_scale_keeps_it() -> None:
    model = tiny_model("gemma3_text")
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        found = with_tokens(model, BEYOND)(input_ids=ids).logits
    torch.testing.assert_close(found[..., :VOCABULARY], expected, rtol=1e-4, atol=1e-5)


def test_head_with_a_bias_is_refused() -> None:
    model = tiny_model("llama")
    model.lm_head.bias = torch.nn.Parameter(torch.zeros(VOCABULARY))
    with pytest.raises(UserError, match="new_tokens: the model's head has a bias, which PEFT's layer"):
        with_tokens(model, BEYOND)


def test_embedding_with_a_forward_of_its_own_is_refused() -> None:
    class Doubled(torch.nn.Embedding):
        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(ids)

    model = tiny_model("llama")
    model.model.embed_tokens.__class__ = Doubled
    with pytest.raises(UserError, match="a Doubled, and PEFT's layer for trained tokens computes something"):
        with_tokens(model, WITHIN)


def test_head_cannot_have_an_adapter_and_trained_rows() -> None:
    shape = LoraShape(2, 4, 0.0, ["q_proj", "lm_head"], new_token_ids=WITHIN)
    with pytest.raises(UserError, match="new_tokens: lm_head has an adapter, and PEFT trains no rows of it"):
        add_lora(tiny_model("llama"), shape, seed=0)
