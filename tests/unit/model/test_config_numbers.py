"""A config.json that no model can have is an error with file, key and cure, before anything is built; what others'
configs say about running the model plays no part."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.models import tiny_model
from yeonma.errors import UserError
from yeonma.model.config_numbers import generation_problems, problems_in
from yeonma.model.load import generation_eos, load_base, load_config
from yeonma.model.source import BaseSource, find_base

CPU = torch.device("cpu")
PLAIN = {
    "model_type": "llama",
    "hidden_size": 2048,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": None,
    "intermediate_size": 8192,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rope_theta": 500000.0,
    "rms_norm_eps": 1e-5,
    "rope_scaling": {"rope_type": "llama3", "factor": 32.0, "original_max_position_embeddings": 8192},
    "tie_word_embeddings": True,
    "time_step_limit": [0.0, float("inf")],
}
WRONG: dict[str, tuple[Any, ...]] = {
    "hidden_size": (0, -1, 10**9, 10**4000, "64", None, 3.5, True, {}),
    "num_hidden_layers": (0, 10**9, None, "x"),
    "num_attention_heads": (0, 10**9, "4", 7),
    "num_key_value_heads": (0, 64, 5, "x"),
    "head_dim": (0, -4, "x"),
    "intermediate_size": (0, "x", 10**12, [1] * 100_000),
    "vocab_size": (0, 10**12, None, float("nan")),
    "max_position_embeddings": (10**20, "x"),
    "rope_theta": (0, -5, "x", float("nan"), float("inf")),
    "rms_norm_eps": (-1, "x", float("nan")),
    "rope_scaling": ({"factor": "x"}, {"factor": float("nan")}, {"long_factor": ["a"]}, {"short_factor": 1}),
    "tie_word_embeddings": ("no", 5),
    "model_type": (5, None, ["llama"]),
    "quantization_config": (5, "x", []),
    "text_config": (5, "x", {"hidden_size": 0}, {"vision_config": {"hidden_size": -1}}),
    "num_labels": (10**12,),
    "anything": (float("nan"),),
}


@pytest.mark.parametrize(("key", "value"), [(key, value) for key in WRONG for value in WRONG[key]])
def test_fault_99_a_number_that_no_model_can_have(key: str, value: Any) -> None:
    (problem,) = problems_in({**PLAIN, key: value}, "base/config.json")
    assert problem.place == "base/config.json" and problem.cure
    assert any(name in problem.what for name in (key, "num_key_value_heads"))
    assert len(problem.what) < 200


def test_all_wrong_numbers_are_listed_at_once() -> None:
    found = problems_in({**PLAIN, "hidden_size": 0, "vocab_size": "x"}, "config.json")
    assert len(found) == 2


PUBLISHED: tuple[dict[str, Any], ...] = (
    PLAIN,
    {"n_embd": 768, "n_head": 12, "n_layer": 12, "n_inner": None, "n_positions": 1024, "vocab_size": 50257},
    {"hidden_size": 2048, "intermediate_size": [8192] * 30, "head_dim": 256, "num_key_value_heads": 2},
    {"text_config": {"hidden_size": 2560, "rope_parameters": {"full_attention": {"factor": 8.0}}}},
    {"num_local_experts": 0, "num_experts_per_tok": None, "q_lora_rank": None, "sliding_window": None},
    {"rope_scaling": {"long_factor": [1.0, 2], "short_factor": [1]}, "rope_theta": 10000},
)


@pytest.mark.parametrize("config", PUBLISHED)
def test_what_published_models_have_is_no_fault(config: dict[str, Any]) -> None:
    assert problems_in(config, "config.json", 2_500_000_000) == []


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("hidden_size", 65_536),
        ("num_hidden_layers", 5_000),
        ("intermediate_size", 10**7),
        ("vocab_size", 10**8),
    ],
)
def test_a_model_far_larger_than_its_weights(key: str, value: int) -> None:
    (problem, *_) = problems_in({**PLAIN, key: value}, "config.json", 2_500_000_000)
    assert "but the weights have 2,500,000,000 bytes" in problem.what


def test_token_ids_of_a_generation_config() -> None:
    assert generation_problems({"eos_token_id": [1, 2], "pad_token_id": None, "temperature": "x"}, "g") == []
    for value in ("x", [1, "a"], 1.5, True, [[1]], {}, 10**12, [0] * 20_000):
        (problem,) = generation_problems({"eos_token_id": value}, "g")
        assert problem.what.startswith("eos_token_id: ") and problem.cure


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    tiny_model("llama").save_pretrained(folder)
    return folder


def changed(base: Path, folder: Path, **values: Any) -> BaseSource:
    for path in base.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    config = json.loads((base / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | values))
    return find_base(str(folder))


def logits(source: BaseSource) -> torch.Tensor:
    with torch.no_grad():
        output = load_base(source, CPU, torch.float32)(torch.tensor([[3, 1, 4, 1, 5]]))
    result: torch.Tensor = output.logits
    return result


RUN_SETTINGS: dict[str, Any] = {
    "_attn_implementation": "flash_attention_2",
    "attn_implementation": "zzz",
    "_experts_implementation": "zzz",
    "output_attentions": True,
    "output_hidden_states": True,
    "return_dict": False,
    "use_cache": False,
    "chunk_size_feed_forward": 5,
    "_name_or_path": "../../elsewhere",
    "transformers_version": "99",
    "pruned_heads": {"0": [1]},
    "problem_type": "regression",
    "gradient_checkpointing": True,
    "pretraining_tp": 2,
    "torchscript": True,
    "dtype": "float8_e4m3fn",
    "torch_dtype": "float16",
}


@pytest.mark.parametrize("key", sorted(RUN_SETTINGS))
def test_fault_99_how_others_ran_a_model_plays_no_part(key: str, base: Path, tmp_path: Path) -> None:
    source = changed(base, tmp_path, **{key: RUN_SETTINGS[key]})
    assert torch.equal(logits(source), logits(BaseSource(str(base))))


def test_all_of_them_at_once_leave_no_trace_in_the_config(base: Path, tmp_path: Path) -> None:
    config = load_config(changed(base, tmp_path, **RUN_SETTINGS))
    assert config._attn_implementation is None and config._experts_implementation is None
    assert config.return_dict and config.use_cache
    assert not config.output_attentions and not config.output_hidden_states


@pytest.mark.parametrize(
    ("key", "value", "named"),
    [
        ("hidden_size", 0, "hidden_size"),
        ("num_hidden_layers", 10**9, "num_hidden_layers"),
        ("hidden_size", 60_000, "but the weights have"),
        ("hidden_act", "zzz", "zzz"),
        ("hidden_act", None, "hidden_act"),
        ("rope_parameters", "x", "rope_parameters"),
        ("rope_parameters", {"rope_type": "zzz"}, "zzz"),
        ("intermediate_size", None, "intermediate_size"),
        ("layer_types", 5, "config"),
        ("pad_token_id", 10**9, "Padding_idx"),
        ("base_model_tp_plan", 5, "config.json"),
        ("model_type", "zzz", "zzz"),
    ],
)
def test_fault_99_reading_such_a_base_is_an_error_in_words(
    key: str, value: Any, named: str, base: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=named) as raised:
        logits(changed(base, tmp_path, **{key: value}))
    assert str(tmp_path) in str(raised.value) and all(problem.cure for problem in raised.value.problems)


def test_a_config_nested_without_end_is_no_json(base: Path, tmp_path: Path) -> None:
    changed(base, tmp_path)
    for name in ("config.json", "generation_config.json", "tokenizer_config.json"):
        before = (tmp_path / name).read_bytes() if (tmp_path / name).exists() else None
        (tmp_path / name).write_text('{"a":' * 100_000 + "1" + "}" * 100_000)
        with pytest.raises(UserError, match="not valid JSON"):
            find_base(str(tmp_path))
        (tmp_path / name).unlink() if before is None else (tmp_path / name).write_bytes(before)


def test_a_generation_config_of_garbage(base: Path, tmp_path: Path) -> None:
    source = changed(base, tmp_path)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": ["x", 2]}')
    with pytest.raises(UserError, match="eos_token_id"):
        find_base(str(tmp_path))
    assert all(isinstance(number, int) for number in generation_eos(source))
