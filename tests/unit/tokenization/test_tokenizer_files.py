"""Tokenizer folders read alike by transformers 4 and 5."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import pre_tokenizers
from transformers import AutoTokenizer, GPT2Tokenizer

from tests.families import tiny_config
from tests.tokenizers import byte_level, sentencepiece_bpe, unigram
from yeonma.model.load import load_tokenizer
from yeonma.model.source import BaseSource
from yeonma.tokenization.tokenizer_files import save_tokenizer_files

TEXTS = ("In 2024 ½ ab²", "가격은 12,300원 😀", " two  blanks\n")


@pytest.mark.parametrize("kind", [byte_level, sentencepiece_bpe, unigram])
def test_class_is_one_that_both_versions_know(kind: Callable[[], Any], tmp_path: Path) -> None:
    tokenizer = kind()
    save_tokenizer_files(tokenizer, tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert config["model_input_names"] == ["input_ids", "attention_mask"]
    read = AutoTokenizer.from_pretrained(tmp_path)
    assert [read(text).input_ids for text in TEXTS] == [tokenizer(text).input_ids for text in TEXTS]


def split_by(*parts: Any) -> Any:
    tokenizer = byte_level()
    tokenizer.backend_tokenizer.pre_tokenizer = (
        pre_tokenizers.Sequence(list(parts)) if len(parts) > 1 else parts[0]
    )
    return tokenizer


def test_splitting_of_the_file_counts_and_not_that_of_the_named_class(tmp_path: Path) -> None:
    published = split_by(
        pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
    )
    save_tokenizer_files(published, tmp_path)
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "tokenizer_class": "GPT2Tokenizer"}))
    split = published.backend_tokenizer.pre_tokenizer.pre_tokenize_str
    own = AutoTokenizer.from_pretrained(tmp_path)
    assert isinstance(own, GPT2Tokenizer)
    assert own.backend_tokenizer.pre_tokenizer.pre_tokenize_str(" 12") != split(" 12")  # why this is mended
    loaded = load_tokenizer(BaseSource(str(tmp_path)))
    assert [loaded.backend_tokenizer.pre_tokenizer.pre_tokenize_str(text) for text in TEXTS] == [
        split(text) for text in TEXTS
    ]
    assert loaded.chat_template == published.chat_template
    assert loaded.eos_token == published.eos_token


@pytest.mark.parametrize("model_type", ["qwen2", "qwen3_5_moe_text"])
@pytest.mark.parametrize("kind", [sentencepiece_bpe, unigram])
def test_file_that_is_not_byte_level_keeps_its_blanks_whatever_the_model_type(
    kind: Callable[[], Any], model_type: str, tmp_path: Path
) -> None:
    published = kind()
    published.save_pretrained(tmp_path)
    tiny_config(model_type).save_pretrained(tmp_path)
    loaded = load_tokenizer(BaseSource(str(tmp_path)))
    assert [loaded(text).input_ids for text in TEXTS] == [published(text).input_ids for text in TEXTS]


def test_class_that_splits_as_its_file_is_left_as_it_is(tmp_path: Path) -> None:
    split_by(pre_tokenizers.ByteLevel(add_prefix_space=False)).save_pretrained(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "tokenizer_class": "GPT2Tokenizer"}))
    assert type(load_tokenizer(BaseSource(str(tmp_path)))) is GPT2Tokenizer
