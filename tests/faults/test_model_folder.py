"""Faults of the model folder, numbered as in the list of faults."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.faults.conftest import Accepted, Refused
from tests.models import FOREST_FAMILIES, OTHER_FAMILIES, tiny_model
from tests.runs import Done, articles, model_folder, trained, write_jsonl
from tests.tokenizers import byte_level
from yeonma.adapter import adapter_folder as adapters
from yeonma.model import load

Change = Callable[..., Path]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("data") / "a.jsonl", articles(6))


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory, base: Path, data: Path) -> Done:
    """An adapter of `base`."""
    return trained(tmp_path_factory.mktemp("tuned") / "adapter", base, data)


@pytest.fixture
def model(tmp_path: Path, base: Path) -> Path:
    """A copy of `base` to damage."""
    return Path(shutil.copytree(base, tmp_path / "model"))


def change_json(path: Path, **changes: object) -> None:
    """Sets keys of a JSON file; None removes one."""
    content = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def in_shards(model: Path) -> list[Path]:
    """Rewrites the model's weights as several files; returns their paths."""
    (model / "model.safetensors").unlink()
    tiny_model("llama").save_pretrained(model, max_shard_size="20KB")
    shards = sorted(model.glob("model-0*.safetensors"))
    assert len(shards) > 2
    return shards


@pytest.mark.parametrize("remaining", [(), ("tokenizer_config.json",)])
def test_fault_54_no_tokenizer(refused: Refused, data: Path, model: Path, remaining: tuple[str, ...]) -> None:
    for name in {"tokenizer.json", "tokenizer_config.json"} - set(remaining):
        (model / name).unlink()
    (line,) = refused(data, base_model=model)
    assert line.startswith("model: cannot load the model's tokenizer (")
    assert line.endswith("; give the folder of a complete model, with its tokenizer")


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"model": 1}', "version https://git-lfs.github.com/spec/v1"]
)
def test_fault_54_invalid_tokenizer_file(refused: Refused, data: Path, model: Path, content: str) -> None:
    (model / "tokenizer.json").write_text(content)
    (line,) = refused(data, base_model=model)
    assert line.startswith("model: cannot load the model's tokenizer (")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin"])
def test_fault_55_only_pickled_weights(refused: Refused, data: Path, model: Path, name: str) -> None:
    torch.save(load_file(model / "model.safetensors"), model / name)
    (model / "model.safetensors").unlink()
    cure = "if you trust them, load them once with transformers and save_pretrained() to a new folder"
    what = "the weights are pickled (.bin), which can run code when loaded"
    assert refused(data, base_model=model) == [f"model: {what}; {cure}"]


def test_fault_56_an_adapter_of_another_base(
    tmp_path: Path, refused: Refused, data: Path, base: Path, tuned: Done
) -> None:
    other = model_folder(tmp_path / "other", "qwen3")
    found = 'config.json: model_type was "llama" and is now "qwen3"'
    what = f"{tuned.folder}: it was trained on {base}, which is not {other}: {found}"
    what += f"; use --base_model {base}"
    assert refused(data, base_model=other, adapter=tuned.folder) == [what.replace(f"{tmp_path}/", "")]
    checkpoint = next(tuned.folder.glob("checkpoint-*"))
    (line,) = refused(data, base_model=other, adapter=checkpoint)
    assert f"it was trained on {base}, which is not other: {found}; use --base_model {base}" in line


def test_fault_56_an_adapter_saved_by_plain_peft_on_another_base(
    tmp_path: Path, refused: Refused, data: Path, base: Path, tuned: Done
) -> None:
    peft_only = copy_as_plain_peft(tuned, tmp_path / "alone")
    other = model_folder(tmp_path / "other", "gpt2")
    (line,) = refused(data, base_model=other, adapter=peft_only)
    assert line == (
        f"alone: the adapter was trained on {base} and does not fit other; "
        "give the base model that the adapter was trained on"
    )


@pytest.mark.parametrize("family", [*FOREST_FAMILIES, *OTHER_FAMILIES])
def test_fault_56_outline_and_loaded_model_have_the_same_base_identity(tmp_path: Path, family: str) -> None:
    tiny_model(family).save_pretrained(tmp_path)
    source = load.find_base(str(tmp_path))
    outline = load.outline(load.load_config(source), source)
    assert all(parameter.is_meta for parameter in outline.parameters())
    loaded = load.load_base(source, torch.device("cpu"), torch.float32)
    assert adapters.base_identity(outline, source) == adapters.base_identity(loaded, source)


def test_fault_57_no_eos_token(
    tmp_path: Path, refused: Refused, accepted: Accepted, data: Path, model: Path
) -> None:
    change_json(model / "tokenizer_config.json", eos_token=None)
    assert refused(data, base_model=model) == [
        "--base_model: the tokenizer has no end-of-sequence token; "
        "set eos_token in its tokenizer_config.json, or give --add_eos_token false"
    ]
    taken = accepted(data, base_model=model, add_eos_token=False)
    assert [answer for _, answer in taken.texts] == [row["title"] for row in articles(6)]


def test_fault_58_no_pad_token(accepted: Accepted, data: Path, model: Path, base: Path) -> None:
    change_json(model / "tokenizer_config.json", pad_token=None)
    assert load.load_tokenizer(load.find_base(str(model))).pad_token is None
    taken, usual = accepted(data, base_model=model), accepted(data, base_model=base)
    assert taken.done.losses == usual.done.losses
    assert taken.done.weight_bytes == usual.done.weight_bytes


def test_fault_59_a_tokenizer_larger_than_the_embedding(refused: Refused, data: Path, model: Path) -> None:
    byte_level().save_pretrained(model)
    assert refused(data, base_model=model) == [
        f"model: the tokenizer has ids up to {len(byte_level()) - 1}, the model's embedding only 97 rows; "
        "use the model's own tokenizer"
    ]


def test_fault_60_a_missing_shard(refused: Refused, data: Path, model: Path) -> None:
    shards = in_shards(model)
    missing = [shards[0], shards[2]]
    for shard in missing:
        shard.unlink()
    names = ", ".join(shard.name for shard in missing)
    assert refused(data, base_model=model) == [f"model: missing shards: {names}; download them again"]


@pytest.mark.parametrize("damage", ["short", "empty", "pointer", "half a header"])
def test_fault_61_a_truncated_shard(refused: Refused, data: Path, model: Path, damage: str) -> None:
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 123456789\n"

    def damage_file(path: Path) -> None:
        original = path.read_bytes()
        contents = {"short": original[:-1], "empty": b"", "pointer": pointer, "half a header": original[:40]}
        path.write_bytes(contents[damage])

    damage_file(model / "model.safetensors")
    (line,) = refused(data, base_model=model)
    assert line.startswith("model/model.safetensors: truncated or damaged (")
    assert line.endswith("; download it again")
    shards = in_shards(model)
    damage_file(shards[0])
    damage_file(shards[-1])
    lines = refused(data, base_model=model)
    assert [line.partition(": ")[0] for line in lines] == [
        f"model/{shards[0].name}",
        f"model/{shards[-1].name}",
    ]


@pytest.mark.parametrize("outside", ["../secret.safetensors", "/etc/hostname", "in/model.safetensors"])
def test_fault_62_a_shard_index_that_names_a_file_outside_the_folder(
    refused: Refused, data: Path, model: Path, outside: str
) -> None:
    shards = in_shards(model)
    shutil.copy(shards[0], model.parent / "secret.safetensors")
    index = model / "model.safetensors.index.json"
    weights = json.loads(index.read_text())["weight_map"]
    change_json(index, weight_map={**weights, "lm_head.weight": outside})
    assert refused(data, base_model=model) == [
        f"model/model.safetensors.index.json: it names a file outside the folder ({outside}); "
        "download the model again, from a source that you trust"
    ]


@pytest.mark.parametrize(
    ("name", "auto_map"),
    [
        ("config.json", {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}),
        ("tokenizer_config.json", {"AutoTokenizer": ["code.Tokenizer", None]}),
    ],
)
def test_fault_63_code_that_comes_with_the_model(
    refused: Refused, data: Path, model: Path, name: str, auto_map: dict[str, object]
) -> None:
    marker = model.parent / "ran"
    (model / "code.py").write_text(f"open({str(marker)!r}, 'w')\n")
    change_json(model / name, auto_map=auto_map)
    assert refused(data, base_model=model) == [
        f"model/{name}: the model comes with its own Python code (auto_map); "
        "read that code, then give --trust_remote_code true"
    ]
    assert not marker.exists()


CODE = """
from transformers import LlamaConfig, LlamaForCausalLM

class Config(LlamaConfig):
    model_type = "yeonma_test"

class Model(LlamaForCausalLM):
    config_class = Config
"""


def test_fault_63_trusted_code_of_the_model_runs(
    tmp_path: Path, accepted: Accepted, data: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    (model / "code_of_model.py").write_text(CODE)
    auto_map = {"AutoConfig": "code_of_model.Config", "AutoModelForCausalLM": "code_of_model.Model"}
    change_json(model / "config.json", auto_map=auto_map, model_type="yeonma_test")
    assert len(accepted(data, base_model=model, trust_remote_code=True).done.losses) == 1


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_fault_64_nan_or_infinite_weights(
    tmp_path: Path, refused: Refused, data: Path, model: Path, base: Path, value: float
) -> None:
    weights = load_file(model / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 5] = value
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    what = "NaN or infinity in model.layers.1.mlp.up_proj.weight; download the weights again"
    assert refused(data, base_model=model, reads_weights=True) == [f"model: {what}"]
    assert not (tmp_path / "out").exists()
    trained(tmp_path / "out", base, data, max_steps=1)  # an existing run is left unchanged too
    lines = refused(data, base_model=model, max_steps=1, overwrite=True, reads_weights=True)
    assert lines == [f"model: {what}"]


def copy_as_plain_peft(tuned: Done, folder: Path) -> Path:
    """Copies only the files of the adapter that PEFT alone would save."""
    folder.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(tuned.folder / name, folder)
    return folder


def test_fault_65_an_adapter_given_as_base(tmp_path: Path, base: Path, data: Path, tuned: Done) -> None:
    continued = trained(tmp_path / "continued", base, data, adapter=tuned.folder, max_steps=2)
    peft_only = copy_as_plain_peft(tuned, tmp_path / "alone")
    for number, folder in enumerate((tuned.folder, next(tuned.folder.glob("checkpoint-*")), peft_only)):
        done = trained(tmp_path / str(number), base, data, base_model=folder, max_steps=2)
        assert f"{base}: " in done.out
        assert done.losses == continued.losses
        assert done.weight_bytes == continued.weight_bytes
        assert json.loads((done.folder / "adapter_config.json").read_text())[
            "base_model_name_or_path"
        ] == str(base)
    fresh = trained(tmp_path / "fresh", base, data, max_steps=2)
    assert fresh.losses != continued.losses


def test_fault_65_an_adapter_as_base_without_a_usable_base_model(
    tmp_path: Path, refused: Refused, data: Path, base: Path, tuned: Done
) -> None:
    peft_only = copy_as_plain_peft(tuned, tmp_path / "alone")
    config = peft_only / "adapter_config.json"
    change_json(config, base_model_name_or_path=str(tmp_path / "gone"))
    (line,) = refused(data, base_model=peft_only)
    cure = "give its new place with --base_model (and, to train, --adapter alone)"
    assert line == f"alone: its base model is no longer at gone; {cure}"
    change_json(config, base_model_name_or_path=str(peft_only))
    (line,) = refused(data, base_model=peft_only)
    assert line.startswith("alone/adapter_config.json: its base alone is an adapter too; ")
    change_json(config, base_model_name_or_path=None)
    (line,) = refused(data, base_model=peft_only)
    assert line.startswith(
        "alone/adapter_config.json: it does not name its base model; give the base model and"
    )
    (peft_only / "adapter_model.safetensors").rename(peft_only / "adapter_model.bin")
    change_json(config, base_model_name_or_path=str(base))
    assert refused(data, base_model=peft_only) == [
        "alone: adapter_model.safetensors is missing; give an adapter saved as safetensors"
    ]
    (line,) = refused(data, base_model=tuned.folder, adapter=peft_only)
    assert line.endswith(f"base_model {tuned.folder} is an adapter too; give --base_model {base}")


def test_several_faults_of_a_model_folder_are_reported_together(
    refused: Refused, data: Path, model: Path
) -> None:
    in_shards(model)[1].unlink()
    change_json(model / "config.json", auto_map={"AutoConfig": "code.Config"})
    change_json(model / "tokenizer_config.json", auto_map={"AutoTokenizer": ["code.Tokenizer", None]})
    lines = refused(data, base_model=model)
    assert [line.partition(": ")[0] for line in lines] == [
        "model/config.json",
        "model/tokenizer_config.json",
        "model",
    ]


def test_incomplete_or_missing_model_folder_is_refused(
    tmp_path: Path, refused: Refused, data: Path, model: Path
) -> None:
    cure = "give the folder of a complete model"
    (model / "model.safetensors").unlink()
    assert refused(data, base_model=model) == [f"model: the folder has no model.safetensors; {cure}"]
    (model / "config.json").write_text("{")
    lines = refused(data, base_model=model)
    assert lines[0].startswith("model/config.json: not valid JSON (") and len(lines) == 2
    (model / "config.json").unlink()
    assert refused(data, base_model=model) == [f"model: the folder has no config.json; {cure}"]
    assert refused(data, base_model=tmp_path / "none") == [
        "none: no such model folder; give a folder or a name on the hub"
    ]
