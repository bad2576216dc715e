"""Checks for what is easily overlooked in a row: invisible characters, size, scripts, repeated texts, answers that
programs write for a missing value."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b
from unicodedata import name, normalize

from yeonma.data.template import Rendered
from yeonma.data.turns import Turn
from yeonma.messages import later

LARGE_BYTES = 10_000_000

DECOMPOSED, ZERO_WIDTH, LARGE, SPACED_APART = 1, 2, 4, 8
CARRIAGE_RETURN, NO_BREAK_EDGE, NOTHING, WHOLE_FRACTION, INTEGER = 16, 32, 64, 128, 256
WITHOUT_SYSTEM, WITH_SYSTEM = 512, 1024
TRIMMED, NOT_GIVEN_BACK = 2048, 4096
FIRST_KEY = 1 << 16
"""Bits of `Notes.flags`. SPACED_APART: a pair whose two answers differ only in white space. NO_BREAK_EDGE: a text that
begins or ends with a no-break space. NOTHING, WHOLE_FRACTION and INTEGER are of whole answers: a word for nothing, such
as `NaN`; a whole number written as a fraction, such as `1.0`; a whole number. WITHOUT_SYSTEM and WITH_SYSTEM: a
conversation without or with a system turn. TRIMMED: the chat template removes blanks at an answer's edges.
NOT_GIVEN_BACK: the token ids do not decode to the row's texts. From FIRST_KEY on, the bits are those of
`tokenization/chat_remarks.py`."""

SCRIPTS = (
    later("Latin"),
    later("Hangul"),
    later("Han"),
    later("Kana"),
    later("Cyrillic"),
    later("Greek"),
    later("Arabic"),
    later("Hebrew"),
    later("Devanagari"),
    later("Thai"),
    later("other"),
)
"""In the order of the bits of `Notes.scripts`, lowest first. Shown by `tr`."""

# Conjoining Jamo. Compatibility Jamo, which people type as such, are not decomposed syllables.
_JAMO = re.compile("[\u1100-\u11ff\ua960-\ua97f\ud7b0-\ud7ff]")
# Joiners are part of emoji and of the spelling of many scripts. Next to Latin or Hangul they have no purpose.
_JOINED = "[\\x00-\u024f\uac00-\ud7a3]"
_ZERO_WIDTH = re.compile(
    f"[\u200b\u2060\ufeff\u180e]|(?<={_JOINED})[\u200c\u200d]|[\u200c\u200d](?={_JOINED})"
)
_NO_BREAK = "\u00a0\u2007\u202f"
# White space, and zero-width characters that hide it.
_AT_EDGES = " \t\r\n\f\v\u3000\u200b\u200c\u200d\u2060\ufeff" + _NO_BREAK
# What pandas, Python, JSON and spreadsheets write where there is no value.
_WORDS_FOR_NOTHING = frozenset(
    ("NaN", "nan", "NAN", "NaT", "None", "null", "NULL", "N/A", "n/a", "#N/A", "<NA>")
)
_NUMBER = re.compile(r"[+-]?[0-9]+(\.0)?")
_LONGEST_NUMBER = 40  # characters
# First words of Unicode's letter names that are not the script's name.
_SCRIPT_OF_WORD = {
    "FULLWIDTH": "Latin",
    "HALFWIDTH": "Kana",
    "CJK": "Han",
    "HIRAGANA": "Kana",
    "KATAKANA": "Kana",
}


@dataclass(frozen=True, slots=True)
class Notes:
    """Findings about one row's data, as the template uses it."""

    flags: int
    scripts: int
    """Scripts of the letters in the answers."""
    digest: int
    """64-bit digest of the texts regardless of white space, letter case and normal form."""
    prompt_digest: int
    """The same digest of the prompt alone."""


NO_NOTES = Notes(flags=0, scripts=0, digest=0, prompt_digest=0)
"""Of a row that has no text."""


def notes_of(rendered: Rendered) -> Notes:
    """The notes of a rendered row, without the template's frame."""
    prompt = [piece.text for piece in rendered.prompt_pieces if piece.field is not None]
    answers = [piece.text for piece in rendered.answer if piece.field is not None]
    if not rendered.answer:  # a turn list
        answers = [_said(turn.text, turn.turn) for turn in rendered.turns if turn.role == "assistant"]
        prompt = [_said(turn.text, turn.turn) for turn in rendered.turns[:-1]]
    elif rendered.answer_turn is not None:
        answers = [_said("".join(answers), rendered.answer_turn)]
    texts = [*prompt, *answers]
    return Notes(
        flags=_flags(texts) | _answer_flags(answers),
        scripts=_scripts(answers),
        digest=digest_of(texts),
        prompt_digest=digest_of(texts if rendered.is_text else prompt),
    )


def _said(text: str, turn: Turn | None) -> str:
    """All that a turn says: reasoning and tool calls before its text."""
    if turn is None:
        return text
    calls = [f"{call.name} {call.arguments}" for call in turn.tool_calls]
    return "\n".join([*([turn.reasoning] if turn.reasoning else []), *calls, text])


def digest_of(texts: Iterable[str]) -> int:
    """64-bit digest of texts, in NFC, with white space collapsed and case folded."""
    digest = blake2b(digest_size=8)
    for text in texts:
        plain = text if text.isascii() else normalize("NFC", text)
        digest.update(" ".join(plain.split()).casefold().encode())
        digest.update(b"\x1f")
    return int.from_bytes(digest.digest(), "little")


def script_names(bits: int) -> tuple[str, ...]:
    """The names of the bits of `Notes.scripts`."""
    return tuple(script for number, script in enumerate(SCRIPTS) if bits >> number & 1)


def _flags(texts: Iterable[str]) -> int:
    flags = size = 0
    for text in texts:
        if "\r" in text:
            flags |= CARRIAGE_RETURN
        if text.isascii():
            size += len(text)
            continue
        size += len(text.encode())
        flags |= DECOMPOSED if _JAMO.search(text) else 0
        flags |= ZERO_WIDTH if _ZERO_WIDTH.search(text) else 0
        if _NO_BREAK[0] in text or _NO_BREAK[1] in text or _NO_BREAK[2] in text:
            flags |= NO_BREAK_EDGE if _has_no_break_edge(text) else 0
    return flags | (LARGE if size >= LARGE_BYTES else 0)


def _has_no_break_edge(text: str) -> bool:
    without = text.strip(_AT_EDGES)
    start = text.find(without)
    return any(space in text[:start] or space in text[start + len(without) :] for space in _NO_BREAK)


def _answer_flags(answers: Iterable[str]) -> int:
    flags = 0
    for answer in answers:
        if len(answer) <= _LONGEST_NUMBER:
            plain = answer.strip()
            if plain in _WORDS_FOR_NOTHING:
                flags |= NOTHING
            elif number := _NUMBER.fullmatch(plain):
                flags |= WHOLE_FRACTION if number[1] else INTEGER
    return flags


def _scripts(texts: Iterable[str]) -> int:
    bits = 0
    for letter in {letter for text in texts for letter in set(text)}:
        bits |= _script(letter)
    return bits


@lru_cache(maxsize=4096)
def _script(letter: str) -> int:
    if not letter.isalpha():
        return 0
    first_word = name(letter, "").split(" ")[0].split("-")[0]
    script = _SCRIPT_OF_WORD.get(first_word, first_word.capitalize())
    return 1 << SCRIPTS.index(script if script in SCRIPTS else "other")
