"""Trained rows without a copy of the embedding: the numbers and gradients of PEFT's own layers, also when switched."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft.tuners.trainable_tokens import TrainableTokensLayer
from transformers import AutoModelForCausalLM

from tests.models import tiny_model
from yeonma.model.kernels.new_rows import patch_trained_rows
from yeonma.model.load import LoraShape, add_lora

IDS = torch.tensor([[5, 97, 7, 99, 97, 8], [97, 98, 3, 4, 95, 96]])


def model_with_rows(family: str, tied: bool, dtype: torch.dtype) -> Any:
    model = tiny_model(family)
    if tied:
        config = model.config
        config.tie_word_embeddings = True
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config).requires_grad_(False).eval()
    model = model.to(dtype)
    peft_model = add_lora(model, LoraShape(2, 4, 0.0, "all-linear", new_token_ids=[97, 98, 99]), seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in peft_model.parameters():
            if weight.requires_grad:
                weight += 0.1 * torch.randn(weight.shape, generator=generator)
    return peft_model


def results(peft_model: Any) -> dict[str, torch.Tensor]:
    peft_model.zero_grad()
    output = peft_model(input_ids=IDS, labels=IDS)
    output.loss.backward()
    gradients = {name: weight.grad for name, weight in peft_model.named_parameters() if weight.requires_grad}
    return {"logits": output.logits.detach(), **gradients}


@pytest.mark.parametrize(
    ("family", "tied", "dtype"),
    [
        ("llama", False, torch.float32),
        ("llama", True, torch.float32),
        ("llama", False, torch.bfloat16),
        ("gemma3_text", True, torch.float32),  # its embedding has a scale
        ("gpt2", True, torch.float32),
    ],
)
def test_numbers_and_gradients_are_those_of_peft(family: str, tied: bool, dtype: torch.dtype) -> None:
    expected = results(model_with_rows(family, tied, dtype))
    peft_model = model_with_rows(family, tied, dtype)
    assert patch_trained_rows(peft_model.get_base_model()) == 2
    tolerance = 1e-5 if dtype == torch.float32 else 0.05
    for name, found in results(peft_model).items():
        bound = tolerance * max(1.0, float(expected[name].abs().max()))
        assert (found - expected[name]).abs().max() <= bound, name


def test_switched_off_and_merged_it_is_pefts_own() -> None:
    peft_model, plain = (model_with_rows("llama", False, torch.float32) for _ in range(2))
    patch_trained_rows(peft_model.get_base_model())
    with torch.no_grad():
        with peft_model.disable_adapter(), plain.disable_adapter():
            assert torch.equal(peft_model(input_ids=IDS).logits, plain(input_ids=IDS).logits)
        before = peft_model(input_ids=IDS).logits
        merged = peft_model.merge_and_unload()
        torch.testing.assert_close(merged(input_ids=IDS).logits, before, rtol=1e-4, atol=1e-4)


def test_no_matrix_of_the_size_of_the_embedding_is_made() -> None:
    peft_model = model_with_rows("llama", False, torch.float32)
    patch_trained_rows(peft_model.get_base_model())
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(TrainableTokensLayer, "get_merged_weights", None)
        assert results(peft_model)["logits"].shape == (2, 6, 100)
