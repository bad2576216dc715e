"""Data formats: the template that fits the columns, turn lists, and the text of a field."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from yeonma.data.columns import column_of, field_text, recognise
from yeonma.data.rows import Row
from yeonma.data.turns import ROLES, Turn, turns_of
from yeonma.errors import UserError


def row(**values: object) -> Row:
    return Row(41, values, "train.jsonl:41")


def field_error(value: object) -> str:
    with pytest.raises(UserError) as caught:
        field_text(row(title=value), "title")
    return str(caught.value)


def turns_error(*turns: object) -> str:
    with pytest.raises(UserError) as caught:
        turns_of(row(messages=list(turns)), "messages")
    return str(caught.value)


# Template recognition


@pytest.mark.parametrize(
    ("columns", "template", "named"),
    [
        ("date category press title document link", "title", "title, document"),
        ("instruction input output", "alpaca", "instruction, input, output"),
        ("output instruction", "alpaca", "output, instruction"),
        ("id system_prompt question response", "orca", "system_prompt, question, response"),
        ("question response", "orca", "question, response"),
        ("prompt prompt_id messages", "chat", "messages"),
        ("id conversations", "chat", "conversations"),
        ("prompt completion", "prompt-completion", "prompt, completion"),
        ("instruction output system", "alpaca-turns", "instruction, output, system"),
        ("history instruction input output", "alpaca-turns", "instruction, input, output, history"),
        ("system_prompt prompt completion", "prompt-completion-turns", "prompt, completion, system_prompt"),
        ("prompt completion tools", "prompt-completion-turns", "prompt, completion, tools"),
        ("text", "text", "text"),
        ("id text url", "text", "text"),
    ],
)
def test_the_columns_choose_the_template(columns: str, template: str, named: str) -> None:
    recognised = recognise(columns.split())
    assert recognised.template == template
    assert recognised.reason == f"template {template}, because the columns are {named}"


def test_every_built_in_template_can_be_recognised() -> None:
    folder = Path(__file__).parents[3] / "yeonma" / "data" / "templates"
    recognised = {
        recognise(columns.split()).template
        for columns in (
            "document title",
            "instruction output",
            "question response",
            "messages",
            "prompt completion",
            "instruction output history",
            "prompt completion system",
            "text",
        )
    }
    assert recognised == {path.stem for path in folder.glob("*.txt")}


def test_unrecognised_columns_error_lists_the_columns_of_each_template() -> None:
    with pytest.raises(UserError) as caught:
        recognise(["id", "body"])
    message = str(caught.value)
    assert message.startswith("--template: the columns (id, body) fit no built-in template; ")
    for words in (
        "--template",
        "--columns",
        "title needs document, title",
        "chat needs messages or conversations",
    ):
        assert words in message


def test_columns_that_fit_but_for_capitals_get_a_cure_that_works() -> None:
    with pytest.raises(UserError, match=r"give --columns '\{instruction: Instruction, output: OUTPUT\}'"):
        recognise(["Instruction", "OUTPUT"])
    assert (
        recognise(["Instruction", "OUTPUT"], {"instruction": "Instruction", "output": "OUTPUT"}).template
        == "alpaca"
    )


def test_columns_that_fit_several_templates_list_the_candidates() -> None:
    with pytest.raises(UserError) as caught:
        recognise(["messages", "prompt", "completion"])
    assert str(caught.value) == (
        "--template: the columns (messages, prompt, completion) fit several templates: chat, prompt-completion; "
        "choose one of them"
    )


def test_renamed_columns_are_recognised_as_their_fields() -> None:
    recognised = recognise(["id", "body", "headline"], {"document": "body", "answer": "headline"})
    assert recognised.template == "title"
    assert recognised.reason == (
        "template title, because the columns are body (as document), headline (as title)"
    )
    assert recognise(["dialogue"], {"conversations": "dialogue"}).template == "chat"


def test_field_is_taken_from_its_renamed_column_which_must_exist() -> None:
    columns = ["messages", "prompt", "completion", "other"]
    assert recognise([*columns[1:]], {"prompt": "other"}).template == "prompt-completion"
    with pytest.raises(
        UserError, match=r'--columns: the data has no column "promt"; did you mean "prompt"\?'
    ):
        recognise(columns, {"document": "promt"})


def test_column_of_a_field_follows_the_columns_setting() -> None:
    setting = {"document": "body", "answer": "headline"}
    assert column_of("document", setting, "title") == "body"
    assert column_of("title", setting, "title") == "headline"
    assert column_of("date", setting, "title") == "date"
    assert column_of("title", None, "title") == "title"
    assert column_of("title", {**setting, "title": "name"}, "title") == "name"


# Texts


@pytest.mark.parametrize("text", ["a", " a\n", "{title}", "가", "\ufeff", "\u200b", "😀"])
def test_field_text_is_returned_unchanged(text: str) -> None:
    assert field_text(row(title=text), "title") == text


@pytest.mark.parametrize("value", [None, "", " ", "\n\t\u3000"])
def test_blank_text_is_none(value: object) -> None:
    assert field_text(row(title=value), "title") is None
    assert field_text(row(other="x"), "title") is None


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (
            ["a"],
            'a list, not text; map the field to "title[0]" or "json(title)" with --columns, in these quotes',
        ),
        ([["a"]], 'a list, not text; map the field to "json(title)" with --columns, in these quotes'),
        (
            {"id": ["a", "b"], "one": ["a"], "two": "b"},
            'an object, not text; map the field to "title.one" or "json(title)" with --columns, in these quotes',
        ),
        ([], "an empty list; fill it or remove the row"),
        (math.nan, "a number (nan), not text; fill it or remove the row"),
        (-math.inf, "a number (-inf), not text; fill it or remove the row"),
        (b"a", "a bytes, not text; a template's field takes text"),
    ],
)
def test_non_text_field_is_an_error_with_a_cure(value: object, kind: str) -> None:
    assert field_error(value) == f'train.jsonl:41: field "title" is {kind}'


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (-12, "-12"),
        (10**30, "1" + "0" * 30),
        (0.1, "0.1"),
        (1.0, "1.0"),
        (1e16, "1e+16"),
        (np.float64(2.5), "2.5"),
        (True, "true"),
        (False, "false"),
    ],
)
def test_numbers_and_booleans_are_written_as_text(value: object, text: str) -> None:
    assert field_text(row(title=value), "title") == text


@pytest.mark.parametrize(
    "number", ["1", "1.0", "0.10", "-0.0", "1e2", "12345678901234567890", "true", "null"]
)
def test_a_number_of_a_json_file_is_the_number_again_when_its_text_is_read(number: str) -> None:
    value = json.loads(number)
    text = field_text(row(title=value), "title")
    assert repr(json.loads(text or "null")) == repr(value)


def test_turn_list_in_a_text_field_suggests_the_chat_template() -> None:
    assert "turn lists need --template chat" in field_error([{"role": "user", "content": "q"}])


def test_a_lone_surrogate_and_a_nul_are_errors() -> None:
    assert "the lone surrogate U+D83D, after 2 characters" in field_error("가나\ud83d")
    assert "a NUL character (U+0000) after 1 character" in field_error("가\0")


# Turn lists

TURNS = (Turn("system", "Be kind."), Turn("user", "안녕?"), Turn("assistant", " 네. "), Turn("tool", ""))


def test_messages_and_sharegpt_give_the_same_turns() -> None:
    messages = [{"role": turn.role, "content": turn.text, "name": None, "tool_calls": None} for turn in TURNS]
    names = {"system": "system", "user": "human", "assistant": "gpt", "tool": "observation"}
    sharegpt = [{"from": names[turn.role], "value": turn.text} for turn in TURNS]
    assert turns_of(row(messages=messages), "messages") == TURNS
    assert turns_of(row(conversations=sharegpt), "conversations") == TURNS


@pytest.mark.parametrize(
    ("names", "role"),
    [
        ("user human", "user"),
        ("assistant gpt chatgpt bing bard model", "assistant"),
        ("system developer", "system"),
        ("tool function observation", "tool"),
    ],
)
def test_role_names_are_mapped_to_roles(names: str, role: str) -> None:
    for name in names.split():
        assert turns_of(row(c=[{"from": name, "value": "x"}]), "c") == (Turn(ROLES[name], "x"),)
        assert ROLES[name] == role


def test_text_parts_are_joined() -> None:
    parts = [{"type": "text", "text": "가"}, {"type": "text", "text": "나"}]
    assert turns_of(row(m=[{"role": "user", "content": parts}]), "m") == (Turn("user", "가나"),)


def test_a_blank_system_turn_is_left_out() -> None:
    turns = [{"from": "system", "value": " "}, {"from": "human", "value": "q"}]
    assert turns_of(row(c=turns), "c") == (Turn("user", "q"),)


USER = {"role": "user", "content": "q"}


@pytest.mark.parametrize(
    ("turn", "message"),
    [
        ({"role": "asistant"}, 'messages[2].role: unknown role "asistant"; did you mean "assistant"?'),
        ({"role": "zzz", "content": "a"}, 'messages[2].role: unknown role "zzz"; roles are system, developer'),
        ({"from": 3, "value": "a"}, "messages[2].from: unknown role a number (3)"),
        ({"content": "a"}, "messages[2].role is missing"),
        ({"role": "assistant"}, "messages[2].content is missing"),
        ({"from": "gpt", "value": None}, "messages[2].value is missing"),
        ({"role": "assistant", "content": " \n"}, "messages[2].content is empty"),
        ({"role": "user", "content": ""}, "messages[2].content is empty"),
        ({"role": "assistant", "content": 3}, "messages[2].content is a number (3), not text"),
        ({"role": "user", "content": "\udc00"}, "messages[2].content contains half a character"),
        (
            {"role": "assistant", "content": None, "tool_calls": [{}]},
            "messages[2].tool_calls[0] has no name of a function",
        ),
        ({"role": "user", "content": [{"type": "image_url"}]}, 'messages[2].content[0] is of type "image_url"'),
        ({"role": "user", "content": [{"type": "text"}]}, "messages[2].content[0] is not a text part"),
        ({"role": "user", "content": ["a"]}, "messages[2].content[0] is not a text part"),
        ("a", "messages[2] is text, not a turn"),
    ],
)  # fmt: skip
def test_invalid_turn_error_gives_its_location_in_the_row(turn: object, message: str) -> None:
    assert turns_error(USER, USER, turn).startswith(f"train.jsonl:41: {message}")


def test_all_invalid_turns_are_reported() -> None:
    assert turns_error({"role": "bot"}, USER, "x").count("\n") == 1


@pytest.mark.parametrize("value", ["text", 3, None, {"role": "user"}])
def test_field_that_is_not_a_turn_list_is_an_error(value: object) -> None:
    with pytest.raises(UserError, match=r'train.jsonl:41: field "messages" is .*, not a list of turns'):
        turns_of(row(messages=value), "messages")
    assert turns_error().startswith('train.jsonl:41: field "messages" has no turns')
