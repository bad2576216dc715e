"""A turn of which the chat template writes nothing is an error with its row, role and number."""

from __future__ import annotations

from typing import Any

import pytest

from tests.tokenizers import CHATML, byte_level
from yeonma.data.rows import Row
from yeonma.data.template import Template, load_template
from yeonma.errors import UserError
from yeonma.tokenization.example import TokenRules
from yeonma.tokenization.example_encoder import encode, encode_prompt

PASSES_OVER = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}"
    "{% elif m.role == 'assistant' %}{{ m.content + eos_token }}{% endif %}{% endfor %}"
)
MERGES = (
    "{% if messages[0].role == 'system' %}{% set ns = messages[0].content + ' / ' %}{% set rest = messages[1:] %}"
    "{% else %}{% set ns = '' %}{% set rest = messages %}{% endif %}"
    "{% for m in rest %}{% set text = (ns if loop.first else '') + m.content %}"
    "{{ '<' + m.role + '>' + (text if m.role == 'assistant' else text | upper) + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)
CHAT = load_template("chat")
RULES = TokenRules(cutoff_len=512)
USER, ANSWER = {"role": "user", "content": "Who is it?"}, {"role": "assistant", "content": "I."}


def problems(template: str, turns: list[dict[str, Any]], **columns: Any) -> list[str]:
    row = Row(7, {"messages": turns, **columns}, "rows.jsonl:7")
    tokenizer = byte_level(template)
    found = []
    for ask in (
        lambda: encode([CHAT.render(row)], [row], tokenizer, RULES),
        lambda: encode_prompt(CHAT.render(row, with_answer=False), row, tokenizer, RULES, 8),
    ):
        try:
            ask()
        except UserError as error:
            found.append([str(problem) for problem in error.problems])
    assert len(found) in (0, 2)  # as in training, so in generation
    assert not found or found[0] == found[1]
    return found[0] if found else []


@pytest.mark.parametrize(
    ("role", "name"),
    [
        ("system", "system or developer"),
        ("developer", "system or developer"),
        ("tool", "tool or function"),
        ("function", "tool or function"),
    ],
)
def test_a_role_that_the_template_passes_over_is_an_error(role: str, name: str) -> None:
    turns = [{"role": role, "content": "Answer like a pirate."}, USER, ANSWER]
    if name.startswith("tool"):
        turns = [USER, {"role": role, "content": "42"}, ANSWER]
    (problem,) = problems(PASSES_OVER, turns)
    number = 2 if name.startswith("tool") else 1
    assert (
        f"rows.jsonl:7: the model's chat template writes nothing of the {name} turn, turn {number};"
        in problem
    )
    assert problems(CHATML, turns) == []


def test_a_text_that_stands_elsewhere_too_does_not_hide_a_lost_turn() -> None:
    turns = [{"role": "system", "content": "Who"}, USER, ANSWER]
    assert len(problems(PASSES_OVER, turns)) == 1
    assert problems(CHATML, turns) == []


def test_every_lost_turn_is_named() -> None:
    turns = [{"role": "system", "content": "Be kind."}, USER, {"role": "tool", "content": "42"}, ANSWER]
    assert len(problems(PASSES_OVER, turns)) == 2


def test_a_system_column_that_leaves_no_token_is_an_error() -> None:
    assert "system" in problems(PASSES_OVER, [USER, ANSWER], system="Be kind.")[0]
    assert problems(CHATML, [USER, ANSWER], system="Be kind.") == []


def test_text_that_the_template_merges_or_changes_is_fine() -> None:
    turns = [{"role": "system", "content": "Be kind."}, USER, ANSWER]
    assert problems(MERGES, turns) == []
    assert len(problems(MERGES, [USER, ANSWER, {"role": "tool", "content": "x"}, ANSWER])) == 0


def test_a_system_part_of_a_template_that_leaves_no_token_is_an_error() -> None:
    template = Template.parse("[system]\nBe kind to {name}.\n[user]\n{q}\n[assistant]\n{a}\n")
    row = Row(3, {"name": "Ann", "q": "Hi?", "a": "Yes."}, "rows.jsonl:3")
    with pytest.raises(UserError, match=r"rows.jsonl:3: .*nothing of the system or developer turn, turn 1"):
        encode([template.render(row)], [row], byte_level(PASSES_OVER), RULES)
    encode([template.render(row)], [row], byte_level(), RULES)
