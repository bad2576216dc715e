"""Checkpoints that also read images: their language model alone is loaded, trained and merged, under its names in the
whole checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForImageTextToText

from tests.multimodal import FAMILIES, checkpoint_folder
from yeonma.model.forest_support import check_forest_support
from yeonma.model.language_part import left_out
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
