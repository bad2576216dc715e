"""Tokens that a run adds: read from a list or a file, added to the tokenizer, refused where they say nothing new."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.runs import characters
from yeonma.errors import UserError
from yeonma.tokenization.cache import tokenizer_identity
from yeonma.tokenization.new_tokens import add_new_tokens, read_new_tokens


def problem(*tokens: str) -> str:
    with pytest.raises(UserError) as raised:
        add_new_tokens(characters(), read_new_tokens(list(tokens)) or [])
    return str(raised.value)


def test_file_has_one_token_a_line_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "tokens.txt"
    path.write_bytes("\ufeff<a>\r\n\r\n <b> \n뜨거움".encode())
    assert read_new_tokens(str(path)) == ["<a>", " <b> ", "뜨거움"]
    assert read_new_tokens(None) is None


def test_new_token_is_one_id_wherever_its_text_stands() -> None:
    tokenizer, plain = characters(), characters()
    ids = add_new_tokens(tokenizer, ["<hot>", "<hotter>", "tion"])
    assert ids == (len(plain), len(plain) + 1, len(plain) + 2)
    text = "x<hotter>y<hot>station."
    found = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert [number for number in found if number >= len(plain)] == [ids[1], ids[0], ids[2]]
    assert tokenizer.decode(found) == text
    assert tokenizer.decode(found, skip_special_tokens=True) == text
    assert tokenizer_identity(tokenizer) != tokenizer_identity(plain)


def test_order_decides_the_ids_and_nothing_else_does() -> None:
    one, other = characters(), characters()
    assert add_new_tokens(one, ["<a>", "<b>"]) == add_new_tokens(other, ["<a>", "<b>"])
    assert tokenizer_identity(one) == tokenizer_identity(other)
    assert add_new_tokens(characters(), []) == ()


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (["a", "<x>"], 'new_tokens: "a" is one token already, with the id '),
        (["</s>"], 'new_tokens: "</s>" is one token already, with the id 2; leave it out'),
        (["<x>", "<x>"], 'new_tokens: "<x>" stands there twice; give it once'),
        ([" "], 'new_tokens: " " is blank; leave it out'),
        ([], "new_tokens: there are none; give a file with one token a line, or a list"),
    ],
)
def test_token_that_says_nothing_new_is_an_error(tokens: list[str], message: str) -> None:
    assert message in problem(*tokens)


def test_file_that_cannot_be_read_is_an_error_with_a_cure(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot be read .*; give a file with one token a line, or a list"):
        read_new_tokens(str(tmp_path / "none.txt"))
    (tmp_path / "latin.txt").write_bytes(b"<a>\n\xe9\n")
    with pytest.raises(UserError, match="not UTF-8, at byte 5; save it as UTF-8"):
        read_new_tokens(str(tmp_path / "latin.txt"))
