"""The loader of adapters refuses every file whose tensors are not exactly those that its config means."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.adapters import tiny_base
from tests.foreign import CONFIG, WEIGHTS, change_config, change_tensors, foreign_adapter
from tests.models import tiny_model
from tests.tokenizers import byte_level
from yeonma.errors import UserError
from yeonma.model.adapter_file import check_adapter_files, not_finite, read_header
from yeonma.model.adapter_weights import check_fits, load_adapter, load_additional_adapter
from yeonma.model.load import load_base, load_config, outline
from yeonma.model.source import find_base

pytestmark = pytest.mark.filterwarnings("ignore")
FIRST = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("weights")
    tiny_base(folder / "base", byte_level())
    foreign_adapter(folder / "base", folder / "plain", tokenizer=False)
    foreign_adapter(folder / "base", folder / "whole", "whole modules", tokenizer=False)
    foreign_adapter(folder / "base", folder / "new", "new tokens", tokenizer=False)
    return folder


def base_of(home: Path) -> Any:
    return load_base(find_base(str(home / "base")), torch.device("cpu"), torch.float32)


def empty_base(home: Path) -> Any:
    source = find_base(str(home / "base"))
    return outline(load_config(source), source)


def copy(home: Path, folder: Path, kind: str = "plain") -> Path:
    shutil.copytree(home / kind, folder)
    return folder


def error_of(call: Callable[[], object]) -> str:
    with pytest.raises(UserError) as caught:
        call()
    return str(caught.value)


def without(name: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {key: value for key, value in tensors.items() if key != name}


def with_(**changes: torch.Tensor) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {**tensors, **changes}


DAMAGES: dict[str, tuple[str, Callable[[Tensors], Tensors], str]] = {
    "missing": ("plain", without(FIRST), f"1 of 8 tensors is missing: {FIRST}"),
    "superfluous": ("plain", with_(x=torch.zeros(2)), "the base has no layer for 1 of its tensors: x"),
    "of another layer": (
        "plain",
        with_(**{FIRST.replace("layers.0", "layers.9"): torch.zeros(4, 32)}),
        "the base has no layer for 1 of its tensors",
    ),
    "renamed": (
        "plain",
        lambda tensors: {key.replace("layers.0", "layers.00"): value for key, value in tensors.items()},
        "4 of 8 tensors are missing",
    ),
    "of another shape": (
        "plain",
        with_(**{FIRST: torch.zeros(4, 31)}),
        "the first has shape (4, 31), but the base needs (4, 32)",
    ),
    "of a base's weight": (
        "plain",
        with_(**{"base_model.model.model.norm.weight": torch.ones(32)}),
        "the base has no layer for 1 of its tensors",
    ),
    "a whole module missing": (
        "whole",
        without("base_model.model.model.norm.weight"),
        "1 of 14 tensors is missing: base_model.model.model.norm.weight",
    ),
    "fewer rows": (
        "new",
        lambda tensors: {key: value[:500] if len(value) > 500 else value for key, value in tensors.items()},
        "its embedding has 500 rows, the base's 560",
    ),
    "heads of unequal rows": (
        "new",
        lambda tensors: {key: value[:565] if "lm_head" in key else value for key, value in tensors.items()},
        "its embedding has 568 rows",
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_tensors_that_do_not_fit_are_named_before_and_at_loading(
    name: str, home: Path, tmp_path: Path
) -> None:
    kind, change, message = DAMAGES[name]
    folder = copy(home, tmp_path / "A", kind)
    change_tensors(folder, change)
    assert message in error_of(lambda: check_fits(empty_base(home), str(folder)))
    assert message in error_of(lambda: load_adapter(base_of(home), str(folder), trainable=False))


FILES: dict[str, tuple[Callable[[Tensors], Tensors], str]] = {
    "NaN": (with_(**{FIRST: torch.full((4, 32), torch.nan)}), f"NaN or infinity in {FIRST}"),
    "infinity": (with_(**{FIRST: torch.full((4, 32), torch.inf)}), f"NaN or infinity in {FIRST}"),
    "infinity in bfloat16": (
        with_(**{FIRST: torch.full((4, 32), -torch.inf, dtype=torch.bfloat16)}),
        f"NaN or infinity in {FIRST}",
    ),
    "integers": (with_(**{FIRST: torch.zeros(4, 32, dtype=torch.int8)}), "stored as I8"),
    "nothing": (lambda tensors: {}, "there are no tensors in it"),
}


@pytest.mark.parametrize("name", FILES)
def test_file_of_numbers_that_no_adapter_has_is_an_error(name: str, home: Path, tmp_path: Path) -> None:
    change, message = FILES[name]
    folder = copy(home, tmp_path / "A")
    change_tensors(folder, change)
    assert message in error_of(lambda: check_adapter_files(folder))
    assert message in error_of(lambda: load_adapter(base_of(home), str(folder), trainable=False))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_largest_numbers_of_a_format_are_finite(dtype: torch.dtype, home: Path, tmp_path: Path) -> None:
    folder = copy(home, tmp_path / "A")
    largest = torch.full((4, 32), torch.finfo(dtype).max, dtype=dtype)
    change_tensors(folder, with_(**{FIRST: largest}))
    assert not_finite(folder, read_header(folder)) == []
    largest[3, 31] = torch.nan
    change_tensors(folder, with_(**{FIRST: largest}))
    assert not_finite(folder, read_header(folder)) == [FIRST]


def test_rank_that_no_tensor_has_is_refused_before_layers_are_made(home: Path, tmp_path: Path) -> None:
    folder = copy(home, tmp_path / "A")
    change_config(folder, r=1 << 20)
    assert "it has the rank 1048576, and no tensor is as large" in error_of(
        lambda: check_adapter_files(folder)
    )


def test_trained_biases_of_the_base_are_an_error_with_a_cure(home: Path, tmp_path: Path) -> None:
    folder = copy(home, tmp_path / "A")
    change_config(folder, bias="all")
    load_adapter(base_of(home), str(folder), trainable=False)  # this base has no biases
    change_tensors(folder, with_(**{"base_model.model.model.norm.bias": torch.zeros(32)}))
    assert "changes the base's own biases" in error_of(lambda: check_adapter_files(folder))


def test_other_files_than_safetensors_are_named_with_a_cure(home: Path, tmp_path: Path) -> None:
    folder = copy(home, tmp_path / "A")
    content = (folder / WEIGHTS).read_bytes()
    for name, message in (
        (None, f"{WEIGHTS} is missing; give an adapter saved as safetensors"),
        ("adapter_model.bin", "the weights are pickled (adapter_model.bin), which can run code when loaded"),
        ("adapter.gguf", "only adapter.gguf, which PEFT did not write"),
    ):
        (folder / WEIGHTS).unlink(missing_ok=True)
        if name:
            (folder / name).write_bytes(content)
        assert message in error_of(lambda: read_header(folder))
        (folder / (name or WEIGHTS)).unlink(missing_ok=True)
    for cut in (0, 7, 100, len(content) - 1):
        (folder / WEIGHTS).write_bytes(content[:cut])
        assert "truncated or damaged" in error_of(lambda: read_header(folder))


def test_copy_of_the_base_that_differs_from_it_is_an_error(home: Path, tmp_path: Path) -> None:
    folder = foreign_adapter(home / "base", tmp_path / "A", "embedding", tokenizer=False)
    load_adapter(base_of(home), str(folder), trainable=False)
    name = "base_model.model.lm_head.base_layer.weight"
    change_tensors(folder, lambda tensors: {**tensors, name: tensors[name] + 1})
    message = error_of(lambda: load_adapter(base_of(home), str(folder), trainable=False))
    assert "it changes the base's own lm_head, beside the adapter" in message


def test_token_beyond_the_base_and_a_second_adapter_with_new_rows_are_errors(
    home: Path, tmp_path: Path
) -> None:
    folder = copy(home, tmp_path / "A")
    change_config(folder, trainable_token_indices=[560])
    load = partial(load_adapter, base_of(home), str(folder), trainable=False)
    assert "it trains the token 560, and the base has 560 rows" in error_of(load)
    first = load_adapter(base_of(home), str(home / "plain"), trainable=False)
    message = error_of(lambda: load_additional_adapter(first, str(home / "new"), "second"))
    assert "it has tokens of its own" in message


def test_adapter_of_experts_from_before_they_were_fused_is_taken_as_peft_takes_it(tmp_path: Path) -> None:
    from peft import PeftModel
    from safetensors.torch import save_file

    from tests.models import with_lora

    model = with_lora(tiny_model("qwen3_moe"), target_modules=["q_proj"])
    model.save_pretrained(str(tmp_path))
    config = json.loads((tmp_path / CONFIG).read_text())
    config["target_modules"] = ["gate_proj", "up_proj", "down_proj"]
    (tmp_path / CONFIG).write_text(json.dumps(config))
    draw, tensors = torch.Generator().manual_seed(0), Tensors()
    for layer in range(2):
        for expert in range(4):
            for name, (outputs, inputs) in {
                "gate_proj": (16, 32),
                "up_proj": (16, 32),
                "down_proj": (32, 16),
            }.items():
                path = f"base_model.model.model.layers.{layer}.mlp.experts.{expert}.{name}"
                tensors[f"{path}.lora_A.weight"] = torch.randn(4, inputs, generator=draw)
                tensors[f"{path}.lora_B.weight"] = torch.randn(outputs, 4, generator=draw)
    save_file(tensors, tmp_path / WEIGHTS)
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        expected = PeftModel.from_pretrained(tiny_model("qwen3_moe"), str(tmp_path))(ids).logits
        loaded = load_adapter(tiny_model("qwen3_moe"), str(tmp_path), trainable=False)(ids).logits
    torch.testing.assert_close(loaded, expected, atol=1e-5, rtol=0)
    assert (expected - tiny_model("qwen3_moe")(ids).logits).abs().max() > 0.1
    save_file(dict(list(tensors.items())[1:]), tmp_path / WEIGHTS)
    error_of(lambda: load_adapter(tiny_model("qwen3_moe"), str(tmp_path), trainable=False))
