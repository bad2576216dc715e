"""Confidence intervals by resampling rows, and paired randomisation tests by swapping the answers of two models.

Shapes: R rows, K sums of a metric, B resamplings.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

Array = np.ndarray
Value = Callable[[Array], Array]
"""(..., K) sums -> (...), the value of a metric."""
RESAMPLES = 2000
BLOCK_NUMBERS = 4_000_000  # of a resampling, in memory at once


def mean(sums: Array) -> Array:
    """K = 2: a sum and a count."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray(sums[..., 0] / sums[..., 1])


def resampled_sums(tables: Sequence[Array], seed: int, resamples: int = RESAMPLES) -> list[Array]:
    """One (B, K) per (R, K) table: sums over rows drawn with replacement, the same for all tables (Efron 1979)."""
    rows = len(tables[0])
    draw = np.random.Generator(np.random.PCG64(seed))
    blocks: list[list[Array]] = [[] for _ in tables]
    for count in _blocks(resamples, rows):
        times = draw.multinomial(rows, np.full(rows, 1 / rows), size=count).astype(float)
        for block, table in zip(blocks, tables, strict=True):
            block.append(times @ table)
    return [np.concatenate(block) for block in blocks]


def interval(values: Array, level: float = 0.95) -> tuple[float, float] | None:
    """Confidence interval of resampled values (percentile method); None if fewer than 100 are finite."""
    values = values[np.isfinite(values)]
    if len(values) < 100:
        return None
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def swap_test(a: Array, b: Array, value: Value, seed: int, resamples: int = RESAMPLES) -> float:
    """p-value of the difference between two models, by paired approximate randomisation (Noreen 1989; Riezler & Maxwell
    2005).

    a, b: (R, K) sums. A resampling swaps the two answers of a row with probability 1/2. The smallest possible p-value
    is 1 / (resamples + 1).
    """
    totals = a.sum(axis=0), b.sum(axis=0)
    observed = float(abs(value(totals[0]) - value(totals[1])))
    if not np.isfinite(observed):
        return 1.0
    draw = np.random.Generator(np.random.PCG64(seed))
    extreme = 0
    for count in _blocks(resamples, len(a)):
        swapped = draw.integers(0, 2, size=(count, len(a))).astype(float) @ (b - a)
        differences = abs(value(totals[0] + swapped) - value(totals[1] - swapped))
        extreme += int((differences >= observed - 1e-12 * max(1.0, observed)).sum())
    return (extreme + 1) / (resamples + 1)


def holm(p_values: Sequence[float]) -> list[float]:
    """The p-values corrected for multiple tests (Holm 1979)."""
    corrected = [0.0] * len(p_values)
    highest = 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda index: p_values[index])):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[index]))
        corrected[index] = highest
    return corrected


def _blocks(count: int, rows: int) -> list[int]:
    size = max(1, BLOCK_NUMBERS // rows)
    return [min(size, count - start) for start in range(0, count, size)]
