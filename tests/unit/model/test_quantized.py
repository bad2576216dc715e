"""A model with weights in 8 or 4 bits equals the model with its dequantised weights.

In forests and in single sequences, with and without LoRA.
"""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from tests.models import tiny_model
from tests.quantised import CPU, INT8, KINDS, NF4, adapted, draw_second_factor, loaded
from tests.runs import model_folder
from yeonma.adapter.adapter_folder import base_identity
from yeonma.config.settings import Quantization
from yeonma.errors import UserError
from yeonma.model import load
from yeonma.model.attention.dispatch import FOREST
from yeonma.model.forest_support import check_forest_support
from yeonma.model.kernels.lora import patch_linear
from yeonma.model.logprobs import ForestSupport, example_logprobs, sequence_logprobs
from yeonma.model.quantized import DequantisedWeight, numbers_of, packed_layers, quantised_layers

FAMILIES = ("llama", "gpt2", "qwen3_moe", "gemma2")
MAX_DEVIATION: dict[Quantization, float] = {"int8": 0.05, "fp8": 0.25}
"""How far log-probabilities are from those of the whole weights, on the average over wildly drawn tiny models."""


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_folder(tmp_path_factory.mktemp("models") / request.param, request.param)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_folder(tmp_path_factory.mktemp("models") / "llama")


def sequences() -> list[np.ndarray]:
    rng = np.random.default_rng(3)
    prefix, *suffixes = (rng.integers(3, 97, count, dtype=np.int32) for count in (20, 14, 9, 30))
    return [np.concatenate([prefix, suffixes[0]]), np.concatenate([prefix, suffixes[1]]), suffixes[2]]


def trained_masks() -> list[np.ndarray]:
    return [np.arange(len(sequence)) > 8 for sequence in sequences()]


def logprobs_and_gradients(model: Any, support: ForestSupport) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Log-probabilities, and the gradients of the trained weights."""
    logprobs = example_logprobs(model, support, sequences(), trained_masks(), share_prefix=True)
    weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return logprobs.detach(), list(torch.autograd.grad(logprobs.sum(), weights)) if weights else []


def assert_same(
    result: tuple[torch.Tensor, list[torch.Tensor]], expected: tuple[torch.Tensor, list[torch.Tensor]]
) -> None:
    torch.testing.assert_close(result[0], expected[0], rtol=0, atol=1e-4)
    assert len(result[1]) == len(expected[1])
    for gradient, other in zip(result[1], expected[1], strict=True):
        torch.testing.assert_close(gradient, other, rtol=0, atol=1e-4 * max(1.0, float(other.abs().max())))


def dequantised_model(model: Any, folder: Path) -> Any:
    """An unquantised model with the dequantised weights of `model`."""
    plain = loaded(folder, "none")
    for name, weight in packed_layers(model):
        assert isinstance(weight, DequantisedWeight)
        layer = plain.get_submodule(name)
        dense_weight = weight.dequantise(torch.float32)
        layer.weight.data.copy_(dense_weight if isinstance(layer, nn.Linear) else dense_weight.t())
    return plain


@pytest.mark.parametrize("kind", [INT8, NF4])
def test_quantised_model_equals_the_model_with_dequantised_weights(family: Path, kind: Quantization) -> None:
    model = loaded(family, kind)
    plain = dequantised_model(model, family)
    results = []
    for peft_model in (model, plain):
        load.add_lora(peft_model, load.LoraShape(4, 8, 0.0, "all-linear"), seed=1)
        draw_second_factor(peft_model)
        support = check_forest_support(peft_model)
        assert support.forest and support.head is not None
        patch_linear(peft_model)
        results.append(logprobs_and_gradients(peft_model, support))
    assert_same(*results)


@pytest.mark.parametrize("kind", KINDS)
def test_all_dense_layers_except_the_head_are_quantised(family: Path, kind: Quantization) -> None:
    if kind == "fp8" and family.name == "gpt2":
        with pytest.raises(UserError, match="no dense layers that it supports"):
            loaded(family, kind)
        return
    model, plain = loaded(family, kind), tiny_model(family.name)
    assert len(list(packed_layers(model))) == len(quantised_layers(plain, kind)) > 3
    for name, _ in packed_layers(model):
        weight, plain_weight = model.get_submodule(name).weight, plain.get_submodule(name).weight
        assert weight.nbytes == plain_weight.numel() * (0.5 if kind == "nf4" else 1)
        assert numbers_of(weight) == plain_weight.numel() and not weight.requires_grad
    assert model.get_output_embeddings().weight.dtype == torch.float32
    assert not hasattr(model.config, "quantization_config")
    source = load.find_base(str(family))
    assert base_identity(model, source) == base_identity(loaded(family, "none"), source)


@pytest.mark.parametrize("kind", [INT8, "fp8"])
def test_logprobs_are_close_to_those_of_unquantised_weights(llama: Path, kind: Quantization) -> None:
    (result, _), (unquantised, _) = (
        logprobs_and_gradients(model, check_forest_support(model))
        for model in (adapted(llama, kind), adapted(llama, "none"))
    )
    assert 1e-4 < float((result - unquantised).abs().mean()) < MAX_DEVIATION[kind]


@pytest.mark.parametrize("kind", KINDS)
def test_forest_logprobs_equal_those_of_single_sequences(llama: Path, kind: Quantization) -> None:
    model = adapted(llama, kind)
    support = check_forest_support(model)
    assert support.forest
    patch_linear(model)
    with torch.no_grad():
        by_forest = example_logprobs(model, support, sequences(), trained_masks(), share_prefix=True)
        model.set_attn_implementation(support.plain_attention)
        alone = torch.cat(
            [
                sequence_logprobs(model, torch.from_numpy(ids).long(), torch.from_numpy(mask))
                for ids, mask in zip(sequences(), trained_masks(), strict=True)
            ]
        )
    # fp8 rounding of activations can turn a difference in the last bit into a step of an eighth
    assert float((by_forest - alone).abs().mean()) < (0.02 if kind == "fp8" else 1e-5)


@pytest.mark.parametrize("kind", [INT8, NF4])
def test_product_of_a_row_is_independent_of_rows_with_large_activations(
    llama: Path, kind: Quantization
) -> None:
    layer = next(weight for _, weight in packed_layers(loaded(llama, kind)))
    x = torch.randn(4, 32)
    alone = layer.product(x, None)
    x = torch.cat([x, 1000 * torch.randn(3, 32)])
    torch.testing.assert_close(layer.product(x, None)[:4], alone, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("kind", KINDS)
def test_patched_lora_gives_pefts_logprobs_and_gradients(
    llama: Path, kind: Quantization, dropout: float
) -> None:
    peft = adapted(llama, kind, dropout)
    ours = copy.deepcopy(peft)
    assert patch_linear(ours)["LoRA"] == 14
    support = check_forest_support(peft)
    ours.set_attn_implementation(FOREST)
    results = []
    for model in (ours, peft):
        model.train()
        torch.manual_seed(5)
        results.append(logprobs_and_gradients(model, support))
    (result, gradients), (expected, peft_gradients) = results
    limit = 0.02 if kind == "fp8" else 1e-5
    assert float((result - expected).abs().mean()) < limit
    distance = sum(float((a - b).norm()) for a, b in zip(gradients, peft_gradients, strict=True))
    assert distance < 10 * limit * sum(float(gradient.norm()) for gradient in peft_gradients)


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_checkpointing_gives_bit_identical_results(llama: Path, kind: Quantization) -> None:
    results = []
    for checkpointed in (False, True):
        model = adapted(llama, kind)
        support = check_forest_support(model)
        if checkpointed:
            load.checkpoint_activations(model)
        patch_linear(model)
        results.append(logprobs_and_gradients(model.train(), support))
    (kept, gradients), (recomputed, recomputed_gradients) = results
    assert torch.equal(kept, recomputed)
    assert all(torch.equal(a, b) for a, b in zip(gradients, recomputed_gradients, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_disabled_adapter_gives_the_logprobs_of_the_base(llama: Path, kind: Quantization) -> None:
    model = loaded(llama, kind)
    support = check_forest_support(model)
    before, _ = logprobs_and_gradients(model, support)
    peft_model = load.add_lora(model, load.LoraShape(4, 8, 0.0, "all-linear"), seed=1)
    draw_second_factor(model)
    patch_linear(model)
    with peft_model.disable_adapter(), torch.no_grad():
        assert torch.equal(
            example_logprobs(model, support, sequences(), trained_masks(), share_prefix=True), before
        )
    after, _ = logprobs_and_gradients(model, support)
    assert float((after - before).abs().mean()) > 0.01


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nan_and_infinite_weights_are_an_error(tmp_path: Path, kind: Quantization, bad: float) -> None:
    folder = model_folder(tmp_path / "llama")
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 5] = bad
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"NaN or infinity in model\.layers\.1\.mlp\.up_proj"):
        loaded(folder, kind)


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_model_gives_finite_logprobs_and_float32_gradients(llama: Path, kind: Quantization) -> None:
    model = loaded(llama, kind, torch.bfloat16)
    assert model.dtype == torch.bfloat16
    load.add_lora(model, load.LoraShape(4, 8, 0.0, "all-linear"), seed=1)
    trained_weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert {weight.dtype for weight in trained_weights} == {torch.float32}
    support = check_forest_support(model)
    assert support.forest
    patch_linear(model)
    (result, gradients), (unquantised, _) = (
        logprobs_and_gradients(model, support),
        logprobs_and_gradients(*_unquantised(llama)),
    )
    assert result.isfinite().all() and all(gradient.dtype == torch.float32 for gradient in gradients)
    assert float((result - unquantised).abs().mean()) < 1.0


def _unquantised(folder: Path) -> tuple[Any, ForestSupport]:
    model = adapted(folder, "none")
    return model, check_forest_support(model)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_gpu_logprobs_equal_those_of_the_cpu(llama: Path, kind: Quantization) -> None:
    results = []
    for device in (CPU, torch.device("cuda", 0)):
        model = load.load_base(load.find_base(str(llama)), device, torch.float32, kind)
        results.append(logprobs_and_gradients(model, check_forest_support(model))[0].cpu())
    assert float((results[0] - results[1]).abs().mean()) < (0.05 if kind == "fp8" else 1e-3)
