"""Templates with turns of several kinds: `[turns]` beside other turns, answers of several fields, side columns."""

from __future__ import annotations

from typing import Any

import pytest

from yeonma.data.columns import SIDE_COLUMNS
from yeonma.data.rows import Row, Rows
from yeonma.data.task import ANSWERS, choose_template, columns_used
from yeonma.data.template import Template, load_template
from yeonma.errors import UserError

ASK, REPLY = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}


def row(**values: Any) -> Row:
    return Row(1, values, "data:1")


def rows(*values: dict[str, Any]) -> Rows:
    columns = tuple(dict.fromkeys(name for value in values for name in value))
    listed = [Row(number, value, f"data:{number}") for number, value in enumerate(values, start=1)]
    return Rows("data", "", columns, lambda: iter(listed))


def turns_of(template: Template, values: Row, **options: Any) -> list[tuple[str | None, str]]:
    return [(turn.role, turn.text) for turn in template.render(values, **options).turns]


def choice_of(*values: dict[str, Any]) -> Any:
    return choose_template(ANSWERS, None, rows(*values), None)


def test_system_text_above_a_turn_list_is_its_first_turn() -> None:
    template = Template.parse("[system]\nBe kind to {name}.\n[turns]\n{messages}\n")
    assert turns_of(template, row(name="Kim", messages=[ASK, REPLY])) == [
        ("system", "Be kind to Kim."),
        ("user", "q"),
        ("assistant", "a"),
    ]
    rendered = template.render(row(name="Kim", messages=[ASK, REPLY]))
    assert rendered.first_answer == 1 and template.is_chat
    assert turns_of(template, row(name="Kim", messages=[ASK]), with_answer=False)[-1] == ("user", "q")


def test_history_before_the_question_is_prompt_and_may_be_missing() -> None:
    template = load_template("alpaca-turns")
    values = {"instruction": "Sort.", "input": "b a", "output": "a b"}
    asked, answered = ("user", "Sort.\nb a"), template.render(row(**values)).answer
    assert turns_of(template, row(**values)) == [asked]
    assert [piece.text for piece in answered] == ["a b"]
    history = [["one?", "1"], ["two?", "2"]]
    assert turns_of(template, row(**values, history=history, system="Be brief.")) == [
        ("system", "Be brief."),
        ("user", "one?"),
        ("assistant", "1"),
        ("user", "two?"),
        ("assistant", "2"),
        asked,
    ]
    for empty in (None, [], ""):
        assert turns_of(template, row(**values, history=empty)) == [asked]


@pytest.mark.parametrize("completion", [[REPLY], REPLY, "a", '[{"role": "assistant", "content": "a"}]'])
@pytest.mark.parametrize("prompt", [[ASK], "q"])
def test_prompt_and_completion_may_be_turns_or_text(prompt: Any, completion: Any) -> None:
    template = load_template("prompt-completion-turns")
    rendered = template.render(row(prompt=prompt, completion=completion))
    assert [(turn.role, turn.text) for turn in rendered.turns] == [("user", "q"), ("assistant", "a")]
    assert rendered.first_answer == 1
    asked = template.render(row(prompt=prompt), with_answer=False)
    assert [(turn.role, turn.text) for turn in asked.turns] == [("user", "q")]


def test_answers_of_the_prompt_are_not_answers_of_the_row() -> None:
    template = load_template("prompt-completion-turns")
    rendered = template.render(row(prompt=[ASK, REPLY, ASK], completion=[REPLY, ASK, REPLY]))
    assert rendered.first_answer == 3 and len(rendered.turns) == 6


@pytest.mark.parametrize(
    ("text", "prompt", "answer"),
    [
        ("[user]\n{q}\n[assistant]\n<think>\n{r}\n</think>\n{a}\n", "Q", "<think>\nR\n</think>\nA"),
        (
            "### Q\n{q}\n### A\n[answer]\n<think>\n{r}\n</think>\n{a}\n",
            "### Q\nQ\n### A\n",
            "<think>\nR\n</think>\nA",
        ),
    ],
)
def test_answer_may_have_several_fields(text: str, prompt: str, answer: str) -> None:
    template = Template.parse(text)
    assert template.answer_field == "a"
    rendered = template.render(row(q="Q", r="R", a="A"))
    assert "".join(piece.text for piece in rendered.prompt_pieces) == prompt
    assert "".join(piece.text for piece in rendered.answer) == answer
    assert template.render(row(q="Q"), with_answer=False).turns == rendered.turns
    with pytest.raises(UserError, match='data:1: field "r" is missing'):
        template.render(row(q="Q", a="A"))
    with pytest.raises(UserError, match="which is the answer"):
        Template.parse(text.replace("{q}", "{q} {r}"))


def test_side_columns_are_read_where_a_turn_list_has_no_place_for_them() -> None:
    assert load_template("chat").side_columns == SIDE_COLUMNS
    with_system = Template.parse("[system]\n{system}\n[turns]\n{messages}\n")
    assert "system" not in with_system.side_columns and "tools" in with_system.side_columns
    assert load_template("title").side_columns == ()
    assert "tools" in columns_used(ANSWERS, load_template("chat"), None)


def test_tools_may_be_json_text_and_get_their_openai_form() -> None:
    bare = {"name": "w", "parameters": {"type": "object"}}
    expected = ({"type": "function", "function": bare},)
    for tools in (
        [bare],
        [{"type": "function", "function": bare}],
        '[{"name": "w", "parameters": {"type": "object"}}]',
    ):
        assert load_template("chat").render(row(messages=[ASK, REPLY], tools=tools)).tools == expected
    for tools in (None, [], "", "[]"):
        assert load_template("chat").render(row(messages=[ASK, REPLY], tools=tools)).tools == ()
    for faulty in ("call me", [3], [{"parameters": {}}], 7):
        with pytest.raises(UserError, match=r"data:1: .*tools"):
            load_template("chat").render(row(messages=[ASK, REPLY], tools=faulty))


@pytest.mark.parametrize(
    ("values", "template"),
    [
        ({"instruction": "i", "output": "o", "system": "s"}, "alpaca-turns"),
        ({"instruction": "i", "output": "o", "system": ""}, "alpaca"),
        ({"instruction": "i", "output": "o", "history": []}, "alpaca"),
        ({"prompt": "p", "completion": "c", "system": "s"}, "prompt-completion-turns"),
        ({"prompt": [ASK], "completion": [REPLY]}, "prompt-completion-turns"),
        ({"prompt": "p", "completion": "c"}, "prompt-completion"),
        ({"messages": [ASK, REPLY], "system": "s", "tools": []}, "chat"),
        ({"question": "q", "response": "r", "system_prompt": "s"}, "orca"),
    ],
)
def test_columns_that_belong_to_the_prompt_choose_a_template_that_has_them(
    values: dict[str, Any], template: str
) -> None:
    assert choice_of(values).template.name == template


def test_column_that_usually_belongs_to_the_prompt_is_not_passed_over() -> None:
    with pytest.raises(
        UserError, match=r"does not use the column context, which usually belongs to the prompt"
    ):
        choice_of({"question": "q", "response": "r", "context": "c"})
    choice = choose_template(ANSWERS, "orca", rows({"question": "q", "response": "r", "context": "c"}), None)
    assert choice.notes == ["columns not used: context"]
    assert choice_of({"question": "q", "response": "r", "context": ""}).template.name == "orca"


def test_unused_columns_are_named() -> None:
    choice = choice_of({"id": 1, "document": "d", "title": "t", "press": "p"})
    assert choice.notes[-1] == "columns not used: id, press"
    assert choice_of({"document": "d", "title": "t"}).notes == [choice.reason]


def test_completion_beside_a_turn_list_of_the_prompt_is_not_lost() -> None:
    data = rows({"prompt": [ASK, REPLY, ASK], "completion": [REPLY]})
    with pytest.raises(UserError, match='"completion" would be lost; use --template prompt-completion-turns'):
        choose_template(ANSWERS, "chat", data, {"messages": "prompt"})


@pytest.mark.parametrize("name", ["chat", "alpaca-turns", "prompt-completion-turns"])
def test_conversation_becomes_the_row_that_has_it_as_its_prompt(name: str) -> None:
    template = load_template(name)
    conversation = [{"role": "system", "content": "s"}, ASK, REPLY, {"role": "user", "content": "again"}]
    for turns in (conversation, conversation[1:], conversation[-1:]):
        asked = template.render(row(**template.row_of_turns(turns)), with_answer=False)
        assert [(turn.role, turn.text) for turn in asked.turns] == [(t["role"], t["content"]) for t in turns]


def test_only_templates_without_text_of_their_own_take_conversations() -> None:
    assert not load_template("alpaca").takes_turns
    assert not Template.parse("[turns]\n{h}\n[user]\nTitle for {d}\n[assistant]\n{t}\n").takes_turns
    assert Template.parse("[system]\nBe kind.\n[turns]\n{messages}\n").takes_turns


@pytest.mark.parametrize(
    ("turn", "message"),
    [
        (
            {**ASK, "reasoning_content": "r"},
            "messages[0].reasoning_content: only an assistant turn has reasoning",
        ),
        ({**REPLY, "reasoning_content": "r", "thinking": "s"}, "messages[0] has different texts in"),
        ({**REPLY, "weight": 2}, "messages[0].weight is a number (2), not a weight"),
        ({**REPLY, "weight": 0, "train": True}, "messages[0] has different weights in weight and train"),
        ({**ASK, "train": True}, "messages[0].train: a user turn cannot be trained"),
        (
            {**ASK, "tool_calls": [{"name": "w"}]},
            "messages[0].tool_calls: only an assistant turn calls tools",
        ),
        (
            {"role": "assistant", "tool_calls": [{"name": "w", "arguments": "x"}]},
            "messages[0].tool_calls[0]: the arguments",
        ),
        ({"from": "function_call", "value": "x"}, "messages[0].value is not a tool call in JSON"),
    ],
)
def test_faulty_keys_of_a_turn_are_errors_with_their_place(turn: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as raised:
        load_template("chat").render(row(messages=[turn, ASK, REPLY]))
    assert str(raised.value).startswith(f"data:1: {message}")


def test_a_built_in_template_does_not_pass_over_images() -> None:
    values = {"messages": [ASK, REPLY], "images": ["a.png"]}
    with pytest.raises(UserError, match="does not use the column images") as error:
        choice_of(values)
    assert "Yeonma trains on text alone: leave out rows that need more; or give --template chat" in str(
        error.value
    )
    assert choose_template(ANSWERS, "chat", rows(values), None).unused == ("images",)
    assert choice_of({**values, "images": []}).template.name == "chat"
