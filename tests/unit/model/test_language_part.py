"""Checkpoints that also read images: their language model alone is loaded, trained and merged, under its names in the
whole checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForImageTextToText

from tests.models import tiny_model
from tests.multimodal import FAMILIES, checkpoint_folder, whole_model
from yeonma.errors import UserError
from yeonma.model.adapter_weights import load_adapter
from yeonma.model.forest_support import check_forest_support
from yeonma.model.language_part import build_empty, left_out, multimodal_class
from yeonma.model.load import LoraShape, add_lora, load_base, load_config, outline
from yeonma.model.peft_targets import as_peft_reads
from yeonma.model.source import find_base

CPU = torch.device("cpu")
ALL = LoraShape(4, 8, 0.0, "all-linear", experts=False)
ONE_BY_ONE = ["llama4"]


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_language_model_alone_gives_the_logits_of_the_whole_checkpoint(family: str, tmp_path: Path) -> None:
    source = find_base(str(checkpoint_folder(tmp_path / "base", family)))
    whole: Any = AutoModelForImageTextToText.from_pretrained(source.name).eval()
    base = load_base(source, CPU, torch.float32)
    assert type(base) is type(whole) and left_out(base)
    assert {name for name, _ in base.named_parameters()} < {name for name, _ in whole.named_parameters()}
    ids = torch.randint(3, 80, (1, 30), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(base(input_ids=ids).logits, whole(input_ids=ids).logits)
    assert base.generate(ids, max_new_tokens=5, do_sample=False).tolist() == (
        whole.generate(ids, max_new_tokens=5, do_sample=False).tolist()
    )
    empty = outline(load_config(source), source)
    assert [name for name, _ in empty.named_parameters()] == [name for name, _ in base.named_parameters()]

    support = check_forest_support(base)
    assert support.forest is (family not in ONE_BY_ONE), support.why_not

    base = load_base(source, CPU, torch.float32)
    peft_model = add_lora(base, ALL, seed=0)
    with torch.no_grad():
        for name, parameter in peft_model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    with as_peft_reads(base, peft_model.peft_config["default"]):
        peft_model.save_pretrained(tmp_path / "adapter")
    by_peft = PeftModel.from_pretrained(whole, str(tmp_path / "adapter"))
    towers = tuple(tower.path for tower in left_out(base))
    adapted = [name for name, _ in by_peft.named_parameters() if "lora_" in name]
    assert adapted == [name for name, _ in peft_model.named_parameters() if "lora_" in name]
    assert not [name for name in adapted if any(tower in name for tower in towers)]
    with torch.no_grad():
        torch.testing.assert_close(
            peft_model(input_ids=ids).logits, by_peft(input_ids=ids).logits, atol=1e-5, rtol=1e-5
        )
        with by_peft.disable_adapter():
            assert not torch.allclose(
                peft_model(input_ids=ids).logits, by_peft(input_ids=ids).logits, atol=0.1
            )


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (["visual"], '"visual" is in a tower for images or sound, through which text never passes'),
        (["visual.blocks", "q_proj"], '"visual.blocks" is in a tower'),
        (["qkv"], '"qkv" is in a tower'),
    ],
)
def test_towers_take_no_adapter(targets: list[str], message: str) -> None:
    config = whole_model("qwen2_5_vl").config
    with pytest.raises(UserError) as raised:
        add_lora(build_empty(config), LoraShape(4, 8, 0.0, targets), seed=0)
    assert message in str(raised.value)
    assert "leave it out: an adapter trained on text reaches the language model alone" in str(raised.value)


def test_projectors_take_no_adapter() -> None:
    config = whole_model("llava").config
    with pytest.raises(
        UserError, match=r"it reaches model\.multi_modal_projector\.linear_1 in the projector"
    ):
        add_lora(build_empty(config), LoraShape(4, 8, 0.0, ["multi_modal_projector"]), seed=0)


def test_names_that_towers_share_reach_the_language_model_alone(tmp_path: Path) -> None:
    base = build_empty(whole_model("gemma3").config)
    peft_model = add_lora(base, LoraShape(4, 8, 0.0, ["q_proj", "v_proj"]), seed=0)
    with as_peft_reads(base, peft_model.peft_config["default"]):
        targets = sorted(peft_model.peft_config["default"].target_modules)
    assert targets == sorted(
        f"model.language_model.layers.{layer}.self_attn.{name}"
        for layer in (0, 1)
        for name in ("q_proj", "v_proj")
    )
    assert not [
        path
        for path, _ in build_empty(whole_model("llama4").config).named_modules()
        if "vision_model." in path
    ]


def test_class_follows_the_config() -> None:
    config = whole_model("qwen3_5").config
    assert multimodal_class(config).__name__ == "Qwen3_5ForConditionalGeneration"
    config.architectures = ["Qwen3_5ForCausalLM"]  # the weights of the language model alone
    assert multimodal_class(config) is None
    assert multimodal_class(config.text_config) is None
    assert type(build_empty(config)).__name__ == "Qwen3_5ForCausalLM"
    assert multimodal_class(tiny_model("llama").config) is None
    assert multimodal_class(AutoConfig.for_model("t5gemma2")) is None


def test_missing_weights_of_the_language_model_are_an_error(tmp_path: Path) -> None:
    folder = checkpoint_folder(tmp_path / "base", "qwen2_5_vl")
    tensors = load_file(folder / "model.safetensors")
    dropped = next(name for name in tensors if "layers.1.mlp.up_proj" in name)
    save_file(
        {name: tensor for name, tensor in tensors.items() if name != dropped}, folder / "model.safetensors"
    )
    with pytest.raises(UserError, match=r"the weights lack model\.language_model\.layers\.1\.mlp\.up_proj"):
        load_base(find_base(str(folder)), CPU, torch.float32)


def test_tower_that_text_needs_is_named() -> None:
    with pytest.raises(UserError, match=r"it needs its model\.visual to read text"):
        build_empty(whole_model("qwen2_5_vl").config).model.visual()


@pytest.mark.parametrize("names", [["q_proj", "qkv"], ["visual.blocks.0.attn.qkv"]])
def test_an_adapter_on_a_tower_is_refused_in_words(names: list[str], tmp_path: Path) -> None:
    base = checkpoint_folder(tmp_path / "base", "qwen2_5_vl")
    config = LoraConfig(r=2, target_modules=names, task_type="CAUSAL_LM", init_lora_weights=False)
    get_peft_model(whole_model("qwen2_5_vl"), config).save_pretrained(tmp_path / "adapter")
    with pytest.raises(UserError) as raised:
        load_adapter(
            load_base(find_base(str(base)), CPU, torch.float32), str(tmp_path / "adapter"), trainable=False
        )
    if "q_proj" in names:
        assert "the base has no layer for 2 of its tensors" in str(raised.value)
        assert "an adapter has to be on the language model alone" in str(raised.value)


def test_an_adapter_by_peft_on_the_whole_checkpoint_gives_the_same_logits(tmp_path: Path) -> None:
    """As other tools make them: target names that a tower shares, with the tower excluded."""
    base = checkpoint_folder(tmp_path / "base", "gemma3")
    whole: Any = AutoModelForImageTextToText.from_pretrained(base).eval()
    config = LoraConfig(
        r=2,
        target_modules=r".*language_model.*\.(q_proj|v_proj)",
        task_type="CAUSAL_LM",
        init_lora_weights=False,
    )
    by_peft = get_peft_model(whole, config).eval()
    by_peft.save_pretrained(tmp_path / "adapter")
    model = load_adapter(
        load_base(find_base(str(base)), CPU, torch.float32), str(tmp_path / "adapter"), trainable=False
    )
    ids = torch.randint(3, 80, (1, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=ids).logits, by_peft(input_ids=ids).logits)
