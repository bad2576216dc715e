"""The numbers that settings accept."""

from __future__ import annotations

from dataclasses import dataclass

from yeonma.messages import later, tr


@dataclass(frozen=True, kw_only=True)
class Range:
    """The numbers that a setting accepts. Infinity and NaN are never among them."""

    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    below: float | None = None
    limit: int | None = None
    """What no run can mean: a billion steps of a millisecond take eleven days. Named only where a number is above."""

    def __contains__(self, number: float) -> bool:
        return (
            float("-inf") < number < float("inf")
            and (self.at_least is None or number >= self.at_least)
            and (self.above is None or number > self.above)
            and (self.at_most is None or number <= self.at_most)
            and (self.below is None or number < self.below)
        )

    def in_words(self) -> list[str]:
        """Its ends, the lower one first: `of at least 0`, `below 1`. At most two."""
        ends = (
            (later("of at least {number}"), self.at_least),
            (later("above {number}"), self.above),
            (later("at most {number}"), self.at_most),
            (later("below {number}"), self.below),
        )
        return [tr(form, number=end) for form, end in ends if end is not None]


COUNT = {"range": Range(at_least=1, limit=10**9)}
ROWS = {"range": Range(at_least=1, limit=10**12)}
BATCH = {"range": Range(at_least=1, limit=10**6)}
EPOCHS = {"range": Range(above=0, limit=10**6)}
TOKENS = {"range": Range(at_least=1, limit=10**8)}
RANK = {"range": Range(at_least=1, limit=65536)}
REQUESTS = {"range": Range(at_least=1, at_most=256)}
PROCESSES = {"range": Range(at_least=1, limit=1024)}
BYTES = {"range": Range(at_least=1, limit=10**15)}
NOT_NEGATIVE = {"range": Range(at_least=0, limit=10**9)}
POSITIVE = {"range": Range(above=0, limit=10**9)}
FRACTION = {"range": Range(at_least=0, at_most=1)}
DECAY = {"range": Range(at_least=0, below=1)}
RATIO = {"range": Range(at_least=1, limit=10**6)}
SEED = {"range": Range(at_least=0, at_most=2**32 - 1)}
PORT = {"range": Range(at_least=0, at_most=65535)}
