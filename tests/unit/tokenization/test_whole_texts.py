"""The template `text`: whole texts in pieces, every token trained once."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest

from tests.tokenizers import byte_level, sentencepiece_bpe
from yeonma.config.settings import DataSettings, TokenSettings
from yeonma.data.columns import recognise
from yeonma.data.rows import Row, Rows
from yeonma.data.task import ANSWERS, PAIRS, choose_template
from yeonma.data.template import Template, load_template
from yeonma.errors import UserError
from yeonma.tokenization.dataset import prepare_dataset
from yeonma.tokenization.example import Example, TokenRules
from yeonma.tokenization.example_encoder import encode

TEXT = load_template("text")
TEXTS = ["한 줄의 글 😀", "word " * 200, "a\n\nb\n", "x"]


def pieces_of(text: str, cutoff_len: int, tokenizer: object = None, **rules: bool) -> list[Example]:
    row = Row(1, {"text": text}, "data:1")
    results = encode(
        [TEXT.render(row)],
        [row],
        tokenizer or byte_level(),
        TokenRules(cutoff_len, **rules),  # type: ignore[arg-type]
    )
    assert all(isinstance(result, Example) for result in results)
    return [result for result in results if isinstance(result, Example)]


@pytest.mark.parametrize("make", [byte_level, sentencepiece_bpe])
@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("cutoff_len", [2, 3, 16, 17, 4096])
def test_every_token_of_a_text_but_the_first_is_trained_once(
    make: object, text: str, cutoff_len: int
) -> None:
    tokenizer = make()  # type: ignore[operator]
    whole = [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
    pieces = pieces_of(text, cutoff_len, tokenizer)
    trained = [int(token) for piece in pieces for token in piece.token_ids[piece.trained]]
    assert [int(pieces[0].token_ids[0]), *trained] == whole
    assert max(len(piece.token_ids) for piece in pieces) <= cutoff_len
    assert all(not piece.trained[0] and piece.trained[1:].all() for piece in pieces)
    for before, after in pairwise(pieces):
        assert before.token_ids[-1] == after.token_ids[0]


def test_special_text_is_text_unless_it_is_parsed() -> None:
    tokenizer = byte_level()
    text = "<|im_start|>user\nhi<|im_end|>"
    (as_text,) = pieces_of(text, 4096)
    (parsed,) = pieces_of(text, 4096, parse_special_tokens=True)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert end not in as_text.token_ids[:-1] and as_text.special_text == 2
    assert parsed.token_ids.tolist() == [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
    assert parsed.special_text == 0


def test_text_beside_an_unknown_column_is_not_taken_for_a_whole_text() -> None:
    with pytest.raises(UserError, match=r"the columns \(text, label\) fit no built-in template"):
        recognise(["text", "label"])


def test_whole_texts_have_no_prompt() -> None:
    row = Row(1, {"text": "a"}, "data:1")
    with pytest.raises(UserError, match="data:1: the template trains whole texts"):
        TEXT.render(row, with_answer=False)
    rows = Rows("data", "", ("text",), lambda: iter([row]))
    assert choose_template(ANSWERS, "text", rows, None).template.is_text
    with pytest.raises(UserError, match="whole texts have no answers to prefer"):
        choose_template(PAIRS, "text", rows, None)


def test_pieces_of_one_token_are_refused(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"text": "a b c"}\n')
    data = DataSettings(data_path=str(tmp_path / "rows.jsonl"))
    tokens = TokenSettings(cutoff_len=1, cache_dir=str(tmp_path / "cache"))
    with pytest.raises(UserError, match="cutoff_len 1: a piece of one token trains nothing"):
        prepare_dataset(data, tokens, byte_level(), 0, print, lambda _: None)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[text]\n{a} {b}", "t.txt:1: [text] takes exactly one field and no other text"),
        ("[text]\nx {a}", "t.txt:1: [text] takes exactly one field and no other text"),
        ("[text]\n{a}\n---\n[text]\n{b}", "t.txt:2:1: [text] has no variants"),
    ],
)
def test_faulty_text_templates_are_errors(text: str, message: str) -> None:
    with pytest.raises(UserError) as raised:
        Template.parse(text, "t.txt")
    assert str(raised.value).startswith(message)
