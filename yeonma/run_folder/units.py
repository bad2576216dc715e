"""What a step counts, in words: examples, pairs or labelled answers, as a Task names them in `units`."""

from __future__ import annotations

from yeonma.messages import counted, later, tr

UNITS = (later("examples"), later("pairs"), later("labelled answers"))
"""Shown by `tr`."""
ONE = {"examples": tr("example"), "pairs": tr("pair"), "labelled answers": tr("labelled answer")}


def counted_units(number: int, units: str) -> str:
    """`1 pair`, `2 pairs`."""
    if units == "pairs":
        return counted(number, "pair")
    return counted(number, "labelled answer") if units == "labelled answers" else counted(number, "example")
