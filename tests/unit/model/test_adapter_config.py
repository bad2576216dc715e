"""adapter_config.json, whoever wrote it."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig

from yeonma.errors import UserError
from yeonma.model.adapter_config import _KEYS, _REFUSED, _WITHOUT_EFFECT, MAX_BYTES, read_adapter_config

VALID = {"peft_type": "LORA", "r": 4, "target_modules": ["q_proj"], "base_model_name_or_path": "base"}


def write(folder: Path, **keys: Any) -> Path:
    (folder / "adapter_config.json").write_text(json.dumps({**VALID, **keys}))
    return folder


def error_of(folder: Path) -> str:
    with pytest.raises(UserError) as caught:
        read_adapter_config(folder)
    return str(caught.value)


def test_what_peft_gets_has_no_key_without_effect(tmp_path: Path) -> None:
    config = read_adapter_config(
        write(
            tmp_path,
            peft_version="0.99",
            auto_mapping={"base_model_class": "X"},
            init_lora_weights="gaussian",
        )
    )
    assert config.keys == {"r": 4, "target_modules": ["q_proj"]}
    assert (config.base, config.revision, config.trains_biases) == ("base", None, False)


def test_every_key_of_peft_is_supported_or_without_effect_or_refused_by_name(tmp_path: Path) -> None:
    known = {*_KEYS, *_WITHOUT_EFFECT, *_REFUSED}
    assert {field.name for field in fields(LoraConfig)} == known
    plain = LoraConfig(r=4, target_modules=["q_proj"]).to_dict()
    plain["target_modules"] = sorted(plain["target_modules"])
    read_adapter_config(write(tmp_path, **json.loads(json.dumps(plain))))  # all at their defaults


@pytest.mark.parametrize("value", [None, False, [], {}, ""])
def test_key_of_a_newer_version_is_passed_over_where_it_says_nothing(value: object, tmp_path: Path) -> None:
    assert "shiny" not in read_adapter_config(write(tmp_path, shiny=value)).keys


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"shiny": 3}, 'it has "shiny": a number (3), a key that Yeonma does not know; load it with PEFT'),
        ({"lora_bias": True}, 'it has "lora_bias": true or false (True), which adds biases to the layers'),
        ({"alora_invocation_tokens": [1]}, "switches the adapter on at certain tokens only"),
        ({"layer_replication": [[0, 2]]}, "repeats layers of the base"),
        (
            {"peft_type": "IA3"},
            'an adapter of PEFT\'s kind "IA3", and Yeonma uses LORA alone; load it with PEFT',
        ),
        ({"peft_type": "PREFIX_TUNING"}, "this kind cannot be merged"),
        ({"peft_type": None}, "it has no peft_type"),
        ({"peft_type": None, "lora_parameters": {}}, "but MLX"),
        ({"peft_type": ["LORA"]}, "an adapter of PEFT's kind"),
        ({"task_type": "SEQ_CLS"}, 'it was trained for the task "SEQ_CLS"'),
        ({"r": 0}, '"r" is a number (0), but must be a whole number from 1'),
        ({"r": True}, '"r" is true or false (True), but must be'),
        ({"r": "8"}, '"r" is "8", but must be'),
        ({"lora_alpha": 1e300}, "below 2**63"),
        ({"lora_dropout": 1}, '"lora_dropout" is a number (1)'),
        ({"target_modules": [1]}, '"target_modules" is [1], but must be a list of names, or an expression'),
        ({"target_modules": None}, "it names no target_modules"),
        ({"modules_to_save": ["(a+)+"]}, "must be a list of modules' names"),
        ({"layers_pattern": "(a+)+", "layers_to_transform": 1}, '"layers_pattern" is "(a+)+"'),
        ({"layers_pattern": "h"}, "layers_pattern needs layers_to_transform"),
        ({"layers_to_transform": [-1]}, '"layers_to_transform" is [-1]'),
        ({"rank_pattern": {"a": 0}}, '"rank_pattern" is {"a": 0}'),
        ({"trainable_token_indices": [1.5]}, '"trainable_token_indices" is [1.5]'),
        ({"trainable_token_indices": {"(a+)+": [1]}}, "a list of token ids"),
        ({"init_lora_weights": "pissa_niter_4"}, "other starts change the base's own weights"),
        ({"bias": "some"}, '"bias" is "some", but must be one of none, all, lora_only'),
        ({"base_model_name_or_path": 3}, '"base_model_name_or_path" is a number (3)'),
    ],
)
def test_keys_that_are_wrong_or_not_supported_are_named(
    keys: dict[str, Any], message: str, tmp_path: Path
) -> None:
    text = error_of(write(tmp_path, **keys))
    assert message in text and text.startswith(str(tmp_path))


def test_all_wrong_keys_are_named_at_once_and_a_thousand_are_counted(tmp_path: Path) -> None:
    text = error_of(write(tmp_path, r=0, lora_alpha="x", bias="x"))
    assert len(text.splitlines()) == 3
    text = error_of(write(tmp_path, **{f"key{number}": "x" * 5000 for number in range(1000)}))
    assert "992 more keys are wrong" in text and len(text) < 5000


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not valid JSON"),
        (b"[]", "not a JSON object"),
        (b'{"r": 1, "r": 2}', 'the key "r" appears twice'),
        (b'{"r": NaN}', "NaN is not JSON"),
        (b'{"r": 1} x', "more text after the object"),
        (b"\xff\xfe", "not UTF-8"),
        (b" " * (MAX_BYTES + 1), "more than 16 MB"),
    ],
)
def test_file_that_is_no_json_object_is_an_error(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_bytes(content)
    assert message in error_of(tmp_path)
