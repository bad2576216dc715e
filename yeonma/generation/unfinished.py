"""The bytes of a character that an answer's last tokens begin and do not finish."""

from __future__ import annotations

import codecs
import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from tokenizers import Tokenizer

REPLACEMENT = "\ufffd"
"""What decoders write for bytes that are no character. It may also be in a text as a character of its own."""

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_MOST_BYTES = 3
"""Bytes of a character without its last one, at most."""


def unfinished_bytes(tokenizer: Any, ids: Sequence[int]) -> tuple[int, int]:
    """(number of tokens, number of replacement characters) at the end of `ids` and of their text that are the first
    bytes of a character. One of the two is 0: either each byte is a token, or tokens hold several bytes."""
    tail, single = b"", 0
    for number in reversed(ids):
        token_bytes, is_single = _bytes_of(tokenizer, int(number))
        if token_bytes is None:
            break
        tail = token_bytes + tail
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


def _bytes_of(tokenizer: Any, number: int) -> tuple[bytes | None, bool]:
    """The token's bytes, or None if they are not known; whether it is a token of one byte as in SentencePiece."""
    added = tokenizer.added_tokens_decoder.get(number)
    if added is not None:
        return added.content.encode("utf-8", "replace"), False
    token = tokenizer.convert_ids_to_tokens(number)
    if isinstance(token, bytes):
        return token, False
    if not isinstance(token, str):
        return None, False
    if match := _BYTE_TOKEN.fullmatch(token):
        return bytes([int(match[1], 16)]), True
    if _is_byte_level(tokenizer):
        values = [_byte_of_character().get(character) for character in token]
        return (None if None in values else bytes(value for value in values if value is not None)), False
    return token.encode("utf-8", "replace"), False


def _is_byte_level(tokenizer: Any) -> bool:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    decoder = backend.decoder if isinstance(backend, Tokenizer) else None
    return decoder is not None and b'"ByteLevel"' in decoder.__getstate__()


@lru_cache(maxsize=1)
def _byte_of_character() -> dict[str, int]:
    """The characters that byte-level BPE writes for bytes: itself if it is visible in Latin-1, else one from 256 on."""
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in visible]
    return {chr(byte): byte for byte in visible} | {
        chr(256 + index): byte for index, byte in enumerate(others)
    }
