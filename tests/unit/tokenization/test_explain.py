"""Views show what is trained: ids, text, the positions of the fields, and what was cut."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from transformers import PreTrainedTokenizerFast

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


def text(view: View, *kinds: str) -> str:
    return "".join(span.text for span in view.text_spans if span.kind in kinds)


def squeezed(text: str) -> str:
    """The text without spaces, because some decoders add some."""
    return "".join(text.split())


def shortest(template: Template, make: Make) -> int:
    """A cutoff that takes about half of the document."""
    rendered = [template.render(ROW)]
    tokenizer = make()
    whole = max(
        len(outcome.token_ids)
        for outcome in encode(rendered, [ROW], tokenizer, TokenRules(cutoff_len=4096))
        if isinstance(outcome, Example)
    )
    times = sum(piece.text == DOCUMENT for turn in rendered[0].turns for piece in turn.pieces)
    return whole - times * len(tokenizer(DOCUMENT, add_special_tokens=False)["input_ids"]) // 2


@each_tokenizer
@each_template
def test_ids_and_masks_are_those_that_are_trained(template: Template, make: Make) -> None:
    for cutoff_len in (4096, shortest(template, make)):
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
def test_the_text_is_told_apart_without_loss(template: Template, make: Make, side: str) -> None:
    views, _ = views_of(template, make, cutoff_len=shortest(template, make), shrink_side=side)
    encoder = TextEncoder.of(make())
    assert any(view.cut_characters for view in views)
    for view in views:
        shown = "".join(span.text for span in view.text_spans if span.kind != "cut")
        assert shown == encoder.decode([token.id for token in view.tokens])
        assert shown == "".join(token.text for token in view.tokens)
        assert (
            text(view, "frame", "field", "answer", "end").endswith(view.answer)
            or view.tokens[-1].kind == "end"
        )
        assert squeezed(view.prompt) in squeezed(shown) or "<unk>" in shown
        trained = [span for span in view.text_spans if span.trained]
        assert {span.kind for span in trained} <= {"answer", "end"}
        assert view.answer.strip().startswith(trained[-2].text.strip() if trained[-1].kind == "end" else "")
        assert all(span.kind not in ("answer", "end") for span in view.text_spans if not span.trained)
        lost = [span for span in view.text_spans if span.kind == "cut"]
        assert all(len(span.text) == view.cut_characters for span in lost)
        for span in lost:  # what was cut, put back into its field, is the field
            around = [neighbour for neighbour in view.text_spans if neighbour.field == span.field]
            whole = "".join(neighbour.text for neighbour in around)
            assert "<unk>" in whole or squeezed(whole) in (squeezed(DOCUMENT), 2 * squeezed(DOCUMENT))
            first, last = around[0].kind, around[-1].kind
            assert {"end": last, "start": first}.get(side, "cut") == "cut"


@each_tokenizer
def test_every_character_belongs_to_a_token(make: Make) -> None:
    encoder = TextEncoder.of(make())
    for sample in ("폭풍이 항구를 😀 닫았고\n\n", " A storm,  closed\tit.", "é\u0301 漢字 x", ""):
        ids = encoder.batch([sample])[0]
        assert "".join(token_texts(ids, encoder)) == encoder.decode(ids)


def test_a_character_of_several_tokens_comes_with_the_last_of_them() -> None:
    encoder = TextEncoder.of(byte_level())
    ids = encoder.batch(["a😀b"])[0]
    texts = token_texts(ids, encoder)
    assert [text for text in texts if text] == ["a", "😀", "b"]
    assert texts.count("") == len(ids) - 3 > 0


def test_what_a_tokenizer_does_not_know_is_stepped_over() -> None:
    row = Row(1, {"document": "a 漢字 storm on Monday", "title": "漢 storm on Monday"}, "rows:1")
    template = load_template("title")
    (view,) = explain([template.render(row)], [row], unigram(), TokenRules(cutoff_len=400))
    assert [span.kind for span in view.text_spans] == ["frame", "field", "frame", "answer", "end"]
    assert "<unk>" in text(view, "field")
    assert text(view, "answer").startswith("<unk>")
    assert text(view, "end") == "</s>"


def test_a_text_that_does_not_come_back_leaves_prompt_and_answer_apart() -> None:
    row = Row(1, {"document": " ".join("漢字水火木金土日月年"), "title": "storm"}, "rows:1")
    template = load_template("title")
    rules = TokenRules(cutoff_len=70)
    (view,) = explain([template.render(row)], [row], unigram(), rules)
    assert [span.kind for span in view.text_spans if span.kind != "cut"] == [
        "prompt",
        "answer",
        "end",
    ]
    assert "".join(token.text for token in view.tokens) == text(view, "prompt", "answer", "end")


def test_a_row_that_is_left_out_shows_its_text_and_why() -> None:
    (view,) = views_of(load_template("title"), byte_level, cutoff_len=8)[0]
    assert view.tokens == ()
    assert view.left_out is not None
    assert "cutoff_len is 8" in view.left_out
    assert text(view, "field") == DOCUMENT
    assert view.prompt + view.answer == text(view, "frame", "field", "answer")
    assert not any(span.trained for span in view.text_spans)


def test_trained_inputs_are_shown_as_trained() -> None:
    (view,) = views_of(load_template("title"), byte_level, train_on_inputs=True)[0]
    assert [token.trained for token in view.tokens] == [False] + [True] * (len(view.tokens) - 1)
    assert {span.kind for span in view.text_spans if span.trained} == {
        "frame",
        "field",
        "answer",
        "end",
    }
