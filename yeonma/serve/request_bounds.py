"""What a request may contain, decided before anything costs time: depth and number of values, length of texts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Any

from yeonma.serve.request_error import RequestError
from yeonma.tokenization.token_bytes import token_bytes_of

ALWAYS_READ_BYTES = 65_536
"""Texts up to this length are always tokenised: that takes little time."""
PROBES = (
    *(character * 999 for character in (" ", "\n", "\t", " \n", "\r\n", "\0", "\u200b", "\u3000", "\ufeff")),
    *("e\u0301" * 500, "\u0301" * 999, "Ａ" * 500, "A" * 999, "Ü" * 500, "\U0010fffd" * 500, "가" * 500),
    *("\u1100\u1161\u11a8" * 300, "👩‍👩‍👧‍👦" * 100, "ab \t c  d\n" * 99),
)
"""Texts of which tokenizers lose something: blanks, marks, unknown characters in a row, capitals, composition."""


@lru_cache(maxsize=8)
def longest_token_bytes(tokenizer: Any) -> int | None:
    """The most bytes of text that one token can stand for; None if the tokenizer was found to lose text, so that its
    tokens say nothing about the length of a text."""
    bytes_of = token_bytes_of(tokenizer)
    for probe in PROBES:
        ids = tokenizer.encode(probe, add_special_tokens=False)
        if sum(len(bytes_of(token_id)) for token_id in ids) < len(probe.encode()):
            return None
    return max(len(bytes_of(token_id)) for token_id in range(len(tokenizer)))


def check_length(texts: Iterable[str], tokenizer: Any, positions: int | None, param: str) -> None:
    """Raises RequestError for texts that are together too long for the model's positions, whatever their tokens are.
    Blanks at their ends do not count: a chat template may remove them."""
    size = sum(len(text.strip().encode("utf-8", "replace")) for text in texts)
    if positions is None or size <= ALWAYS_READ_BYTES:
        return
    longest = longest_token_bytes(tokenizer)
    if longest is not None and size > (most := max(ALWAYS_READ_BYTES, positions * longest)):
        problem = (
            f"the text has {size:,} bytes, and the model's {positions:,} positions hold at most {most:,}"
        )
        raise RequestError(400, f"{problem}: shorten it", param=param, code="context_length_exceeded")


def texts_in(value: object) -> list[str]:
    """All texts within a value of JSON."""
    found: list[str] = []
    rest = [value]
    while rest:
        match rest.pop():
            case str() as text:
                found.append(text)
            case Mapping() as mapping:
                rest += mapping.values()
            case list() as items:
                rest += items
    return found
