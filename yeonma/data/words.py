"""Parts of sentences: lists of names, and places of rows."""

from __future__ import annotations

from collections.abc import Iterable

from yeonma.messages import Said, in_english, tr


def any_of(names: Iterable[str]) -> str:
    """`a or b`."""
    return _joined(list(names), " or ", tr(" or "))


def all_of(names: Iterable[str]) -> str:
    """`a and b`."""
    return _joined(list(names), " and ", tr(" and "))


def with_more(names: Iterable[str], most: int) -> str:
    """The first `most` names, and how many more there are: `a, b and 3 more`."""
    known = list(names)
    shown, more = ", ".join(known[:most]), len(known) - most
    return tr("{names} and {more:,} more", names=shown, more=more) if more > 0 else shown


def field_name(column: str) -> str:
    """A column as a field of a row."""
    return tr('field "{column}"', column=column)


def row_place(name: str, number: int) -> str:
    """The place of a row in a file without lines: `train.parquet row 3`. Quick: every row has one."""
    english = f"{name} row {number}"
    return Said.of(_ROW.format(name=name, number=number), english) if isinstance(_ROW, Said) else english


_ROW = tr("{name} row {number}", name="{name}", number="{number}")


def _joined(names: list[str], english: str, joiner: str) -> str:
    return Said.of(joiner.join(names), english.join(str(in_english(name)) for name in names))
