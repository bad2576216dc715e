"""config.json keeps the keys of the published file and has those that readers of its older form need."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig, Gemma3Config

from tests.families import tiny_config
from tests.models import FOREST_FAMILIES, OTHER_FAMILIES, tiny_model
from yeonma.model.config_keys import add_older_keys, with_older_keys

ROPE = {
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
    "yarn": {
        "rope_type": "yarn",
        "rope_theta": 1000000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 32,
    },
    "longrope": {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0] * 4,
        "long_factor": [1.0, 2.0, 4.0, 8.0],
        "original_max_position_embeddings": 64,
    },
}
SMALL: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}


def written(config: Any, folder: Path, published: dict[str, Any] | None = None) -> dict[str, Any]:
    """The config.json as it is written for a base with the `published` one."""
    config.save_pretrained(folder)
    add_older_keys(folder, config, published or {})
    content: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return content


@pytest.mark.parametrize("family", [*FOREST_FAMILIES, *OTHER_FAMILIES])
def test_every_family_gets_the_older_keys_and_is_read_as_before(family: str, tmp_path: Path) -> None:
    config = tiny_model(family).config
    content = written(config, tmp_path)
    assert content["torch_dtype"] == content["dtype"]
    rope = content.get("rope_parameters") or {}
    if rope:
        assert content["rope_theta"] == rope.get("full_attention", rope)["rope_theta"]
    if "sliding_attention" in rope:
        assert content["rope_local_base_freq"] == rope["sliding_attention"]["rope_theta"]
    read, before = (one.to_dict() for one in (AutoConfig.from_pretrained(tmp_path), config))
    assert {name: read[name] for name in before if name != "_name_or_path"} == {
        name: value for name, value in before.items() if name != "_name_or_path"
    }


@pytest.mark.parametrize("kind", ROPE)
def test_scaled_positions_are_written_in_both_forms(kind: str, tmp_path: Path) -> None:
    family = "phi3" if kind == "longrope" else "llama"
    config = AutoConfig.for_model(
        family, **SMALL, pad_token_id=0, original_max_position_embeddings=64, rope_parameters=dict(ROPE[kind])
    )
    content = written(config, tmp_path)
    assert content["rope_theta"] == ROPE[kind]["rope_theta"]
    scaling = content["rope_scaling"]
    if kind == "longrope":  # the form that Phi-3 was published in
        assert scaling == {
            "type": "longrope",
            "short_factor": ROPE[kind]["short_factor"],
            "long_factor": ROPE[kind]["long_factor"],
        }
        assert content["original_max_position_embeddings"] == 64
    else:
        assert scaling == {name: value for name, value in ROPE[kind].items() if name != "rope_theta"}
    read = AutoConfig.from_pretrained(tmp_path).rope_parameters
    assert {name: read[name] for name in ROPE[kind]} == ROPE[kind]


def test_full_attention_without_positions_has_no_older_form() -> None:
    rope = {"full_attention": None, "sliding_attention": {"rope_type": "default", "rope_theta": 500.0}}
    written = {**tiny_config("beam").to_dict(), "rope_parameters": rope}
    completed = with_older_keys(written, {}, type(tiny_config("beam")))
    assert completed["rope_parameters"] == rope and "rope_theta" not in completed


def test_configs_inside_get_their_own_keys(tmp_path: Path) -> None:
    config = Gemma3Config(text_config={**SMALL, "dtype": "bfloat16"}, vision_config={"hidden_size": 32})
    content = written(config, tmp_path)
    inner = content["text_config"]
    assert inner["rope_theta"] == inner["rope_parameters"]["full_attention"]["rope_theta"]
    assert inner["rope_local_base_freq"] == inner["rope_parameters"]["sliding_attention"]["rope_theta"]
    assert inner["torch_dtype"] == inner["dtype"]
    assert "rope_theta" not in content


def test_published_keys_are_kept_but_not_those_of_other_weights(tmp_path: Path) -> None:
    config = AutoConfig.for_model("llama", **SMALL, dtype="float32", rope_parameters=dict(ROPE["llama3"]))
    published = {
        "rope_theta": 500000.0,
        "rope_scaling": {name: value for name, value in ROPE["llama3"].items() if name != "rope_theta"},
        "torch_dtype": "bfloat16",
        "own_key": {"of": "the publisher"},
        "quantization_config": {"quant_method": "fp8"},
        "_name_or_path": "/home/somebody/checkpoint",
    }
    content = written(config, tmp_path, published)
    assert content["rope_scaling"] == published["rope_scaling"]
    assert content["own_key"] == published["own_key"]
    assert content["torch_dtype"] == "float32"  # that of the weights written, not the published ones
    assert "quantization_config" not in content
    assert content.get("_name_or_path") != published["_name_or_path"]


def test_key_that_would_change_what_transformers_reads_is_left_out() -> None:
    config = AutoConfig.for_model("llama", **SMALL, dtype="float32")
    content = json.loads(config.to_json_string())
    del content["tie_word_embeddings"]
    completed = with_older_keys(content, {"tie_word_embeddings": True, "own_key": 1}, type(config))
    assert "tie_word_embeddings" not in completed
    assert completed["own_key"] == 1
