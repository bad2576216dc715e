"""Warnings about a data set before it is trained on: how many rows are affected, and the first of them.

They come from the token store; the rows are not read again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from yeonma.data.text_checks import DECOMPOSED, LARGE, SPACED_APART, ZERO_WIDTH
from yeonma.tokenization.store import TokenStore

FIRST = 10


@dataclass(frozen=True)
class DataWarning:
    """A warning about some rows. `what` describes them; `rows` are the first few of their numbers."""

    kind: str
    count: int
    rows: tuple[int, ...]
    what: str

    def __str__(self) -> str:
        return f"{self.what}: {self.count:,} ({listed(self.rows, self.count)})"


@dataclass(frozen=True)
class Repeats:
    """Row numbers, ascending, of rows that repeat an earlier row (`rows`), or its prompt with another answer
    (`prompts`)."""

    rows: np.ndarray
    prompts: np.ndarray


def data_warnings(store: TokenStore, positions: np.ndarray) -> list[DataWarning]:
    """Warnings about the rows of the examples at `positions`, the most serious first."""
    rows = used_rows(store, positions)
    flags = store.row_flags[rows - 1]
    repeats = repeats_of(store, rows)
    special = np.unique(store.row_numbers[positions][store.special_text[positions] > 0])
    straddling = np.unique(store.row_numbers[positions][store.straddles[positions]])
    return [
        warning
        for warning in (
            rows_warning("large", rows[flags & LARGE > 0], "rows over 10 MB"),
            rows_warning(
                "decomposed",
                rows[flags & DECOMPOSED > 0],
                "rows with decomposed Hangul (NFD)",
            ),
            rows_warning(
                "spaced_apart",
                rows[flags & SPACED_APART > 0],
                "pairs whose chosen and rejected answers differ only in white space",
            ),
            rows_warning("zero_width", rows[flags & ZERO_WIDTH > 0], "rows with zero-width characters"),
            rows_warning("special_text", special, "rows with special-token text, encoded as ordinary text"),
            rows_warning("repeated", repeats.rows, "rows that repeat an earlier row"),
            rows_warning(
                "asked_again",
                repeats.prompts,
                "rows that repeat an earlier prompt with another answer",
            ),
            rows_warning(
                "straddling", straddling, "rows whose answer's first token would have merged with the prompt"
            ),
        )
        if warning is not None
    ]


def overlap_of(
    train: tuple[TokenStore, np.ndarray], validation: tuple[TokenStore, np.ndarray]
) -> DataWarning | None:
    """The validation rows that repeat a training row. Each side is a store and positions in it."""
    train_rows, held_out = used_rows(*train), used_rows(*validation)
    seen = np.isin(validation[0].row_digests[held_out - 1], train[0].row_digests[train_rows - 1])
    return rows_warning("overlap", held_out[seen], "validation rows that are also training rows")


def used_rows(store: TokenStore, positions: np.ndarray) -> np.ndarray:
    """The row numbers of the examples at `positions`, ascending, each once."""
    return np.unique(store.row_numbers[positions])


def repeats_of(store: TokenStore, rows: np.ndarray) -> Repeats:
    repeated = _is_repeat(store.row_digests[rows - 1])
    repeated_prompt = _is_repeat(store.prompt_digests[rows - 1]) & ~repeated
    return Repeats(rows[repeated], rows[repeated_prompt])


def listed(numbers: Sequence[int], count: int | None = None, most: int = FIRST) -> str:
    """`rows 3, 17 and 5 more`, of `count` rows in all."""
    count = len(numbers) if count is None else count
    shown = ", ".join(str(number) for number in numbers[:most])
    more = count - min(len(numbers), most)
    return f"{'row' if count == 1 else 'rows'} {shown}" + (f" and {more:,} more" if more else "")


def _is_repeat(digests: np.ndarray) -> np.ndarray:
    """Which digests equal an earlier one."""
    first = np.zeros(len(digests), dtype=bool)
    first[np.unique(digests, return_index=True)[1]] = True
    return ~first


def rows_warning(kind: str, rows: np.ndarray, what: str) -> DataWarning | None:
    """A warning about these rows; None if there are none."""
    return DataWarning(kind, len(rows), tuple(rows[:FIRST].tolist()), what) if len(rows) else None
