"""What a person should hear about a data set before it is trained on: how many rows, and the first of them.

Told from the token store alone; the rows are not read again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from yeonma.data.text_checks import DECOMPOSED, LARGE, SPACED_APART, ZERO_WIDTH
from yeonma.tokenization.store import TokenStore

FIRST = 10


@dataclass(frozen=True)
class Remark:
    """`what`: which rows these are; `rows`: the first few of their numbers."""

    kind: str
    count: int
    rows: tuple[int, ...]
    what: str

    def __str__(self) -> str:
        return f"{self.what}: {self.count:,} ({listed(self.rows, self.count)})"


@dataclass(frozen=True)
class Repeats:
    """Row numbers, ascending, of rows that say what an earlier row has said (`again`), or ask what an earlier one has
    asked with another answer (`asked_again`)."""

    again: np.ndarray
    asked_again: np.ndarray


def remarks_of(store: TokenStore, positions: np.ndarray) -> list[Remark]:
    """Of the rows that the examples at `positions` come from; the worst to miss first."""
    rows = used_rows(store, positions)
    flags = store.row_flags[rows - 1]
    found = repeats_of(store, rows)
    special = np.unique(store.row_numbers[positions][store.special_text[positions] > 0])
    straddling = np.unique(store.row_numbers[positions][store.straddles[positions]])
    return [
        remark
        for remark in (
            rows_remark("large", rows[flags & LARGE > 0], "rows over 10 MB"),
            rows_remark(
                "decomposed",
                rows[flags & DECOMPOSED > 0],
                "rows with decomposed Hangul (NFD)",
            ),
            rows_remark(
                "spaced_apart",
                rows[flags & SPACED_APART > 0],
                "pairs whose chosen and rejected answers differ only in white space",
            ),
            rows_remark("zero_width", rows[flags & ZERO_WIDTH > 0], "rows with zero-width characters"),
            rows_remark("special_text", special, "rows with special-token texts, encoded as ordinary text"),
            rows_remark("repeated", found.again, "rows that stand more than once"),
            rows_remark(
                "asked_again",
                found.asked_again,
                "rows that ask what an earlier row asks, with another answer",
            ),
            rows_remark(
                "straddling", straddling, "rows whose answer would have joined its first token to the prompt"
            ),
        )
        if remark is not None
    ]


def overlap_of(
    train: tuple[TokenStore, np.ndarray], validation: tuple[TokenStore, np.ndarray]
) -> Remark | None:
    """The validation rows that say what a training row says. Each side is a store and positions in it."""
    train_rows, held_out = used_rows(*train), used_rows(*validation)
    seen = np.isin(validation[0].row_digests[held_out - 1], train[0].row_digests[train_rows - 1])
    return rows_remark("overlap", held_out[seen], "rows in both the training and the validation rows")


def used_rows(store: TokenStore, positions: np.ndarray) -> np.ndarray:
    """The numbers of the rows that some examples come from, ascending, each once."""
    return np.unique(store.row_numbers[positions])


def repeats_of(store: TokenStore, rows: np.ndarray) -> Repeats:
    again = _later(store.row_digests[rows - 1])
    asked_again = _later(store.prompt_digests[rows - 1]) & ~again
    return Repeats(rows[again], rows[asked_again])


def listed(numbers: Sequence[int], count: int | None = None, most: int = FIRST) -> str:
    """`rows 3, 17 and 5 more`; `count` of them in all."""
    count = len(numbers) if count is None else count
    shown = ", ".join(str(number) for number in numbers[:most])
    more = count - min(len(numbers), most)
    return f"{'row' if count == 1 else 'rows'} {shown}" + (f" and {more:,} more" if more else "")


def _later(digests: np.ndarray) -> np.ndarray:
    """Which digests an earlier one equals."""
    first = np.zeros(len(digests), dtype=bool)
    first[np.unique(digests, return_index=True)[1]] = True
    return ~first


def rows_remark(kind: str, rows: np.ndarray, what: str) -> Remark | None:
    """The remark on these rows, None where there are none."""
    return Remark(kind, len(rows), tuple(rows[:FIRST].tolist()), what) if len(rows) else None
