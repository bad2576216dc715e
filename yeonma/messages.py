"""What Yeonma says to people, in the language of help.

The English sentences stand in the code, and those of other languages in gettext's catalogues under `catalogue/`:
`ko.po` to read and edit, `ko.mo` made of it. `python scripts/messages.py` brings both up to date with the code.

What is stored and compared stays English: keys, names, and what programs read.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache
from gettext import GNUTranslations, NullTranslations
from pathlib import Path
from string import Formatter
from typing import get_args

from yeonma.language import Language, language

CATALOGUES = Path(__file__).parent / "catalogue"


class Said(str):
    """A message in another language, with its `english`."""

    english: str

    @staticmethod
    def of(text: str, english: str) -> str:
        if text == english:
            return text
        said = Said(text)
        said.english = english
        return said


def in_english(text: object) -> object:
    """What `tr` and `counted` gave, in English, as it is stored and compared. Anything else as it is."""
    return text.english if isinstance(text, Said) else text


def tr(message: str, /, **values: object) -> str:
    """A message in the language of help, with values at its `{places}`, as `str.format` puts them there.

    `message` is a literal, so that a script finds it, or a name of what `later` got. Braces that stand for themselves
    are doubled.
    """
    if (name := language()) == "en":
        return message.format(**_in_english(values))
    return _said(_catalogue(name).gettext(message), message, values)


def counted(number: int, one: str, many: str = "", /, **values: object) -> str:
    """`1 row`, `1,200 rows`: a number with what it counts. many: for other numbers than 1, by default with an s."""
    number = int(number)  # NumPy's numbers are no plural forms
    english = forms(one, many)[number != 1]
    values = {"number": number, **values}
    if (name := language()) == "en":
        return english.format(**_in_english(values))
    return _said(_catalogue(name).ngettext(*forms(one, many), number), english, values)


def _said(translation: str, english: str, values: dict[str, object]) -> str:
    """Both with their values, of which those that are messages have an English form, too."""
    return Said.of(translation.format(**values), english.format(**_in_english(values)))


def _in_english(values: dict[str, object]) -> dict[str, object]:
    return {key: in_english(value) for key, value in values.items()}


def counted_in_english(number: int, one: str, many: str = "", /) -> str:
    """`counted`, in English for programs."""
    return forms(one, many)[int(number) != 1].format(number=number)


def forms(one: str, many: str = "") -> tuple[str, str]:
    """The messages of `counted` for 1 and for other numbers."""
    return f"{{number:,}} {one}", f"{{number:,}} {many or f'{one}s'}"


def later(message: str, /) -> str:
    """A message that is stored or compared in English, and shown with `tr(it)`."""
    return message


def translated(english: str) -> str:
    """What was stored in English, in the language of help, as far as the catalogue has it: the message with the most
    text of its own that fits. What stands at its places is translated too."""
    if not english or (name := language()) == "en":
        return english
    whole = _catalogue(name).gettext(english)
    if whole != english:
        return _filled(whole, {})
    fitting = (
        (pattern, text) for own, pattern, text in _patterns(name) if all(part in english for part in own)
    )
    for pattern, text in fitting:
        if found := pattern.fullmatch(english):
            values = {key: translated(value) for key, value in found.groupdict().items()}
            return _filled(text, values)
    return english


def _filled(text: str, values: dict[str, str]) -> str:
    """A translation with texts at its places."""
    parts = Formatter().parse(text)
    return "".join(
        f"{literal}{values.get(place, '')}" if place else literal for literal, place, _, _ in parts
    )


_LEAST_OWN, _LEAST_OF_COUNTS = 5, 3
"""Letters that a message needs besides its places to be told by them, and one that counts."""


@cache
def _patterns(name: str) -> list[tuple[list[str], re.Pattern[str], str]]:
    """(texts between places, expression, translation) of messages with places or braces. First those with most text,
    and of them those with the fewest places."""
    found: list[tuple[int, int, list[str], re.Pattern[str], str]] = []
    for key, text in getattr(_catalogue(name), "_catalog", {}).items():
        message, plural = (key[0], "s?") if isinstance(key, tuple) else (key, "")
        parts = list(Formatter().parse(message))
        places = [place for _, place, _, _ in parts if place]
        own = [literal for literal, _, _, _ in parts if literal]
        size = sum(map(str.isalpha, "".join(own)))
        least = _LEAST_OF_COUNTS if plural else _LEAST_OWN
        if (places or own != [message]) and size >= least and len(set(places)) == len(places):
            expression = "".join(_expressions(parts)) + plural
            found.append((-size, len(places), own, re.compile(expression, re.DOTALL), text))
    return [entry[2:] for entry in sorted(found, key=lambda entry: entry[:2])]


def _expressions(parts: list[tuple[str, str | None, str | None, str | None]]) -> Iterator[str]:
    for literal, place, spec, _ in parts:
        kind = r"[\dN.,]+" if spec and spec.startswith(",") else ".+?"  # N: see `fault_of`
        yield re.escape(literal) + (f"(?P<{place}>{kind})" if place else "")


def in_every_language(message: str, /, **values: object) -> list[str]:
    """What `tr` gives in each language, to find in a file that was written in any of them."""
    return [_catalogue(name).gettext(message).format(**values) for name in get_args(Language)]


@cache
def _catalogue(name: str) -> NullTranslations:
    path = CATALOGUES / f"{name}.mo"
    if not path.exists():  # English
        return NullTranslations()
    with path.open("rb") as file:
        return GNUTranslations(file)
