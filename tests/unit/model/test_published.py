"""Bases that are quantised in their files: which are read, and what is said of the others, before torch is imported."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.runs import articles, model_folder, sft, write_jsonl
from yeonma.errors import UserError
from yeonma.model import published
from yeonma.model.published import Published, published_in, published_in_folder
from yeonma.model.source import find_base
from yeonma.packages import install

ROOT = Path(__file__).resolve().parents[3]
INT4 = {"weights": {"num_bits": 4, "type": "int"}, "targets": ["Linear"]}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return model_folder(tmp_path / "llama")


def change_config(folder: Path, **values: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **values}))


def described(found: Mapping[str, Any]) -> str:
    published = published_in({"quantization_config": found}, "some/model")
    assert isinstance(published, Published)
    return str(published)


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        ({"load_in_8bit": True}, "bitsandbytes int8 (8 bits)"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes fp4 (4 bits)"),
        (
            {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
            "bitsandbytes nf4 (4 bits, double quantisation)",
        ),
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "fp8 (8 bits, blocks of 128 x 128)"),
        ({"quant_method": "fp8"}, "fp8 (8 bits, one scale per weight)"),
        ({"quant_method": "mxfp4"}, "mxfp4 (4 bits, blocks of 32)"),
        (
            {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {"a": INT4}},
            "compressed-tensors int4 (4 bits, pack-quantized)",
        ),
    ],
)
def test_what_is_read_is_described(found: Mapping[str, Any], expected: str) -> None:
    assert described(found) == expected


def test_a_quantisation_is_found_where_configs_have_it() -> None:
    fp8 = {"quant_method": "fp8"}
    for config in ({"quantization_config": fp8}, {"text_config": {"quantization_config": fp8}}):
        assert published_in(config, "m") is not None
    early = {"compression_config": {"config_groups": {"a": INT4}, "format": "pack-quantized"}}
    assert published_in(early, "m") is not None
    for config in (
        {},
        {"quantization_config": None},
        {"quantization_config": {}},
        {"quantization": {"x": 1}},
    ):
        assert published_in(config, "m") is None


KINDS = {
    "gptq": "GPTQ in 4 bits",
    "awq": "AWQ in 4 bits",
    "hqq": "HQQ",
    "torchao": "torchao",
    "aqlm": "AQLM",
    "eetq": "EETQ",
    "quanto": "quanto",
    "auto-round": "AutoRound in 4 bits",
    "fbgemm_fp8": "FBGEMM FP8",
    "exl3": "EXL3 in 4 bits",
    "something_new": "something_new",
}


@pytest.mark.parametrize("method", KINDS)
def test_other_kinds_are_named_with_the_model_that_was_quantised(
    tmp_path: Path, folder: Path, method: str
) -> None:
    bits = {"bits": 4} if "bits" in KINDS[method] else {}
    change_config(folder, quantization_config={"quant_method": method, **bits})
    (folder / "README.md").write_text("---\ntags: [x]\nbase_model:\n- some/plain-model\n---\n# Quantised\n")
    done = sft(tmp_path / "out", folder, write_jsonl(tmp_path / "rows.jsonl", articles(4)))
    assert done.status == 2 and not (tmp_path / "out").exists()
    expected = (
        f"{folder}: its weights are quantised by {KINDS[method]}, which Yeonma does not read; give some/plain-model, "
        "which it was made from, and --quantization nf4 if that is too large"
    )
    assert expected in done.err


def test_models_of_mlx_and_files_of_older_quantisers_are_named(folder: Path) -> None:
    change_config(folder, quantization={"group_size": 64, "bits": 4})
    with pytest.raises(UserError, match="quantised by MLX in 4 bits"):
        find_base(str(folder))
    change_config(folder, quantization=None)
    find_base(str(folder))
    (folder / "quantize_config.json").write_text("{}")
    with pytest.raises(UserError, match=r"quantize_config\.json: its weights are quantised by GPTQ"):
        find_base(str(folder))


@pytest.mark.parametrize(
    ("readme", "name", "expected"),
    [
        ("---\nbase_model: some/plain\n---\n", None, "give some/plain, which"),
        ("---\nbase_model: ['some/plain']\n---\n", None, "give some/plain, which"),
        ("no front matter\nbase_model: other/one\n", "some/plain", "give some/plain, which"),
        (None, "some/plain", "give some/plain, which"),
        (None, "elsewhere/llama", "give the unquantised model"),  # a copy of itself
        (None, None, "give the unquantised model"),
    ],
)
def test_the_unquantised_model_is_found_where_files_name_it(
    folder: Path, readme: str | None, name: str | None, expected: str
) -> None:
    change_config(folder, quantization_config={"quant_method": "gptq"}, _name_or_path=name)
    if readme is not None:
        (folder / "README.md").write_text(readme)
    with pytest.raises(UserError, match=expected):
        find_base(str(folder))


@pytest.mark.parametrize(
    ("found", "message"),
    [
        ({"quant_method": "fp8", "weight_block_size": [128]}, "not described as Yeonma knows it"),
        ({"quant_method": "fp8", "weight_block_size": [0, 128]}, r"weight_block_size is \[0, 128\]"),
        ({"load_in_4bit": True, "bnb_4bit_quant_type": "int3"}, "bnb_4bit_quant_type is 'int3'"),
        ({"quant_method": "compressed-tensors"}, "config_groups"),
        (
            {
                "quant_method": "compressed-tensors",
                "config_groups": {"a": INT4},
                "transform_config": {"x": 1},
            },
            "rotates activations",
        ),
        (
            {"config_groups": {"a": INT4}, "sparsity_config": {"format": "sparse-24-bitmask"}},
            "sparse weights",
        ),
    ],
)
def test_forms_that_are_not_known_are_refused(found: Mapping[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        published_in({"quantization_config": found}, "some/model")


@pytest.mark.parametrize(
    ("found", "package"),
    [
        ({"load_in_4bit": True}, "bitsandbytes"),
        ({"quant_method": "compressed-tensors", "config_groups": {"a": INT4}}, "compressed-tensors"),
    ],
)
def test_a_missing_package_is_named_with_the_tested_version(
    folder: Path, found: Mapping[str, Any], package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    change_config(folder, quantization_config=found)
    monkeypatch.setattr(published, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=f"the package {package} is not installed; {install(package)}"):
        published_in_folder(folder)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"quantization": "nf4"},
            "is quantised already: bitsandbytes int8 (8 bits); leave it out: the weights",
        ),
        ({"shard": True, "use_dora": True}, "DoRA needs the unquantised weights"),
    ],
)
def test_settings_that_packed_weights_exclude_are_refused(
    tmp_path: Path, folder: Path, settings: dict[str, object], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    change_config(folder, quantization_config={"load_in_8bit": True})
    monkeypatch.setattr(published, "find_spec", lambda name: name)
    done = sft(tmp_path / "out", folder, write_jsonl(tmp_path / "rows.jsonl", articles(4)), **settings)
    assert done.status == 2 and message in done.err


def test_kinds_are_refused_before_torch_is_imported(tmp_path: Path, folder: Path) -> None:
    change_config(folder, quantization_config={"quant_method": "awq"})
    data = write_jsonl(tmp_path / "rows.jsonl", articles(4))
    words = [
        "sft",
        "--base_model",
        str(folder),
        "--data_path",
        str(data),
        "--output_dir",
        str(tmp_path / "out"),
    ]
    code = f"import sys; from yeonma.cli import main; print(main({words!r}), 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.split() == ["2", "False"], done.stderr
    assert "quantised by AWQ" in done.stderr
