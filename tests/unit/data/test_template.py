from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from yeonma.data.rows import Row
from yeonma.data.template import (
    BUILT_IN,
    Rendered,
    RenderedTurn,
    Template,
    answer_text,
    field_lengths,
    load_template,
    prompt_text,
    shorten,
)
from yeonma.data.template_syntax import Piece
from yeonma.errors import UserError

SIMPLE = "### Article:\n{document}\n\n### Title:\n{title}\n"
TURNS = "[system]\nBe brief.\n\n[user]\n{document}\n\n[assistant]\n{title}\n"
quick = settings(max_examples=100, deadline=None, derandomize=True)


def row(**values: object) -> Row:
    return Row(41, values, "train.jsonl:41")


def row_of(values: dict[str, object]) -> Row:
    return Row(41, values, "train.jsonl:41")


def parse_error(text: str, name: str = "t.txt") -> str:
    with pytest.raises(UserError) as caught:
        Template.parse(text, name)
    return str(caught.value)


def row_error(
    template: Template,
    values: dict[str, object],
    columns: dict[str, str] | None = None,
    with_answer: bool = True,
) -> str:
    with pytest.raises(UserError) as caught:
        template.render(row_of(values), columns, with_answer=with_answer)
    return str(caught.value)


def texts(rendered: Rendered) -> tuple[str, str]:
    return prompt_text(rendered), answer_text(rendered)


def messages_of(*roles: str) -> list[dict[str, str]]:
    return [{"role": role, "content": f"{role} {index}"} for index, role in enumerate(roles, start=1)]


# Parsing


def test_last_field_is_the_answer_and_all_text_before_it_the_prompt() -> None:
    rendered = Template.parse(SIMPLE).render(row(document="It rained.", title="Rain"))
    assert rendered == Rendered(
        turns=(
            RenderedTurn(
                None,
                (
                    Piece("### Article:\n", None),
                    Piece("It rained.", "document"),
                    Piece("\n\n### Title:\n", None),
                ),
            ),
        ),
        answer=(Piece("Rain", "title"),),
        variant=0,
        answer_role=None,
    )


def test_answer_includes_text_after_its_field_but_not_final_newlines() -> None:
    rendered = Template.parse("Q: {q}\nA: {a}.\nDone. \n\n\n").render(row(q="1", a="2"))
    assert texts(rendered) == ("Q: 1\nA: ", "2.\nDone. ")


@pytest.mark.parametrize(
    "text",
    [
        "\ufeff" + SIMPLE,
        SIMPLE.replace("\n", "\r\n"),
        SIMPLE.replace("\n", "\r"),
        SIMPLE.rstrip(),
        SIMPLE + "\n\n",
    ],
)
def test_template_ignores_byte_order_mark_line_endings_and_final_newlines(text: str) -> None:
    assert Template.parse(text, "other name") == Template.parse(SIMPLE)
    assert Template.parse(text).text == SIMPLE


def test_templates_with_different_text_are_unequal() -> None:
    assert Template.parse(SIMPLE) != Template.parse(SIMPLE.replace("###", "##"))


def test_doubled_braces_are_literal_braces() -> None:
    rendered = Template.parse('{{"q": "{q}"}} {{{a}}}').render(row(q="x", a="y"))
    assert texts(rendered) == ('{"q": "x"} {', "y}")


def test_field_names_allow_any_script_and_inner_spaces() -> None:
    template = Template.parse("{본문 내용} {कहानी} {sub-title_2}: {제목}")
    assert template.fields == {"본문 내용", "कहानी", "sub-title_2", "제목"}
    assert template.answer_field == "제목"
    values = {"본문 내용": "가", "कहानी": "나", "sub-title_2": "다", "제목": "라"}
    assert texts(template.render(row_of(values))) == ("가 나 다: ", "라")


def test_prompt_may_repeat_a_field() -> None:
    template = Template.parse("{a} {b} {a}: {c}")
    assert template.variants[0].prompt_fields == ("a", "b")
    assert texts(template.render(row(a="1", b="2", c="3"))) == ("1 2 1: ", "3")


@pytest.mark.parametrize(
    ("text", "place", "what"),
    [
        ("x {q} \n }: {a}", "t.txt:2:2", '"}" without an opening "{"'),
        ("한글 {q", "t.txt:1:4", '"{" is not closed'),
        ("{q\n}: {a}", "t.txt:1:1", '"{" is not closed'),
        ("{q{r}: {a}", "t.txt:1:1", '"{" is not closed'),
        ("{q}}: {a}", "t.txt:1:4", '"}" without an opening "{"'),
    ],
)
def test_an_unbalanced_brace_is_an_error_with_line_and_column(text: str, place: str, what: str) -> None:
    assert parse_error(text).splitlines()[0].startswith(f"{place}: {what}")


@pytest.mark.parametrize(
    "field", ["a.b", "a[0]", "0", "a!r", "a:>3", "", " ", '"title": "x"', "a,b", "%a%", "''.__class__"]
)
def test_field_that_is_not_a_plain_name_is_an_error(field: str) -> None:
    message = parse_error("Q {" + field + "}: {a}")
    assert message.startswith(f't.txt:1:3: "{{{field}}}" is not a field')


def test_an_expression_in_doubled_braces_is_plain_text() -> None:
    rendered = Template.parse("{{''.__class__}} {q}: {a}").render(row(q="x", a="y"))
    assert prompt_text(rendered) == "{''.__class__} x: "


@pytest.mark.parametrize(
    ("char", "shown"), [("\u200b", "U+200B"), ("\ufeff", "U+FEFF"), ("\u00a0", "U+00A0")]
)
def test_invisible_character_in_a_field_name_is_reported_by_code_point(char: str, shown: str) -> None:
    message = parse_error("{docu" + char + "ment}: {title}")
    assert (
        message == f't.txt:1:1: the field name "docu{shown}ment" contains an invisible character; delete it'
    )


def test_spaces_at_the_edges_of_a_field_name_are_an_error_with_the_fix() -> None:
    assert parse_error("{ q }: {a}") == 't.txt:1:1: "{ q }" begins or ends with a space; write "{q}"'


def test_brace_errors_are_reported_together_up_to_a_limit() -> None:
    assert [line.split(": ")[0] for line in parse_error("{a.b}\n}\n{x").splitlines()] == [
        "t.txt:1:1",
        "t.txt:2:1",
        "t.txt:3:1",
    ]
    lines = parse_error("}\n" * 20 + "{q}: {a}").splitlines()
    assert len(lines) == 9
    assert lines[-1] == "t.txt: 12 more such problems"


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("", "no field"),
        ("Write a title.", "no field"),
        ("Article: {{document}}", 'no field; write "{document}", with single braces'),
        ("{title}", "an answer but no prompt"),
        ("\n \n{title}", "an answer but no prompt"),
        ("[assistant]\n{title}", "an answer but no prompt"),
        (SIMPLE + "---\n", "no field"),
    ],
)
def test_a_template_without_a_field_or_without_a_prompt_is_an_error(text: str, what: str) -> None:
    assert what in parse_error(text)


def test_prompt_without_fields_is_accepted() -> None:
    assert texts(Template.parse("Tell a joke: {joke}").render(row(joke="Ha."))) == ("Tell a joke: ", "Ha.")


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("{document}\n\nlike {title}\n{title}", "t.txt:3:6"),
        ("[user]\n{title}\n[assistant]\n{title}", "t.txt:2:1"),
        (SIMPLE + "---\n{title}: {title}", "t.txt:7:1"),
    ],
)
def test_answer_field_in_the_prompt_is_an_error(text: str, place: str) -> None:
    assert parse_error(text).startswith(f'{place}: the prompt shows "title", which is the answer')


def test_a_prompt_field_mapped_to_the_answers_column_is_an_error() -> None:
    template = Template.parse(SIMPLE)
    message = row_error(template, {"title": "T"}, {"document": "title"})
    assert '"title" is the answer and also the prompt field "document"' in message


def test_variants_with_different_answer_fields_are_an_error() -> None:
    message = parse_error("Q {q}: {a}\n---\nQ {q}: {b}")
    assert message.startswith('t.txt:3:8: this variant ends with the field "b", the first one with "a"')


@pytest.mark.parametrize(("char", "shown"), [("\0", "U+0000"), ("\udc80", "U+DC80")])
def test_nul_and_lone_surrogates_in_a_template_are_errors(char: str, shown: str) -> None:
    assert parse_error("{q}\nx" + char + "{a}").startswith(f"t.txt:2:2: {shown}")


# Turns


def test_lines_with_roles_split_a_template_into_turns() -> None:
    rendered = Template.parse(TURNS).render(row(document="It rained.", title="Rain"))
    assert rendered.turns == (
        RenderedTurn("system", (Piece("Be brief.", None),)),
        RenderedTurn("user", (Piece("It rained.", "document"),)),
    )
    assert rendered.answer == (Piece("Rain", "title"),)
    assert rendered.answer_role == "assistant"
    with pytest.raises(ValueError, match="chat template"):
        prompt_text(rendered)


def test_turn_template_allows_earlier_turns_and_text_around_the_answer() -> None:
    text = "[user]\nOne?\n[assistant]\n1\n[user]\n{q}\n\n[assistant]\n\nTitle: {a}!\n"
    rendered = Template.parse(text).render(row(q="Two?", a="2"))
    assert [turn.role for turn in rendered.turns] == ["user", "assistant", "user"]
    assert answer_text(rendered) == "Title: 2!"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("Hi\n[user]\n{q}\n[assistant]\n{a}", "t.txt:1: text before the first turn"),
        ("[user]\n{q}\n[assistant]\nx {a}\n[user]\n{b}", "t.txt:5: the last turn is [user]"),
        ("[user]\n{q}\n[assistant]\nYes.", "t.txt:3: the last turn has no field, the answer"),
        ("[turns]\n{a} {b}", "t.txt:1: [turns] takes exactly one field and no other text"),
        ("[turns]\n{a}\n[user]\nx", "t.txt:3: the last turn is [user]"),
        ("[system]\n\n[user]\n{q}\n[assistant]\n{a}", "t.txt:1: the [system] turn is empty"),
        (
            "[system]\nx\n[User]\n{q}\n[assistant]\n{a}",
            't.txt:3: "[User]" does not begin a turn; write "[user]"',
        ),
    ],
)
def test_invalid_turns_are_errors_with_their_line(text: str, message: str) -> None:
    assert parse_error(text).startswith(message)


def test_a_role_inside_a_line_is_plain_text() -> None:
    rendered = Template.parse("as [user] {q}\n [assistant] {a}").render(row(q="1", a="2"))
    assert texts(rendered) == ("as [user] 1\n [assistant] ", "2")


# Rendering


def test_field_values_are_inserted_unchanged() -> None:
    text = "{title} {{x}} {} } {\n---\n[user]\r\n\\n "
    assert texts(Template.parse(SIMPLE).render(row(document=text, title=text))) == (
        f"### Article:\n{text}\n\n### Title:\n",
        text,
    )


def test_columns_map_fields_and_the_answer() -> None:
    template = Template.parse(SIMPLE)
    values: dict[str, object] = {"body": "B", "headline": "H"}
    rendered = template.render(row_of(values), {"document": "body", "answer": "headline"})
    assert texts(rendered) == ("### Article:\nB\n\n### Title:\n", "H")
    assert rendered.turns[0].pieces[1].field == "document"
    assert rendered == template.render(row_of(values), {"document": "body", "title": "headline"})


def test_first_variant_whose_fields_all_have_text_is_used() -> None:
    alpaca = load_template("alpaca")
    for given_input, variant in [("2+2", 0), (" \n", 1), ("", 1), (None, 1)]:
        rendered = alpaca.render(row(instruction="Add.", input=given_input, output="4"))
        assert rendered.variant == variant
    assert alpaca.render(row(instruction="Add.", output="4")).variant == 1


def test_prompt_without_the_answer_equals_the_training_prompt() -> None:
    for values in [{"instruction": "Add.", "input": "2+2"}, {"instruction": "Add."}]:
        trained = load_template("alpaca").render(row_of({**values, "output": "4"}))
        for answer in [{}, {"output": None}, {"output": ""}, {"output": "4"}]:
            prompt = load_template("alpaca").render(row_of({**values, **answer}), with_answer=False)
            assert (prompt.turns, prompt.variant) == (trained.turns, trained.variant)
            assert prompt.answer == ()


def test_unknown_field_in_columns_is_an_error_except_chosen_and_rejected() -> None:
    message = row_error(load_template("title"), {"body": "B", "title": "T"}, {"documnt": "body"})
    assert message == '--columns: the template has no field "documnt"; did you mean "document"?'
    preferences = load_template("title").render(
        row(document="B", good="T"), {"chosen": "good", "rejected": "bad", "title": "good"}
    )
    assert answer_text(preferences) == "T"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"document": "d"}, 'field "title" is missing; the template uses document, title'),
        (
            {"document": "d", "titel": "t"},
            'field "title" is missing; the template uses document, title; did you mean "titel"?',
        ),
        ({"document": "d", "title": None}, 'field "title" is null; the template uses document, title'),
        ({"document": "d", "title": " \n"}, 'field "title" is empty; the template uses document, title'),
        (
            {"docu\u200bment": "d", "title": "t"},
            'field "document" is missing; the template uses document, title; did you mean "docuU+200Bment"?',
        ),
    ],
)
def test_missing_null_or_empty_field_is_reported_with_its_row(
    values: dict[str, object], message: str
) -> None:
    assert row_error(Template.parse(SIMPLE), values) == f"train.jsonl:41: {message}"


def test_missing_mapped_column_is_reported_with_its_field() -> None:
    message = row_error(Template.parse(SIMPLE), {"body": "B", "title": "T"}, {"document": "bodi"})
    assert 'field "document" (column "bodi") is missing' in message
    assert message.endswith('did you mean "body"?')


def test_row_that_fits_no_variant_is_reported_against_the_closest_one() -> None:
    message = row_error(load_template("orca"), {"system_prompt": "s", "response": "r"})
    assert message == 'train.jsonl:41: field "question" is missing; the template uses question, response'


def test_all_missing_fields_of_a_row_are_reported_together() -> None:
    lines = row_error(Template.parse(SIMPLE), {"x": "y"}).splitlines()
    assert len(lines) == 2
    assert 'field "document"' in lines[0]
    assert 'field "title"' in lines[1]
    assert len(row_error(Template.parse(SIMPLE), {"x": "y"}, with_answer=False).splitlines()) == 1


def test_a_number_fills_a_field_like_the_same_text() -> None:
    template = Template.parse(SIMPLE)
    number, text = (template.render(row_of({"document": 0, "title": title})) for title in (1.0, "1.0"))
    assert number == text == template.render(row_of({"document": "0", "title": "1.0"}))


names = st.text(st.characters(categories=["Lu", "Ll", "Lo"]), min_size=1, max_size=8)
frames = st.text(st.characters(exclude_categories=["Cs", "Cc"]) | st.just("\n"), max_size=20)


@quick
@given(st.lists(st.tuples(frames, names, st.text(min_size=1)), min_size=1, max_size=4))
def test_any_template_text_and_field_values_render_unchanged(parts: list[tuple[str, str, str]]) -> None:
    parts = [(frame, f"{name}{index}", data) for index, (frame, name, data) in enumerate(parts)]
    safe = [
        (frame, name, "".join(c for c in data if c != "\0" and not "\ud800" <= c <= "\udfff") + "x")
        for frame, name, data in parts
    ]
    text = "Q:" + "".join(
        frame.replace("{", "{{").replace("}", "}}") + "{" + name + "}" for frame, name, _ in safe
    )
    if any(line.rstrip() == "---" or line.strip().startswith("[") for line in text.split("\n")):
        return
    template = Template.parse(text)
    rendered = template.render(row_of({name: data for _, name, data in safe}))
    assert prompt_text(rendered) + answer_text(rendered) == "Q:" + "".join(f + d for f, _, d in safe)
    assert answer_text(rendered) == safe[-1][2]
    assert Template.parse(template.text) == template


# Built-in templates


@pytest.mark.parametrize("name", BUILT_IN)
def test_a_built_in_templates_text_parses_to_an_equal_template(name: str) -> None:
    template = load_template(name)
    assert template.name == name
    assert Template.parse(template.text, "template.txt") == template


def test_title_template_renders_the_korean_prompt() -> None:
    prompt = (
        "당신은 주어진 본문으로부터 적절한 제목을 생성하는 제목 생성기입니다. "
        "본문이 주어지면 제목을 만드세요."
        "\n\n### 본문:\n비가 왔다.\n\n### 제목:\n"
    )
    rendered = load_template("title").render(row(document="비가 왔다.", title="비"))
    assert texts(rendered) == (prompt, "비")


def test_alpaca_template_renders_the_original_prompts() -> None:
    alpaca = load_template("alpaca")
    assert prompt_text(alpaca.render(row(instruction="Add.", input="2+2", output="4"))) == (
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nAdd.\n\n### Input:\n2+2\n\n### Response:\n"
    )
    assert prompt_text(alpaca.render(row(instruction="Add.", input="", output="4"))) == (
        "Below is an instruction that describes a task. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nAdd.\n\n### Response:\n"
    )


def test_orca_template_accepts_either_system_column_or_none() -> None:
    orca = load_template("orca")
    frame = "### User:\nq\n\n### Assistant:\n"
    assert (
        prompt_text(orca.render(row(system="s", question="q", response="r"))) == f"### System:\ns\n\n{frame}"
    )
    assert prompt_text(orca.render(row(system_prompt="p", question="q", response="r"))) == (
        f"### System:\np\n\n{frame}"
    )
    assert texts(orca.render(row(system="", question="q", response="r"))) == (frame, "r")


def test_prompt_completion_template_adds_no_text() -> None:
    assert texts(load_template("prompt-completion").render(row(prompt="1+1=", completion=" 2"))) == (
        "1+1=",
        " 2",
    )


# Turn lists


def test_chat_template_reads_messages_or_conversations() -> None:
    chat = load_template("chat")
    assert chat.is_chat
    assert chat.fields == {"messages", "conversations"}
    expected = (
        RenderedTurn("user", (Piece("user 1", "turn 1"),)),
        RenderedTurn("assistant", (Piece("assistant 2", "turn 2"),)),
    )
    messages = chat.render(row(messages=messages_of("user", "assistant")))
    assert messages == Rendered(expected, (), 0, "assistant")
    sharegpt = [{"from": "human", "value": "user 1"}, {"from": "gpt", "value": "assistant 2"}]
    assert chat.render(row(messages=None, conversations=sharegpt)) == Rendered(expected, (), 1, "assistant")
    assert chat.render(row(dialog=messages_of("user", "assistant")), {"messages": "dialog"}).turns == expected


@pytest.mark.parametrize(
    ("roles", "trained", "prompt_turns"),
    [
        (("user", "assistant"), 2, 1),
        (("system", "user", "assistant", "user", "assistant"), 5, 4),
        (("user", "assistant", "user"), 3, 3),
        (("user", "assistant", "assistant"), 3, 2),
    ],
)
def test_prompt_of_a_turn_list_omits_its_final_assistant_turn(
    roles: tuple[str, ...], trained: int, prompt_turns: int
) -> None:
    chat, conversation = load_template("chat"), row(messages=messages_of(*roles))
    assert len(chat.render(conversation).turns) == trained
    assert (
        chat.render(conversation, with_answer=False).turns == chat.render(conversation).turns[:prompt_turns]
    )


@pytest.mark.parametrize(
    ("roles", "with_answer", "what"),
    [
        (("user",), True, "no assistant turn"),
        (("assistant",), True, "no turn before the answer"),
        (("assistant",), False, "no turn before the answer"),
        (("system",), False, "ends with a system turn"),
    ],
)
def test_turn_list_without_an_answer_or_a_prompt_is_an_error(
    roles: tuple[str, ...], with_answer: bool, what: str
) -> None:
    message = row_error(load_template("chat"), {"messages": messages_of(*roles)}, with_answer=with_answer)
    assert message.startswith("train.jsonl:41: ")
    assert what in message


def test_a_row_without_a_turn_list_is_an_error() -> None:
    assert row_error(load_template("chat"), {"message": []}) == (
        'train.jsonl:41: field "messages" is missing; the template uses messages or conversations; '
        'did you mean "message"?'
    )


@pytest.mark.parametrize(
    "text", ["[turns]\n{messages} {x}", "[turns]\nHello {messages}", "[turns]\n{a}\n---\nQ {q}: {a}"]
)
def test_turn_list_template_with_other_text_or_fields_is_an_error(text: str) -> None:
    assert "turn" in parse_error(text)


# Loading


def test_template_loads_from_a_built_in_name_a_file_or_a_text(tmp_path: Path) -> None:
    path = tmp_path / "my.txt"
    path.write_bytes(b"\xef\xbb\xbf" + SIMPLE.replace("\n", "\r\n").encode())
    assert load_template(str(path)) == load_template(SIMPLE)
    assert load_template(str(path)).name == str(path)
    assert load_template("title").answer_field == "title"
    assert load_template(r"{q}\n{a}").text == "{q}\\n{a}\n"
    assert load_template("long " * 2000 + "{a}").answer_field == "a"


def test_unknown_template_is_an_error_with_suggestions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my-title.txt").write_text(SIMPLE)
    for setting, suggestion in [("alpacca", "alpaca"), ("my-titel.txt", "my-title.txt")]:
        with pytest.raises(UserError, match=f'no file is named "{setting}".*did you mean "{suggestion}"'):
            load_template(setting)
    for setting in ["qqq", "nowhere/at/all.txt", "", "x" * 5000]:
        with pytest.raises(UserError, match="no built-in template"):
            load_template(setting)
    with pytest.raises(UserError, match="is not a file"):
        load_template(str(tmp_path))


def test_template_file_that_is_not_utf8_is_an_error_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "cp949.txt"
    path.write_bytes("Article:\n본문 {document}: {title}".encode("cp949"))
    with pytest.raises(UserError, match=r"cp949\.txt:2: is not UTF-8; save the template as UTF-8"):
        load_template(str(path))


# Shortening


def shortened(text: str, keep: int, side: str) -> str:
    rendered = Template.parse("Q: {q}. {a}").render(row(q=text, a="!"))
    return shorten(rendered, "q", keep, side).turns[0].pieces[1].text


@pytest.mark.parametrize(
    ("side", "results"),
    [
        ("end", ["", "a", "ab", "abc", "abcd", "abcde", "abcde"]),
        ("start", ["", "e", "de", "cde", "bcde", "abcde", "abcde"]),
        ("middle", ["", "a", "ae", "abe", "abde", "abcde", "abcde"]),
    ],
)
def test_a_field_is_shortened_from_the_given_side(side: str, results: list[str]) -> None:
    assert [shortened("abcde", keep, side) for keep in range(7)] == results


def test_shortening_changes_every_occurrence_of_the_named_field_only() -> None:
    rendered = Template.parse("{q}, {r}, {q}: {a}").render(row(q="long text", r="rest", a="answer"))
    short = shorten(rendered, "q", 4, "end")
    assert texts(short) == ("long, rest, long: ", "answer")
    assert field_lengths(rendered) == {"q": 9, "r": 4}
    assert field_lengths(short) == {"q": 4, "r": 4}
    assert short.variant == rendered.variant


def test_assistant_turns_are_not_among_the_fields_to_shorten() -> None:
    rendered = load_template("chat").render(
        row(messages=messages_of("system", "user", "assistant", "user", "assistant"))
    )
    assert field_lengths(rendered) == {"turn 1": 8, "turn 2": 6, "turn 4": 6}
    assert shorten(rendered, "turn 4", 2, "end").turns[3].pieces == (Piece("us", "turn 4"),)


@pytest.mark.parametrize(
    ("text", "keep", "side", "result"),
    [
        ("xe\u0301y", 2, "end", "x"),
        ("xe\u0301y", 3, "end", "xe\u0301"),
        ("xe\u0301y", 2, "start", "y"),
        ("ae\u0301xe\u0301b", 4, "middle", "ab"),
        ("x\u1112\u1161\u11ab", 3, "end", "x"),  # a syllable in decomposed Jamo
        ("x\u1112\u1161\u11aby", 2, "start", "y"),
        ("x\ud558\u11aby", 2, "end", "x"),  # an open syllable with its trailing consonant apart
        ("\ud558\ud558\ud558", 2, "end", "\ud558\ud558"),
        ("ㄱㄴㄷ", 2, "end", "ㄱㄴ"),
        ("x\U0001f469\u200d\U0001f680y", 3, "end", "x"),
    ],
)
def test_shortening_does_not_split_grapheme_clusters(text: str, keep: int, side: str, result: str) -> None:
    assert shortened(text, keep, side) == result


@quick
@given(st.text("ae\u0301\u1112\u1161\u11ab\ud558 ", max_size=12), st.sampled_from(["end", "start", "middle"]))
def test_shortened_length_never_exceeds_the_limit_and_grows_with_it(text: str, side: str) -> None:
    lengths = [len(shortened(text + "x", keep, side)) for keep in range(len(text) + 2)]
    assert all(length <= keep for keep, length in enumerate(lengths))
    assert lengths == sorted(lengths)
    assert lengths[-1] == len(text) + 1


def test_shortening_with_a_wrong_side_or_field_is_an_error() -> None:
    rendered = Template.parse(SIMPLE).render(row(document="d", title="t"))
    with pytest.raises(ValueError, match="side"):
        shorten(rendered, "document", 1, "left")
    with pytest.raises(ValueError, match='no field "title"'):
        shorten(rendered, "title", 1, "end")
