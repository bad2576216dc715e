"""Korean pages quote Yeonma's output in Korean, word for word as the catalogue has it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from string import Formatter

import pytest

from scripts.messages import read
from yeonma.messages import CATALOGUES

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([ROOT / "README.ko.md", *(ROOT / "docs").glob("*.ko.md")])
FENCED = re.compile(r"^( *)```\w*\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
SENTENCE = re.compile(r"`([^`]*(?:습니다|입니다|입니까\?|하세요))`")
"""Inline code that ends as a Korean sentence does."""
LEAST_OWN = 3
"""Letters that a message needs besides its values to be told by them."""


def quoted(page: str) -> Iterator[str]:
    """The lines that begin with `yeonma: `, and sentences in inline code, each divided into problem and cures."""
    for block in FENCED.finditer(page):
        lines = (line.strip() for line in block[2].splitlines())
        for line in lines:
            if line.startswith("yeonma: "):
                yield from line.removeprefix("yeonma: ").split("; ")
    for sentence in SENTENCE.findall(FENCED.sub("", page)):
        yield from " ".join(sentence.split()).removeprefix("yeonma: ").split("; ")


def pattern(translation: str) -> re.Pattern[str] | None:
    """Of a translation with some text of its own: the end of a text with any values at its places."""
    parts = list(Formatter().parse(translation))
    if sum(map(str.isalpha, "".join(literal for literal, _, _, _ in parts))) < LEAST_OWN:
        return None
    own = "".join(re.escape(literal) + (".+?" if name is not None else "") for literal, name, _, _ in parts)
    return re.compile(f"(?:^|: ){own}$")


@pytest.fixture(scope="module")
def said() -> list[re.Pattern[str]]:
    strings = (message.string for message in read(CATALOGUES / "ko.po") if message.id)
    texts = [text if isinstance(text, str) else text[0] for text in strings]
    return [found for text in texts if (found := pattern(text)) is not None]


def unsaid(page: str, said: list[re.Pattern[str]]) -> list[str]:
    return [quote for quote in quoted(page) if not any(found.search(quote) for found in said)]


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_quotes_are_what_the_catalogue_says(page: Path, said: list[re.Pattern[str]]) -> None:
    assert unsaid(page.read_text(encoding="utf-8"), said) == []


def test_another_wording_and_another_language_are_found(said: list[re.Pattern[str]]) -> None:
    known, unknown = "yeonma: --lr: {}; 여기서는 --learning_rate 설정입니다", "{} 설정입니다"
    page = "`a.csv: 열 구분자는 ;입니다`\n\n```\n{}\n```\n"
    assert unsaid(page.format(known.format("알 수 없는 설정입니다")), said) == []
    assert unsaid(page.format(known.format("모르는 설정입니다")), said) == ["--lr: 모르는 설정입니다"]
    assert unsaid(page.format(known.format("unknown setting")), said) == ["--lr: unknown setting"]
    assert unsaid(f"`{unknown.format('없는')}`", said) == ["없는 설정입니다"]
