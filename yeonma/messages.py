"""What Yeonma says to people, in the language of help.

The English sentences stand in the code, and those of other languages in gettext's catalogues under `catalogue/`:
`ko.po` to read and edit, `ko.mo` made of it. `python scripts/messages.py` brings both up to date with the code.

What is stored and compared stays English: keys, names, and what programs read.
"""

from __future__ import annotations

from functools import cache
from gettext import GNUTranslations, NullTranslations
from pathlib import Path

from yeonma.language import language

CATALOGUES = Path(__file__).parent / "catalogue"


def tr(message: str, /, **values: object) -> str:
    """A message in the language of help, with values at its `{places}`, as `str.format` puts them there.

    `message` is a literal, so that a script finds it, or a name of what `later` got. Braces that stand for themselves
    are doubled.
    """
    return _catalogue(language()).gettext(message).format(**values)


def counted(number: int, one: str, many: str = "", /, **values: object) -> str:
    """`1 row`, `1,200 rows`: a number with what it counts. many: for other numbers than 1, by default with an s."""
    return _catalogue(language()).ngettext(*forms(one, many), number).format(number=number, **values)


def counted_in_english(number: int, one: str, many: str = "", /) -> str:
    """`counted`, in English for programs."""
    return forms(one, many)[number != 1].format(number=number)


def forms(one: str, many: str = "") -> tuple[str, str]:
    """The messages of `counted` for 1 and for other numbers."""
    return f"{{number:,}} {one}", f"{{number:,}} {many or f'{one}s'}"


def later(message: str, /) -> str:
    """A message that is stored or compared in English, and shown with `tr(it)`."""
    return message


@cache
def _catalogue(name: str) -> NullTranslations:
    path = CATALOGUES / f"{name}.mo"
    if not path.exists():  # English
        return NullTranslations()
    with path.open("rb") as file:
        return GNUTranslations(file)
