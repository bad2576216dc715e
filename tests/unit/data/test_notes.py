"""Notes about a row: hidden characters, size, scripts, and digests that ignore white space and case."""

from __future__ import annotations

from unicodedata import normalize

import numpy as np
import pytest

from yeonma.data.rows import Row
from yeonma.data.template import Template, load_template
from yeonma.data.text_checks import (
    DECOMPOSED,
    LARGE,
    LARGE_BYTES,
    SCRIPTS,
    ZERO_WIDTH,
    Notes,
    digest_of,
    notes_of,
    script_names,
)

PLAIN = Template.parse("Article:\n{document}\nTitle:\n{title}\n")


def noted(document: str = "An article.", title: str = "A title") -> Notes:
    return notes_of(PLAIN.render(Row(1, {"document": document, "title": title}, "rows:1")))


@pytest.mark.parametrize(
    ("text", "flags"),
    [
        ("A storm closed the harbour.", 0),
        ("서울의 아침 ㅋㅋ ㅠㅠ", 0),
        ("ｶﾞ 가나 é e\u0301", 0),
        (normalize("NFD", "서울"), DECOMPOSED),
        ("zero\u200bwidth", ZERO_WIDTH),
        ("서\u200d울", ZERO_WIDTH),
        ("word\u2060joiner", ZERO_WIDTH),
        ("👩\u200d👩\u200d👧 and ❤️\u200d🔥 and क्\u200dष", 0),
        (normalize("NFD", "서울") + "\ufeff", DECOMPOSED | ZERO_WIDTH),
    ],
)
def test_flags_say_what_cannot_be_seen(text: str, flags: int) -> None:
    assert noted(document=text).flags == flags
    assert noted(title=text).flags == flags


def test_a_large_row_is_one_whose_texts_have_ten_million_bytes_together() -> None:
    assert noted("가" * (LARGE_BYTES // 3 + 1), "b").flags == LARGE
    assert noted("a" * (LARGE_BYTES - 2), "b").flags == 0
    assert noted("a" * (LARGE_BYTES - 2), "bb").flags == LARGE


@pytest.mark.parametrize(
    ("title", "scripts"),
    [
        ("1, 2 and 3", ("Latin",)),
        ("42!", ()),
        ("AI 시대의 서울", ("Latin", "Hangul")),
        ("東京の夜", ("Han", "Kana")),
        ("ＡＢＣ ｶﾅ", ("Latin", "Kana")),
        ("Привет, мир", ("Cyrillic",)),
        ("ଓଡ଼ିଆ", ("other",)),
    ],
)
def test_scripts_are_those_of_the_answer_alone(title: str, scripts: tuple[str, ...]) -> None:
    assert script_names(noted("이 본문은 세지 않는다", title).scripts) == scripts
    assert set(scripts) <= set(SCRIPTS)


def test_a_turn_lists_answers_are_its_assistant_turns() -> None:
    turns = [
        {"role": "user", "content": "사과?"},
        {"role": "assistant", "content": "Apple."},
        {"role": "user", "content": "И груша?"},
        {"role": "assistant", "content": "Pear."},
    ]
    chat = load_template("chat")
    notes = notes_of(chat.render(Row(1, {"messages": turns}, "rows:1")))
    assert script_names(notes.scripts) == ("Latin",)
    other = [*turns[:3], {"role": "assistant", "content": "Another pear."}]
    changed = notes_of(chat.render(Row(1, {"messages": other}, "rows:1")))
    assert changed.prompt_digest == notes.prompt_digest
    assert changed.digest != notes.digest


def test_digests_see_through_space_case_and_normal_form_and_nothing_else() -> None:
    same = noted("A  storm\n\nclosed it.", "서울 아침")
    for document, title in (
        ("a storm closed IT. ", normalize("NFD", "서울 아침")),
        ("A storm closed it.", " 서울\t아침"),
    ):
        assert noted(document, title).digest == same.digest
    for document, title in (("A storm closed it", "서울 아침"), ("A storm closed it. 서울", "아침")):
        assert noted(document, title).digest != same.digest
    assert noted("A storm closed it.", "x").prompt_digest == same.prompt_digest
    assert digest_of(["ab", "c"]) != digest_of(["a", "bc"])
    assert 0 <= same.digest < 2**64
    assert np.array([same.digest], dtype="<u8")[0] == same.digest


def test_the_frame_has_no_part_in_it() -> None:
    row = Row(1, {"document": "x", "title": "y"}, "rows:1")
    other = Template.parse("본문\u200b: {document} →\n{title}")
    assert notes_of(other.render(row)) == notes_of(PLAIN.render(row))
