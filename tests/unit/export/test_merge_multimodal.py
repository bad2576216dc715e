"""Runs on checkpoints that also read images: trained on text, asked, and merged into the whole checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

from tests.multimodal import checkpoint_folder
from tests.published import fp8_folders, packed_folder
from tests.runs import Done, articles, command, trained, write_jsonl
from yeonma.model.language_part import left_out
from yeonma.model.load import load_base
from yeonma.model.source import find_base


def run_on(base: Path, place: Path, **settings: object) -> Done:
    data = write_jsonl(place / "rows.jsonl", articles(10))
    options = {"max_steps": 2, "card_rows": 1, "learning_rate": 0.05, "lora_experts": False, **settings}
    return trained(place / "OUT", base, data, **options)


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(path)
    return tensors


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        pytest.param("qwen2_5_vl", {"lora_target_modules": "[q_proj,down_proj]"}, marks=pytest.mark.slow),
        ("gemma3", {}),  # its files have other names than the model, and its head is tied
        pytest.param("mistral3", {"max_shard_size": "30KB"}, marks=pytest.mark.slow),
        pytest.param("qwen3_5", {}, marks=pytest.mark.slow),
        pytest.param("llama4", {}, marks=pytest.mark.slow),
        ("qwen3_vl_moe", {"lora_experts": True}),  # merged with the whole base in memory
    ],
)
def test_run_and_merge_keep_the_whole_checkpoint(
    family: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    saving = {"max_shard_size": size} if (size := settings.pop("max_shard_size", None)) else {}
    base = checkpoint_folder(tmp_path / "base", family, **saving)
    (base / "preprocessor_config.json").write_text('{"image_processor_type": "X"}')
    done = run_on(base, tmp_path, **settings)
    assert "the adapter is on its language model alone" in done.err + done.out

    card = (done.folder / "README.md").read_text("utf-8")
    whole: Any = AutoModelForImageTextToText.from_pretrained(base).eval()
    assert f'base = {type(whole).__name__}.from_pretrained("path/to/base")' in card
    assert "model = PeftModel.from_pretrained(base, folder)" in card
    peft_model = PeftModel.from_pretrained(whole, str(done.folder)).eval()
    stored = load_file(done.folder / "adapter_model.safetensors")
    reached = {name.replace(".default", "") for name, _ in peft_model.named_parameters() if "lora_" in name}
    assert stored.keys() == reached
    ids = torch.tensor([[1, 30, 31, 40, 41, 50, 12]])
    with torch.no_grad():
        expected = peft_model(input_ids=ids).logits

    assert command(done.folder, "verify", str(done.folder)).status == 0
    merged = command(done.folder, "merge", str(done.folder), "--output_dir", str(tmp_path / "M"))
    assert merged.status == 0, merged.out + merged.err
    in_memory = "loading the whole base into memory" in merged.out + merged.err
    assert in_memory is settings.get("lora_experts", False)
    model: Any = AutoModelForImageTextToText.from_pretrained(tmp_path / "M").eval()
    assert type(model) is type(whole)
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=ids).logits, expected, atol=1e-4, rtol=1e-4)
    if family == "gemma3":  # an image of four tokens
        image = {
            "input_ids": torch.tensor([[1, 90, 90, 90, 90, 30, 31]]),
            "pixel_values": torch.randn(1, 3, 28, 28, generator=torch.Generator().manual_seed(0)),
        }
        with torch.no_grad():
            torch.testing.assert_close(
                model(**image).logits, peft_model(**image).logits, atol=1e-4, rtol=1e-4
            )
            other = model(**{**image, "pixel_values": -image["pixel_values"]}).logits
            assert not torch.allclose(model(**image).logits, other, atol=0.1)
    before, after = tensors_of(base), tensors_of(tmp_path / "M")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert before.keys() == after.keys() and changed
    assert not [name for name in changed if "vision" in name or "visual" in name or "projector" in name]
    assert (tmp_path / "M/preprocessor_config.json").read_bytes() == (
        base / "preprocessor_config.json"
    ).read_bytes()
    config = json.loads((tmp_path / "M/config.json").read_text())
    assert config["architectures"] == [type(whole).__name__] and config["vision_config"]

    row = write_jsonl(tmp_path / "row.jsonl", articles(1))
    answers = [
        command(done.folder, "generate", str(folder), "--data_path", str(row), "--max_new_tokens", "8")
        for folder in (done.folder, tmp_path / "M")
    ]
    assert answers[0].status == answers[1].status == 0, answers[0].err + answers[1].err
    assert answers[0].out == answers[1].out


def test_a_checkpoint_published_in_fp8_is_trained_and_merged(tmp_path: Path) -> None:
    published, dequantised = fp8_folders(tmp_path, "gemma3", make=checkpoint_folder)
    ids = torch.tensor([[1, 30, 31, 40, 41, 50, 12]])
    models = [
        load_base(find_base(str(folder)), torch.device("cpu"), torch.float32)
        for folder in (published, dequantised)
    ]
    assert all(map(left_out, models))
    with torch.no_grad():
        assert torch.equal(models[0](input_ids=ids).logits, models[1](input_ids=ids).logits)
    run = run_on(published, tmp_path)
    merged = command(run.folder, "merge", str(run.folder), "--output_dir", str(tmp_path / "M"))
    assert merged.status == 0, merged.out + merged.err
    before, after = tensors_of(dequantised), tensors_of(tmp_path / "M")
    assert before.keys() == after.keys()
    kept = [name for name in before if "vision" in name or "projector" in name]
    assert kept and all(torch.equal(before[name], after[name]) for name in kept)


def test_a_checkpoint_that_bitsandbytes_packed_is_loaded_without_its_towers(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    base = checkpoint_folder(tmp_path / "base", "gemma3")
    packed = packed_folder(tmp_path / "packed", base, load_in_4bit=True, bnb_4bit_quant_type="nf4")
    ids = torch.tensor([[1, 30, 31, 40, 41, 50, 12]])
    source = find_base(str(packed))
    model = load_base(source, torch.device("cpu"), torch.float32)
    whole = load_base(source, torch.device("cpu"), torch.float32, whole=True)
    assert left_out(model) and not left_out(whole)
    with torch.no_grad():
        torch.testing.assert_close(
            model(input_ids=ids).logits, whole(input_ids=ids).logits, atol=1e-4, rtol=1e-4
        )


def test_several_number_formats_become_one_with_a_word(tmp_path: Path) -> None:
    base = checkpoint_folder(tmp_path / "base", "qwen3_vl_moe")
    tensors = {
        name: tensor if "visual" in name else tensor.bfloat16()
        for name, tensor in load_file(base / "model.safetensors").items()
    }
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    run = run_on(base, tmp_path, lora_experts=True)
    merged = command(run.folder, "merge", str(run.folder), "--output_dir", str(tmp_path / "M"))
    assert merged.status == 0, merged.out + merged.err
    assert "its files have weights in BF16 and F32; all are written in" in merged.out + merged.err
