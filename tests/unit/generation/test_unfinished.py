"""An answer cut within a character ends before it; a replacement character that was trained stays."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.tokenizers import byte_level, sentencepiece_bpe
from yeonma.generation.completion import continued_text
from yeonma.tokenization.text_encoder import TextEncoder

TOKENIZERS: dict[str, Callable[[], Any]] = {"byte-level": byte_level, "byte fallback": sentencepiece_bpe}
TEXTS = st.text(st.sampled_from("a é가힣😀\ufffd\n "), min_size=1, max_size=6)


@pytest.mark.parametrize("kind", TOKENIZERS)
@given(text=TEXTS)
@settings(deadline=None, max_examples=60)
def test_a_text_cut_after_any_token_is_a_beginning_of_it(kind: str, text: str) -> None:
    tokenizer = TOKENIZERS[kind]()
    encoder = TextEncoder.of(tokenizer)
    before = encoder.batch(["Question: x\nAnswer:"])[0]
    ids = encoder.continuation(before, text)
    cuts = [continued_text(tokenizer, before, ids[:count]) for count in range(len(ids) + 1)]
    assert cuts[-1] == text
    assert all(text.startswith(cut) for cut in cuts)
    assert cuts == sorted(cuts, key=len)


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_bytes_that_are_no_character_stay_visible(kind: str) -> None:
    tokenizer = TOKENIZERS[kind]()
    encoder = TextEncoder.of(tokenizer)
    before = encoder.batch(["x"])[0]
    emoji = encoder.continuation(before, "😀")
    assert continued_text(tokenizer, before, emoji[:2]) == ""
    assert continued_text(tokenizer, before, [*emoji[:2], *encoder.continuation(before, "a")]).endswith("a")
    assert "\ufffd" in continued_text(tokenizer, before, [*emoji[:2], *encoder.continuation(before, "a")])
