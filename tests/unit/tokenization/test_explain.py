"""A view shows what an example trains: ids, text, the positions of the fields, and the text that was cut."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from tests.chat_habits import HABITS, Habit
from tests.tokenizers import byte_level, sentencepiece_bpe, unigram
from yeonma.data.rows import Row
from yeonma.data.template import Rendered, Template, load_template
from yeonma.tokenization.example import Example, LeftOut, TokenRules
from yeonma.tokenization.example_encoder import encode
from yeonma.tokenization.explain import View, explain, token_texts
from yeonma.tokenization.text_encoder import TextEncoder

Make = Callable[[], PreTrainedTokenizerFast]
each_tokenizer = pytest.mark.parametrize(
    "make",
    [byte_level, sentencepiece_bpe, lambda: sentencepiece_bpe("always"), unigram],
    ids=["byte-level", "sentencepiece-first", "sentencepiece-always", "unigram"],
)
each_template = pytest.mark.parametrize(
    "template",
    [
        load_template("title"),
        Template.parse("Write a title for\n{document}\n(again: {document})\n\nTitle: {title}."),
        Template.parse("[system]\nWrite a title.\n[user]\n### {document} !\n[assistant]\n{title}\n"),
        load_template("chat"),
    ],
    ids=["title", "twice", "turns", "chat"],
)
each_side = pytest.mark.parametrize("side", ["end", "start", "middle"])

DOCUMENT = (
    "시의회는 오래된 도서관을 한 해 더 열어 두기로 했다. The town council voted to keep the old library open."
)
TITLE = "오래된 도서관 library"
TURNS = [
    {"role": "user", "content": "Write a title."},
    {"role": "assistant", "content": "Storm closes harbour"},
    {"role": "user", "content": DOCUMENT},
    {"role": "assistant", "content": TITLE},
]
ROW = Row(7, {"document": DOCUMENT, "title": TITLE, "messages": TURNS}, "rows.jsonl:7")


def views_of(template: Template, make: Make, **rules: object) -> tuple[list[View], list[Example | LeftOut]]:
    rendered: list[Rendered] = [template.render(ROW)]
    tokenizer, token_rules = make(), TokenRules(**{"cutoff_len": 4096, **rules})  # type: ignore[arg-type]
    return explain(rendered, [ROW], tokenizer, token_rules), encode(rendered, [ROW], tokenizer, token_rules)


def text_of(view: View, *kinds: str) -> str:
    return "".join(span.text for span in view.text_spans if span.kind in kinds)


def without_spaces(text: str) -> str:
    """The text without spaces, because some decoders add spaces."""
    return "".join(text.split())


def half_document_cutoff(template: Template, make: Make) -> int:
    """A `cutoff_len` that cuts about half of the document."""
    rendered = [template.render(ROW)]
    tokenizer = make()
    full_length = max(
        len(outcome.token_ids)
        for outcome in encode(rendered, [ROW], tokenizer, TokenRules(cutoff_len=4096))
        if isinstance(outcome, Example)
    )
    occurrences = sum(piece.text == DOCUMENT for turn in rendered[0].turns for piece in turn.pieces)
    return full_length - occurrences * len(tokenizer(DOCUMENT, add_special_tokens=False)["input_ids"]) // 2


@each_tokenizer
@each_template
def test_view_has_the_ids_and_masks_of_the_training_example(template: Template, make: Make) -> None:
    for cutoff_len in (4096, half_document_cutoff(template, make)):
        views, examples = views_of(template, make, cutoff_len=cutoff_len)
        assert len(views) == len(examples)
        for view, example in zip(views, examples, strict=True):
            assert isinstance(example, Example)
            assert [token.id for token in view.tokens] == example.token_ids.tolist()
            assert [token.trained for token in view.tokens] == example.trained.tolist()
            assert view.prompt_length == example.prompt_length
            assert view.cut_characters == example.cut_characters
            assert (view.row, view.place, view.left_out) == (7, "rows.jsonl:7", None)


@each_tokenizer
@each_template
@each_side
def test_text_spans_join_to_the_decoded_text_and_the_cut_fields(
    template: Template, make: Make, side: str
) -> None:
    views, _ = views_of(template, make, cutoff_len=half_document_cutoff(template, make), shrink_side=side)
    encoder = TextEncoder.of(make())
    assert any(view.cut_characters for view in views)
    for view in views:
        shown = "".join(span.text for span in view.text_spans if span.kind != "cut")
        assert shown == encoder.decode([token.id for token in view.tokens])
        assert shown == "".join(token.text for token in view.tokens)
        assert (
            text_of(view, "frame", "field", "answer", "end").endswith(view.answer)
            or view.tokens[-1].kind == "end"
        )
        assert without_spaces(view.prompt) in without_spaces(shown) or "<unk>" in shown
        trained = [span for span in view.text_spans if span.trained]
        assert {span.kind for span in trained} <= {"answer", "end"}
        assert view.answer.strip().startswith(trained[-2].text.strip() if trained[-1].kind == "end" else "")
        assert all(span.kind not in ("answer", "end") for span in view.text_spans if not span.trained)
        cut_spans = [span for span in view.text_spans if span.kind == "cut"]
        if view.dropped_turns:  # their texts are shown as cut, too
            continue
        assert all(len(span.text) == view.cut_characters for span in cut_spans)
        for span in cut_spans:  # the spans of a field, with the cut one, give the whole field
            field_spans = [other for other in view.text_spans if other.field == span.field]
            field_text = "".join(other.text for other in field_spans)
            assert "<unk>" in field_text or without_spaces(field_text) in (
                without_spaces(DOCUMENT),
                2 * without_spaces(DOCUMENT),
            )
            first, last = field_spans[0].kind, field_spans[-1].kind
            assert {"end": last, "start": first}.get(side, "cut") == "cut"


@each_tokenizer
def test_token_texts_join_to_the_decoded_text(make: Make) -> None:
    encoder = TextEncoder.of(make())
    for sample in ("폭풍이 항구를 😀 닫았고\n\n", " A storm,  closed\tit.", "é\u0301 漢字 x", ""):
        ids = encoder.batch([sample])[0]
        assert "".join(token_texts(ids, encoder)) == encoder.decode(ids)


def test_character_of_several_tokens_belongs_to_its_last_token() -> None:
    encoder = TextEncoder.of(byte_level())
    ids = encoder.batch(["a😀b"])[0]
    texts = token_texts(ids, encoder)
    assert [text for text in texts if text] == ["a", "😀", "b"]
    assert texts.count("") == len(ids) - 3 > 0


def test_unknown_tokens_keep_the_text_spans_apart() -> None:
    row = Row(1, {"document": "a 漢字 storm on Monday", "title": "漢 storm on Monday"}, "rows:1")
    template = load_template("title")
    (view,) = explain([template.render(row)], [row], unigram(), TokenRules(cutoff_len=400))
    assert [span.kind for span in view.text_spans] == ["frame", "field", "frame", "answer", "end"]
    assert "<unk>" in text_of(view, "field")
    assert text_of(view, "answer").startswith("<unk>")
    assert text_of(view, "end") == "</s>"


def test_text_that_cannot_be_aligned_has_only_prompt_answer_and_end() -> None:
    row = Row(1, {"document": " ".join("漢字水火木金土日月年"), "title": "storm"}, "rows:1")
    template = load_template("title")
    rules = TokenRules(cutoff_len=70)
    (view,) = explain([template.render(row)], [row], unigram(), rules)
    assert [span.kind for span in view.text_spans if span.kind != "cut"] == [
        "prompt",
        "answer",
        "end",
    ]
    assert "".join(token.text for token in view.tokens) == text_of(view, "prompt", "answer", "end")


def test_left_out_row_shows_its_text_and_the_reason() -> None:
    (view,) = views_of(load_template("title"), byte_level, cutoff_len=8)[0]
    assert view.tokens == ()
    assert view.left_out is not None
    assert "cutoff_len is 8" in view.left_out
    assert text_of(view, "field") == DOCUMENT
    assert view.prompt + view.answer == text_of(view, "frame", "field", "answer")
    assert not any(span.trained for span in view.text_spans)


def test_train_on_inputs_marks_prompt_tokens_as_trained() -> None:
    (view,) = views_of(load_template("title"), byte_level, train_on_inputs=True)[0]
    assert [token.trained for token in view.tokens] == [False] + [True] * (len(view.tokens) - 1)
    assert {span.kind for span in view.text_spans if span.trained} == {
        "frame",
        "field",
        "answer",
        "end",
    }


TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}
CALL = {"type": "function", "function": {"name": "look", "arguments": {"at": "x"}}}
WITH_CALLS = [habit for habit in HABITS if habit.tools and habit.reasoning]


def spans_of(
    habit: Habit, turns: list[dict[str, Any]], **columns: object
) -> list[list[tuple[str, str, bool]]]:
    """(kind, text, trained) of the spans of each of a conversation's examples, without frame."""
    row = Row(1, {"messages": turns, **columns}, "rows.jsonl:1")
    views = explain([load_template("chat").render(row)], [row], habit.tokenizer(), TokenRules(4096))
    return [
        [(span.kind, span.text, span.trained) for span in view.text_spans if span.kind != "frame"]
        for view in views
    ]


@pytest.mark.parametrize("habit", WITH_CALLS, ids=lambda habit: habit.name)
def test_tools_reasoning_and_calls_are_kinds_of_their_own(habit: Habit) -> None:
    call = {"role": "assistant", "content": None, "reasoning_content": "I must look.", "tool_calls": [CALL]}
    answer = {"role": "assistant", "content": "a", "reasoning_content": "It is seen."}
    turns = [
        {"role": "user", "content": "q"},
        {**call, "weight": 0},
        {"role": "tool", "content": "r"},
        answer,
    ]
    (spans,) = spans_of(habit, turns, tools=[TOOL])
    (tools,) = [span for span in spans if span[0] == "tools"]
    assert "# Tools" in tools[1] and '"name": "look"' in tools[1] and not tools[2]
    assert [span for span in spans if span[0] == "reasoning"] == [
        ("reasoning", "I must look.", False),
        ("reasoning", "It is seen.", True),
    ]
    written = '<tool_call>\n{"name": "look", "arguments": {"at": "x"}}\n</tool_call>'
    assert [span for span in spans if span[0] == "call"] == [("call", written, False)]
    (trained,) = spans_of(habit, [turns[0], call, *turns[2:]], tools=[TOOL])
    assert [span for span in trained if span[0] == "call"] == [("call", written, True)]
    assert [span[2] for span in trained if span[0] == "reasoning"] == [True, True]


def test_calls_of_an_earlier_exchange_are_found_where_their_reasoning_is_dropped() -> None:
    call = {"role": "assistant", "content": None, "reasoning_content": "I must look.", "tool_calls": [CALL]}
    asked = {"role": "user", "content": "q"}
    (spans,) = spans_of(WITH_CALLS[0], [asked, {**call, "weight": 0}, asked, {**call, "tool_calls": [CALL]}])
    assert [trained for kind, _, trained in spans if kind == "call"] == [False, True]
    assert [trained for kind, _, trained in spans if kind == "reasoning"] == [True]


def test_assistant_turns_that_are_not_trained_are_a_kind_of_their_own() -> None:
    asked = {"role": "user", "content": "q"}
    first, last = ({"role": "assistant", "content": text} for text in ("first", "last"))
    (spans,) = spans_of(HABITS[0], [asked, {**first, "weight": 0}, asked, last])
    assert ("untrained", "first", False) in spans and ("answer", "last", True) in spans
    (spans,) = spans_of(HABITS[0], [asked, first, asked, last])
    assert {kind for kind, _, _ in spans} == {"field", "answer", "end"}


def test_spans_and_tokens_have_the_weights_of_the_example() -> None:
    asked = {"role": "user", "content": "q"}
    half, whole = ({"role": "assistant", "content": text} for text in ("half", "whole"))
    row = Row(1, {"messages": [asked, {**half, "weight": 0.5}, asked, whole]}, "rows.jsonl:1")
    rendered = [load_template("chat").render(row)]
    (view,) = explain(rendered, [row], HABITS[0].tokenizer(), TokenRules(4096))
    (example,) = encode(rendered, [row], HABITS[0].tokenizer(), TokenRules(4096))
    assert isinstance(example, Example) and example.weights is not None
    assert view.weights == tuple(example.weights.tolist()) == tuple(token.weight for token in view.tokens)
    assert [(span.text, span.weight) for span in view.text_spans if span.kind == "answer"] == [
        ("half", 0.5),
        ("whole", 1.0),
    ]
    (plain,) = explain([load_template("chat").render(ROW)], [ROW], byte_level(), TokenRules(4096))
    assert plain.weights is None
