"""Layers by number and exceptions by name: what they reach, what they refuse, and that PEFT alone reads the adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from tests.models import tiny_model
from tests.unit.model.test_targets import ALL, model_of, problem_of, with_tower
from yeonma.model.load import LoraShape, add_lora
from yeonma.model.peft_targets import as_peft_reads
from yeonma.model.target_choice import TargetChoice, chosen_layers
from yeonma.model.targets import adapted, coverage

MOE_WITHOUT_GATE = "routed experts 1/1 (down_proj; not gate_up_proj), router 0/1"


def on(model: Any, targets: str | list[str] = ALL, **choice: Any) -> str:
    peft_model = add_lora(model, LoraShape(4, 8, 0.0, targets, **choice), seed=0)
    return str(coverage(peft_model.get_base_model()))


@pytest.mark.parametrize("numbers", ["1", 1, [1], "1-", "1-1", "[1]"])
def test_layers_are_named_by_numbers_lists_and_ranges(numbers: Any) -> None:
    model = tiny_model("llama")
    assert on(model, layers=numbers) == "attention 1/2, MLP 1/2"
    assert all(".layers.1." in path for path in adapted(model))


@pytest.mark.parametrize(
    ("family", "targets", "choice", "expected"),
    [
        ("llama", ALL, {"layers": "0-1"}, "attention 2/2, MLP 2/2"),
        ("llama", ["q_proj", "lm_head"], {"layers": 0},
         "attention 1/2 (q_proj; not k_proj, v_proj, o_proj), MLP 0/2, head 1/1"),
        ("llama", ALL, {"exclude": ["down_proj"]},
         "attention 2/2, MLP 2/2 (gate_proj, up_proj; not down_proj)"),
        ("llama", ALL, {"exclude": ["layers.0.mlp", "*.[qk]_proj"]},
         "attention 2/2 (v_proj, o_proj; not q_proj, k_proj), MLP 1/2"),
        ("llama", ALL, {"layers": 0, "exclude": "mlp"}, "attention 1/2, MLP 0/2"),
        ("deepseek_v3", ALL, {"layers": "1"},
         "attention 1/2, dense MLP 0/1, shared experts 1/1, routed experts 1/1, router 0/1"),
        ("deepseek_v3", ALL, {"exclude": "experts"},
         "attention 2/2, dense MLP 1/1, shared experts 1/1, routed experts 0/1, router 0/1"),
        ("deepseek_v3", ["mlp"], {"exclude": ["gate_proj", "up_proj"]},
         "attention 0/2, dense MLP 1/1 (down_proj; not gate_proj, up_proj), shared experts 1/1 (down_proj; not "
         f"gate_proj, up_proj), {MOE_WITHOUT_GATE}"),
    ],
)  # fmt: skip
def test_what_is_chosen_is_said_by_part(
    family: str, targets: str | list[str], choice: dict[str, Any], expected: str
) -> None:
    assert on(model_of(family), targets, **choice) == expected


def test_layers_of_a_tower_are_not_those_that_numbers_name() -> None:
    names = ["q_proj", "vision_tower.*.q_proj"]
    reached = chosen_layers(with_tower(), TargetChoice(names, lora_layers=1))
    paths = [layer.path for layer in reached]
    assert sum("vision" in path for path in paths) == 2
    assert [path for path in paths if "vision" not in path] == [
        "model.language_model.layers.1.self_attn.q_proj"
    ]


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({"lora_layers": "0,2-"}, "lora_layers: the model has no layers 2-; it has the layers 0-1"),
        ({"lora_layers": "1-7"}, "lora_layers: the model has no layers 1-7; it has the layers 0-1"),
        ({"exclude_modules": ["qq_proj"]}, 'exclude_modules: no layer of the model is called "qq_proj"'),
        ({"exclude_modules": ["norm"]}, "exclude_modules: \"norm\" is a layer of the kind"),
        ({"exclude_modules": ["layers"]}, "exclude_modules: it leaves no layer to adapt"),
    ],
)  # fmt: skip
def test_choice_that_the_model_does_not_have_is_an_error(choice: dict[str, Any], message: str) -> None:
    found = problem_of(lambda: chosen_layers(tiny_model("llama"), TargetChoice(ALL, **choice)))
    assert found.startswith(message)


def test_names_that_the_chosen_layers_lack_are_an_error_that_says_where_they_are() -> None:
    choice = TargetChoice(["layers.0.mlp.gate_proj"], lora_layers=1)
    found = problem_of(lambda: chosen_layers(tiny_model("llama"), choice))
    assert "the layers 1 have none of the layers to adapt: only the layers 0 have gate_proj" in found


def test_half_of_what_experts_hold_in_one_parameter_cannot_be_excluded() -> None:
    choice = TargetChoice(ALL, exclude_modules=["gate_proj"])
    found = problem_of(lambda: chosen_layers(model_of("deepseek_v3"), choice))
    assert found.startswith("exclude_modules: the routed experts hold gate_proj and up_proj in one parameter")
    assert "name up_proj too" in found


@pytest.mark.parametrize("family", ["llama", "deepseek_v3"])
def test_plain_peft_reads_the_adapter_of_chosen_layers(tmp_path: Path, family: str) -> None:
    model = model_of(family)
    shape = LoraShape(4, 8, 0.0, ALL, layers="1", exclude=["o_proj"])
    peft_model = add_lora(model, shape, seed=0)
    with torch.no_grad():
        for name, weight in peft_model.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.1)
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        expected = peft_model(input_ids=ids).logits
    with as_peft_reads(model, peft_model.peft_config["default"]):
        peft_model.save_pretrained(str(tmp_path), save_embedding_layers=False)
    plain = PeftModel.from_pretrained(model_of(family), str(tmp_path))
    with torch.no_grad():
        torch.testing.assert_close(plain(input_ids=ids).logits, expected, rtol=1e-5, atol=1e-5)
