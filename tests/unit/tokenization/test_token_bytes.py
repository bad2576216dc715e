"""The bytes of single tokens, put together, are the text, whatever kind of tokenizer wrote it."""

from __future__ import annotations

from typing import Any

import pytest

from tests.runs import characters
from tests.tokenizers import byte_level, sentencepiece_bpe, unigram
from yeonma.tokenization.token_bytes import token_bytes_of

TEXTS = ("A storm closed the harbour.", "배 마흔 척이 🦜 기다렸다.", "두\n 줄")


@pytest.mark.parametrize(
    "tokenizer", [byte_level(), sentencepiece_bpe()], ids=["byte level", "byte fallback"]
)
@pytest.mark.parametrize("text", TEXTS)
def test_bytes_of_tokens_are_the_text(tokenizer: Any, text: str) -> None:
    token_bytes = token_bytes_of(tokenizer)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert b"".join(map(token_bytes, ids)).decode().removeprefix(" ") == text
    assert "🦜" not in text or not all(is_text(token_bytes(token_id)) for token_id in ids)


def is_text(content: bytes) -> bool:
    try:
        return bool(content.decode())
    except UnicodeDecodeError:
        return False


def test_bytes_of_unigram_and_of_whole_characters() -> None:
    for tokenizer, text in ((unigram(), "the old library"), (characters(), "a b.c")):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert b"".join(map(token_bytes_of(tokenizer), ids)).decode().removeprefix(" ") == text


def test_special_tokens_are_their_own_text_and_missing_ids_are_empty() -> None:
    token_bytes = token_bytes_of(byte_level())
    assert token_bytes(byte_level().eos_token_id) == b"<|endoftext|>"
    assert token_bytes(99_999) == b""
