"""Notes about a row: hidden characters, size, scripts, and digests that ignore white space and case."""

from __future__ import annotations

from unicodedata import normalize

import numpy as np
import pytest

from yeonma.data.rows import Row
from yeonma.data.template import Template, load_template
from yeonma.data.text_checks import (
    CARRIAGE_RETURN,
    DECOMPOSED,
    INTEGER,
    LARGE,
    LARGE_BYTES,
    NO_BREAK_EDGE,
    NOTHING,
    SCRIPTS,
    WHOLE_FRACTION,
    ZERO_WIDTH,
    Notes,
    digest_of,
    notes_of,
    script_names,
)

PLAIN = Template.parse("Article:\n{document}\nTitle:\n{title}\n")


def notes_for(document: str = "An article.", title: str = "A title") -> Notes:
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
        ("one\r\ntwo", CARRIAGE_RETURN),
        ("one\rtwo", CARRIAGE_RETURN),
        ("하나\r\n둘", CARRIAGE_RETURN),
        ("one\ntwo", 0),
        ("\u00a0one", NO_BREAK_EDGE),
        ("one\u00a0", NO_BREAK_EDGE),
        ("one. \u202f\n", NO_BREAK_EDGE),
        ("one\u00a0\u200b", NO_BREAK_EDGE | ZERO_WIDTH),
        ("\u2007 하나", NO_BREAK_EDGE),
        ("10\u00a0km", 0),
        ("\u2003em spaces\u2003", 0),
    ],
)
def test_flags_report_invisible_characters(text: str, flags: int) -> None:
    assert notes_for(document=text).flags == flags
    assert notes_for(title=text).flags == flags


def test_a_long_run_of_no_break_spaces_takes_no_longer_than_reading_it() -> None:
    spaces = "\u00a0" * 1_000_000
    assert notes_for(f"a{spaces}b").flags == 0
    assert notes_for(f"a{spaces}").flags == NO_BREAK_EDGE


@pytest.mark.parametrize(
    ("answer", "flags"),
    [
        *(
            (word, NOTHING)
            for word in ("NaN", "nan", "None", "null", "NULL", "N/A", "#N/A", "<NA>", " NaN\n")
        ),
        *((word, 0) for word in ("none", "Nan", "NaN.", "null and void", "No", "-", "NA", "")),
        *((number, WHOLE_FRACTION) for number in ("1.0", "0.0", "-12.0", "1975.0\n")),
        *((number, INTEGER) for number in ("1", "-12", "007", " 3 ")),
        *((number, 0) for number in ("1.5", "1.00", "1,0", "v1.0", "1.0.0", "1e3", "٣", "1" * 41)),
    ],
)
def test_flags_report_answers_that_are_words_for_nothing_or_numbers(answer: str, flags: int) -> None:
    assert notes_for(title=answer or "x").flags == flags
    assert notes_for(document=answer or "x").flags == 0
    turns = [{"role": "user", "content": "nan"}, {"role": "assistant", "content": answer or "x"}]
    chat = load_template("chat").render(Row(1, {"messages": turns}, "rows:1"))
    assert notes_of(chat).flags == flags


def test_row_is_flagged_large_from_ten_million_bytes_of_text() -> None:
    assert notes_for("가" * (LARGE_BYTES // 3 + 1), "b").flags == LARGE
    assert notes_for("a" * (LARGE_BYTES - 2), "b").flags == 0
    assert notes_for("a" * (LARGE_BYTES - 2), "bb").flags == LARGE


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
def test_scripts_are_detected_in_the_answer_only(title: str, scripts: tuple[str, ...]) -> None:
    assert script_names(notes_for("이 본문은 세지 않는다", title).scripts) == scripts
    assert set(scripts) <= set(SCRIPTS)


def test_chat_notes_use_the_assistant_turns_as_the_answer() -> None:
    turns = [
        {"role": "user", "content": "사과?"},
        {"role": "assistant", "content": "Apple."},
        {"role": "user", "content": "И груша?"},
        {"role": "assistant", "content": "Pear."},
    ]
    chat = load_template("chat")
    notes = notes_of(chat.render(Row(1, {"messages": turns}, "rows:1")))
    assert script_names(notes.scripts) == ("Latin",)
    other_turns = [*turns[:3], {"role": "assistant", "content": "Another pear."}]
    changed = notes_of(chat.render(Row(1, {"messages": other_turns}, "rows:1")))
    assert changed.prompt_digest == notes.prompt_digest
    assert changed.digest != notes.digest


def test_digests_ignore_only_white_space_case_and_normal_form() -> None:
    notes = notes_for("A  storm\n\nclosed it.", "서울 아침")
    for document, title in (
        ("a storm closed IT. ", normalize("NFD", "서울 아침")),
        ("A storm closed it.", " 서울\t아침"),
    ):
        assert notes_for(document, title).digest == notes.digest
    for document, title in (("A storm closed it", "서울 아침"), ("A storm closed it. 서울", "아침")):
        assert notes_for(document, title).digest != notes.digest
    assert notes_for("A storm closed it.", "x").prompt_digest == notes.prompt_digest
    assert digest_of(["ab", "c"]) != digest_of(["a", "bc"])
    assert 0 <= notes.digest < 2**64
    assert np.array([notes.digest], dtype="<u8")[0] == notes.digest


def test_notes_ignore_the_text_of_the_template() -> None:
    row = Row(1, {"document": "x", "title": "y"}, "rows:1")
    other_template = Template.parse("본문\u200b: {document} →\n{title}")
    assert notes_of(other_template.render(row)) == notes_of(PLAIN.render(row))
