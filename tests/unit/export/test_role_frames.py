"""Chat templates as Go templates over `.Messages`: the text of transformers, character by character, or a reason."""

from __future__ import annotations

import random

import pytest

from tests.chat_habits import HABITS, rendered
from tests.tokenizers import byte_level
from yeonma.data.template import Template, load_template
from yeonma.export.go_template import GoTemplateError, execute, literal
from yeonma.export.role_frames import MessagesTemplate, messages_template, render_messages
from yeonma.tokenization.example import TokenRules
from yeonma.tokenization.text_encoder import TextEncoder

CUTS = "the chat template cuts blanks off the texts of turns"
TEXTS = (
    "x",
    "두 줄\n\n그리고",
    '"{{ .Content }}" {x}',
    "a  b\tc",
    "\u3000wide\u3000",
    " edges \n",
    "`$before`",
)
BY_PLACE = (
    "{% for m in messages %}{{ '[' + m.role + (' first' if loop.index0 < 3 else '') + ']' + m.content }}{% endfor %}"
    "{{ '[assistant]' }}"
)
SYSTEM_LAST = (
    "{% set s = messages[0].content if messages[0].role == 'system' else '' %}"
    "{% for m in messages %}{% if m.role != 'system' %}{{ '[' + m.role + ']' }}"
    "{% if loop.last %}{{ s }}{% endif %}{{ m.content }}{% endif %}{% endfor %}{{ '[assistant]' }}"
)
DATED = (
    "{{ 'Today is ' + strftime_now('%d %B %Y') + '.' }}{% for m in messages %}{{ '[' + m.role + ']' + m.content }}"
    "{% endfor %}{{ '[assistant]' }}"
)
TWICE = (
    "{% for m in messages %}{{ '[' + m.role + ']' + m.content + m.content }}{% endfor %}{{ '[assistant]' }}"
)
UPPER = "{% for m in messages %}{{ '[' + m.role + ']' + m.content|replace('{', '(') }}{% endfor %}{{ '[assistant]' }}"


def written(chat_template: str, template: Template | None = None) -> MessagesTemplate:
    encoder = TextEncoder.of(byte_level(chat_template))
    return messages_template(template or load_template("chat"), encoder, TokenRules(512), "")


@pytest.mark.parametrize("habit", HABITS, ids=[habit.name for habit in HABITS])
def test_template_writes_what_transformers_writes(habit: object) -> None:
    """Random conversations of contents that no trial has, by transformers without Yeonma."""
    assert isinstance(habit, type(HABITS[0]))
    encoder = TextEncoder.of(habit.tokenizer())
    made = messages_template(load_template("chat"), encoder, TokenRules(512), "")
    if made.text is None:
        assert made.why
        return
    draw = random.Random(1)
    for _ in range(20):
        turns = ("user", "assistant") * 3
        roles = ("system",) * (made.takes_system and draw.random() < 0.5) + turns[: draw.choice((1, 3, 5))]
        messages = [{"role": role, "content": draw.choice(TEXTS)} for role in roles]
        expected = rendered(habit, messages, add_generation_prompt=True)
        assert render_messages(made.text, messages) == expected


@pytest.mark.parametrize(
    ("chat_template", "why"),
    [
        (BY_PLACE, "the chat template writes something else before a turn, by its place"),
        (TWICE, "the chat template writes a turn twice"),
        (UPPER, "the chat template rewrites the texts of turns"),
        (
            "{% for m in messages %}{{ '[' + m.role + ']' + m.content|trim }}{% endfor %}{{ '[assistant]' }}",
            CUTS,
        ),
    ],
    ids=["by place", "twice", "rewritten", "trimmed"],
)
def test_reason_is_said_where_go_does_not_write_the_same(chat_template: str, why: str) -> None:
    made = written(chat_template)
    assert (made.text, made.why) == (None, why)


def test_system_message_that_moves_is_refused_and_the_rest_is_written() -> None:
    made = written(SYSTEM_LAST)
    assert made.text is not None
    assert not made.takes_system
    user = {"role": "user", "content": "x"}
    assert render_messages(made.text, [user]) == "[user]x[assistant]"
    with pytest.raises(GoTemplateError, match="not trained on a message of this role in this place"):
        render_messages(made.text, [{"role": "system", "content": "s"}, user])


def test_date_is_that_of_training() -> None:
    made = written(DATED)
    assert made.text is not None
    assert "Today is 26 July 2024." in made.text


def test_templates_own_system_turn_is_written() -> None:
    template = Template.parse("[system]\nBe brief.\n[turns]\n{messages}\n")
    made = written(
        "{% for m in messages %}{{ '[' + m.role + ']' + m.content }}{% endfor %}{{ '[assistant]' }}", template
    )
    assert made.text is not None
    assert (
        render_messages(made.text, [{"role": "user", "content": "x"}])
        == "[system]Be brief.[user]x[assistant]"
    )


def test_messages_that_training_does_not_have_are_refused() -> None:
    made = written(
        "{% for m in messages %}{{ '[' + m.role + ']' + m.content }}{% endfor %}{{ '[assistant]' }}"
    )
    assert made.text is not None
    user = {"role": "user", "content": "x"}
    for messages in (
        [user, {"role": "tool", "content": "1"}],
        [{"role": "system", "content": "s"}],
        [{**user, "content": ""}],
    ):
        with pytest.raises(GoTemplateError):
            render_messages(made.text, messages)
    empty = {"role": "system", "content": ""}
    assert render_messages(made.text, [empty, user]) == render_messages(made.text, [user])


@pytest.mark.parametrize(
    "text", ["{{ x }}", '"""', '"a', 'a""b', "\u3000{\u200b\x07}", "😀 `raw` \\n", "}}{"]
)
def test_literal_is_written_as_it_is(text: str) -> None:
    assert execute(literal(text), {}) == text
    assert '""' not in literal(text)


@pytest.mark.parametrize(
    "template", ["{{ end }}", "{{ if .A }}", "{{ printf .A }}", "{{ range .A }}x", "{{ }}"]
)
def test_template_outside_of_the_subset_is_an_error(template: str) -> None:
    with pytest.raises((GoTemplateError, KeyError)):
        execute(template, {"A": "x"})
