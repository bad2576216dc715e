"""Layers of a model by their numbers: `0-11`, `0-3,8,10-`. No torch here."""

from __future__ import annotations

import re
from collections.abc import Sequence

from yeonma.messages import later, tr

RANGES_EXAMPLE = later("numbers and ranges such as 0-3,8,10-")
LayerRange = tuple[int, int | None]
"""The first and the last layer, or None for the last one of the model."""


class InvalidRanges(ValueError):
    """A text that names no layers. `cure` says how to write them."""

    cure = tr("give {values}", values=tr(RANGES_EXAMPLE))


def layer_ranges(text: str) -> tuple[LayerRange, ...]:
    """The ranges that a value of `--lora_layers` names. Raises InvalidRanges."""
    found: list[LayerRange] = []
    for part in text.strip("[]").split(","):
        match = re.fullmatch(r"\s*(\d{1,6})\s*(-?)\s*(\d{0,6})\s*", part, re.ASCII)
        if match is None or (match[3] and not match[2]):
            what = (
                tr('"{part}" is no layer and no range', part=part.strip())
                if part.strip()
                else tr("a layer is missing")
            )
            raise InvalidRanges(what)
        first = int(match[1])
        last = int(match[3]) if match[3] else None if match[2] else first
        if last is not None and last < first:
            raise InvalidRanges(tr("{first}-{last} ends before it begins", first=first, last=last))
        found.append((first, last))
    return tuple(found)


def layers_in(ranges: Sequence[LayerRange], there: Sequence[int]) -> set[int]:
    """The layers among those `there` that the ranges name."""
    return {
        number
        for number in there
        if any(first <= number and (last is None or number <= last) for first, last in ranges)
    }


def layers_lacking(ranges: Sequence[LayerRange], there: Sequence[int]) -> list[str]:
    """The ranges that name a layer which is not `there`, as text."""
    return [
        f"{first}-" if last is None else str(first) if first == last else f"{first}-{last}"
        for first, last in ranges
        if not {first, first if last is None else last} <= set(there)
    ]


def as_ranges(numbers: Sequence[int]) -> str:
    """Numbers as ranges: 0-2, 5."""
    runs: list[list[int]] = []
    for number in sorted(set(numbers)):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)
