"""Answers that are JSON of a schema: which tokens may come next, by the library llguidance."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from yeonma.errors import UserError
from yeonma.generation.completion import special_ids
from yeonma.packages import install
from yeonma.tokenization.text_encoder import TextEncoder
from yeonma.tokenization.token_bytes import token_bytes_of

WHITE_SPACE = r"\x20|\x0D?\x0A[\x20\x09]{0,64}"
"""Between the parts of JSON: a space, or a line break and an indent. Without a limit, a weak model may write white
space to the end."""
JSON_CHARACTERS = '{}[]":,0123456789'
BEFORE = "x"
"""Text before an answer: any that the tokenizer does not join with what follows."""
MAX_REASON = 300
"""Characters of the library's own words in an error."""


@dataclass(frozen=True, eq=False)
class JsonVocabulary:
    """A model's tokens as the library sees them. Making it takes a second for a large vocabulary."""

    tokenizer: Any
    size: int
    token_bytes: Sequence[bytes]

    @staticmethod
    def of(tokenizer: Any, stop_ids: Sequence[int]) -> JsonVocabulary:
        """Raises UserError if the library is missing, or if no token ends an answer."""
        try:
            import llguidance
        except ImportError:
            problem = "JSON by a schema needs the package llguidance, which is not installed here"
            raise UserError(
                problem, cure=f"install it where the server runs: {install('llguidance')}"
            ) from None
        if not stop_ids:
            raise UserError(
                "JSON by a schema needs a model with an end token", cure="ask without response_format"
            )
        size = max(tokenizer.get_vocab().values()) + 1
        of_token = token_bytes_of(tokenizer)
        tokens = [of_token(token_id) for token_id in range(size)]
        lacking = [char for char in JSON_CHARACTERS if char.encode() not in tokens]
        if lacking:
            problem = f"this model's vocabulary cannot write JSON: it has no token for {' '.join(lacking)}"
            raise UserError(problem, cure="ask without response_format")
        special = [*special_ids(tokenizer), *(token_id for token_id in range(size) if not tokens[token_id])]
        words = _Words(tokens, sorted(set(special)), TextEncoder.of(tokenizer))
        wrapped = llguidance.LLTokenizer(llguidance.TokenizerWrapper(words), eos_token=sorted(stop_ids))
        return JsonVocabulary(wrapped, size, tokens)

    def grammar(self, schema: Mapping[str, Any]) -> JsonGrammar:
        """Raises UserError with the library's reason if it cannot follow the schema."""
        from llguidance import LLMatcher

        own = {**schema, "x-guidance": {"whitespace_pattern": WHITE_SPACE}}
        try:
            text = LLMatcher.grammar_from_lark(f"start: /[ \\n]?/ json\njson: %json {json.dumps(own)}")
            matcher = LLMatcher(self.tokenizer, text, log_level=0)
            reason = matcher.get_error()
        except (ValueError, RecursionError) as error:  # nested too deeply
            reason = str(error)
        if reason:
            reason = re.split(r"\n\s*1 \| start:|\n<state>", reason)[0]
            reason = reason.rpartition("failed to compile JSON schema: ")[2]
            short = " ".join(reason.split())[:MAX_REASON]
            raise UserError(f"the JSON schema cannot be followed: {short}", cure="change the schema")
        return JsonGrammar(self, matcher)


@dataclass(frozen=True, eq=False)
class _Words:
    """A tokenizer as the library wants it."""

    tokens: Sequence[bytes]
    special_token_ids: Sequence[int]
    encoder: TextEncoder
    bos_token_id: int | None = None
    eos_token_id: int = 0  # the stop tokens are given apart

    def __call__(self, content: bytes | str) -> list[int]:
        """The ids of text that must follow, within an answer. Fewer, if the vocabulary cannot write it."""
        text = content.decode() if isinstance(content, bytes) else content
        before = self.encoder.batch_without_start([BEFORE])[0]
        ids = self.encoder.continuation(before, text, as_text=True)
        return ids if b"".join(self.tokens[token_id] for token_id in ids) == text.encode() else []


@dataclass(frozen=True, eq=False)
class JsonGrammar:
    """A schema, ready for any number of answers."""

    vocabulary: JsonVocabulary
    matcher: Any

    def mask(self, after: str | None = None) -> JsonMask:
        """The mask of a new answer. `after`: the text after which JSON begins, such as the tag that closes reasoning;
        None: it begins at once."""
        return JsonMask(self.vocabulary, self.matcher.deep_copy(), None if after is None else after.encode())


@dataclass(eq=False)
class JsonMask:
    """A `TokenMask`. The end token is allowed only where the JSON is complete."""

    vocabulary: JsonVocabulary
    matcher: Any
    waiting_for: bytes | None
    before: bytearray = field(default_factory=bytearray)

    @property
    def is_over(self) -> bool:
        return self.waiting_for is None and bool(self.matcher.is_stopped())

    @property
    def has_failed(self) -> bool:
        """Whether the library knows no way on: the grammar is too complex for it."""
        return bool(self.matcher.is_error())

    def allowed(self) -> NDArray[np.bool_] | None:
        if self.waiting_for is not None or self.has_failed:
            return None
        bits = np.frombuffer(self.matcher.compute_bitmask(), dtype=np.uint8)
        return np.unpackbits(bits, bitorder="little")[: self.vocabulary.size].astype(bool)

    def accept(self, token_id: int) -> None:
        if self.waiting_for is None:
            self.matcher.consume_token(token_id)
            return
        self.before += self.vocabulary.token_bytes[token_id] if token_id < self.vocabulary.size else b""
        if self.waiting_for in self.before:
            self.waiting_for = None
