"""Bases published in fewer bits: the weights that are read, runs on them, and what is recorded."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, FineGrainedFP8Config, Mxfp4Config

from tests.published import compressed_folders, fp8_folders, mxfp4_folders, packed_folder
from tests.quantised import CPU, loaded, needs_bitsandbytes
from tests.runs import TEMPLATE, arguments, articles, command, model_folder, trained, write_jsonl
from yeonma.adapter.adapter_folder import base_identity
from yeonma.errors import UserError
from yeonma.model import load
from yeonma.model.gradient_check import check_input_gradients
from yeonma.model.kernels.linear import frozen_linear
from yeonma.model.quantized import packed_layers
from yeonma.model.sharding import local_weight_bytes
from yeonma.policy import blueprint, load_policy

SHAPE = load.LoraShape(4, 8, 0.0, "all-linear")
SETTINGS: dict[str, object] = {"max_steps": 6, "card_rows": 1}
FOUR_BITS: dict[str, dict[str, Any]] = {
    "nf4": {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "nf4 without double quantisation": {"bnb_4bit_quant_type": "nf4"},
    "fp4": {"bnb_4bit_quant_type": "fp4"},
    "nf4 for bfloat16": {"bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": "bfloat16"},
    "nf4 in bfloat16 tensors": {"bnb_4bit_quant_type": "nf4", "bnb_4bit_quant_storage": "bfloat16"},
}
PACKED: dict[str, dict[str, Any]] = {
    **{name: {"load_in_4bit": True, **options} for name, options in FOUR_BITS.items()},
    "int8": {"load_in_8bit": True},
}
needs_compressed_tensors = pytest.mark.skipif(
    find_spec("compressed_tensors") is None, reason="compressed-tensors is not installed"
)
FOLDERS: dict[str, Callable[[Path], tuple[Path, Path]]] = {
    "fp8": fp8_folders,
    "fp8 without blocks": lambda place: fp8_folders(place, block=None),
    "fp8 experts": lambda place: fp8_folders(place, "qwen3_moe"),
    "mxfp4": mxfp4_folders,
    "int4": compressed_folders,
    "compressed fp8": lambda place: compressed_folders(place, 8),
}
"""A folder as published, and one with the same weights whole."""
WHOLE = [
    pytest.param(kind, marks=needs_compressed_tensors if "int4" in kind or "compressed" in kind else [])
    for kind in FOLDERS
]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_folder(tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("data") / "rows.jsonl", articles(17))


def published_of(folder: Path) -> object:
    return json.loads((folder / "yeonma.json").read_text()).get("published_weights")


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = model(torch.arange(3, 60).unsqueeze(0)).logits
    return result


# bitsandbytes


@needs_bitsandbytes
@pytest.mark.parametrize("kind", PACKED)
def test_gradients_of_packed_layers_equal_those_of_whole_ones(tmp_path: Path, base: Path, kind: str) -> None:
    folder = packed_folder(tmp_path / "packed", base, **PACKED[kind])
    model = loaded(folder, "none")
    whole = load.load_base(load.find_base(str(folder)), CPU, torch.float32, whole=True)
    assert len(list(packed_layers(model))) == 14 and not list(packed_layers(whole))
    for name, packed in packed_layers(model):
        weight = whole.get_submodule(name).weight
        x = torch.randn(5, weight.shape[1]).requires_grad_()
        y = x.detach().clone().requires_grad_()
        ours, plain = frozen_linear(x, packed, None), F.linear(y, weight)
        upstream = torch.randn_like(ours)
        ours.backward(upstream)
        plain.backward(upstream)
        torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(x.grad, y.grad, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits(model), logits(whole), rtol=1e-5, atol=1e-4)


@needs_bitsandbytes
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_six_steps_on_a_packed_base_equal_those_with_quantization(
    tmp_path: Path, base: Path, data: Path, kind: str
) -> None:
    folder = packed_folder(tmp_path / "packed", base, **PACKED[kind])
    packed = trained(tmp_path / "P", folder, data, **SETTINGS)
    quantised = trained(tmp_path / "Q", base, data, quantization=kind, **SETTINGS)
    assert packed.losses == pytest.approx(quantised.losses, abs=1e-4)
    for name, weight in packed.weights.items():
        torch.testing.assert_close(weight, quantised.weights[name], rtol=1e-4, atol=1e-5)
    bits = {"nf4": "nf4 (4 bits, double quantisation)", "int8": "int8 (8 bits)"}[kind]
    assert f"weights published as bitsandbytes {bits}: held in these bits, 0.0 MB" in packed.out
    size = {"nf4": 4, "int8": 8}[kind]
    assert published_of(packed.folder) == {"method": "bitsandbytes", "kind": kind, "bits": size}
    assert json.loads((packed.folder / "yeonma.json").read_text())["quantization"] == "none"
    assert published_of(quantised.folder) is None
    assert len(list(packed_layers(load_policy(packed.folder).model))) == 14


@needs_bitsandbytes
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_files_of_any_number_format_are_held_in_the_one_asked_for(
    tmp_path: Path, base: Path, dtype: torch.dtype
) -> None:
    folder = packed_folder(tmp_path / "packed", base, torch.bfloat16, load_in_4bit=True)
    model = loaded(folder, "none", dtype)
    packed = {f"{name}.weight" for name, _ in packed_layers(model)}
    assert {weight.dtype for name, weight in model.named_parameters() if name not in packed} == {dtype}
    assert {layer.dequantise(dtype).dtype for _, layer in packed_layers(model)} == {dtype}  # type: ignore[attr-defined]
    assert logits(model).isfinite().all()


@needs_bitsandbytes
def test_gpt2_packed_by_bitsandbytes_is_merged_with_its_weights_transposed(tmp_path: Path) -> None:
    base = model_folder(tmp_path / "gpt2", "gpt2")
    folder = packed_folder(tmp_path / "packed", base, load_in_4bit=True, bnb_4bit_quant_type="nf4")
    whole = load.load_base(load.find_base(str(folder)), CPU, torch.float32, whole=True)
    torch.testing.assert_close(logits(loaded(folder, "none")), logits(whole), rtol=1e-5, atol=1e-4)


# Dequantised as they are read


@pytest.mark.parametrize("kind", WHOLE)
def test_published_weights_are_those_of_the_whole_model(tmp_path: Path, kind: str) -> None:
    folder, whole = FOLDERS[kind](tmp_path)
    model, plain = loaded(folder, "none"), loaded(whole, "none")
    assert not hasattr(model.config, "quantization_config")
    for (name, weight), (_, other) in zip(model.named_parameters(), plain.named_parameters(), strict=True):
        assert torch.equal(weight, other), name
    assert torch.equal(logits(model), logits(plain))
    outline = load.outline(load.load_config(load.find_base(str(folder))), load.find_base(str(folder)))
    source = load.find_base(str(folder))
    assert base_identity(model, source) == base_identity(outline, source) != base_identity(plain, source)


@pytest.mark.parametrize("kind", WHOLE)
def test_losses_on_a_published_base_equal_those_on_the_whole_one(
    tmp_path: Path, data: Path, kind: str
) -> None:
    folder, whole = FOLDERS[kind](tmp_path)
    settings = {**SETTINGS, "max_steps": 3, "card_rows": 0, "lora_target_modules": "[q_proj, v_proj]"}
    published, plain = (
        trained(tmp_path / base.name / "OUT", base, data, **settings) for base in (folder, whole)
    )
    assert published.losses == plain.losses
    assert published.weight_bytes == plain.weight_bytes
    (line,) = [line for line in published.out.splitlines() if "weights published as" in line]
    assert "dequantised as they are read, held in torch.float32, " in line and line.endswith(
        "MB of frozen weights"
    )
    methods = {"fp8": "fp8", "mxfp4": "mxfp4"}
    record = published_of(published.folder)
    assert isinstance(record, dict)
    assert record["method"] == methods.get(kind.partition(" ")[0], "compressed-tensors")
    assert "weights published as" not in plain.out and published_of(plain.folder) is None


@pytest.mark.parametrize("kind", ["int8", "nf4", "fp8"])
@pytest.mark.parametrize("published", ["fp8", "mxfp4"])
def test_quantization_may_follow(tmp_path: Path, published: str, kind: Any) -> None:
    folder, whole = FOLDERS[published](tmp_path)
    model, plain = loaded(folder, kind), loaded(whole, kind)
    assert len(list(packed_layers(model))) == len(list(packed_layers(plain))) > 3
    assert torch.equal(logits(model), logits(plain))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_experts_in_mxfp4_stay_packed_where_a_quantization_follows(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    folder, whole = mxfp4_folders(tmp_path)
    source = load.find_base(str(folder))
    packed, plain = loaded(folder, "fp8", dtype), loaded(whole, "fp8", dtype)
    experts = packed.model.layers[0].mlp.experts
    assert experts.down_proj.shape == (4, 32, 2, 17) and experts.down_proj.dtype == torch.uint8
    assert local_weight_bytes(packed) < 0.5 * local_weight_bytes(plain)
    assert type(packed) is type(plain)
    assert base_identity(packed, source) == base_identity(loaded(folder, "none"), source)
    gradients = []
    for model in (packed, plain):
        x = model.get_input_embeddings()(torch.arange(3, 60)[None]).detach().requires_grad_()
        model(inputs_embeds=x).logits.float().square().mean().backward()
        gradients.append(x.grad)
    assert torch.equal(*gradients) and gradients[0].abs().max() > 0
    without_experts = replace(SHAPE, experts=False)
    drawn = blueprint(load.load_config(source), dtype, without_experts, quantization="fp8")
    assert drawn.weight_bytes == pytest.approx(local_weight_bytes(packed), rel=0.05)
    check_input_gradients(packed, "gpt-oss")
    for names in (["all-linear"], ["q_proj", "down_proj"]):
        with pytest.raises(
            UserError, match=r"experts.*held in 4 bits as they are published.*lora_experts false"
        ):
            load.add_lora(packed, load.LoraShape(4, 8, 0.0, names), seed=1)


def test_a_run_on_packed_experts_equals_one_on_whole_ones(tmp_path: Path, data: Path) -> None:
    folder, whole = mxfp4_folders(tmp_path)
    settings = {"max_steps": 3, "quantization": "fp8", "lora_target_modules": "[q_proj, v_proj]"}
    packed, plain = (
        trained(tmp_path / base.name / "OUT", base, data, **settings) for base in (folder, whole)
    )
    assert packed.losses == plain.losses
    assert "experts held in these bits, dense layers in fp8, " in packed.out


def test_fp8_and_mxfp4_equal_what_transformers_dequantises(tmp_path: Path) -> None:
    fp8, _ = fp8_folders(
        tmp_path / "fp8", block=(16, 16)
    )  # transformers refuses blocks that do not fit evenly
    mxfp4, _ = mxfp4_folders(tmp_path / "mxfp4")
    for folder, config in (
        (fp8, FineGrainedFP8Config(dequantize=True)),
        (mxfp4, Mxfp4Config(dequantize=True)),
    ):
        theirs = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=torch.float32)
        for (name, weight), (_, other) in zip(
            loaded(folder, "none").named_parameters(), theirs.named_parameters(), strict=True
        ):
            # transformers 5.17 leaves the experts of mxfp4 in bfloat16
            torch.testing.assert_close(weight, other.to(weight.dtype), rtol=0, atol=0, msg=name)


def changed(folder: Path, name: str, tensor: torch.Tensor | None) -> None:
    tensors = load_file(folder / "model.safetensors")
    if tensor is None:
        del tensors[name]
    else:
        tensors[name] = tensor
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("model.layers.1.mlp.up_proj.weight_scale_inv", None, "it has no scale"),
        (
            "model.layers.1.mlp.up_proj.weight_scale_inv",
            torch.ones(3, 2),
            r"scale \(3, 2\), and blocks of \[20, 12\]",
        ),
        (
            "model.layers.1.mlp.up_proj.weight",
            torch.ones(48, 16, dtype=torch.int8),
            "its numbers are I8, not fp8",
        ),
        ("model.layers.1.mlp.up_proj.weight_scale_inv", torch.full((3, 3), torch.nan), "NaN or infinity"),
    ],
)
def test_tensors_that_do_not_fit_the_format_are_named(
    tmp_path: Path, name: str, tensor: torch.Tensor | None, message: str
) -> None:
    folder, _ = fp8_folders(tmp_path)
    changed(folder, name, tensor)
    with pytest.raises(UserError, match=message) as error:
        loaded(folder, "none")
    assert "model.layers.1.mlp.up_proj" in str(error.value)


def test_missing_weights_of_a_published_base_are_named(tmp_path: Path) -> None:
    folder, _ = fp8_folders(tmp_path)
    changed(folder, "model.norm.weight", None)
    with pytest.raises(UserError, match=r"the weights lack model\.norm\.weight"):
        loaded(folder, "none")


# The forecast, merging, verifying


@needs_bitsandbytes
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_the_forecast_of_packed_weights_is_that_of_quantization(
    tmp_path: Path, base: Path, kind: Any
) -> None:
    folder = packed_folder(tmp_path / "packed", base, **PACKED[kind])
    drawn = blueprint(load.load_config(load.find_base(str(folder))), torch.float32, SHAPE)
    quantised = blueprint(
        load.load_config(load.find_base(str(base))), torch.float32, SHAPE, quantization=kind
    )
    assert drawn.weight_bytes == quantised.weight_bytes
    assert drawn.frozen == quantised.frozen and drawn.trained == quantised.trained


@needs_bitsandbytes
def test_the_forecast_leaves_out_layers_that_were_not_packed(tmp_path: Path, base: Path) -> None:
    skipped = {"load_in_4bit": True, "llm_int8_skip_modules": ["lm_head", "down_proj"]}
    folder = packed_folder(tmp_path / "packed", base, **skipped)
    drawn = blueprint(load.load_config(load.find_base(str(folder))), torch.float32, SHAPE)
    assert drawn.weight_bytes == pytest.approx(local_weight_bytes(loaded(folder, "none")), rel=0.1)
    assert len(list(packed_layers(drawn.model))) == len(list(packed_layers(loaded(folder, "none")))) == 12


def test_inspect_says_what_is_read_and_held(tmp_path: Path, data: Path) -> None:
    folder, whole = fp8_folders(tmp_path)
    words = {"data_path": data, "template": TEMPLATE, "lora_r": 4}
    held = "published as fp8 (8 bits, blocks of 20 x 12): dequantised as they are read, "
    for options, expected in (({}, "held in float32"), ({"quantization": "fp8"}, "dense layers held in fp8")):
        done = command(tmp_path, "inspect", *arguments({"base_model": folder, **words, **options}))
        assert done.status == 0, done.err
        assert held + expected in done.out
    assert "published as" not in command(tmp_path, "inspect", *arguments({"base_model": whole, **words})).out


@pytest.mark.parametrize("kind", [pytest.param("nf4", marks=needs_bitsandbytes), *WHOLE])
def test_an_adapter_is_merged_into_the_weights_that_were_published(
    tmp_path: Path, base: Path, data: Path, kind: str
) -> None:
    if kind == "nf4":
        folder = packed_folder(tmp_path / "packed", base, **PACKED[kind])
    else:
        folder, _ = FOLDERS[kind](tmp_path)
    settings = {
        "max_steps": 2,
        "learning_rate": 0.05,
        "card_rows": 1,
        "lora_target_modules": "[q_proj, v_proj]",
    }
    done = trained(tmp_path / "OUT", folder, data, **settings)
    card = (done.folder / "README.md").read_text()
    assert "published as" in card
    verified = command(tmp_path, "verify", str(done.folder))
    assert verified.status == 0, verified.out
    merged = command(tmp_path, "merge", str(done.folder), "--output_dir", str(tmp_path / "M"))
    assert merged.status == 0, merged.out + merged.err
    assert "quantization_config" not in json.loads((tmp_path / "M" / "config.json").read_text())
    assert published_of(tmp_path / "M") is None
    assert "is published as " in (tmp_path / "M" / "README.md").read_text()
    theirs: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "M")
    torch.testing.assert_close(logits(theirs), logits(load_policy(done.folder).model), rtol=1e-4, atol=1e-3)
