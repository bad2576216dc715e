"""Tokens as OpenAI's API writes them beside their log-probabilities: as text and bytes, and where they begin."""

from __future__ import annotations

import codecs
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from yeonma.generation.completion import special_ids
from yeonma.generation.token_scores import ScoredToken
from yeonma.tokenization.token_bytes import token_bytes_of

LOWEST = -9999.0
"""Stands for log-probabilities below it: JSON has no infinity."""


@dataclass(frozen=True, eq=False)
class TokenNames:
    """The texts and bytes of a tokenizer's tokens."""

    content: Callable[[int], bytes]
    special: frozenset[int]

    @staticmethod
    @lru_cache(maxsize=8)
    def of(tokenizer: Any) -> TokenNames:
        """Made once for a tokenizer."""
        return TokenNames(token_bytes_of(tokenizer), special_ids(tokenizer))

    def text(self, token_id: int, escape: str = "") -> str:
        """The token's text. Bytes that are no text by themselves are escaped, after `escape`."""
        content = self.content(token_id)
        try:
            return content.decode()
        except UnicodeDecodeError:
            return escape + "".join(chr(byte) if 32 <= byte < 127 else f"\\x{byte:02x}" for byte in content)

    def joined(self, token_ids: Sequence[int]) -> str:
        """The text of token ids, special tokens included."""
        return b"".join(map(self.content, token_ids)).decode(errors="replace")

    def chat_content(self, tokens: Sequence[ScoredToken]) -> list[dict[str, Any]]:
        """`logprobs.content` of a chat completion."""

        def named(token_id: int, logprob: float | None) -> dict[str, Any]:
            content = list(self.content(token_id))
            return {"token": self.text(token_id), "logprob": _number(logprob), "bytes": content}

        return [
            {
                **named(token.token_id, token.logprob),
                "top_logprobs": [named(token_id, logprob) for token_id, logprob in token.top],
            }
            for token in tokens
        ]

    def completion(self, tokens: Sequence[ScoredToken], offsets: Sequence[int]) -> dict[str, Any]:
        """`logprobs` of a completion. The chosen token is always among the most likely ones."""
        tops: list[dict[str, float | None] | None] = []
        for token in tokens:
            if token.logprob is None:
                tops.append(None)
                continue
            top: dict[str, float | None] = {}
            for token_id, logprob in (*token.top, (token.token_id, token.logprob)):
                top.setdefault(self.text(token_id, "bytes:"), _number(logprob))
            tops.append(top)
        return {
            "tokens": [self.text(token.token_id, "bytes:") for token in tokens],
            "token_logprobs": [_number(token.logprob) for token in tokens],
            "top_logprobs": tops,
            "text_offset": list(offsets),
        }


def _number(logprob: float | None) -> float | None:
    return None if logprob is None else max(logprob, LOWEST)


@dataclass(eq=False)
class OffsetCounter:
    """Where the tokens of a text begin, in characters. Special tokens that are no part of the text take no room."""

    names: TokenNames
    position: int = 0
    decoder: Any = field(default_factory=lambda: codecs.getincrementaldecoder("utf-8")("replace"))

    def offsets(self, tokens: Sequence[ScoredToken], text: str = "") -> list[int]:
        """The offsets of the next tokens. `text`: the whole text, as far as it is known."""
        found = []
        for token in tokens:
            found.append(self.position)
            characters = self.decoder.decode(self.names.content(token.token_id))
            if text.startswith(characters, self.position):
                self.position += len(characters)
            elif characters.startswith(" ") and text.startswith(characters[1:], self.position):
                self.position += len(characters) - 1  # a dummy prefix
            elif token.token_id not in self.names.special:
                self.position += len(characters)
        return found
