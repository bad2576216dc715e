"""Quantised bases of unusual model types: layers with another product stay whole, others are refused in words."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.families import tiny_family
from tests.family_trials import FamilyTrial
from tests.quantised import needs_bitsandbytes
from yeonma.errors import UserError
from yeonma.model.quantized import check_layers, packed_layers, quantised_layers


@pytest.mark.parametrize("kind", ["int8", "nf4", "fp8"])
def test_layer_with_a_product_of_its_own_stays_whole(kind: str) -> None:
    model = tiny_family("deepseek_v4")
    grouped = [module for module in model.modules() if "GroupedLinear" in type(module).__name__]
    router = [module for module in tiny_family("llama4_text").modules() if "Router" in type(module).__name__]
    layers = quantised_layers(model, kind)  # type: ignore[arg-type]
    assert grouped and not set(map(id, grouped)) & set(map(id, layers))
    assert router and not set(map(id, router)) & set(map(id, layers))


def test_fp8_leaves_the_grouped_product_of_deepseek_v4_whole(tmp_path: Path) -> None:
    policy = FamilyTrial("deepseek_v4", tmp_path).policy("fp8")
    names = [
        name.removesuffix(".base_layer").rpartition(".")[2]
        for name, _ in packed_layers(policy.transformers_model)
    ]
    assert "o_b_proj" in names and "o_a_proj" not in names


@pytest.mark.parametrize("kind", ["int8", "nf4", "fp8"])
def test_model_of_which_no_layer_can_be_quantised_is_refused(kind: str) -> None:
    with pytest.raises(UserError, match=f"quantization {kind}: falcon has no dense layers that it supports"):
        check_layers(tiny_family("falcon"), kind, "falcon")  # type: ignore[arg-type]


@needs_bitsandbytes
def test_code_that_reads_quantised_weights_itself_is_refused_in_words(tmp_path: Path) -> None:
    done = FamilyTrial("dots3_note_text", tmp_path).sft(quantization="int8")
    assert done.status == 2, done.out
    assert "quantization: this model's code does not run with weights held in fewer bits" in done.err
    assert "Traceback" not in done.err
