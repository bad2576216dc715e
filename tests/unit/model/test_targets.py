"""Which layers target names reach, what is said of them, and that PEFT alone reads the same adapter."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from tests.models import MORE_FAMILIES
from yeonma.errors import UserError
from yeonma.model.adapter_weights import add_lora_of, load_adapter, load_additional_adapter
from yeonma.model.load import (
    LoraShape,
    add_lora,
    hide_loading_noise,
)
from yeonma.model.peft_targets import as_peft_reads
from yeonma.model.targets import coverage, resolve, target_layers

SMALL: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
}
SHARED = {"num_experts": 4, "shared_expert_intermediate_size": 16}
CHUNKED = {"num_local_experts": 2, "intermediate_size_mlp": 48, "head_dim": 8, "interleave_moe_layer_step": 2}
TOP_2 = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
MIXTURES: dict[str, dict[str, Any]] = {
    "deepseek_v3": MORE_FAMILIES["deepseek_v3"],
    "qwen2_moe": {**SHARED, **TOP_2},
    "mixtral": {"num_local_experts": 4},
    "llama4_text": CHUNKED,
    "gpt_oss": {"num_local_experts": 4, "head_dim": 8},
    "phimoe": {"num_local_experts": 4},
}
ALL = "all-linear"
MLP_NAMES = ["gate_proj", "up_proj", "down_proj"]
IDS = torch.arange(3, 40)[None]


def model_of(family: str) -> Any:
    """A frozen model with numbers of its own; the same each time."""
    hide_loading_noise()
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **{**SMALL, **MIXTURES.get(family, {})})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.normal_(std=0.2)
    return model.requires_grad_(False).eval()


@cache
def with_tower() -> Any:
    """Gemma 3 with its vision tower, on the meta device."""
    tower = {"image_size": 28, "patch_size": 14, "vision_use_head": False, "num_attention_heads": 4}
    tower |= {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    tokens = {"boi_token_index": 93, "eoi_token_index": 94, "image_token_index": 95}
    text = {**SMALL, "head_dim": 16}
    config = AutoConfig.for_model(
        "gemma3", text_config=text, vision_config=tower, mm_tokens_per_image=4, **tokens
    )
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def said(model: Any, targets: str | list[str], *, experts: bool = True) -> str:
    peft_model = add_lora(model, LoraShape(4, 8, 0.0, targets, experts=experts), seed=0)
    return str(coverage(peft_model.get_base_model()))


def problem_of(action: Callable[[], object]) -> str:
    with pytest.raises(UserError) as raised:
        action()
    return str(raised.value)


@pytest.mark.parametrize(
    ("family", "targets", "experts", "expected"),
    [
        ("llama", ALL, True, "attention 2/2, MLP 2/2"),
        ("llama", ["q_proj"], True, "attention 2/2 (q_proj; not k_proj, v_proj, o_proj), MLP 0/2"),
        ("llama", ["layers.1.mlp", "*.0.self_attn.[qk]_proj", "lm_head"], True,
         "attention 1/2 (q_proj, k_proj; not v_proj, o_proj), MLP 1/2, head 1/1"),
        ("deepseek_v3", ALL, True,
         "attention 2/2, dense MLP 1/1, shared experts 1/1, routed experts 1/1, router 0/1"),
        ("deepseek_v3", ALL, False,
         "attention 2/2, dense MLP 1/1, shared experts 1/1, routed experts 0/1, router 0/1"),
        ("deepseek_v3", MLP_NAMES, True,
         "attention 0/2, dense MLP 1/1, shared experts 1/1, routed experts 1/1, router 0/1"),
        ("deepseek_v3", MLP_NAMES, False,
         "attention 0/2, dense MLP 1/1, shared experts 1/1, routed experts 0/1, router 0/1"),
        ("deepseek_v3", ["shared_experts", "gate"], True,
         "attention 0/2, dense MLP 0/1, shared experts 1/1, routed experts 0/1, router 1/1"),
        ("qwen2_moe", ALL, True, "attention 2/2, shared experts 2/2, routed experts 2/2, router 0/2"),
        ("qwen2_moe", MLP_NAMES, True, "attention 0/2, shared experts 2/2, routed experts 2/2, router 0/2"),
        ("qwen2_moe", ["mlp"], False, "attention 0/2, shared experts 2/2, routed experts 0/2, router 0/2"),
        ("qwen2_moe", ["shared_expert_gate", "experts"], False,
         "attention 0/2, shared experts 0/2, routed experts 2/2, router 2/2 (shared_expert_gate; not gate)"),
        ("mixtral", ALL, True, "attention 2/2, routed experts 2/2, router 0/2"),
        ("mixtral", ["w1", "w2", "w3"], True, "attention 0/2, routed experts 2/2, router 0/2"),
        ("mixtral", ["down_proj"], True,
         "attention 0/2, routed experts 2/2 (down_proj; not gate_up_proj), router 0/2"),
        ("llama4_text", ALL, True,
         "attention 2/2, dense MLP 1/1, shared experts 1/1, routed experts 1/1, router 0/1"),
        ("llama4_text", MLP_NAMES, True,
         "attention 0/2, dense MLP 1/1, shared experts 1/1, routed experts 1/1, router 0/1"),
        ("llama4_text", ["router"], True,
         "attention 0/2, dense MLP 0/1, shared experts 0/1, routed experts 0/1, router 1/1"),
        ("gpt_oss", ALL, True, "attention 2/2, routed experts 2/2, router 0/2"),
        ("phimoe", ALL, True, "attention 2/2, routed experts 2/2, router 0/2"),
    ],
)  # fmt: skip
def test_what_target_names_reach_is_said_by_part(
    family: str, targets: str | list[str], experts: bool, expected: str
) -> None:
    assert said(model_of(family), targets, experts=experts) == expected


@pytest.mark.parametrize(
    ("targets", "language", "tower"),
    [
        ([ALL], 14, 0),
        (["q_proj"], 2, 0),
        (["*"], 14, 0),
        (["vision_tower"], 0, 12),
        (["vision_tower.*.fc1", "q_proj"], 2, 2),
    ],
)
def test_tower_is_reached_by_its_own_name_alone(targets: list[str], language: int, tower: int) -> None:
    parts = [layer.part for layer in resolve(with_tower(), targets, experts=True)]
    assert (len(parts), parts.count("vision tower")) == (language + tower, tower)


@pytest.mark.parametrize(
    ("family", "targets", "message"),
    [
        ("llama", [], "it names no layer; use all-linear, or name layers such as [q_proj, v_proj]"),
        ("llama", ["Q_proj"], 'did you mean "q_proj"?'),
        ("llama", ["embed_tokens"], '"embed_tokens" is a layer of the kind Embedding, and adapters are put on'),
        ("llama", ["norm", "q_prj"], '"norm" is a layer of the kind LlamaRMSNorm'),
        ("mixtral", ["gate_proj"], "its routed experts are gate_up_proj (w1 and w3 in its files) and down_proj "
         "(w2 in its files); use gate_up_proj, or all-linear"),
        ("mixtral", ["w1"], "hold w1 and w3 in one parameter, and w3 is not named; name w3 too"),
        ("deepseek_v3", ["gate_proj"], "up_proj is not named; name up_proj too, or use --lora_experts false"),
    ],
)  # fmt: skip
def test_name_that_reaches_nothing_is_an_error_with_a_cure(
    family: str, targets: list[str], message: str
) -> None:
    model = model_of(family)
    text = problem_of(lambda: resolve(model, targets, experts=True))
    assert message in text
    assert all(line.startswith("lora_target_modules: ") for line in text.splitlines())
    assert len(text.splitlines()) == max(1, len(targets))


def test_layer_of_a_tower_and_routed_experts_without_their_setting_are_errors() -> None:
    text = problem_of(lambda: resolve(with_tower(), ["fc1"], experts=True))
    assert text.endswith("write vision_tower.*.fc1, or vision_tower for all of it")
    text = problem_of(lambda: resolve(model_of("mixtral"), ["w1", "w2", "w3"], experts=False))
    assert "name routed experts alone, which lora_experts false leaves out" in text


@pytest.mark.parametrize("changed", [{"dropout": 0.1}, {"use_dora": True}])
def test_option_that_experts_do_not_take_is_an_error_before_anything_is_built(
    changed: dict[str, Any],
) -> None:
    shape = LoraShape(**{"r": 4, "alpha": 8, "dropout": 0.0, "target_modules": ALL, **changed})
    text = problem_of(lambda: add_lora(model_of("mixtral"), shape, seed=0))
    assert "PEFT has none for the routed experts (model.layers.0.mlp.experts.gate_up_proj)" in text
    without = LoraShape(**{**vars(shape), "experts": False})
    assert "routed experts 0/2" in str(
        coverage(add_lora(model_of("mixtral"), without, seed=0).get_base_model())
    )


class Doubling(nn.Linear):
    """Returns one tensor, so that PEFT can add to it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


class WithBoth(nn.Linear):
    """Returns two tensors, to which PEFT cannot add."""

    def forward(self, x: torch.Tensor) -> Any:  # type: ignore[override]
        return super().forward(x), x


@pytest.mark.parametrize(("kind", "expected"), [(Doubling, "linear"), (WithBoth, "weight")])
def test_layer_with_a_forward_of_its_own_is_adapted_in_its_weight_where_peft_cannot_add(
    kind: type[nn.Linear], expected: str
) -> None:
    model = model_of("llama")
    attention = model.model.layers[0].self_attn
    attention.q_proj = kind(32, 32, bias=False)
    (layer,) = [layer for layer in target_layers(model) if layer.path.endswith("0.self_attn.q_proj")]
    assert layer.kind == expected
    in_all_linear = {layer.path for layer in resolve(model, [ALL], experts=True)}
    assert (layer.path in in_all_linear) == (expected == "linear")
    assert layer in resolve(model, ["q_proj"], experts=True)


@pytest.mark.parametrize(("family", "transposed"), [("llama", False), ("gpt2", True)])
def test_peft_is_told_of_layers_that_hold_their_weights_transposed(family: str, transposed: bool) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model = add_lora(model_of(family), LoraShape(4, 8, 0.0, [ALL]), seed=0)
    assert model.peft_config["default"].fan_in_fan_out is transposed


@pytest.mark.parametrize(
    ("family", "targets", "experts"),
    [
        ("deepseek_v3", [ALL], True),
        ("deepseek_v3", MLP_NAMES, False),
        ("deepseek_v3", ["gate", "kv_b_proj"], True),
        ("qwen2_moe", [ALL], True),
        ("mixtral", [ALL], True),
        ("llama4_text", [ALL, "router"], True),
        ("gpt_oss", [ALL], True),
        ("gpt2", [ALL], True),
    ],
)
def test_adapter_on_any_part_gives_the_same_logits_loaded_by_plain_peft_and_merged(
    tmp_path: Path, family: str, targets: list[str], experts: bool
) -> None:
    peft_model = add_lora(model_of(family), LoraShape(4, 8, 0.0, targets, experts=experts), seed=0)
    draw = torch.Generator().manual_seed(1)
    for weight in peft_model.parameters():
        if weight.requires_grad:
            weight.data.normal_(std=0.2, generator=draw)
    config = peft_model.peft_config["default"]
    own = config.target_modules
    with as_peft_reads(peft_model.get_base_model(), config):
        peft_model.save_pretrained(str(tmp_path))
    assert config.target_modules == own
    with torch.no_grad():
        base, expected = model_of(family)(IDS).logits, peft_model(IDS).logits
        assert (base - expected).abs().max() > 0.02
        loaded = load_adapter(model_of(family), str(tmp_path), trainable=False)
        assert coverage(loaded.get_base_model()) == coverage(peft_model.get_base_model())
        torch.testing.assert_close(loaded(IDS).logits, expected, atol=1e-5, rtol=1e-5)
        plain = PeftModel.from_pretrained(model_of(family), str(tmp_path))
        torch.testing.assert_close(plain(IDS).logits, expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(loaded.merge_and_unload()(IDS).logits, expected, atol=1e-5, rtol=1e-5)
    again = add_lora_of(model_of(family), str(tmp_path))
    assert coverage(again.get_base_model()) == coverage(peft_model.get_base_model())


def test_second_adapter_on_the_same_parts_is_loaded_beside_the_first(tmp_path: Path) -> None:
    folders = []
    for number, targets in enumerate([[ALL], MLP_NAMES, ["experts", "gate"]]):
        peft_model = add_lora(model_of("deepseek_v3"), LoraShape(4, 8, 0.0, targets), seed=number)
        for weight in peft_model.parameters():
            if weight.requires_grad:
                weight.data.normal_(std=0.2)
        folders.append(str(tmp_path / str(number)))
        with as_peft_reads(peft_model.get_base_model(), peft_model.peft_config["default"]):
            peft_model.save_pretrained(folders[-1])
    both = load_adapter(model_of("deepseek_v3"), folders[0], trainable=False)
    load_additional_adapter(both, folders[1], "second")
    for name, folder in (("default", folders[0]), ("second", folders[1])):
        both.set_adapter(name)
        alone = load_adapter(model_of("deepseek_v3"), folder, trainable=False)
        with torch.no_grad():
            torch.testing.assert_close(both(IDS).logits, alone(IDS).logits, atol=1e-5, rtol=1e-5)
    text = problem_of(lambda: load_additional_adapter(both, folders[2], "third"))
    assert text.endswith("than those of the first adapter; load them one by one")


def test_rank_counts_for_each_matrix_of_the_files(tmp_path: Path) -> None:
    peft_model = add_lora(model_of("mixtral"), LoraShape(4, 8, 0.0, ALL), seed=0)
    experts = peft_model.get_base_model().model.layers[0].mlp.experts
    wrapped = {one.parameter_name: one for one in (experts, experts.base_layer)}
    assert {name: one.r["default"] for name, one in wrapped.items()} == {"gate_up_proj": 8, "down_proj": 4}
    assert {one.scaling["default"] for one in wrapped.values()} == {2.0}


def test_layers_that_peft_would_move_stand_in_its_file_as_weights(tmp_path: Path) -> None:
    peft_model = add_lora(model_of("deepseek_v3"), LoraShape(4, 8, 0.0, MLP_NAMES, experts=False), seed=0)
    with as_peft_reads(peft_model.get_base_model(), peft_model.peft_config["default"]):
        peft_model.save_pretrained(str(tmp_path))
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["target_modules"] == []
    assert "model.layers.0.mlp.gate_proj.weight" in config["target_parameters"]
    peft_model = add_lora(model_of("llama"), LoraShape(4, 8, 0.1, MLP_NAMES), seed=0)
    with as_peft_reads(peft_model.get_base_model(), peft_model.peft_config["default"]):
        peft_model.save_pretrained(str(tmp_path))
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert sorted(config["target_modules"]) == sorted(MLP_NAMES)  # as ever
    assert (config["target_parameters"], config["lora_dropout"]) == (None, 0.1)
