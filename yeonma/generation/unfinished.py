"""The bytes of a character that an answer's last tokens begin and do not finish."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import Any

from yeonma.tokenization.token_bytes import BYTE_TOKEN, token_bytes_of

REPLACEMENT = "\ufffd"
"""What decoders write for bytes that are no character. It may also be in a text as a character of its own."""

_MOST_BYTES = 3
"""Bytes of a character without its last one, at most."""


def unfinished_bytes(tokenizer: Any, ids: Sequence[int]) -> tuple[int, int]:
    """(number of tokens, number of replacement characters) at the end of `ids` and of their text that are the first
    bytes of a character. One of the two is 0: either each byte is a token, or tokens hold several bytes."""
    tail, single, token_bytes = b"", 0, token_bytes_of(tokenizer)
    for number in map(int, reversed(ids)):
        tail = token_bytes(number) + tail
        is_single = BYTE_TOKEN.fullmatch(str(tokenizer.convert_ids_to_tokens(number))) is not None
        single += is_single and single == len(tail) - 1
        if len(tail) > _MOST_BYTES:
            break
    for size in range(1, min(len(tail), _MOST_BYTES) + 1):
        if _is_beginning(tail[-size:]):
            return (size, 0) if single >= size else (0, 1)
    return (0, 0)


def _is_beginning(part: bytes) -> bool:
    """Whether these bytes are the beginning of a character, and nothing else."""
    try:
        return not codecs.getincrementaldecoder("utf-8")("strict").decode(part)
    except UnicodeDecodeError:
        return False
