"""Splits of a data set and slices of them, such as `train[:1000]` or `train[10%:20%]+test`.

Their syntax and meaning are those of the library `datasets`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice

from yeonma.data.records import Record, Source
from yeonma.errors import UserError, brief
from yeonma.messages import tr

_PART = re.compile(
    r"(?P<name>\w+(?:\.\w+)*)"
    r"(?:\[(?:(?P<start>-?[\d_]+)(?P<start_percent>%)?)?:(?:(?P<stop>-?[\d_]+)(?P<stop_percent>%)?)?\])?"
    r"(?:\((?P<rounding>[^)]*)\))?",
)
ROUNDINGS = ("closest", "pct1_dropremainder")


@dataclass(frozen=True)
class SplitSlice:
    """A split, or the rows of it from `start` to before `stop`. Negative numbers count from the end."""

    name: str
    start: int | None = None
    stop: int | None = None
    in_percent: bool = False
    rounding: str = "closest"

    @property
    def is_whole(self) -> bool:
        return self.start is None and self.stop is None

    @property
    def needs_count(self) -> bool:
        """Whether its bounds depend on the number of rows of the split."""
        return not self.is_whole and (self.in_percent or min(self.start or 0, self.stop or 0) < 0)

    def bounds(self, count: int) -> tuple[int, int]:
        """The first row, from 0, and the one behind the last, of a split with `count` rows."""
        start = 0 if self.start is None else self._row(self.start, count)
        stop = count if self.stop is None else self._row(self.stop, count)
        start, stop = (max(count + bound, 0) if bound < 0 else min(bound, count) for bound in (start, stop))
        return start, max(start, stop)

    def _row(self, bound: int, count: int) -> int:
        if not self.in_percent:
            return bound
        return round(bound * count / 100) if self.rounding == "closest" else bound * (count // 100)


def parse_split(text: str) -> tuple[SplitSlice, ...]:
    """The splits and slices that `--data_split` names, joined by `+`. Raises UserError for anything else."""
    return tuple(_part(part) for part in re.split(r"\s*\+\s*", text.strip()))


def without_slices(text: str) -> str:
    """The splits that `--data_split` names, whole. A text that cannot be parsed stays as it is."""
    try:
        return "+".join(dict.fromkeys(part.name for part in parse_split(text)))
    except UserError:
        return text


def _part(text: str) -> SplitSlice:
    match = _PART.fullmatch(text)
    cure = tr("write train, train[:1000] or train[10%:20%], joined by + if there are several")
    if match is None:
        raise UserError(
            tr('"{text}" is no split and no slice of one', text=brief(text)), place="--data_split", cure=cure
        )
    try:
        start, stop = (int(match[name]) if match[name] else None for name in ("start", "stop"))
    except ValueError:  # 1__0, or thousands of digits
        raise UserError(
            tr('"{text}" has no valid numbers', text=brief(text)), place="--data_split", cure=cure
        ) from None
    in_percent = bool(match["start_percent"] or match["stop_percent"])
    rounding = match["rounding"]
    problem = ""
    if in_percent and max(abs(start or 0), abs(stop or 0)) > 100:
        problem, cure = tr("more than 100%"), tr("give -100% to 100%")
    elif rounding is not None and rounding not in ROUNDINGS:
        problem, cure = (
            tr('unknown rounding "{rounding}"', rounding=brief(rounding)),
            tr("give one of {roundings}", roundings=", ".join(ROUNDINGS)),
        )
    elif rounding is not None and not in_percent:
        problem, cure = tr("only slices in per cent are rounded"), tr("leave the rounding out")
    if problem:
        what = tr("{problem} in {text}", problem=problem, text=brief(text))
        raise UserError(what, place="--data_split", cure=cure)
    return SplitSlice(match["name"], start, stop, in_percent, rounding or "closest")


def sliced(sources: Sequence[Source], part: SplitSlice) -> Source:
    """The rows of a slice, as one source. Counts the rows of the sources first if the slice needs their number."""
    start, stop = part.start or 0, part.stop
    if part.needs_count:
        start, stop = part.bounds(sum(_count(source) for source in sources))
    elif stop is not None:
        stop = max(start, stop)

    def read() -> Iterator[Record]:
        return islice(chain.from_iterable(source.read() for source in sources), start, stop)

    return Source(read, tuple(note for source in sources for note in source.notes))


def _count(source: Source) -> int:
    return sum(1 for _ in source.read()) if source.count is None else source.count
