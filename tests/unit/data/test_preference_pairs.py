"""Preference data: formats of pairs and labels, the end of the prompt, and tokens with one prompt for both answers."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from tests.tokenizers import CHATML, LLAMA2_CHAT, byte_level, sentencepiece_bpe, unigram
from yeonma.data.column_paths import with_paths
from yeonma.data.columns import Columns
from yeonma.data.preference_pairs import (
    RenderedPair,
    notes_of_pairs,
    pair_shape,
    recognise_labelled,
    recognise_pairs,
    render_label,
    render_pairs,
)
from yeonma.data.rows import Row, Rows
from yeonma.data.task import LABELLED, PAIRS, choose_template
from yeonma.data.template import Template, answer_text, load_template, prompt_text
from yeonma.data.text_checks import SPACED_APART
from yeonma.errors import UserError
from yeonma.tokenization.cache import build_store
from yeonma.tokenization.dataset import data_warnings
from yeonma.tokenization.example import AnswerRole, Example, LeftOut, TokenRules, Unit
from yeonma.tokenization.example_encoder import encode_prompt
from yeonma.tokenization.preference_encoder import encode_pairs

CHAT = load_template("chat")
RULES = TokenRules(cutoff_len=512)
TOKENIZERS = {"byte_level": byte_level, "sentencepiece_bpe": sentencepiece_bpe, "unigram": unigram}


def row(**values: object) -> Row:
    return Row(41, values, "train.jsonl:41")


def table(rows: Iterable[Mapping[str, object]]) -> Rows:
    rows = list(rows)
    columns = tuple(dict.fromkeys(name for values in rows for name in values))
    numbered = [Row(number, values, f"train.jsonl:{number}") for number, values in enumerate(rows, start=1)]
    return Rows("train.jsonl", "data", columns, lambda: iter(numbered))


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def answer(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def human(text: str) -> dict[str, str]:
    return {"from": "human", "value": text}


def gpt(text: str) -> dict[str, str]:
    return {"from": "gpt", "value": text}


def render_pair(template: Template, row: Row, columns: Columns = None) -> RenderedPair:
    (pair,) = render_pairs(template, row, columns)
    return pair


def recognised_pair(values: Mapping[str, object]) -> RenderedPair:
    """The pair of a data set of this row, whose columns choose the template."""
    rows = table([values])
    recognised = recognise_pairs(rows)
    columns = dict(recognised.columns)
    (first,) = with_paths(rows, columns)
    return render_pair(load_template(recognised.template), first, columns)


def prompt_and_answers(pair: RenderedPair) -> tuple[list[tuple[str | None, str]], list[str], list[str]]:
    """Returns the turns of the prompt and the texts of both answers."""

    def turns(side: object) -> list[tuple[str | None, str]]:
        return [(turn.role, "".join(piece.text for piece in turn.pieces)) for turn in side.turns]  # type: ignore[attr-defined]

    sides = []
    for side in (pair.chosen, pair.rejected):
        after = [text for _, text in turns(side)[pair.prompt_turns :]]
        sides.append([*after, answer_text(side)] if side.answer else after)
    return turns(pair.chosen)[: pair.prompt_turns], sides[0], sides[1]


def error_of(**values: object) -> str:
    with pytest.raises(UserError) as caught:
        render_pair(CHAT, row(**values))
    return str(caught.value)


# Texts


@pytest.mark.parametrize(
    ("values", "template", "prompt"),
    [
        ({"prompt": "p\n"}, "prompt-completion", "p\n"),
        ({"question": "q"}, "orca", "### User:\nq\n\n### Assistant:\n"),
        (
            {"system": "s", "question": "q"},
            "orca",
            "### System:\ns\n\n### User:\nq\n\n### Assistant:\n",
        ),
        ({"system": "", "question": "q"}, "orca", "### User:\nq\n\n### Assistant:\n"),
        ({"document": "d"}, "title", None),
        ({"instruction": "i", "input": ""}, "alpaca", None),
        ({"instruction": "i", "input": "n"}, "alpaca", None),
    ],
)
def test_text_columns_choose_the_template_and_fill_both_answers(
    values: dict[str, str], template: str, prompt: str | None
) -> None:
    values = {**values, "chosen": "good", "rejected": "bad"}
    recognised = recognise_pairs(table([values]))
    assert (recognised.template, recognised.columns) == (template, ())
    named = ", ".join(name for name, value in values.items() if value or name != "system")
    assert recognised.reason == f"template {template}, because the columns are {named}"
    pair = render_pair(load_template(template), row(**values))
    assert (answer_text(pair.chosen), answer_text(pair.rejected)) == ("good", "bad")
    assert pair.chosen.turns == pair.rejected.turns
    if prompt is not None:
        assert prompt_text(pair.chosen) == prompt


def test_answer_columns_can_be_renamed() -> None:
    values = {"prompt": "p", "better": "good", "worse": "bad"}
    columns = {"chosen": "better", "rejected": "worse"}
    recognised = recognise_pairs(table([values]), columns)
    assert recognised.template == "prompt-completion"
    pair = render_pair(load_template("prompt-completion"), row(**values), columns)
    assert (answer_text(pair.chosen), answer_text(pair.rejected)) == ("good", "bad")


@pytest.mark.parametrize("name", ["answer", "completion"])
def test_columns_setting_for_a_single_answer_is_refused(name: str) -> None:
    with pytest.raises(
        UserError, match="--columns: a pair has two answers; name the columns of `chosen` and"
    ):
        render_pair(
            load_template("prompt-completion"), row(prompt="p", chosen="a", rejected="b"), {name: "c"}
        )


def test_answer_column_used_as_prompt_field_is_refused() -> None:
    for side in ("chosen", "rejected"):
        with pytest.raises(
            UserError, match=f'the column "{side}" is the answer and also the prompt field "prompt"'
        ):
            render_pair(load_template("prompt-completion"), row(chosen="a", rejected="b"), {"prompt": side})


def test_error_lists_templates_if_columns_fit_several_or_none() -> None:
    answers = {"chosen": "a", "rejected": "b"}
    with pytest.raises(UserError, match="fit several templates: orca, prompt-completion"):
        recognise_pairs(table([{"prompt": "p", "question": "q", **answers}]))
    with pytest.raises(UserError, match="alpaca needs instruction, chosen, rejected") as caught:
        recognise_pairs(table([{"text": "p", **answers}]))
    assert "fit no built-in template" in str(caught.value)


# Turns

OPENAI = {"messages": [user("q")], "chosen": answer("good"), "rejected": answer("bad")}
TURN_FORMATS: dict[str, dict[str, object]] = {
    "an object each": OPENAI,
    "sharegpt": {"conversations": [human("q")], "chosen": gpt("good"), "rejected": gpt("bad")},
    "lists of one": {**OPENAI, "chosen": [answer("good")], "rejected": [answer("bad")]},
    "mixed": {**OPENAI, "chosen": [gpt("good")], "rejected": "bad"},
    "the prompt's turns in prompt": {
        "prompt": [user("q")],
        "chosen": [answer("good")],
        "rejected": [answer("bad")],
    },
    "the prompt's text in prompt": {"prompt": "q", "chosen": [answer("good")], "rejected": [answer("bad")]},
    "whole dialogues": {"chosen": [user("q"), answer("good")], "rejected": [user("q"), answer("bad")]},
    "whole dialogues and their messages": {
        "prompt": "q",
        "messages": [user("q"), answer("good")],
        "chosen": [user("q"), answer("good")],
        "rejected": [user("q"), answer("bad")],
    },
    "dialogues as texts": {
        "chosen": "\n\nHuman: q\n\nAssistant: good",
        "rejected": "\n\nHuman: q\n\nAssistant: bad",
    },
}


@pytest.mark.parametrize("form", TURN_FORMATS)
def test_every_turn_format_gives_the_same_pair(form: str) -> None:
    values = TURN_FORMATS[form]
    recognised = recognise_pairs(table([values]))
    assert recognised.template == "chat"
    in_prompt = form.startswith("the prompt's")
    assert recognised.columns == ((("messages", "prompt"),) if in_prompt else ())
    pair = render_pair(CHAT, row(**values), dict(recognised.columns))
    assert prompt_and_answers(pair) == ([("user", "q")], ["good"], ["bad"])
    assert pair.chosen.answer_role == "assistant"


def test_turns_shared_by_both_dialogues_are_the_prompt() -> None:
    prompt_turns = [user("a"), answer("b"), user("c")]
    pair = render_pair(
        CHAT,
        row(
            chosen=[*prompt_turns, answer("same start, good")],
            rejected=[*prompt_turns, answer("same start, bad")],
        ),
    )
    prompt = [("user", "a"), ("assistant", "b"), ("user", "c")]
    # the prompt never ends inside a turn
    assert prompt_and_answers(pair) == (prompt, ["same start, good"], ["same start, bad"])


def test_dialogue_that_begins_the_other_keeps_its_last_turn_as_answer() -> None:
    chosen = [user("a"), answer("b")]
    pair = render_pair(CHAT, row(chosen=chosen, rejected=[*chosen, user("c"), answer("d")]))
    assert prompt_and_answers(pair) == ([("user", "a")], ["b"], ["b", "c", "d"])


def test_answers_can_have_several_turns() -> None:
    pair = render_pair(
        CHAT,
        row(
            messages=[user("a")],
            chosen=[answer("b"), user("c"), answer("d")],
            rejected=[answer("x"), user("y"), answer("z")],
        ),
    )
    assert prompt_and_answers(pair) == ([("user", "a")], ["b", "c", "d"], ["x", "y", "z"])


def test_text_dialogue_is_split_at_paragraphs_that_start_with_a_speaker() -> None:
    text = "\n\nHuman: one\n\ntwo Assistant: no\n\nAssistant: three\n\nHuman: Human: four\n\nAssistant: {}"
    pair = render_pair(CHAT, row(chosen=text.format("five"), rejected=text.format("six")))
    prompt = [("user", "one\n\ntwo Assistant: no"), ("assistant", "three"), ("user", "Human: four")]
    assert prompt_and_answers(pair) == (prompt, ["five"], ["six"])


@pytest.mark.parametrize(
    ("values", "what"),
    [
        (
            {"chosen": answer("a"), "rejected": answer("b")},
            'field "messages" is missing, and the answers are not whole dialogues',
        ),
        (
            {"messages": [user("q"), answer("a")], "chosen": answer("b"), "rejected": answer("c")},
            "the prompt of chosen and rejected ends with an assistant turn",
        ),
        (
            {"messages": [user("q")], "chosen": [answer("a"), user("q")], "rejected": answer("c")},
            "chosen ends with a user turn",
        ),
        ({**OPENAI, "chosen": [{"role": "robot", "content": "a"}]}, "chosen[0].role"),
        ({**OPENAI, "chosen": {"role": "assistant"}}, "chosen.content is missing"),
        ({**OPENAI, "chosen": 3}, 'field "chosen" is a number (3), not a list of turns'),
    ],
)
def test_invalid_pair_turns_are_refused_with_their_location(values: dict[str, object], what: str) -> None:
    message = error_of(**values)
    assert message.startswith(f"train.jsonl:41: {what}"), message


def test_pair_notes_cover_the_prompt_and_both_answers() -> None:
    template = load_template("prompt-completion")

    def notes(prompt: str, chosen: str, rejected: str) -> object:
        return notes_of_pairs(render_pairs(template, row(prompt=prompt, chosen=chosen, rejected=rejected)))

    first = notes("p", "a b", "a  b")
    assert first.flags == SPACED_APART  # type: ignore[attr-defined]
    assert notes("p", "a b", "c").flags == 0  # type: ignore[attr-defined]
    digests = {notes(*texts).digest for texts in (("p", "a", "b"), ("p", "b", "a"), ("q", "a", "b"))}  # type: ignore[attr-defined]
    assert len(digests) == 3
    assert len({notes("p", *answers).prompt_digest for answers in ("ab", "cd")}) == 1  # type: ignore[attr-defined]


# Other names, system prompts, tools, several rejected answers

SYSTEM = {"role": "system", "content": "Be true."}
OTHER_NAMES: dict[str, dict[str, object]] = {
    "OpenAI's": {
        "input": {"messages": [user("q")], "tools": [], "parallel_tool_calls": True},
        "preferred_output": [answer("good")],
        "non_preferred_output": [answer("bad")],
    },
    "ms-swift's with a text": {"messages": [user("q"), answer("good")], "rejected_response": "bad"},
    "ms-swift's with a turn": {"messages": [user("q"), answer("good")], "rejected_response": [answer("bad")]},
    "ms-swift's with a dialogue": {
        "messages": [user("q"), answer("good")],
        "rejected_messages": [user("q"), answer("bad")],
    },
    "ms-swift's in sharegpt": {"conversations": [human("q"), gpt("good")], "rejected_response": "bad"},
    "LLaMA-Factory's": {
        "conversations": [human("q")],
        "chosen": gpt("good"),
        "rejected": gpt("bad"),
        "system": "",
        "tools": "[]",
    },
    "ultrafeedback's": {
        "prompt": "q",
        "prompt_id": "a1",
        "messages": [user("q"), answer("good")],
        "chosen": [user("q"), answer("good")],
        "rejected": [user("q"), answer("bad")],
        "score_chosen": 8.5,
        "score_rejected": 2,
    },
    "one dialogue and the other answer": {"chosen": [user("q"), answer("good")], "rejected": "bad"},
    "the other answer and one dialogue": {"chosen": answer("good"), "rejected": [user("q"), answer("bad")]},
}


@pytest.mark.parametrize("form", OTHER_NAMES)
def test_turns_under_other_names_give_the_same_pair(form: str) -> None:
    pair = recognised_pair(OTHER_NAMES[form])
    assert prompt_and_answers(pair) == ([("user", "q")], ["good"], ["bad"])


@pytest.mark.parametrize("form", [*OTHER_NAMES, *TURN_FORMATS])
def test_the_template_chat_reads_the_same_columns_as_without_a_template(form: str) -> None:
    rows = table([{**OTHER_NAMES, **TURN_FORMATS}[form]])
    given, chosen = (choose_template(PAIRS, template, rows, None) for template in ("chat", None))
    first, second = (
        [render_pairs(CHAT, row, choice.columns) for row in with_paths(rows, choice.columns)]
        for choice in (given, chosen)
    )
    assert first == second
    named = with_paths(rows, given.columns).columns
    assert PAIRS.missing_columns(given.template, named, given.columns) == []


def test_the_last_turn_of_messages_is_the_chosen_answer_and_earlier_answers_are_the_prompt() -> None:
    turns = [user("a"), answer("b"), user("c"), answer("good")]
    prompt = [("user", "a"), ("assistant", "b"), ("user", "c")]
    for rejected in ("bad", answer("bad"), [*turns[:-1], answer("bad")]):
        pair = recognised_pair({"messages": turns, "rejected_response": rejected})
        assert prompt_and_answers(pair) == (prompt, ["good"], ["bad"])


def test_messages_may_begin_with_a_greeting_of_the_assistant() -> None:
    turns = [answer("Hello"), user("q"), answer("good")]
    prompt = [("assistant", "Hello"), ("user", "q")]
    for rejected in ("bad", [*turns[:-1], answer("bad")]):
        pair = recognised_pair({"messages": turns, "rejected_messages": rejected})
        assert prompt_and_answers(pair) == (prompt, ["good"], ["bad"])
    openai = {**OTHER_NAMES["OpenAI's"], "input": {"messages": turns[:-1]}}
    assert prompt_and_answers(recognised_pair(openai)) == (prompt, ["good"], ["bad"])


def test_the_reason_names_the_columns_that_are_used() -> None:
    reasons = {form: recognise_pairs(table([values])).reason for form, values in OTHER_NAMES.items()}
    start = "template chat, because the columns are "
    assert reasons["OpenAI's"] == (
        f"{start}preferred_output (as chosen), non_preferred_output (as rejected), input.messages (as messages)"
    )
    assert (
        reasons["ms-swift's with a text"] == f"{start}messages (as chosen), rejected_response (as rejected)"
    )
    assert reasons["ultrafeedback's"] == f"{start}messages, chosen, rejected"


def test_the_users_own_mapping_comes_before_known_shapes() -> None:
    swift = table([OTHER_NAMES["ms-swift's with a text"]])
    assert pair_shape(swift) == {"chosen": "messages", "rejected": "rejected_response"}
    assert pair_shape(swift, {"chosen": "a", "rejected": "b"}) == {}
    both = {**OTHER_NAMES["ms-swift's with a text"], "chosen": "good", "rejected": "worse"}
    assert pair_shape(table([both])) == {}
    assert pair_shape(table([{"prompt": "p", "chosen": "a", "rejected": "b"}])) == {}


@pytest.mark.parametrize(
    ("form", "values"),
    [
        ("a list", {"messages": [user("q")], "chosen": answer("good"), "rejected": answer("bad")}),
        ("sharegpt", {"conversations": [human("q")], "chosen": gpt("good"), "rejected": gpt("bad")}),
        ("turns and texts", {"messages": [user("q")], "chosen": "good", "rejected": "bad"}),
        ("prompt", {"prompt": [user("q")], "chosen": [answer("good")], "rejected": [answer("bad")]}),
        ("dialogues", TURN_FORMATS["whole dialogues"]),
        ("texts", TURN_FORMATS["dialogues as texts"]),
        ("OpenAI's", OTHER_NAMES["OpenAI's"]),
        ("ms-swift's", OTHER_NAMES["ms-swift's with a text"]),
    ],
)
@pytest.mark.parametrize("column", ["system", "system_prompt"])
def test_a_system_column_beside_turns_is_the_system_turn_of_the_prompt(
    form: str, values: dict[str, object], column: str
) -> None:
    prompt = [("system", "Be true."), ("user", "q")]
    pair = recognised_pair({**values, column: "Be true."})
    assert prompt_and_answers(pair) == (prompt, ["good"], ["bad"]), form
    for blank in ("", " \n", None):
        assert prompt_and_answers(recognised_pair({**values, column: blank}))[0] == prompt[1:]
    assert column in recognise_pairs(table([{**values, column: "Be true."}])).reason


def test_a_system_turn_equal_to_the_system_column_stands_once() -> None:
    values = {**OPENAI, "messages": [SYSTEM, user("q")], "system": "Be true.\n"}
    assert prompt_and_answers(recognised_pair(values))[0] == [("system", "Be true."), ("user", "q")]
    both = {**OPENAI, "system": "Be true.", "system_prompt": "Be true."}
    assert prompt_and_answers(recognised_pair(both))[0] == [("system", "Be true."), ("user", "q")]


def test_two_system_prompts_that_differ_are_refused() -> None:
    assert error_of(**{**OPENAI, "messages": [SYSTEM, user("q")], "system": "Be brief."}) == (
        'train.jsonl:41: field "system" is a system prompt, but the turns begin with another system turn; '
        "keep one of them"
    )
    assert error_of(**OPENAI, system="Be true.", system_prompt="Be brief.") == (
        'train.jsonl:41: field "system_prompt" is a system prompt, but field "system" says another; keep one of them'
    )


def test_a_system_column_beside_texts_makes_them_turns() -> None:
    values = {"prompt": "p", "chosen": "a", "rejected": "b", "system": "Be true."}
    pair = recognised_pair(values)
    assert prompt_and_answers(pair) == ([("system", "Be true."), ("user", "p")], ["a"], ["b"])
    assert recognise_pairs(table([values])).reason == (
        "template chat, because the columns are prompt, chosen, rejected, system"
    )
    assert recognise_pairs(table([{**values, "system": " "}])).template == "prompt-completion"
    alpaca = {"instruction": "p", "chosen": "a", "rejected": "b", "system_prompt": "Be true."}
    pair = recognised_pair(alpaca)
    assert prompt_and_answers(pair) == ([("system", "Be true."), ("user", "p")], ["a"], ["b"])
    with pytest.raises(UserError, match="does not use the column system_prompt"):
        choose_template(
            PAIRS,
            None,
            table([{"document": "p", "chosen": "a", "rejected": "b", "system_prompt": "s"}]),
            None,
        )


TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}


@pytest.mark.parametrize("tools", [[TOOL], '[{"name": "f", "parameters": {"type": "object"}}]', TOOL])
def test_tools_beside_the_turns_are_those_of_both_answers(tools: object) -> None:
    nested = {**OTHER_NAMES["OpenAI's"], "input": {"messages": [user("q")], "tools": tools}}
    for pair in (render_pair(CHAT, row(**OPENAI, tools=tools)), recognised_pair(nested)):
        assert pair.chosen.tools == pair.rejected.tools == (TOOL,)
    labelled = render_label(CHAT, row(messages=[user("q"), answer("a")], label=True, tools=tools))
    assert labelled.rendered.tools == (TOOL,)
    assert 'field "rejected_tools": both answers' in error_of(**OPENAI, rejected_tools=tools)
    assert "tools[0] is not the description of a tool" in error_of(**OPENAI, tools=[{"type": "function"}])


def test_reasoning_and_tool_calls_of_answers_are_kept() -> None:
    call = {"type": "function", "function": {"name": "f", "arguments": "{}"}}
    chosen = {**answer("4"), "reasoning_content": "Two and two."}
    rejected = {"role": "assistant", "content": None, "tool_calls": [call]}
    pair = render_pair(CHAT, row(messages=[user("q")], chosen=chosen, rejected=rejected))
    assert pair.chosen.answer_turn is not None and pair.chosen.answer_turn.reasoning == "Two and two."
    assert pair.rejected.answer_turn is not None and pair.rejected.answer_turn.tool_calls[0].name == "f"
    label = render_label(CHAT, row(messages=[user("q"), chosen], label=True))
    assert label.rendered.answer_turn == pair.chosen.answer_turn
    weighed = {**chosen, "weight": 0.5}
    assert "an answer has a weight" in error_of(messages=[user("q")], chosen=weighed, rejected=rejected)


@pytest.mark.parametrize("empty", [None, [], {}, "", "[]", " {} ", "null"])
def test_empty_tools_are_no_tools(empty: object) -> None:
    pair = render_pair(CHAT, row(**OPENAI, tools=empty))
    assert prompt_and_answers(pair) == ([("user", "q")], ["good"], ["bad"])


@pytest.mark.parametrize(
    "values",
    [
        {"prompt": "q", "chosen": "good", "rejected": ["bad", "worse"]},
        {"messages": [user("q")], "chosen": answer("good"), "rejected": [[answer("bad")], [answer("worse")]]},
        {"messages": [user("q")], "chosen": answer("good"), "rejected": ["bad", [answer("worse")]]},
        {
            "chosen": [user("q"), answer("good")],
            "rejected": [[user("q"), answer("bad")], [user("q"), answer("worse")]],
        },
        {"messages": [user("q"), answer("good")], "rejected_response": ["bad", "worse"]},
    ],
)
def test_every_one_of_several_rejected_answers_is_a_pair(values: dict[str, object]) -> None:
    rows = table([values])
    recognised = recognise_pairs(rows)
    columns, template = dict(recognised.columns), load_template(recognised.template)
    (first,) = with_paths(rows, columns)
    pairs = render_pairs(template, first, columns)
    singles = [prompt_and_answers(pair)[1:] for pair in pairs]
    assert singles == [(["good"], ["bad"]), (["good"], ["worse"])]
    assert pairs[0].chosen == pairs[1].chosen
    assert pairs[0].prompt_turns == pairs[1].prompt_turns == 1


def test_a_list_of_one_rejected_text_is_that_text() -> None:
    template = load_template("prompt-completion")
    (listed,) = render_pairs(template, row(prompt="p", chosen="a", rejected=["b"]))
    assert listed == render_pair(template, row(prompt="p", chosen="a", rejected="b"))


def test_an_empty_one_of_several_rejected_answers_is_named() -> None:
    template = load_template("prompt-completion")
    with pytest.raises(UserError) as caught:
        render_pairs(template, row(prompt="p", chosen="a", rejected=["b", " ", None]))
    cure = "a pair needs both answers (chosen and rejected); fill it or remove the row"
    assert str(caught.value).splitlines() == [
        f'train.jsonl:41: field "rejected[1]" is empty; {cure}',
        f'train.jsonl:41: field "rejected[2]" is null; {cure}',
    ]
    assert 'field "rejected[1]" is an object, not text' not in error_of(**{**OPENAI, "rejected": ["b", []]})


def test_notes_of_several_pairs_cover_every_rejected_answer() -> None:
    template = load_template("prompt-completion")

    def notes(*rejected: str) -> object:
        return notes_of_pairs(render_pairs(template, row(prompt="p", chosen="a b", rejected=list(rejected))))

    assert notes("c", "a  b").flags == SPACED_APART  # type: ignore[attr-defined]
    assert notes("c", "d").flags == 0  # type: ignore[attr-defined]
    assert len({notes(*texts).digest for texts in (("c", "d"), ("d", "c"), ("c",), ("c", "e"))}) == 4  # type: ignore[attr-defined]


# Labels


@pytest.mark.parametrize(
    ("label", "desirable"),
    [
        *((label, True) for label in (True, "true", 1, 1.0, "1", "1.0", np.float64(1), "Yes", " GOOD ")),
        *((label, True) for label in ("chosen", "Desirable")),
        *((label, False) for label in (False, "False", 0, 0.0, -1, -1.0, "0", "-1", "0.0", "no", "Bad")),
        *((label, False) for label in ("rejected", "undesirable\n")),
    ],
)
def test_label_values_are_read_as_desirable_or_not(label: object, desirable: bool) -> None:
    values = {"prompt": "p", "completion": "c", "label": label}
    assert recognise_labelled(table([values])).template == "prompt-completion"
    actual = render_label(load_template("prompt-completion"), row(**values))
    assert (answer_text(actual.rendered), actual.desirable) == ("c", desirable)


@pytest.mark.parametrize(
    ("label", "state"),
    [
        (None, "null"),
        ("maybe", '"maybe"'),
        ("", '""'),
        ("not good", '"not good"'),
        (2, "a number (2)"),
        (0.5, "a number (0.5)"),
        (float("nan"), "a number (nan)"),
        ([True], "a list"),
    ],
)
def test_other_labels_are_refused_with_a_list_of_those_accepted(label: object, state: str) -> None:
    with pytest.raises(UserError) as caught:
        render_label(load_template("prompt-completion"), row(prompt="p", completion="c", label=label))
    assert str(caught.value) == (
        f'train.jsonl:41: field "label" is {state}; say whether the answer is desirable: '
        "true, 1, 1.0, yes, good, chosen, desirable; or not: "
        "false, 0, 0.0, -1, -1.0, no, bad, rejected, undesirable"
    )


def test_the_label_is_in_kto_tag_if_there_is_no_column_label() -> None:
    values: dict[str, object] = {"instruction": "i", "output": "o", "kto_tag": False}
    rows = table([values, {**values, "kto_tag": True}])
    assert recognise_labelled(rows).reason == (
        "template alpaca, because the columns are instruction, output, kto_tag"
    )
    template = load_template("alpaca")
    assert [render_label(template, row).desirable for row in rows] == [False, True]
    assert LABELLED.missing_columns(template, rows.columns, None) == []
    assert render_label(template, row(**values, label=True)).desirable
    assert not render_label(template, row(**values, label="a class"), {"label": "kto_tag"}).desirable
    (problem,) = LABELLED.missing_columns(template, ["instruction", "output"], None)
    assert problem.what == 'the data has no column "label"'


CONVERSATION = {
    "prompt": [{"role": "system", "content": "s"}, user("a"), answer("b"), user("c")],
    "completion": [answer("good")],
    "label": True,
}


@pytest.mark.parametrize("template", [None, "chat"])
@pytest.mark.parametrize(
    "completion",
    [[answer("good")], answer("good"), "good", [gpt("good")]],
)
def test_a_completion_of_turns_is_the_answer_and_the_prompts_turns_come_before_it(
    completion: object, template: str | None
) -> None:
    values = {**CONVERSATION, "completion": completion}
    choice = choose_template(LABELLED, template, table([values]), None)
    assert choice.columns == {"messages": "prompt", "answer": "completion"}
    assert LABELLED.missing_columns(choice.template, list(values), choice.columns) == []
    actual = render_label(choice.template, row(**values), choice.columns).rendered
    whole = render_label(CHAT, row(messages=[*CONVERSATION["prompt"], answer("good")], label=True)).rendered  # type: ignore[misc]
    assert actual == whole
    assert [turn.role for turn in actual.turns] == ["system", "user", "assistant", "user"]
    assert answer_text(actual) == "good"


def test_earlier_turns_of_a_completion_are_the_prompt() -> None:
    completion = [answer("tool?"), user("3"), answer("good")]
    columns = {"messages": "prompt", "answer": "completion"}
    actual = render_label(CHAT, row(prompt="q", completion=completion, label=1), columns).rendered
    assert [(turn.role, turn.text) for turn in actual.turns] == [
        ("user", "q"),
        ("assistant", "tool?"),
        ("user", "3"),
    ]
    assert answer_text(actual) == "good"


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"completion": [user("q")]}, 'field "completion" does not end with an assistant turn; end it'),
        (
            {"completion": []},
            'field "completion" is empty; a labelled answer needs both prompt and completion',
        ),
        ({"prompt": None}, 'field "prompt" is null; a labelled answer needs both prompt and completion'),
        ({"prompt": [{"role": "robot", "content": "q"}]}, "prompt[0].role: unknown role"),
        ({"tools": ["f"]}, "tools[0] is not the description of a tool"),
        ({"system": "other"}, 'field "system" is a system prompt, but the turns begin with another'),
    ],
)
def test_faulty_prompts_and_completions_of_turns_are_refused(
    changes: dict[str, object], problem: str
) -> None:
    columns = {"messages": "prompt", "answer": "completion"}
    with pytest.raises(UserError) as caught:
        render_label(CHAT, row(**{**CONVERSATION, **changes}), columns)
    assert str(caught.value).startswith(f"train.jsonl:41: {problem}")


def test_a_missing_column_of_completions_is_named() -> None:
    columns = {"messages": "prompt", "answer": "completion"}
    (problem,) = LABELLED.missing_columns(CHAT, ["prompt", "label"], columns)
    assert problem.what == 'the data has no column "completion"'


def test_a_system_column_beside_labelled_turns_is_their_system_turn() -> None:
    labelled = {"messages": [user("q"), answer("a")], "label": True, "system": "Be true."}
    assert recognise_labelled(table([labelled])).reason.endswith("label; system turns are in system")
    turns = [user("q"), answer("a")]
    system = {"role": "system", "content": "Be true."}

    def said(**values: object) -> tuple[list[tuple[str | None, str]], str]:
        rendered = render_label(CHAT, row(label=True, **values)).rendered
        return [(turn.role, turn.text) for turn in rendered.turns], answer_text(rendered)

    expected = said(messages=[system, *turns])
    assert expected == ([("system", "Be true."), ("user", "q")], "a")
    for column in ("system", "system_prompt"):
        assert said(messages=turns, **{column: "Be true."}) == expected
    assert said(messages=[system, *turns], system="Be true.") == expected
    assert said(conversations=[human("q"), gpt("a")], system="Be true.") == expected
    with pytest.raises(UserError, match='the column "system" has another system prompt'):
        render_label(CHAT, row(messages=[system, *turns], label=True, system="Be brief."))


def test_a_system_column_beside_labelled_texts_makes_them_turns() -> None:
    values = {"prompt": "p", "completion": "c", "label": True, "system": "s"}
    recognised = recognise_labelled(table([values]))
    template = load_template(recognised.template)
    rendered = render_label(template, row(**values), dict(recognised.columns)).rendered
    assert [(turn.role, turn.text) for turn in rendered.turns] == [("system", "s"), ("user", "p")]
    assert answer_text(rendered) == "c"


def test_last_turn_of_a_labelled_turn_list_is_the_answer() -> None:
    actual = render_label(CHAT, row(messages=[user("q"), answer("a")], label=False))
    assert [turn.role for turn in actual.rendered.turns] == ["user"]
    assert answer_text(actual.rendered) == "a"


# Tokens


def units_of(
    pairs: list[dict[str, object]],
    tokenizer: PreTrainedTokenizerFast,
    rules: TokenRules = RULES,
    template: str = "prompt-completion",
) -> list[Unit | LeftOut]:
    rows = list(table(pairs))
    return encode_pairs([render_pairs(load_template(template), row) for row in rows], rows, tokenizer, rules)


def sides(unit: Unit | LeftOut) -> tuple[Example, Example]:
    assert isinstance(unit, Unit)
    (first, chosen), (second, rejected) = unit.members
    assert (first, second) == (AnswerRole.CHOSEN, AnswerRole.REJECTED)
    return chosen, rejected


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("template", ["prompt-completion", "title", "chat"])
def test_both_answers_follow_the_prompt_ids_used_in_generation(name: str, template: str) -> None:
    tokenizer = TOKENIZERS[name]()
    field = {"prompt-completion": "prompt", "title": "document", "chat": "messages"}[template]
    for prompt in ("The storm ", "월요일에 폭풍이", "a <|im_end|> b </s>"):
        value: object = [user(prompt)] if template == "chat" else prompt
        answers = {"chosen": "closes the harbour", "rejected": " 항구를 닫았고"}
        chosen, rejected = sides(units_of([{field: value, **answers}], tokenizer, template=template)[0])
        rendered = load_template(template).render(row(**{field: value}), with_answer=False)
        prompt = encode_prompt(rendered, row(), tokenizer, RULES, max_new_tokens=99)
        for side, text in ((chosen, answers["chosen"]), (rejected, answers["rejected"])):
            assert side.prompt_length == len(prompt)
            assert side.token_ids[: len(prompt)].tolist() == prompt.tolist()
            assert side.trained.tolist() == [i >= len(prompt) for i in range(len(side.token_ids))]
            decoded = tokenizer.decode(side.token_ids[len(prompt) :], skip_special_tokens=True)
            assert re.sub(r"\s", "", text) in re.sub(r"\s", "", decoded)


@pytest.mark.parametrize("side", ["end", "start", "middle"])
def test_prompt_is_cut_equally_for_both_answers_to_fit_the_longer(side: str) -> None:
    tokenizer = byte_level()
    pairs: list[dict[str, object]] = [
        {
            "prompt": f"{number} The storm closed the harbour. " * 9,
            "chosen": "x " * number,
            "rejected": "long " * 9,
        }
        for number in range(1, 12)
    ]
    rules = TokenRules(cutoff_len=70, shrink_side=side)  # type: ignore[arg-type]
    for unit, values in zip(units_of(pairs, tokenizer, rules), pairs, strict=True):
        chosen, rejected = sides(unit)
        length = chosen.prompt_length
        assert chosen.token_ids[:length].tolist() == rejected.token_ids[:length].tolist()
        assert chosen.cut_characters == rejected.cut_characters > 0
        longer = max(len(chosen.token_ids), len(rejected.token_ids))
        assert 70 - 4 < longer <= 70
        whole = sides(units_of([values], tokenizer)[0])
        for cut, uncut in zip((chosen, rejected), whole, strict=True):  # the answers are whole
            assert cut.token_ids[length:].tolist() == uncut.token_ids[uncut.prompt_length :].tolist()
        rendered = load_template("prompt-completion").render(row(**values), with_answer=False)
        prompt = encode_prompt(rendered, row(), tokenizer, rules, max_new_tokens=longer - length)
        assert prompt.tolist() == chosen.token_ids[:length].tolist()


def test_pair_with_an_answer_over_the_limit_is_left_out_or_an_error() -> None:
    good: dict[str, object] = {"prompt": "p", "chosen": "a", "rejected": "b"}
    pairs = [good, {"prompt": "p", "chosen": "a", "rejected": "x " * 99}]
    _, left_out = units_of(pairs, byte_level(), TokenRules(cutoff_len=40))
    assert isinstance(left_out, LeftOut)
    assert left_out.row == 2
    with pytest.raises(UserError, match=r"train.jsonl:2: .*cutoff_len is 40; raise --cutoff_len"):
        units_of(pairs, byte_level(), TokenRules(cutoff_len=40, over_limit="error"))


def test_only_assistant_turns_after_the_prompt_are_trained() -> None:
    tokenizer = byte_level(CHATML)
    values: dict[str, object] = {
        "messages": [user("a"), answer("untrained"), user("b")],
        "chosen": [answer("first"), user("and?"), answer("second")],
        "rejected": [answer("third")],
    }
    chosen, rejected = sides(units_of([values], tokenizer, template="chat")[0])
    trained = tokenizer.decode(chosen.token_ids[chosen.trained])
    assert trained == "first<|im_end|>second<|im_end|>"
    assert tokenizer.decode(rejected.token_ids[rejected.trained]) == "third<|im_end|>"
    assert chosen.prompt_length == rejected.prompt_length
    length = chosen.prompt_length
    assert chosen.token_ids[:length].tolist() == rejected.token_ids[:length].tolist()


def test_pair_whose_earlier_turns_the_chat_template_rewrites_is_left_out() -> None:
    rewriting = CHATML.replace(
        "message['content']", "(message['content'] if loop.last else message['content'][:1])"
    )
    values: dict[str, object] = {
        "messages": [user("aa")],
        "chosen": [answer("first"), user("and?"), answer("second")],
        "rejected": [answer("third")],
    }
    (actual,) = units_of([values], byte_level(rewriting), template="chat")
    assert isinstance(actual, LeftOut)
    assert "rewrites earlier turns" in actual.reason


def test_row_refused_by_the_chat_template_is_named() -> None:
    values = {**OPENAI, "messages": [{"role": "tool", "content": "3"}, user("q")]}
    with pytest.raises(
        UserError, match=r"train.jsonl:1: the model's chat template refuses this row: Only system"
    ):
        units_of([values], sentencepiece_bpe(chat_template=LLAMA2_CHAT), template="chat")


# The store


def test_store_has_the_unit_and_role_of_each_pair_answer(tmp_path: Path) -> None:
    rows = table(
        {"prompt": f"{i} p ", "chosen": "a" * (i % 3 + 1), "rejected": "a" if i == 2 else "b"}
        for i in range(5)
    )
    identical_answers = [{"prompt": "p", "chosen": "same", "rejected": "same"}]
    rows = table(
        [*(row.values for row in rows), *identical_answers, {"prompt": "q", "chosen": "a", "rejected": "b"}]
    )
    store = build_store(
        rows, load_template("prompt-completion"), None, byte_level(), RULES, tmp_path, task=PAIRS
    )
    assert (store.counts.rows, store.counts.units, store.counts.examples) == (7, 6, 12)
    assert store.units.tolist() == [unit for unit in range(6) for _ in range(2)]
    assert store.roles.tolist() == [AnswerRole.CHOSEN, AnswerRole.REJECTED] * 6
    assert store.row_numbers.tolist() == [number for number in (1, 2, 3, 4, 5, 7) for _ in range(2)]
    assert store.examples_of(np.array([4, 1])).tolist() == [8, 9, 2, 3]
    for unit in range(6):
        chosen, rejected = (store[int(i)] for i in store.examples_of(np.array([unit])))
        answers = len(chosen.token_ids) + len(rejected.token_ids) - 2 * chosen.prompt_length
        assert store.unit_lengths[unit] == chosen.prompt_length + answers
    plain_store = build_store(
        rows, load_template("prompt-completion"), {"answer": "chosen"}, byte_level(), RULES, tmp_path
    )
    assert plain_store.key != store.key
    assert plain_store.unit_lengths is plain_store.lengths


def test_the_pairs_of_a_row_are_units_with_its_number(tmp_path: Path) -> None:
    several = {"prompt": "p ", "chosen": "a", "rejected": ["b", "a", "cc"]}
    rows = table([{"prompt": "o ", "chosen": "a", "rejected": "b"}, several, {**several, "rejected": "b"}])
    store = build_store(
        rows, load_template("prompt-completion"), None, byte_level(), RULES, tmp_path, task=PAIRS
    )
    assert (store.counts.rows, store.counts.units, store.counts.left_out) == (3, 4, 1)
    assert store.row_numbers.tolist() == [1, 1, 2, 2, 2, 2, 3, 3]
    assert [(left.row, left.reason) for left in store.left_out] == [(2, "chosen equals rejected")]
    assert store.rows_of(np.arange(4)) == [1, 2, 2, 3]
    by_hand = units_of([{**several, "rejected": text} for text in ("b", "cc")], byte_level())
    for unit, alone in zip((1, 2), by_hand, strict=True):
        both = [store[int(i)].token_ids.tolist() for i in store.examples_of(np.array([unit]))]
        assert both == [example.token_ids.tolist() for example in sides(alone)]
    (told,) = (w for w in data_warnings(store, np.arange(8)) if w.kind == "several_rejected")
    assert str(told) == "rows with several rejected answers, each in a pair of its own: 1 (row 2)"


def test_a_labelled_row_is_one_example_with_the_role_of_its_label(tmp_path: Path) -> None:
    rows = table({"prompt": f"{i} p ", "completion": f"{'x' * i}!", "label": i % 2 == 0} for i in range(1, 5))
    store = build_store(
        rows, load_template("prompt-completion"), None, byte_level(), RULES, tmp_path, task=LABELLED
    )
    assert (store.counts.units, len(store)) == (4, 4)
    assert [AnswerRole(role) for role in store.roles] == [AnswerRole.UNDESIRABLE, AnswerRole.DESIRABLE] * 2
    assert store.counts.trained_tokens == int(store.trained_counts.sum())
