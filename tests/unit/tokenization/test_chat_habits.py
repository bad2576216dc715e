"""Conversations through chat templates of many habits, checked against transformers' own rendering."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.chat_habits import HABITS, NAMES, Habit
from yeonma.data.rows import Row, Rows
from yeonma.data.template import load_template
from yeonma.errors import UserError
from yeonma.tokenization.cache import build_store
from yeonma.tokenization.example import NOT_TRAINED, Example, LeftOut, TokenRules, answer_tokens
from yeonma.tokenization.example_encoder import encode, encode_prompt

CHAT = load_template("chat")
RULES = TokenRules(cutoff_len=4096)
CONTENTS = ["hi", "서울은 맑음 ☀️", "def f(x):\n    return x  # <b>\n\n```\n}}{{", "a </i> b"]
REASONING = "Two and\ntwo 😀"

every_habit = pytest.mark.parametrize("habit", HABITS, ids=NAMES)
thinking_habit = pytest.mark.parametrize(
    "habit", [habit for habit in HABITS if habit.reasoning], ids=[h.name for h in HABITS if h.reasoning]
)
tool_habit = pytest.mark.parametrize(
    "habit", [habit for habit in HABITS if habit.tools], ids=[h.name for h in HABITS if h.tools]
)


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: str | None, **keys: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **keys}


def examples_of(
    habit: Habit, messages: list[dict[str, Any]], rules: TokenRules = RULES, **columns: Any
) -> list[Example | LeftOut]:
    row = Row(1, {"messages": messages, **columns}, "data:1")
    return encode([CHAT.render(row)], [row], habit.tokenizer(), rules)


def prompt_text(habit: Habit, messages: list[dict[str, Any]], **kwargs: Any) -> str:
    """The generation prompt by transformers alone."""
    text = habit.tokenizer().apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True, **kwargs
    )
    return str(text)


def check(habit: Habit, example: Example | LeftOut, prompt: str, written: str) -> None:
    """The example is this prompt and this text, encoded by the tokenizer alone, and just the text is trained."""
    assert isinstance(example, Example)
    tokenizer = habit.tokenizer()
    prompt_ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    whole_ids = tokenizer(prompt + written, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(example.token_ids[example.trained]) == written
    assert example.token_ids[: example.prompt_length].tolist() == prompt_ids
    assert example.trained.tolist() == [index >= len(prompt_ids) for index in range(len(example.trained))]
    assert example.straddles == (whole_ids[: len(prompt_ids)] != prompt_ids)
    if not example.straddles:  # else the answer's ids continue the prompt's, and the text is the same
        assert example.token_ids.tolist() == whole_ids


def trained_answers(habit: Habit, results: list[Example | LeftOut]) -> list[tuple[list[int], str]]:
    """(ids before it, text) of every run of trained tokens."""
    tokenizer = habit.tokenizer()
    answers = []
    for example in results:
        assert isinstance(example, Example)
        ids, trained = example.token_ids, [False, *example.trained.tolist(), False]
        starts = [i for i in range(len(ids)) if trained[i + 1] and not trained[i]]
        ends = [i for i in range(1, len(ids) + 1) if trained[i] and not trained[i + 1]]
        for start, end in zip(starts, ends, strict=True):
            answers.append((ids[:start].tolist(), tokenizer.decode(ids[start:end])))
    return answers


@every_habit
@pytest.mark.parametrize("content", CONTENTS)
def test_one_answer_continues_the_generation_prompt(habit: Habit, content: str) -> None:
    (example,) = examples_of(habit, [user("Say it."), assistant(content)])
    check(habit, example, prompt_text(habit, [user("Say it.")]), habit.written(None, content))


@every_habit
def test_generation_is_asked_with_the_trained_prompt(habit: Habit) -> None:
    turns = [user("Say it."), assistant("once"), user("Again?"), assistant("twice")]
    last = examples_of(habit, turns)[-1]
    assert isinstance(last, Example)
    row = Row(1, {"messages": turns[:-1]}, "data:1")
    asked = encode_prompt(CHAT.render(row, with_answer=False), row, habit.tokenizer(), RULES, 8)
    assert asked.tolist() == last.token_ids[: last.prompt_length].tolist()


@every_habit
def test_every_answer_of_a_conversation_is_trained_after_its_own_prompt(habit: Habit) -> None:
    turns = [user("Name it."), assistant("oak"), user("And one more?"), assistant("elm 🌳")]
    if habit.system:
        turns = [{"role": "system", "content": "Be brief."}, *turns]
    tokenizer = habit.tokenizer()
    trained = trained_answers(habit, examples_of(habit, turns))
    first, last = len(turns) - 4, len(turns) - 2
    expected = []
    for position, content in ((first + 1, "oak"), (last + 1, "elm 🌳")):
        ids = tokenizer(prompt_text(habit, turns[:position]), add_special_tokens=False)["input_ids"]
        expected.append((ids, content))
    assert [ids for ids, _ in trained] == [ids for ids, _ in expected]
    for (_, text), (_, content) in zip(trained, expected, strict=True):
        written = habit.written(None, content)
        # channels end an earlier answer with another token
        assert text in (written, written.replace("<|return|>", "<|end|>"))


@thinking_habit
@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking", None])
def test_reasoning_is_trained_before_its_answer(habit: Habit, key: str | None) -> None:
    turn = assistant("4", **{key: REASONING}) if key else assistant(f"<think>\n{REASONING}\n</think>\n\n4")
    if key is None and "<think>" not in habit.template:
        pytest.skip("the template does not know this block")
    (example,) = examples_of(habit, [user("2+2?"), turn])
    check(habit, example, prompt_text(habit, [user("2+2?")]), habit.written(REASONING, "4"))


@thinking_habit
def test_reasoning_of_earlier_turns_is_trained_with_the_prompt_that_will_be_asked(habit: Habit) -> None:
    turns = [
        user("1+1?"),
        assistant("2", reasoning_content="One and one."),
        user("2+2?"),
        assistant("4", reasoning_content="Two and two."),
    ]
    key = "thinking" if "m.thinking" in habit.template else "reasoning_content"
    asked_turns = [
        {key if name == "reasoning_content" else name: value for name, value in turn.items()}
        for turn in turns
    ]
    last = examples_of(habit, turns)[-1]
    tokenizer = habit.tokenizer()
    assert isinstance(last, Example)
    prompt = tokenizer(prompt_text(habit, asked_turns[:-1]), add_special_tokens=False)["input_ids"]
    assert last.token_ids[: last.prompt_length].tolist() == prompt
    assert tokenizer.decode(last.token_ids[last.prompt_length :]) == habit.written("Two and two.", "4")


@thinking_habit
def test_block_is_opened_once_and_closed_once(habit: Habit) -> None:
    for turn in (
        assistant("4"),
        assistant("4", reasoning_content="R"),
        assistant("<think>\nR\n</think>\n\n4"),
    ):
        (example,) = examples_of(habit, [user("2+2?"), turn])
        assert isinstance(example, Example)
        text = habit.tokenizer().decode(example.token_ids)
        assert text.count("<think>") <= 1 and text.count("<think>") == text.count("</think>")


@thinking_habit
def test_thinking_drop_trains_the_answer_as_if_the_row_had_no_reasoning(habit: Habit) -> None:
    rules = TokenRules(cutoff_len=4096, thinking="drop")
    (dropped,) = examples_of(habit, [user("2+2?"), assistant("4", reasoning_content="R")], rules)
    (without,) = examples_of(habit, [user("2+2?"), assistant("4")])
    assert isinstance(dropped, Example) and isinstance(without, Example)
    assert dropped.token_ids.tolist() == without.token_ids.tolist()


@thinking_habit
def test_thinking_keep_adds_no_empty_block(habit: Habit) -> None:
    rules = TokenRules(cutoff_len=4096, thinking="keep")
    (example,) = examples_of(habit, [user("2+2?"), assistant("4")], rules)
    assert isinstance(example, Example)
    trained = habit.tokenizer().decode(example.token_ids[example.trained])
    opens = "<think>" in prompt_text(habit, [user("2+2?")])
    assert ("</think>" in trained) == opens  # an open block must be closed


def test_thinking_empty_adds_an_empty_block_where_the_template_writes_none() -> None:
    habit = next(habit for habit in HABITS if habit.name == "brackets around reasoning, contents verbatim")
    rules = TokenRules(cutoff_len=4096, thinking="empty")
    (example,) = examples_of(habit, [user("2+2?"), assistant("4")], rules)
    assert isinstance(example, Example)
    assert habit.tokenizer().decode(example.token_ids[example.trained]) == "[THINK][/THINK]4</s>"


def test_reasoning_is_refused_by_name_where_the_template_cannot_write_it() -> None:
    turns = [user("2+2?"), assistant("4", reasoning_content="R")]
    with pytest.raises(
        UserError, match=r"data:1: a turn has reasoning, .* does not write it; --thinking drop"
    ):
        examples_of(HABITS[0], turns)
    for thinking, text in (("drop", "4<|im_end|>"), ("keep", "<think>\nR\n</think>\n\n4<|im_end|>")):
        rules = TokenRules(cutoff_len=4096, thinking=thinking)  # type: ignore[arg-type]
        (example,) = examples_of(HABITS[0], turns, rules)
        check(HABITS[0], example, prompt_text(HABITS[0], turns[:1]), text)


def test_reasoning_after_a_prompt_that_closes_the_block_is_an_error() -> None:
    habit = next(habit for habit in HABITS if habit.name == "block in the last turn")
    turns = [user("2+2?"), assistant("4", reasoning_content="R")]
    with pytest.raises(UserError, match="closes the think block in the prompt"):
        examples_of(habit, turns, chat_template_kwargs={"enable_thinking": False})


def test_arguments_of_the_chat_template_change_the_prompt_row_by_row() -> None:
    habit = next(habit for habit in HABITS if habit.name == "block in the last turn")
    turns = [user("2+2?"), assistant("4")]
    asked = prompt_text(habit, turns[:1], enable_thinking=False)
    assert asked.endswith("<think>\n\n</think>\n\n")
    by_setting = TokenRules(cutoff_len=4096, chat_template_kwargs={"enable_thinking": False})
    check(habit, examples_of(habit, turns, by_setting)[0], asked, "4<|im_end|>")
    by_column = examples_of(habit, turns, chat_template_kwargs='{"enable_thinking": false}')[0]
    check(habit, by_column, asked, "4<|im_end|>")
    with pytest.raises(UserError, match='no argument "enable_thinkin"; did you mean "enable_thinking"'):
        examples_of(habit, turns, chat_template_kwargs={"enable_thinkin": False})


TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "날씨",
        "parameters": {"type": "object", "properties": {}},
    },
}
CALL = {"id": "call12345", "type": "function", "function": {"name": "weather", "arguments": {"city": "서울"}}}


@tool_habit
@pytest.mark.parametrize("as_text", [False, True], ids=["arguments as object", "arguments as text"])
def test_tools_and_tool_calls_are_those_of_transformers(habit: Habit, as_text: bool) -> None:
    call = {**CALL, "function": {"name": "weather", "arguments": '{"city": "서울"}'}} if as_text else CALL
    turns = [
        user("날씨?"),
        assistant(None, tool_calls=[call]),
        {"role": "tool", "tool_call_id": "call12345", "name": "weather", "content": '{"t": -3}'},
        assistant("영하 3도."),
    ]
    as_object = [turns[0], assistant(None, tool_calls=[CALL]), *turns[2:]]
    tokenizer = habit.tokenizer()
    answers = trained_answers(habit, examples_of(habit, turns, tools=[TOOL]))
    asked = prompt_text(habit, as_object[:1], tools=[TOOL])
    whole = str(tokenizer.apply_chat_template(as_object[:2], tools=[TOOL], tokenize=False))
    header = asked.removesuffix("<think>\n</think>\n")  # a closed block, which the turn itself does not have
    assert '{"name": "weather", ' in whole[len(header) :] and whole.startswith(header)
    last = prompt_text(habit, as_object[:3], tools=[TOOL])
    assert answers == [
        (tokenizer(asked, add_special_tokens=False)["input_ids"], whole[len(header) :].removesuffix("\n")),
        (tokenizer(last, add_special_tokens=False)["input_ids"], habit.written(None, "영하 3도.")),
    ]


@every_habit
def test_tools_that_the_template_does_not_write_are_an_error(habit: Habit) -> None:
    if habit.tools:
        return
    with pytest.raises(UserError, match=r"data:1: the row offers tools, and .* does not write them"):
        examples_of(habit, [user("a"), assistant("b")], tools=[TOOL])
    with pytest.raises(UserError, match=r"data:1: the model's chat template (does not write|refuses)"):
        examples_of(habit, [user("a"), assistant(None, tool_calls=[CALL])])


@every_habit
@pytest.mark.parametrize("key", ["weight", "loss", "train"])
def test_turn_with_weight_zero_is_not_trained(habit: Habit, key: str) -> None:
    turns = [user("a"), assistant("wrong", **{key: 0}), user("b"), assistant("right", **{key: 1})]
    (example,) = examples_of(habit, turns)
    check(habit, example, prompt_text(habit, turns[:3]), habit.written(None, "right"))
    turns[3][key] = False
    (left_out,) = examples_of(habit, turns)
    assert isinstance(left_out, LeftOut) and left_out.reason == NOT_TRAINED


@pytest.mark.parametrize("skip_bad", [False, True])
def test_row_without_a_trained_turn_is_not_over_the_limit(skip_bad: bool, tmp_path: Path) -> None:
    """`over_limit` "error" is about lengths: such a row is left out and counted."""
    turns = [[user("a"), assistant("no", weight=0)], [user("b"), assistant("yes")]]
    rows = [Row(number, {"messages": row}, f"data:{number}") for number, row in enumerate(turns, start=1)]
    source = Rows("data", "weights", ("messages",), lambda: iter(rows))
    rules = TokenRules(cutoff_len=4096, over_limit="error")
    tokenizer = HABITS[0].tokenizer()
    store = build_store(source, CHAT, None, tokenizer, rules, tmp_path, skip_bad=skip_bad)
    assert [(row.row, row.reason) for row in store.left_out] == [(1, NOT_TRAINED)]
    assert store.counts.examples == 1


@pytest.mark.parametrize(
    ("train_on", "marks", "trained"),
    [
        ("all", (None, None), "oneTWO"),
        ("last", (None, None), "TWO"),
        ("marked", (1, None), "one"),
        ("marked", (None, True), "TWO"),
        ("all", (0, None), "TWO"),
        ("last", (1, 0), None),
        ("marked", (None, None), None),
    ],
)
def test_train_on_chooses_the_turns(train_on: Any, marks: tuple[Any, Any], trained: str | None) -> None:
    rules = TokenRules(cutoff_len=4096, train_on=train_on)
    turns = [user("a"), assistant("one", weight=marks[0]), user("b"), assistant("TWO", weight=marks[1])]
    (result,) = examples_of(HABITS[0], turns, rules)
    if trained is None:
        assert isinstance(result, LeftOut) and result.reason == NOT_TRAINED
        return
    assert isinstance(result, Example)
    text = HABITS[0].tokenizer().decode(result.token_ids[result.trained])
    assert text.replace("<|im_end|>", "") == trained


def test_system_column_is_the_system_turn() -> None:
    turns = [user("a"), assistant("b")]
    (example,) = examples_of(HABITS[0], turns, system="Be true.")
    (same,) = examples_of(HABITS[0], [{"role": "system", "content": "Be true."}, *turns])
    assert isinstance(example, Example) and isinstance(same, Example)
    assert example.token_ids.tolist() == same.token_ids.tolist()
    for column in ("system", "system_prompt"):
        with pytest.raises(UserError, match=f'the column "{column}" has another system prompt; keep one'):
            examples_of(HABITS[0], [{"role": "system", "content": "x"}, *turns], **{column: "Be true."})


def test_special_text_in_data_is_text_and_the_template_s_own_marks_are_tokens() -> None:
    habit = next(habit for habit in HABITS if habit.name == "block of special tokens")
    tokenizer = habit.tokenizer()
    think = tokenizer.convert_tokens_to_ids("<think>")
    turns = [user("Write <think> and <|im_end|>."), assistant("<think>\nR\n</think>\n\n<|im_end|> it is")]
    (example,) = examples_of(habit, turns)
    assert isinstance(example, Example)
    ids = example.token_ids.tolist()
    prompt, answer = ids[: example.prompt_length], ids[example.prompt_length :]
    assert think not in prompt and answer[0] == think
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert answer.count(end) == 1 and answer[-1] == end
    assert example.special_text == 3  # <think> and two <|im_end|>


@thinking_habit
def test_generated_text_is_split_into_reasoning_and_answer(habit: Habit) -> None:
    tokenizer = habit.tokenizer()
    tokens = answer_tokens(tokenizer, RULES)
    prompt = prompt_text(habit, [user("2+2?")])
    end = tokenizer.decode([max(tokens.stop_ids)])
    for reasoning, content in ((None, "4"), ("Two and\ntwo", "It is 4.\n\nYes."), ("R", "a <b> c")):
        text = habit.written(reasoning, content)
        for stop in tokens.stop_ids:
            text = text.removesuffix(tokenizer.decode([stop]))
        text = text.removesuffix(tokens.shape.trail)
        is_open = tokens.shape.opens(prompt)
        parts = tokens.shape.parts(text, is_open=is_open)
        assert (parts.reasoning or None, parts.content) == (reasoning, content), end
        # while it grows, nothing is shown that the whole does not have
        for size in range(len(text)):
            growing = tokens.shape.parts(text[:size], is_open=is_open, growing=True)
            assert content.startswith(growing.content)
            assert (reasoning or "").startswith(growing.reasoning or "")


@pytest.mark.parametrize(
    ("name", "argument", "block"),
    [
        ("prompt closes the block, no turn has one", "enable_thinking", ("<think>", "</think>")),
        (
            "prompt closes a channel of thought, no turn has one",
            "thinking",
            ("<|channel>thought", "<channel|>"),
        ),
    ],
)
def test_the_cure_of_a_closed_block_switches_thinking_on(
    name: str, argument: str, block: tuple[str, str]
) -> None:
    (habit,) = [habit for habit in HABITS if habit.name == name]
    turns = [user("2+2?"), assistant("4", reasoning_content=REASONING)]
    with pytest.raises(UserError) as error:
        examples_of(habit, turns)
    (problem,) = error.value.problems
    assert f"switch thinking on with --chat_template_kwargs '{{{argument}: true}}'" in problem.cure
    (example,) = examples_of(habit, turns, replace(RULES, chat_template_kwargs={argument: True}))
    assert isinstance(example, Example)
    written = habit.tokenizer().decode(example.token_ids[example.trained])
    end = habit.written(None, "")
    assert written == f"{block[0]}\n{REASONING}\n{block[1]}\n\n4{end}"
    prompt = prompt_text(habit, turns[:1], **{argument: True})
    ids = habit.tokenizer()(prompt, add_special_tokens=False)["input_ids"]
    assert example.token_ids[: example.prompt_length].tolist() == ids


@thinking_habit
def test_a_block_in_the_middle_of_an_answer_loses_nothing(habit: Habit) -> None:
    """Templates that split at the closing tag would drop what stands before it."""
    content = "Well. <think>hm</think> B."
    (example,) = examples_of(habit, [user("A or B?"), assistant(content)])
    assert isinstance(example, Example)
    written = habit.tokenizer().decode(example.token_ids[example.trained])
    assert written == habit.written(None, content)


@thinking_habit
def test_a_block_that_is_never_closed_is_an_error(habit: Habit) -> None:
    if "</think>" not in habit.template:
        pytest.skip("the template does not know this block")
    with pytest.raises(UserError, match=r"data:1: .* begins with <think> and has no </think>"):
        examples_of(habit, [user("A or B?"), assistant("<think>hm, B.")])


def test_reasoning_that_ends_as_an_answer_does_is_refused() -> None:
    habit = next(habit for habit in HABITS if habit.name == "reasoning between marks, ended as an answer is")
    turns = [user("2+2?"), assistant("4", reasoning_content="R")]
    with pytest.raises(
        UserError, match=r"ends reasoning with <\|end\|>, which also ends an answer"
    ) as raised:
        examples_of(habit, turns)
    assert raised.value.problems[0].place == "data:1"
    assert "--thinking drop" in str(raised.value)
    (dropped,) = examples_of(habit, turns, TokenRules(cutoff_len=4096, thinking="drop"))
    check(habit, dropped, prompt_text(habit, turns[:1]), habit.written(None, "4"))
