"""Token ids decode to the text: answers beside tokens that take blanks along, and rows that a tokenizer changes."""

from __future__ import annotations

from typing import Any

import pytest
from tokenizers import AddedToken, normalizers

from tests.tokenizers import CHATML, byte_level, sentencepiece_bpe, unigram
from yeonma.data.rows import Row
from yeonma.data.template import load_template
from yeonma.data.text_checks import NOT_GIVEN_BACK
from yeonma.tokenization.example import Example, TokenRules
from yeonma.tokenization.example_encoder import encode
from yeonma.tokenization.round_trip import losses_of
from yeonma.tokenization.text_encoder import TextEncoder

CODE = "    if y:\n        z()\n"
RULES = TokenRules(cutoff_len=512)


def with_tokens(**options: bool) -> Any:
    """A tokenizer whose marks of turns take blanks along, as those of Phi-3 do."""
    tokenizer = byte_level(
        "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
    )
    marks = [
        AddedToken(name, special=True, normalized=False, **options)
        for name in ("<|user|>", "<|assistant|>", "<|end|>")
    ]
    tokenizer.add_tokens(marks)
    return tokenizer


def normalising(normalizer: normalizers.Normalizer) -> Any:
    tokenizer = byte_level()
    tokenizer.backend_tokenizer.normalizer = normalizer
    return tokenizer


def examples(tokenizer: Any, *turns: str) -> list[Example]:
    roles = ("user", "assistant") * len(turns)
    messages = [{"role": role, "content": text} for role, text in zip(roles, turns, strict=False)]
    row = Row(1, {"messages": messages}, "data:1")
    found = encode([load_template("chat").render(row)], [row], tokenizer, RULES)
    return [example for example in found if isinstance(example, Example)]


def trained(tokenizer: Any, example: Example) -> str:
    return TextEncoder.of(tokenizer).decode(example.token_ids[example.prompt_length :].tolist())


@pytest.mark.parametrize("options", [{"rstrip": True}, {"lstrip": True}, {"lstrip": True, "rstrip": True}])
def test_an_answer_keeps_the_blanks_that_a_mark_beside_it_would_take(options: dict[str, bool]) -> None:
    tokenizer = with_tokens(**options)
    (example,) = examples(tokenizer, "q", CODE)
    assert trained(tokenizer, example).startswith(CODE + "<|end|>")
    assert not example.flags & NOT_GIVEN_BACK
    first, last = examples(tokenizer, "q", CODE, "again", "  two  ")
    assert trained(tokenizer, first).startswith(CODE + "<|end|>")
    assert trained(tokenizer, last).startswith("  two  <|end|>")


def test_other_answers_have_the_ids_of_the_tokenizer() -> None:
    tokenizer = with_tokens(rstrip=True)
    (example,) = examples(tokenizer, "q", "plain")
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "q"}, {"role": "assistant", "content": "plain"}], tokenize=False
    )
    assert example.token_ids.tolist() == tokenizer(text, add_special_tokens=False)["input_ids"]
    assert example.flags == 0


def test_blanks_of_a_question_that_a_mark_takes_are_noticed() -> None:
    assert examples(with_tokens(rstrip=True), "   q", "plain")[0].flags == NOT_GIVEN_BACK
    assert examples(byte_level(), "   q", "plain")[0].flags == 0


@pytest.mark.parametrize(
    ("normalizer", "changed", "same"),
    [
        (normalizers.Lowercase(), "Hello", "hello"),
        (normalizers.NFKC(), "① ﬁn", "1 fin 가"),
        (normalizers.NFC(), "\u1112\u1161\u11ab", "한 é"),
        (normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents()]), "é", "e"),
        (normalizers.Strip(), "x", "x"),
        (normalizers.Replace("\t", "    "), "a\tb", "a b"),
    ],
)
def test_a_normaliser_is_noticed_in_the_rows_that_it_changes(
    normalizer: normalizers.Normalizer, changed: str, same: str
) -> None:
    tokenizer = normalising(normalizer)
    for turns in (("q", changed), (changed, "a")):
        if changed != same:
            assert examples(tokenizer, *turns)[0].flags == NOT_GIVEN_BACK
    assert examples(tokenizer, "q", same)[0].flags == 0


def test_a_character_that_the_vocabulary_lacks_is_noticed() -> None:
    assert examples(unigram(CHATML), "town", "☃ x")[0].flags == NOT_GIVEN_BACK
    assert examples(unigram(CHATML), "town", "the town")[0].flags == 0


@pytest.mark.parametrize("tokenizer", [byte_level(), sentencepiece_bpe()])
def test_rows_of_a_tokenizer_that_keeps_all_text_are_not_decoded(tokenizer: Any) -> None:
    losses = losses_of(TextEncoder.of(tokenizer))
    assert not losses.may_change("Any text,\n\n  한글 é ﬁ 😀\r\n")
