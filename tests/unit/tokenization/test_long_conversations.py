"""Conversations over `cutoff_len` lose whole old exchanges before a turn is shortened or the row is left out."""

from __future__ import annotations

from typing import Any

import pytest

from tests.tokenizers import byte_level
from yeonma.data.preference_pairs import render_pairs
from yeonma.data.rows import Row
from yeonma.data.template import load_template
from yeonma.tokenization.example import Example, LeftOut, TokenRules, Unit
from yeonma.tokenization.example_encoder import encode, encode_prompt
from yeonma.tokenization.preference_encoder import encode_pairs

CHAT = load_template("chat")
TOKENIZER = byte_level()
SYSTEM = {"role": "system", "content": "Be brief."}


def exchange(number: int) -> list[dict[str, Any]]:
    return [
        {"role": "user", "content": f"What comes after {number}?"},
        {"role": "assistant", "content": f"{number + 1}."},
    ]


def turns_of(first: int, last: int) -> list[dict[str, Any]]:
    return [SYSTEM, *(turn for number in range(first, last) for turn in exchange(number))]


def encoded(turns: list[dict[str, Any]], cutoff_len: int, **rules: Any) -> Example | LeftOut:
    row = Row(1, {"messages": turns}, "data:1")
    (result,) = encode([CHAT.render(row)], [row], TOKENIZER, TokenRules(cutoff_len, **rules))
    return result


@pytest.mark.parametrize("kept", [1, 2, 7, 19])
def test_long_conversation_is_the_conversation_of_its_last_exchanges(kept: int) -> None:
    expected = encoded(turns_of(20 - kept, 20), 10_000)
    assert isinstance(expected, Example)
    for room in (0, 5):  # a limit that the kept exchanges just reach, and one that no further exchange fits
        result = encoded(turns_of(0, 20), len(expected.token_ids) + room)
        assert isinstance(result, Example)
        assert result.token_ids.tolist() == expected.token_ids.tolist()
        assert result.trained.tolist() == expected.trained.tolist()
        assert result.dropped_turns == 2 * (20 - kept)
        assert result.cut_characters == 0


def test_conversation_that_fits_keeps_every_turn() -> None:
    whole = encoded(turns_of(0, 20), 10_000)
    assert isinstance(whole, Example)
    assert whole.dropped_turns == 0
    exact = encoded(turns_of(0, 20), len(whole.token_ids))
    assert isinstance(exact, Example)
    assert exact.token_ids.tolist() == whole.token_ids.tolist()


def test_last_exchange_is_shortened_when_it_is_too_long_alone() -> None:
    turns = [
        *turns_of(0, 5),
        {"role": "user", "content": "word " * 100},
        {"role": "assistant", "content": "ok"},
    ]
    result = encoded(turns, 60)
    assert isinstance(result, Example)
    assert result.dropped_turns == 10 and result.cut_characters > 0
    text = TOKENIZER.decode(result.token_ids)
    assert "Be brief." in text and "What comes" not in text and "word word" in text
    left_out = encoded([*turns[:-1], {"role": "assistant", "content": "ok " * 100}], 60)
    assert isinstance(left_out, LeftOut)


def test_long_turn_loses_text_before_an_exchange_is_dropped() -> None:
    question = {"role": "user", "content": "word " * 60}
    turns = [question, {"role": "assistant", "content": "ok"}, *exchange(1)]
    whole = encoded(turns, 10_000)
    assert isinstance(whole, Example)
    a_little, much = encoded(turns, len(whole.token_ids) - 10), encoded(turns, len(whole.token_ids) - 110)
    assert isinstance(a_little, Example) and isinstance(much, Example)
    assert (a_little.dropped_turns, a_little.cut_characters > 0) == (0, True)
    assert (much.dropped_turns, much.cut_characters) == (2, 0)
    last = encoded([SYSTEM, *exchange(1)][1:], 10_000)
    assert isinstance(last, Example)
    assert much.token_ids.tolist() == last.token_ids.tolist()


def test_generation_drops_the_same_exchanges() -> None:
    turns = turns_of(0, 20)
    trained = encoded(turns, 100)
    assert isinstance(trained, Example) and trained.dropped_turns
    row = Row(1, {"messages": turns[:-1]}, "data:1")
    answer = len(trained.token_ids) - trained.prompt_length
    rules = TokenRules(100)
    asked = encode_prompt(CHAT.render(row, with_answer=False), row, TOKENIZER, rules, answer)
    assert asked.tolist() == trained.token_ids[: trained.prompt_length].tolist()


def test_pairs_lose_the_same_exchanges_on_both_sides() -> None:
    chosen, rejected = {"role": "assistant", "content": "yes"}, {"role": "assistant", "content": "no no"}
    prompt = [*turns_of(0, 20), {"role": "user", "content": "Sure?"}]
    short = [*turns_of(17, 20), {"role": "user", "content": "Sure?"}]

    def unit(prompt: list[dict[str, Any]], cutoff_len: int) -> Unit | LeftOut:
        row = Row(1, {"messages": prompt, "chosen": [chosen], "rejected": [rejected]}, "data:1")
        (result,) = encode_pairs([render_pairs(CHAT, row)], [row], TOKENIZER, TokenRules(cutoff_len))
        return result

    expected = unit(short, 10_000)
    assert isinstance(expected, Unit)
    longest = max(len(example.token_ids) for _, example in expected.members)
    result = unit(prompt, longest)
    assert isinstance(result, Unit)
    for (_, example), (_, wanted) in zip(result.members, expected.members, strict=True):
        assert example.token_ids.tolist() == wanted.token_ids.tolist()
        assert example.dropped_turns == 34


def test_only_answers_that_stay_are_trained() -> None:
    result = encoded(turns_of(0, 20), 100)
    assert isinstance(result, Example)
    text = TOKENIZER.decode(result.token_ids[result.trained])
    assert text.endswith("20.<|im_end|>") and not text.startswith("1.<|im_end|>")
    last_only = encoded(turns_of(0, 20), 100, train_on="last")
    assert isinstance(last_only, Example)
    assert TOKENIZER.decode(last_only.token_ids[last_only.trained]) == "20.<|im_end|>"
