"""What a row's text holds that its owner may not see: hidden characters, size, mixed scripts, a twin elsewhere."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b
from unicodedata import name, normalize

from yeonma.data.template import Rendered

LARGE_BYTES = 10_000_000

DECOMPOSED, ZERO_WIDTH, LARGE, SPACED_APART = 1, 2, 4, 8
"""Bits of `Notes.flags`. SPACED_APART: a pair whose two answers differ in nothing but white space."""

SCRIPTS = (
    "Latin",
    "Hangul",
    "Han",
    "Kana",
    "Cyrillic",
    "Greek",
    "Arabic",
    "Hebrew",
    "Devanagari",
    "Thai",
    "other",
)
"""By the bits of `Notes.scripts`, lowest first."""

# Conjoining Jamo. Compatibility Jamo, which people type by themselves, are no decomposed syllables.
_JAMO = re.compile("[\u1100-\u11ff\ua960-\ua97f\ud7b0-\ud7ff]")
# The joiners are part of emoji and of many scripts' spelling: only those beside Latin or Hangul serve no purpose.
_JOINED = "[\\x00-\u024f\uac00-\ud7a3]"
_ZERO_WIDTH = re.compile(
    f"[\u200b\u2060\ufeff\u180e]|(?<={_JOINED})[\u200c\u200d]|[\u200c\u200d](?={_JOINED})"
)
# How Unicode's names of letters begin, where that is not the script's own name.
_BEGINNINGS = {
    "FULLWIDTH": "Latin",
    "HALFWIDTH": "Kana",
    "CJK": "Han",
    "HIRAGANA": "Kana",
    "KATAKANA": "Kana",
}


@dataclass(frozen=True, slots=True)
class Notes:
    """Of one row, as the template uses it."""

    flags: int
    scripts: int
    """Whose letters stand in the answers."""
    digest: int
    """64 bits of the texts but for white space, letter case and normal form: equal for rows that say the same."""
    prompt_digest: int
    """The same of what is asked alone."""


def notes_of(rendered: Rendered) -> Notes:
    """Looks at the data alone, not at the template's frame."""
    asked = [piece.text for turn in rendered.turns for piece in turn.pieces if piece.field is not None]
    answers = [piece.text for piece in rendered.answer if piece.field is not None]
    if not rendered.answer:  # a turn list
        turns = [("".join([piece.text for piece in turn.pieces]), turn.role) for turn in rendered.turns]
        answers = [text for text, role in turns if role == "assistant"]
        asked = [text for text, _ in turns[:-1]]
    texts = [*asked, *answers]
    return Notes(
        flags=_flags(texts),
        scripts=_scripts(answers),
        digest=digest_of(texts),
        prompt_digest=digest_of(asked),
    )


def digest_of(texts: Iterable[str]) -> int:
    """64 bits of texts, each with white space collapsed, letter case folded and in one normal form."""
    found = blake2b(digest_size=8)
    for text in texts:
        plain = text if text.isascii() else normalize("NFC", text)
        found.update(" ".join(plain.split()).casefold().encode())
        found.update(b"\x1f")
    return int.from_bytes(found.digest(), "little")


def script_names(bits: int) -> tuple[str, ...]:
    """The names of a `Notes.scripts`."""
    return tuple(script for number, script in enumerate(SCRIPTS) if bits >> number & 1)


def _flags(texts: Iterable[str]) -> int:
    flags = size = 0
    for text in texts:
        if text.isascii():
            size += len(text)
            continue
        size += len(text.encode())
        flags |= DECOMPOSED if _JAMO.search(text) else 0
        flags |= ZERO_WIDTH if _ZERO_WIDTH.search(text) else 0
    return flags | (LARGE if size >= LARGE_BYTES else 0)


def _scripts(texts: Iterable[str]) -> int:
    found = 0
    for letter in {letter for text in texts for letter in set(text)}:
        found |= _script(letter)
    return found


@lru_cache(maxsize=4096)
def _script(letter: str) -> int:
    if not letter.isalpha():
        return 0
    beginning = name(letter, "").split(" ")[0].split("-")[0]
    script = _BEGINNINGS.get(beginning, beginning.capitalize())
    return 1 << SCRIPTS.index(script if script in SCRIPTS else "other")
