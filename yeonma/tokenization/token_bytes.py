"""The bytes that each token stands for, whatever kind of tokenizer it belongs to."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import lru_cache
from typing import Any

BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
"""A single byte, in SentencePiece's byte fallback."""


@lru_cache(maxsize=8)
def token_bytes_of(tokenizer: Any) -> Callable[[int], bytes]:
    """The function from token id to bytes. Added tokens, special ones included, are their own text; ids without a token
    are empty. A dummy prefix is a space, as within a text. Made once for a tokenizer."""
    added = {token_id: token.content.encode() for token_id, token in tokenizer.added_tokens_decoder.items()}
    spelling = _spelling(tokenizer)

    def token_bytes(token_id: int) -> bytes:
        if token_id in added:
            return added[token_id]
        token = tokenizer.convert_ids_to_tokens(token_id)
        return b"" if token is None else token if isinstance(token, bytes) else spelling(token)

    return token_bytes


def _spelling(tokenizer: Any) -> Callable[[str], bytes]:
    """How the vocabulary spells bytes, by the tokenizer's decoder."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    decoder = None if backend is None else backend.decoder
    kinds = "" if decoder is None else json.dumps(json.loads(decoder.__getstate__()), ensure_ascii=False)
    if '"ByteLevel"' in kinds:
        return _of_byte_level
    if "▁" in kinds or (backend is None and "<0x0A>" in tokenizer.get_vocab()):
        return _of_sentencepiece
    return str.encode


def _of_sentencepiece(token: str) -> bytes:
    byte = BYTE_TOKEN.fullmatch(token)
    return bytes([int(byte[1], 16)]) if byte else token.replace("▁", " ").encode()


def _of_byte_level(token: str) -> bytes:
    if not all(char in BYTES for char in token):  # a token of a vocabulary that is only partly byte-level
        return token.encode()
    return bytes(BYTES[char] for char in token)


def _byte_alphabet() -> dict[str, int]:
    """Character -> byte in byte-level vocabularies: printable characters of Latin-1 stand for themselves, and all other
    bytes, in their order, for the characters from 256 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


BYTES = _byte_alphabet()
