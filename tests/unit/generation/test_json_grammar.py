"""Answers that follow a JSON schema: whatever the model prefers, any allowed path is JSON of the schema."""

from __future__ import annotations

import json
import sys
from typing import Any

import numpy as np
import pytest

from tests.runs import characters
from tests.tokenizers import byte_level, sentencepiece_bpe, unigram
from yeonma.errors import UserError
from yeonma.generation.json_grammar import MAX_REASON, JsonMask, JsonVocabulary

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 5},
        "number": {"type": "integer", "maximum": 9999},
        "kind": {"enum": ["x", "y z"]},
    },
    "required": ["name", "number", "kind"],
    "additionalProperties": False,
}
TOKENIZERS = pytest.mark.parametrize(
    "tokenizer",
    [byte_level(), sentencepiece_bpe(), characters()],
    ids=["byte level", "fallback", "characters"],
)


def random_path(mask: JsonMask, seed: int) -> list[int]:
    """The tokens of an answer, each drawn from those that are allowed."""
    rng, ids = np.random.default_rng(seed), list[int]()
    while not mask.is_over:
        allowed = mask.allowed()
        assert allowed is not None
        ids.append(int(rng.choice(np.flatnonzero(allowed))))
        mask.accept(ids[-1])
    assert not mask.has_failed
    return ids


def text_of(vocabulary: JsonVocabulary, ids: list[int]) -> str:
    return b"".join(vocabulary.token_bytes[token_id] for token_id in ids).decode()


@TOKENIZERS
def test_any_allowed_path_is_json_of_the_schema(tokenizer: Any) -> None:
    vocabulary = JsonVocabulary.of(tokenizer, [tokenizer.eos_token_id])
    grammar = vocabulary.grammar(SCHEMA)
    for seed in range(6):
        ids = random_path(grammar.mask(), seed)
        value = json.loads(text_of(vocabulary, ids))
        assert list(value) == ["name", "number", "kind"]
        assert len(value["name"]) <= 5 and isinstance(value["number"], int) and value["kind"] in ("x", "y z")
        assert tokenizer.eos_token_id not in ids


def test_the_end_token_is_allowed_only_where_the_json_may_end() -> None:
    tokenizer = characters()
    vocabulary = JsonVocabulary.of(tokenizer, [1, tokenizer.eos_token_id])
    mask = vocabulary.grammar({"type": "integer"}).mask()
    first = mask.allowed()
    assert first is not None and not first[[1, tokenizer.eos_token_id]].any()
    mask.accept(tokenizer.convert_tokens_to_ids("4"))
    second = mask.allowed()
    assert second is not None and second[[1, tokenizer.eos_token_id]].all()
    assert second[tokenizer.convert_tokens_to_ids("2")]
    mask.accept(tokenizer.eos_token_id)
    assert mask.is_over and not mask.has_failed


def test_the_schema_holds_from_the_end_of_reasoning_on() -> None:
    tokenizer = characters()
    vocabulary = JsonVocabulary.of(tokenizer, [tokenizer.eos_token_id])
    mask = vocabulary.grammar({"const": 7}).mask(after="!!")
    for char in "any text!":
        assert mask.allowed() is None and not mask.is_over
        mask.accept(tokenizer.convert_tokens_to_ids(char))
    mask.accept(tokenizer.convert_tokens_to_ids("!"))
    assert text_of(vocabulary, random_path(mask, 0)).strip() == "7"


def test_a_schema_that_cannot_be_followed_gets_the_librarys_reason() -> None:
    vocabulary = JsonVocabulary.of(characters(), [2])
    with pytest.raises(UserError, match=r"cannot be followed: Invalid type: strin; change the schema"):
        vocabulary.grammar({"type": "strin"})
    with pytest.raises(UserError) as caught:
        vocabulary.grammar({"type": "string", "pattern": "(?<=" + "a" * 1000 + ")b"})
    assert len(str(caught.value)) < MAX_REASON + 100
    deep: dict[str, Any] = {}
    for _ in range(2000):
        deep = {"items": deep}
    with pytest.raises(UserError, match="cannot be followed"):
        vocabulary.grammar(deep)


def test_a_vocabulary_without_the_characters_of_json_is_refused() -> None:
    with pytest.raises(UserError, match=r'it has no token for .*"'):
        JsonVocabulary.of(unigram(), [1])


def test_a_missing_package_is_named_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(UserError, match=r'pip install "llguidance==\d+\.\d+\.\d+"'):
        JsonVocabulary.of(characters(), [2])
