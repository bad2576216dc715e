"""The numbers that a setting takes."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Range:
    """The numbers that a setting takes. Infinity and NaN are never among them."""

    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    below: float | None = None

    def __contains__(self, number: float) -> bool:
        return (
            float("-inf") < number < float("inf")
            and (self.at_least is None or number >= self.at_least)
            and (self.above is None or number > self.above)
            and (self.at_most is None or number <= self.at_most)
            and (self.below is None or number < self.below)
        )

    def __str__(self) -> str:
        ends = (
            ("of at least", self.at_least),
            ("above", self.above),
            ("at most", self.at_most),
            ("below", self.below),
        )
        return " and ".join(f"{words} {number}" for words, number in ends if number is not None)


COUNT = {"range": Range(at_least=1)}
NOT_NEGATIVE = {"range": Range(at_least=0)}
POSITIVE = {"range": Range(above=0)}
SHARE = {"range": Range(at_least=0, at_most=1)}
DECAY = {"range": Range(at_least=0, below=1)}
SEED = {"range": Range(at_least=0, at_most=2**32 - 1)}
PORT = {"range": Range(at_least=0, at_most=65535)}
