"""What of a text is counted: words, Korean morphemes or characters, by the script of the wanted answers."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from typing import Any

UNSPACED = frozenset(
    {"CJK", "HIRAGANA", "KATAKANA", "THAI", "LAO", "KHMER", "MYANMAR", "TIBETAN", "BOPOMOFO"}
)
NOTABLE = 0.2  # a script's share of the letters from which on it decides

Split = Callable[[str], list[str]]


@dataclass(frozen=True)
class Units:
    """A way to take texts apart, its name, and sacrebleu's tokenizer that suits the same texts."""

    name: str
    split: Split
    bleu: str
    note: str = ""
    """What would have been better, and how to have it."""


def units_for(texts: Iterable[str]) -> Units:
    """Words where they stand apart; of Korean morphemes where kiwipiepy is installed, else characters; of scripts that
    are written without spaces characters."""
    scripts = Counter(_script(char) for text in texts for char in unicodedata.normalize("NFC", text))
    letters = sum(scripts.values()) - scripts[""]
    if scripts["HANGUL"] > NOTABLE * letters:
        if find_spec("kiwipiepy") is not None:
            return Units("morphemes (kiwipiepy)", morphemes, "char")
        note = "for ROUGE by morphemes: pip install kiwipiepy"
        return Units("characters", characters, "char", note)
    unspaced = sum(scripts[name] for name in UNSPACED)
    if unspaced > NOTABLE * letters:
        return Units("characters", characters, "zh" if scripts["CJK"] == unspaced else "char")
    return Units("words", words, "13a")


@cache
def _script(char: str) -> str:
    """The first word of a letter's name: LATIN, HANGUL, CJK; empty for what is no letter."""
    return unicodedata.name(char, " ").split(" ")[0] if char.isalpha() else ""


@cache
def _counts(char: str) -> bool:
    return unicodedata.category(char)[0] in "LMN"


def words(text: str) -> list[str]:
    """Runs of letters, marks and digits in lower case; of a text that has none, its characters."""
    text = unicodedata.normalize("NFC", text).lower()
    return "".join(char if _counts(char) else " " for char in text).split() or _visible(text)


def characters(text: str) -> list[str]:
    """Letters, marks and digits one by one; of a text that has none, whatever is visible."""
    text = unicodedata.normalize("NFC", text).lower()
    return [char for char in text if _counts(char)] or _visible(text)


def morphemes(text: str) -> list[str]:
    """Korean morphemes by kiwipiepy, without punctuation; foreign words and numbers are morphemes too."""
    text = unicodedata.normalize("NFC", text)
    found = [
        token.form.lower()
        for token in _kiwi().tokenize(text)
        if not token.tag.startswith("S") or token.tag in ("SL", "SH", "SN")
    ]
    return found or characters(text)


def _visible(text: str) -> list[str]:
    return [char for char in text if not char.isspace()]


@cache
def _kiwi() -> Any:
    from kiwipiepy import Kiwi

    return Kiwi()
