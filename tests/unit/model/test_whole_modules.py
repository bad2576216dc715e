"""Modules trained whole beside an adapter: what names reach, what is refused, and that gradients are plain PEFT's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from tests.models import tiny_model
from yeonma.errors import UserError
from yeonma.model.adapter_weights import load_adapter
from yeonma.model.forest_support import check_forest_support
from yeonma.model.kernels.patch import patch_kernels
from yeonma.model.load import LoraShape, add_lora
from yeonma.model.logprobs import example_logprobs
from yeonma.model.targets import coverage
from yeonma.model.train_mode import train_adapter

CHOICES: dict[str, list[str]] = {
    "head": ["lm_head"],
    "embedding": ["embed_tokens"],
    "norms": ["norm", "*layernorm"],
    "mlp": ["layers.1.mlp"],
    "several": ["lm_head", "embed_tokens", "norm"],
}


def shape(whole: Any, targets: Any = "all-linear", **more: Any) -> LoraShape:
    return LoraShape(2, 4, 0.0, targets, whole=whole, **more)


def tied_model(family: str = "llama") -> Any:
    config = tiny_model(family).config
    config.tie_word_embeddings = True
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).requires_grad_(False).eval()


def paths_of(model: Any) -> list[str]:
    return [path for path, module in model.named_modules() if hasattr(module, "modules_to_save")]


def problem(whole: Any, model: Any = None, **more: Any) -> str:
    with pytest.raises(UserError) as raised:
        add_lora(tiny_model("llama") if model is None else model, shape(whole, **more), seed=0)
    return str(raised.value)


@pytest.mark.parametrize("kind", CHOICES)
def test_gradients_over_a_forest_are_those_of_plain_peft_one_by_one(kind: str) -> None:
    names, targets = CHOICES[kind], ["q_proj", "down_proj"]
    choice = shape(names, targets, exclude=["layers.1.mlp"] if kind == "mlp" else None)
    ours, plain = tiny_model("llama"), tiny_model("llama")
    peft_model = add_lora(ours, choice, seed=0)
    support = check_forest_support(ours)
    assert support.forest
    patch_kernels(ours, support=support, trim_last=True)
    train_adapter(ours)
    config = peft_model.peft_config["default"]
    own = LoraConfig(
        r=2,
        lora_alpha=4,
        target_modules=config.target_modules,
        modules_to_save=paths_of(ours),
        task_type="CAUSAL_LM",
    )
    reference: Any = get_peft_model(plain, own)
    trained = {name: weight for name, weight in reference.named_parameters() if weight.requires_grad}
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, weight in peft_model.named_parameters():
            if weight.requires_grad:
                weight += 0.05 * torch.randn(weight.shape, generator=generator)
                trained[name].copy_(weight)
    random = np.random.default_rng(0)
    frame = random.integers(3, 90, 20)
    sequences = [np.concatenate([frame, random.integers(3, 90, 6)]).astype(np.int32) for _ in range(3)]
    masks = [np.arange(len(ids)) >= 20 for ids in sequences]
    (-example_logprobs(ours, support, sequences, masks, share_prefix=True).sum()).backward()
    for ids in sequences:
        labels = torch.tensor([[-100] * 20 + ids[20:].tolist()])
        loss = reference(input_ids=torch.tensor(ids[None].astype(np.int64)), labels=labels).loss
        (6 * loss).backward()
    found = {name: weight.grad for name, weight in peft_model.named_parameters() if weight.requires_grad}
    assert found.keys() == trained.keys() and any("modules_to_save" in name for name in found)
    for name, gradient in found.items():
        expected = trained[name].grad
        assert expected is not None and gradient is not None and expected.abs().max() > 0, name
        assert torch.allclose(gradient, expected, rtol=1e-3, atol=1e-4), name


def test_what_is_trained_whole_is_said() -> None:
    model = tiny_model("llama")
    add_lora(model, shape(["lm_head", "norm"]), seed=0)
    assert str(coverage(model)) == "attention 2/2, MLP 2/2; trained whole: lm_head, model.norm"


def test_embedding_and_head_that_share_a_weight_are_trained_together() -> None:
    for name, family in (("lm_head", "llama"), ("embed_tokens", "llama"), ("wte", "gpt2")):
        model = tied_model(family)
        peft_model = add_lora(model, shape([name]), seed=0)
        paths = [path.rpartition(".")[2] for path in paths_of(model)]
        assert sorted(paths) == sorted({"lm_head", "wte" if family == "gpt2" else "embed_tokens"})
        assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
        whole = [weight for name, weight in peft_model.named_parameters() if "modules_to_save" in name]
        assert len(whole) == 1 and whole[0].requires_grad


@pytest.mark.parametrize(
    ("whole", "message"),
    [
        (["lm_hed"], 'modules_to_save: no module of the model is called "lm_hed"; did you mean "lm_head"?'),
        (["layers.0"], "modules_to_save: model.layers.0 holds whole layers of the model; name the modules in it"),
        (["model"], "modules_to_save: model holds whole layers of the model"),
        (["rotary_emb"], "modules_to_save: model.rotary_emb has no weights; leave it out"),
        (["layers.1.mlp"], "model.layers.1.mlp would be trained whole and have an adapter too (gate_proj, up_proj, "
         "down_proj); keep the adapter out of it with --exclude_modules '[model.layers.1.mlp]'"),
    ],
)  # fmt: skip
def test_module_that_cannot_be_trained_whole_is_an_error_with_a_cure(whole: list[str], message: str) -> None:
    assert message in problem(whole)


@pytest.mark.parametrize("names", [["lm_head"], ["embed_tokens"], ["norm"], ["layers.0.mlp"]])
def test_weights_are_float32_on_a_base_in_bfloat16_also_when_loaded(tmp_path: Path, names: list[str]) -> None:
    model = tiny_model("llama").to(torch.bfloat16)
    peft_model = add_lora(model, shape(names, ["q_proj"]), seed=0)
    with torch.no_grad():
        for name, weight in peft_model.named_parameters():
            if weight.requires_grad:
                assert weight.dtype == torch.float32, name
                weight += 1e-3 * torch.randn_like(weight)
    ids = torch.tensor([[5, 6, 7]])
    logits = peft_model(input_ids=ids).logits
    assert logits.dtype == torch.bfloat16
    logits.float().sum().backward()
    peft_model.save_pretrained(str(tmp_path), save_embedding_layers=False)
    loaded = load_adapter(tiny_model("llama").to(torch.bfloat16), str(tmp_path), trainable=False)
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=ids).logits, logits)
        plain = PeftModel.from_pretrained(tiny_model("llama").to(torch.bfloat16), str(tmp_path))
        torch.testing.assert_close(plain(input_ids=ids).logits, logits, rtol=0.1, atol=0.1)
