"""Why rows are left out is stored and compared in English, and shown in the language of help."""

from __future__ import annotations

import pickle

import pytest

from yeonma.data.rows import Row
from yeonma.data.words import row_place
from yeonma.errors import Problem, UserError
from yeonma.messages import in_english, tr, translated
from yeonma.tokenization.bad_rows import bad_row
from yeonma.tokenization.example import EQUAL, LeftOut

ENGLISH = 'field "q" is text, not a list of turns'


@pytest.fixture
def korean(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("YEONMA_LANG", "ko")


def message() -> str:
    return tr('field "{column}" is {value}, not a list of turns', column="q", value="text")


def test_message_keeps_its_english(korean: None) -> None:
    assert message() != ENGLISH
    assert in_english(message()) == in_english(pickle.loads(pickle.dumps(message()))) == ENGLISH


def test_reason_of_a_bad_row_is_english(korean: None) -> None:
    row = Row(3, {}, "t.jsonl:3")
    left = bad_row(row, UserError([Problem(message(), row.place)]))
    assert (left.reason, left.fault, type(left.reason)) == (ENGLISH, ENGLISH, str)
    assert "q" in translated(left.reason) and "턴" in translated(left.reason)


def test_reasons_are_translated_when_shown(korean: None) -> None:
    assert LeftOut(1, row_place("t", 1), tr(EQUAL)).reason == EQUAL
    assert translated(EQUAL) == tr(EQUAL) != EQUAL
    assert translated("no message of Yeonma {x}") == "no message of Yeonma {x}"


def test_english_stays_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("YEONMA_LANG", "en")
    assert message() == translated(ENGLISH) == ENGLISH
    assert type(message()) is str
