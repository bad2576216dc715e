"""Fitting a prompt under a limit: which field loses text, and how much of it stays."""

from __future__ import annotations

from collections.abc import Callable

from yeonma.text.template import Rendered, field_lengths


def shrinkable(rendered: Rendered, shrink: str | None) -> str | None:
    """The prompt field that may lose text: the one named, else the longest; None where the row has none."""
    lengths = field_lengths(rendered)
    if shrink is not None:
        return shrink if shrink in lengths else None
    return max(lengths, key=lengths.__getitem__, default=None)


def largest_keep(count: Callable[[int], int], length: int, tokens: int, budget: int) -> int:
    """The most characters, from 1 to `length` - 1, that can stay of a field so that the prompt fits; 0 for none.

    `count(keep)` is the prompt's tokens with `keep` characters of the field, `tokens` those with all `length` of them
    (over `budget`). The answer's own count was taken and fits. Tokens hardly ever shrink with more text; where they
    do, a larger answer may exist. Guesses by proportion, halves where that is slow: few counts, each a tokenisation.
    """
    if length < 2:
        return 0
    low, high = 1, length
    low_tokens, high_tokens = count(low), tokens
    if low_tokens > budget:
        return 0
    slow = False
    while high - low > 1:
        share = (budget - low_tokens) / max(high_tokens - low_tokens, 1)
        guess = (low + high) // 2 if slow else low + round(share * (high - low))
        guess = min(max(guess, low + 1), high - 1)
        gap = high - low
        if (found := count(guess)) <= budget:
            low, low_tokens = guess, found
        else:
            high, high_tokens = guess, found
        slow = not slow and high - low > gap // 2
    return low
