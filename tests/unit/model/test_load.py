from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from tests.models import VOCABULARY, tiny_model
from tests.tokenizers import byte_level
from yeonma.errors import UserError
from yeonma.model.adapter_weights import load_adapter
from yeonma.model.load import (
    LoraShape,
    add_lora,
    check_vocabulary,
    load_base,
    load_config,
    load_tokenizer,
    pick_device,
    pick_dtype,
)
from yeonma.model.source import BaseSource, find_base

CPU = torch.device("cpu")


def complete_model(folder: Path, family: str = "llama", **options: Any) -> Path:
    tiny_model(family).save_pretrained(folder, **options)
    return folder


def sharded_model(folder: Path) -> Path:
    complete_model(folder, max_shard_size="20KB")
    assert len(list(folder.glob("model-0*.safetensors"))) > 2
    return folder


def save_adapter(base: str, folder: Path) -> Path:
    model = add_lora(tiny_model("llama"), LoraShape(4, 4, 0.0, ["q_proj"]), seed=0)
    model.peft_config["default"].base_model_name_or_path = base
    model.save_pretrained(folder)
    return folder


def message_of(action: Callable[[], object]) -> str:
    with pytest.raises(UserError) as error:
        action()
    return str(error.value)


def change_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def load(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    return load_base(find_base(str(folder)), CPU, dtype)


# Valid model folders


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "gpt_oss"])
def test_complete_folder_loads_as_a_frozen_model_in_eval_mode(family: str, tmp_path: Path) -> None:
    model = load(complete_model(tmp_path, family))
    assert not model.training and not any(parameter.requires_grad for parameter in model.parameters())
    expected = tiny_model(family).state_dict()
    assert all(torch.equal(weight, expected[name]) for name, weight in model.state_dict().items())


def test_weights_are_loaded_in_the_requested_dtype(tmp_path: Path) -> None:
    assert load(complete_model(tmp_path), torch.bfloat16).dtype == torch.bfloat16


def test_sharded_model_equals_the_single_file_model(tmp_path: Path) -> None:
    logits = [
        load(folder)(torch.arange(9)[None]).logits
        for folder in (sharded_model(tmp_path / "a"), complete_model(tmp_path / "b"))
    ]
    assert torch.equal(*logits)


def test_name_that_is_not_a_folder_is_a_hub_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("yeonma.hub.why_unreachable", lambda: None)
    assert find_base("somebody/something", "main") == BaseSource("somebody/something", "main")


@pytest.mark.parametrize("name", ["./nowhere", "/no/where", "~/no/where", "a/b/c"])
def test_path_to_a_missing_folder_is_an_error(name: str) -> None:
    assert "no such model folder" in message_of(lambda: find_base(name))


def test_missing_hub_model_is_an_error_that_names_it() -> None:
    source = BaseSource("somebody/nothing")
    for part, load_part in (
        ("config", load_config),
        ("tokenizer", load_tokenizer),
        ("config", lambda base: load_base(base, CPU, torch.float32)),
    ):
        assert message_of(lambda load_part=load_part: load_part(source)).startswith(
            f"somebody/nothing: cannot load the model's {part}"
        )


# Invalid model folders


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2", "gpt2"])
def test_folder_without_a_tokenizer_is_an_error(family: str, tmp_path: Path) -> None:
    source = find_base(str(complete_model(tmp_path, family)))
    message = message_of(lambda: load_tokenizer(source))
    assert message.startswith(f"{tmp_path}: cannot load the model's tokenizer")
    assert message.endswith("give the folder of a complete model, with its tokenizer")


def test_the_folders_own_tokenizer_is_loaded(tmp_path: Path) -> None:
    byte_level().save_pretrained(complete_model(tmp_path))
    assert load_tokenizer(find_base(str(tmp_path))).get_vocab() == byte_level().get_vocab()


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("tokenizer.json", "{,"),
        ("tokenizer.json", '{"version": 1}'),
        ("tokenizer_config.json", '{"eos_token": true}'),
        ("tokenizer_config.json", '{"model_max_length": "long"}'),
        ("tokenizer_config.json", '{"added_tokens_decoder": []}'),
        ("tokenizer_config.json", '{"chat_template": "\\ud800"}'),
        ("config.json", '{"model_type": "llama", "hidden_act": 5}'),
        ("config.json", '{"model_type": "llamas"}'),
    ],
)
def test_invalid_tokenizer_or_config_file_is_an_error(name: str, text: str, tmp_path: Path) -> None:
    byte_level(chat_template=None).save_pretrained(complete_model(tmp_path))
    (tmp_path / name).write_text(text)
    source, load_file_of = find_base(str(tmp_path)), load_config if name == "config.json" else load_tokenizer
    assert message_of(lambda: load_file_of(source)).startswith(f"{tmp_path}: cannot load the model's ")


def test_find_base_rejects_a_tokenizer_config_that_is_not_an_object(tmp_path: Path) -> None:
    complete_model(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("[1]")
    assert "not a JSON object" in message_of(lambda: find_base(str(tmp_path)))


def test_pickled_weights_without_safetensors_are_refused(tmp_path: Path) -> None:
    torch.save({}, complete_model(tmp_path) / "pytorch_model.bin")
    find_base(str(tmp_path))  # allowed next to safetensors
    (tmp_path / "model.safetensors").unlink()
    message = message_of(lambda: find_base(str(tmp_path)))
    assert "pickled" in message and "save_pretrained()" in message
    assert "cannot load" in message_of(lambda: load_base(BaseSource(str(tmp_path)), CPU, torch.float32))


def test_folder_without_weights_or_config_is_an_error(tmp_path: Path) -> None:
    (complete_model(tmp_path) / "model.safetensors").unlink()
    assert "has no model.safetensors" in message_of(lambda: find_base(str(tmp_path)))
    (tmp_path / "config.json").unlink()
    assert "has no config.json" in message_of(lambda: find_base(str(tmp_path)))


@pytest.mark.parametrize("text", ["{", "[1]", "\xff"])
def test_config_that_is_not_a_json_object_is_an_error(text: str, tmp_path: Path) -> None:
    (complete_model(tmp_path) / "config.json").write_bytes(text.encode("latin-1"))
    assert message_of(lambda: find_base(str(tmp_path))).startswith(f"{tmp_path / 'config.json'}: not ")


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    shard = sorted(sharded_model(tmp_path).glob("model-0*.safetensors"))[1]
    shard.unlink()
    assert message_of(lambda: find_base(str(tmp_path))) == (
        f"{tmp_path}: missing shards: {shard.name}; download them again"
    )


@pytest.mark.parametrize("damage", ["short", "empty", "pointer"])
def test_damaged_weight_file_is_named_before_loading(damage: str, tmp_path: Path) -> None:
    for folder in (sharded_model(tmp_path / "many"), complete_model(tmp_path / "one")):
        shard = sorted(folder.glob("*.safetensors"))[-1]
        content = shard.read_bytes()
        pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 123456789\n"
        shard.write_bytes({"short": content[:-1], "empty": b"", "pointer": pointer}[damage])
        message = message_of(lambda folder=folder: find_base(str(folder)))
        assert message.startswith(f"{shard}: truncated or damaged") and message.endswith("download it again")


@pytest.mark.parametrize(
    "elsewhere", ["../other/model.safetensors", "/etc/hostname", "sub/model.safetensors"]
)
def test_weight_index_naming_a_file_outside_the_folder_is_an_error(elsewhere: str, tmp_path: Path) -> None:
    index = sharded_model(tmp_path) / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["lm_head.weight"] = elsewhere
    index.write_text(json.dumps(content))
    message = message_of(lambda: find_base(str(tmp_path)))
    cure = "download the model again, from a source that you trust"
    assert message == f"{index}: it names a file outside the folder ({elsewhere}); {cure}"


@pytest.mark.parametrize("index", ["{", "[]", "{}", '{"weight_map": {}}', '{"weight_map": {"a": 1}}'])
def test_invalid_weight_index_is_an_error(index: str, tmp_path: Path) -> None:
    (sharded_model(tmp_path) / "model.safetensors.index.json").write_text(index)
    assert "model.safetensors.index.json: " in message_of(lambda: find_base(str(tmp_path)))


def test_model_with_python_code_is_refused_unless_trusted(tmp_path: Path) -> None:
    path = complete_model(tmp_path) / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "auto_map": {"AutoConfig": "evil.Config"}}))
    message = message_of(lambda: find_base(str(tmp_path)))
    assert "its own Python code" in message and "--trust_remote_code true" in message
    assert find_base(str(tmp_path), trust_remote_code=True).trust_remote_code


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weight_with_nan_or_infinity_is_named_in_the_error(
    value: float, dtype: torch.dtype, tmp_path: Path
) -> None:
    change_weights(
        complete_model(tmp_path), lambda weights: weights["model.norm.weight"].__setitem__(3, value)
    )
    assert message_of(lambda: load(tmp_path, dtype)) == (
        f"{tmp_path}: NaN or infinity in model.norm.weight; download the weights again"
    )


def test_large_finite_weights_whose_sum_overflows_are_accepted(tmp_path: Path) -> None:
    change_weights(complete_model(tmp_path), lambda weights: weights["model.norm.weight"].fill_(3e38))
    assert load(tmp_path) is not None


def test_weights_missing_in_the_file_are_an_error(tmp_path: Path) -> None:
    change_weights(complete_model(tmp_path), lambda weights: weights.pop("model.layers.1.mlp.up_proj.weight"))
    assert "the weights lack model.layers.1.mlp.up_proj.weight" in message_of(lambda: load(tmp_path))


def test_weights_of_the_wrong_shape_are_an_error(tmp_path: Path) -> None:
    name = "model.layers.0.self_attn.q_proj.weight"
    change_weights(
        complete_model(tmp_path), lambda weights: weights.update({name: weights[name][:4].clone()})
    )
    assert f"{name} (4, 32) for (32, 32)" in message_of(lambda: load(tmp_path))


def test_tokenizer_larger_than_the_embedding_is_an_error() -> None:
    tokenizer = byte_level()
    check_vocabulary(tokenizer, len(tokenizer), "m")
    message = message_of(lambda: check_vocabulary(tokenizer, len(tokenizer) - 1, "m"))
    assert f"ids up to {len(tokenizer) - 1}" in message and f"only {len(tokenizer) - 1} rows" in message
    assert "m: " in message_of(lambda: check_vocabulary(tokenizer, VOCABULARY, "m"))


# Adapters


def test_adapter_folder_as_base_resolves_to_its_base_and_adapter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("yeonma.hub.why_unreachable", lambda: None)
    base, adapter = complete_model(tmp_path / "base"), tmp_path / "adapter"
    save_adapter(str(base), adapter)
    assert find_base(str(adapter)) == BaseSource(str(base), adapter=str(adapter))
    save_adapter("somebody/something", adapter)
    assert find_base(str(adapter)) == BaseSource("somebody/something", adapter=str(adapter))


def test_adapter_whose_base_is_missing_or_an_adapter_is_an_error(tmp_path: Path) -> None:
    first = save_adapter("somebody/something", tmp_path / "first")
    assert "is an adapter too" in message_of(
        lambda: find_base(str(save_adapter(str(first), tmp_path / "second")))
    )
    # an adapter that is its own base
    assert "is an adapter too" in message_of(lambda: find_base(str(save_adapter(str(first), first))))
    (first / "adapter_config.json").write_text('{"base_model_name_or_path": null}')
    assert "does not name its base" in message_of(lambda: find_base(str(first)))


def test_load_adapter_freezes_the_adapter_unless_trainable(tmp_path: Path) -> None:
    adapter = save_adapter("somebody/something", tmp_path)
    for trainable in (True, False):
        model = load_adapter(tiny_model("llama"), str(adapter), trainable=trainable)
        assert isinstance(model, PeftModel)
        assert {p.requires_grad for name, p in model.named_parameters() if "lora_" in name} == {trainable}


def test_adapter_of_another_base_is_an_error_that_names_both_bases(tmp_path: Path) -> None:
    adapter = save_adapter("somebody/something", tmp_path / "adapter")
    model = load(complete_model(tmp_path / "gpt2", "gpt2"))
    message = message_of(lambda: load_adapter(model, str(adapter), trainable=False))
    assert (
        "was trained on somebody/something and does not fit" in message and str(tmp_path / "gpt2") in message
    )


# New LoRA layers


@pytest.mark.parametrize(
    ("targets", "layers"),
    [
        (["q_proj", "up_proj"], {"q_proj", "up_proj"}),
        ("q_proj", {"q_proj"}),
        (["self_attn.k_proj"], {"k_proj"}),
        ("all-linear", {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}),
        (["all-linear"], {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}),
    ],
)
def test_lora_is_added_only_to_the_target_layers(targets: str | list[str], layers: set[str]) -> None:
    model = add_lora(tiny_model("llama"), LoraShape(4, 8, 0.0, targets), seed=0)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {name.split(".lora_")[0].rsplit(".", 1)[-1] for name in trained} == layers
    assert len(trained) == 2 * 2 * len(layers)


@pytest.mark.parametrize("targets", [["gate_prj"], "gate_prj", ["q_proj", "gate_prj"]])
def test_unknown_target_layer_error_lists_the_models_layers(targets: str | list[str]) -> None:
    message = message_of(lambda: add_lora(tiny_model("llama"), LoraShape(4, 8, 0.0, targets), seed=0))
    assert message == (
        'lora_target_modules: no layer of the model is called "gate_prj"; it has down_proj, gate_proj, k_proj, '
        'lm_head, o_proj, q_proj, up_proj, v_proj; did you mean "gate_proj"?'
    )


def test_dense_target_names_match_fused_expert_layers() -> None:
    targets = ["gate_proj", "down_proj", "up_proj"]
    model = add_lora(tiny_model("qwen3_moe"), LoraShape(4, 8, 0.0, targets), seed=0)
    assert {
        name.split(".mlp.")[1].split(".")[0] for name, p in model.named_parameters() if p.requires_grad
    } == {"experts"}
    message = message_of(lambda: add_lora(tiny_model("qwen3_moe"), LoraShape(4, 8, 0.1, targets), seed=0))
    assert message.startswith("lora_dropout: PEFT has none for the routed experts")
    assert message.endswith("use --lora_dropout 0, or use --lora_experts false")
    message = message_of(
        lambda: add_lora(tiny_model("gpt_oss"), LoraShape(4, 8, 0.0, ["q_proj", "up_proj"]), seed=0)
    )
    assert 'no layer of the model is called "up_proj"' in message


def test_new_adapter_is_float32_and_seeded_and_keeps_the_base_output() -> None:
    base = tiny_model("llama").bfloat16()
    ids = torch.arange(3, 20)[None]
    expected = base(ids).logits
    adapters = []
    for torch_seed, seed in enumerate((5, 5, 6)):
        torch.manual_seed(torch_seed)  # must not matter
        model = add_lora(tiny_model("llama").bfloat16(), LoraShape(4, 8, 0.0, "all-linear"), seed)
        assert torch.equal(model(ids).logits, expected)
        adapters.append([p for p in model.parameters() if p.requires_grad])
        assert all(p.dtype == torch.float32 for p in adapters[-1])
    first, same, other = adapters
    assert all(torch.equal(a, b) for a, b in zip(first, same, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize(
    ("options", "scaling"), [({}, 16 / 4), ({"use_rslora": True}, 16 / 2), ({"use_dora": True}, 16 / 4)]
)
def test_rslora_dora_and_dropout_options_reach_peft(options: dict, scaling: float) -> None:
    model = add_lora(tiny_model("llama"), LoraShape(4, 16, 0.25, ["q_proj"], **options), seed=0)
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    assert layer.scaling["default"] == scaling
    assert layer.lora_dropout["default"].p == 0.25
    assert ("default" in layer.lora_magnitude_vector) == options.get("use_dora", False)


# Device and dtype


def test_cpu_dtype_auto_is_float32_and_every_dtype_is_accepted() -> None:
    assert pick_device("cpu") == CPU
    assert pick_dtype("auto", CPU) == torch.float32
    assert [pick_dtype(name, CPU) for name in ("float32", "bfloat16", "float16")] == [
        torch.float32,
        torch.bfloat16,
        torch.float16,
    ]


@pytest.mark.parametrize("has_bfloat16", [True, False])
def test_gpu_without_bfloat16_uses_float16_for_auto_and_refuses_bfloat16(
    has_bfloat16: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: has_bfloat16)
    gpu = torch.device("cuda", 0)
    assert pick_dtype("auto", gpu) == (torch.bfloat16 if has_bfloat16 else torch.float16)
    if has_bfloat16:
        assert pick_dtype("bfloat16", gpu) == torch.bfloat16
    else:
        assert "no bfloat16" in message_of(lambda: pick_dtype("bfloat16", gpu))


def test_without_a_gpu_auto_is_the_cpu_and_cuda_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert pick_device("auto") == CPU
    assert "no usable CUDA device" in message_of(lambda: pick_device("cuda"))


def test_auto_device_is_the_gpu_of_the_local_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert pick_device("auto") == torch.device("cuda", 3)


@pytest.mark.parametrize("rank", [2**63, 2**61])
def test_huge_lora_rank_is_an_error(rank: int) -> None:
    model = tiny_model("llama").to("meta")
    message = message_of(lambda: add_lora(model, LoraShape(rank, 8, 0.0, "all-linear"), seed=0))
    assert message.startswith(f"lora_r: an adapter of rank {rank} cannot be created")
