"""What `all-linear` reaches in models of many kinds and what it passes over, and that plain PEFT reads the adapter."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from tests.families import FAMILIES, tiny_config, tiny_family
from yeonma.errors import UserError
from yeonma.model.adapter_weights import load_adapter
from yeonma.model.kernels.patch import patch_kernels
from yeonma.model.load import LoraShape, add_lora, hide_loading_noise
from yeonma.model.peft_targets import as_peft_reads
from yeonma.model.targets import ROUTED, ROUTER, coverage, resolve, target_layers

ALL = "all-linear"
MIXTURES = ("deepseek_v3", "glm4_moe", "gpt_oss", "llama4_text", "nemotron_h", "qwen3_moe", "qwen3_next")
REST = sorted(set(FAMILIES) - set(MIXTURES))
TRIED = [*MIXTURES, *(pytest.param(name, marks=pytest.mark.slow) for name in REST)]
"""All model types; quickly those of the best-known mixtures."""
NOT_ADAPTED = {"dbrx"}
"""Model types whose experts' weights are read by the module around them."""


@cache
def outline(model_type: str) -> Any:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(tiny_config(model_type))


def said(model_type: str) -> str:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(tiny_config(model_type))
        return str(coverage(add_lora(model, LoraShape(4, 8, 0.0, [ALL]), seed=0).get_base_model()))


@pytest.mark.parametrize(
    ("model_type", "expected"),
    [
        ("kimi_linear", "attention 1/1, recurrent layers 1/1, dense MLP 1/1, shared experts 1/1, routed experts 1/1, "
         "router 0/1"),
        ("recurrent_gemma", "attention 1/1, recurrent layers 2/2, MLP 3/3"),
        ("minimax", "attention 1/1, recurrent layers 1/1, routed experts 2/2, router 0/2"),
        ("granitemoehybrid", "attention 1/1, recurrent layers 1/1, shared experts 2/2, routed experts 2/2, router 0/2"),
        ("bamba", "attention 1/1, recurrent layers 1/1, MLP 2/2"),
        ("falcon_h1", "attention 2/2, recurrent layers 2/2 (in_proj; not out_proj), MLP 2/2"),
        ("mamba2", "recurrent layers 2/2 (in_proj; not out_proj)"),
        ("nemotron_h", "attention 1/1, recurrent layers 1/1 (in_proj; not out_proj), dense MLP 1/1, "
         "shared experts 1/1, routed experts 1/1, router 0/1"),
        ("falcon_mamba", "recurrent layers 2/2 (in_proj, x_proj; not dt_proj, out_proj)"),
        ("dbrx", "attention 2/2, routed experts 0/2, router 0/2"),
        ("rwkv", "recurrent layers 2/2, MLP 2/2"),
        ("deepseek_v4", "attention 2/2 (q_a_proj, q_b_proj, kv_proj, o_b_proj, gate_proj; not o_a_proj), "
         "shared experts 2/2, routed experts 2/2, router 0/2"),
        ("llama4_text", "attention 2/2, shared experts 2/2, routed experts 2/2, router 0/2"),
        ("phimoe", "attention 2/2, routed experts 2/2, router 0/2"),
        ("longcat_flash", "attention 2/2, dense MLP 2/2, routed experts 2/2, router 0/2"),
    ],
)  # fmt: skip
def test_one_line_says_what_has_an_adapter_and_what_is_passed_over(model_type: str, expected: str) -> None:
    assert said(model_type) == expected


@pytest.mark.parametrize("model_type", TRIED)
def test_all_linear_reaches_every_routed_expert_and_no_router(model_type: str) -> None:
    model = outline(model_type)
    reached = resolve(model, [ALL], experts=True)
    without_experts = resolve(model, [ALL], experts=False)
    layers = target_layers(model)
    assert not [layer.path for layer in reached if layer.part == ROUTER]
    routed = [layer for layer in layers if layer.part == ROUTED and model_type not in NOT_ADAPTED]
    assert [layer for layer in reached if layer.part == ROUTED] == routed
    assert without_experts == [layer for layer in reached if layer.part != ROUTED]


@pytest.mark.parametrize(
    ("model_type", "name"),
    [("mamba", "dt_proj"), ("jamba", "dt_proj"), ("mamba2", "out_proj"), ("dbrx", "w1")],
)
def test_layer_whose_weight_the_models_code_reads_itself_gets_no_adapter(model_type: str, name: str) -> None:
    reached = resolve(outline(model_type), [ALL], experts=True)
    assert reached and not [layer.path for layer in reached if layer.leaf == name]
    by_pattern = resolve(outline(model_type), ["*"], experts=True)
    assert by_pattern and not [layer.path for layer in by_pattern if layer.leaf == name]
    with pytest.raises(
        UserError, match=f'reads the weight of "{name}" itself, so that an adapter would do nothing'
    ):
        resolve(outline(model_type), [name], experts=True)


def test_gated_norms_keep_their_own_forward() -> None:
    for model_type in ("granitemoehybrid", "nemotron_h", "mamba2", "bamba", "qwen3_next"):
        model = tiny_family(model_type)
        gated = [module for module in model.modules() if "NormGated" in type(module).__name__]
        assert gated
        patch_kernels(model)
        assert all("forward" not in vars(module) for module in gated)


NOT_MERGED = {"zamba"}
"""Its layers share weights, and have an adapter each. `yeonma merge` refuses it."""
IDS = torch.arange(3, 40)[None]
NOT_BY_PLAIN_PEFT = {"laguna"}
"""transformers renames `shared_expert.` by an expression that matches `shared_experts`; PEFT finds no such layer."""


@pytest.mark.parametrize("model_type", TRIED)
def test_adapter_on_all_linear_gives_the_same_logits_loaded_by_plain_peft_and_merged(
    tmp_path: Path, model_type: str
) -> None:
    def base() -> Any:
        model = tiny_family(model_type)
        for weight in model.parameters():  # wide, so that an adapter shows
            if weight.ndim > 1:
                weight.data.mul_(5)
        return model

    def logits(model: Any) -> torch.Tensor:
        model.eval()
        with torch.no_grad():
            return model(IDS, use_cache=False).logits

    hide_loading_noise()
    peft_model = add_lora(base(), LoraShape(4, 8, 0.0, [ALL]), seed=0)
    draw = torch.Generator().manual_seed(1)
    for weight in peft_model.parameters():
        if weight.requires_grad:
            weight.data.normal_(std=0.2, generator=draw)
    with as_peft_reads(peft_model.get_base_model(), peft_model.peft_config["default"]):
        peft_model.save_pretrained(str(tmp_path))
    expected = logits(peft_model)
    assert (logits(base()) - expected).abs().max() > 1e-3
    tolerance = {"atol": 1e-4 * float(expected.abs().max()), "rtol": 1e-4}
    loaded = load_adapter(base(), str(tmp_path), trainable=False)
    assert coverage(loaded.get_base_model()) == coverage(peft_model.get_base_model())
    torch.testing.assert_close(logits(loaded), expected, **tolerance)
    if model_type not in NOT_BY_PLAIN_PEFT:
        plain = PeftModel.from_pretrained(base(), str(tmp_path))
        torch.testing.assert_close(logits(plain), expected, **tolerance)
    if model_type not in NOT_MERGED:
        torch.testing.assert_close(logits(loaded.merge_and_unload()), expected, **tolerance)
