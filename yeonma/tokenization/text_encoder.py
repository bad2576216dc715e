"""Text -> token ids: the tokenizer's own rules, continuations of a text, special-token text inside data."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tokenizers import Encoding, Tokenizer, pre_tokenizers

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Span = tuple[int, int]
"""Start and end of a range of characters; the end is exclusive."""

# Texts to try a continuation after. In every known tokenizer, one of them keeps its ids whatever follows.
_PREFIXES = ("\n", "x", "0", "가", ".")


@dataclass(frozen=True)
class TextEncoder:
    """Encodes text with one tokenizer.

    `start_ids` precede every text (BOS, or nothing); ids that the tokenizer would append are left out. `special`
    matches the text of special tokens; `control` also matches tokens that only chat templates treat as special.
    """

    tokenizer: PreTrainedTokenizerBase
    backend: Tokenizer | None
    start_ids: list[int]
    bos_id: int | None
    eos_id: int | None
    special_text: dict[int, str]
    special: re.Pattern[str] | None
    control: re.Pattern[str] | None

    @staticmethod
    def of(tokenizer: PreTrainedTokenizerBase) -> TextEncoder:
        added = tokenizer.added_tokens_decoder
        special = {number: token.content for number, token in added.items() if token.special}
        special |= dict(zip(tokenizer.all_special_ids, map(str, tokenizer.all_special_tokens), strict=True))
        control = {
            *special.values(),
            *(token.content for token in added.values() if not token.content.isspace()),
        }
        return TextEncoder(
            tokenizer=tokenizer,
            backend=_backend(tokenizer),
            start_ids=_start_ids(tokenizer),
            bos_id=tokenizer.bos_token_id,
            eos_id=tokenizer.eos_token_id,
            special_text=special,
            special=_any_of(special.values()),
            control=_any_of(control),
        )

    def has_special(self, text: str) -> bool:
        """Whether `text` contains a special token's text."""
        return self.special is not None and self.special.search(text) is not None

    def specials_in(self, text: str, data: Sequence[Span]) -> bool:
        """Whether a special token's text in `text` overlaps its `data` spans."""
        marks = self.special.finditer(text) if self.special is not None else ()
        return any(_overlaps(mark.span(), data) for mark in marks)

    def token_id(self, text: str) -> int | None:
        """The id of the token with this name."""
        token_id = self.tokenizer.convert_tokens_to_ids(text)
        return token_id if isinstance(token_id, int) else None

    def batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of the texts, with the tokenizer's start tokens and at most one BOS at the front."""
        return [self._with_start(ids) for ids in self.batch_without_start(texts)]

    def batch_without_start(self, texts: Sequence[str], *, as_text: bool = False) -> list[list[int]]:
        """The ids of the texts without start tokens. With `as_text`, special-token text is ordinary text."""
        if self.backend is None:
            encoded = self.tokenizer(list(texts), add_special_tokens=False, split_special_tokens=as_text)
            return [list(ids) for ids in encoded["input_ids"]]
        return [encoding.ids for encoding in _batch(self.backend, texts, as_text)]

    def decode(self, ids: Sequence[int]) -> str:
        return str(
            self.tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
        )

    def continuation(self, before: Sequence[int], text: str, *, as_text: bool = False) -> list[int]:
        """Ids that continue `before` with `text`: no BOS, no dummy prefix, so that decoding appends just `text`.

        They are the ids that `text` has after one of a few prefixes; as a last resort, it is encoded character by
        character. Text that the tokenizer does not reproduce (unknown characters, normalisation) gets its ids after a
        prefix. With `as_text`, special-token text in `text` is ordinary text.
        """
        if not text:
            return []
        if not before:
            return self.batch_without_start([text], as_text=as_text)[0]
        before = self._tail(before)
        expected = self.decode(before) + text
        fallback: list[int] | None = None
        for prefix in _PREFIXES if as_text else (*_PREFIXES, *list(self.special_text.values())[:3]):
            prefix_ids, full_ids = self.batch_without_start([prefix, prefix + text], as_text=as_text)
            ids = full_ids[len(prefix_ids) :]
            if full_ids[: len(prefix_ids)] != prefix_ids or (as_text and not self._is_ordinary(ids)):
                continue
            if self.decode(before + ids) == expected:
                return ids
            if prefix in _PREFIXES and fallback is None and not self.decode(full_ids).endswith(text):
                fallback = ids
        by_character = self._by_character(text) if fallback is None else None
        if by_character is not None and self.decode(before + by_character) == expected:
            return by_character
        return fallback or self.batch_without_start([text], as_text=as_text)[0]

    def with_data(self, text: str, data: Sequence[Span], before: Sequence[int] = ()) -> tuple[list[int], int]:
        """Ids of `text`, and the number of special-token texts that overlap its `data` spans.

        Those are encoded as ordinary text; the others stay special tokens. The ids continue `before`; if it is empty,
        start tokens are added. Needs a `backend`, for its character offsets.
        """
        ids, offsets = self._ids_and_offsets(text)
        specials = [self._special_span(text, token, span) for token, span in zip(ids, offsets, strict=True)]
        in_data = [special is not None and _overlaps(special, data) for special in specials]
        out, start = list(before), 0
        while start < len(ids):
            end = start + 1
            if in_data[start]:  # up to the next token that stays special
                while end < len(ids) and (specials[end] is None or in_data[end]):
                    end += 1
                out += self._ordinary(out, text[offsets[start][0] : _end(offsets, end, text)])
            elif start == 0 and before and specials[0] is None:
                while end < len(ids) and specials[end] is None:
                    end += 1
                out += self.continuation(out, text[: _end(offsets, end, text)])
            else:
                out.append(ids[start])
            start = end
        return (out[len(before) :] if before else self._with_start(out)), sum(in_data)

    def _tail(self, ids: Sequence[int]) -> list[int]:
        """The last ids, enough to see how text continues them; they begin with a whole character."""
        size = 32
        while size < len(ids) and "\ufffd" in self.decode(ids[-size:]):
            size *= 4
        return list(ids[-size:])

    def _with_start(self, ids: list[int]) -> list[int]:
        if self.bos_id is not None and ids[:1] == [self.bos_id]:
            while ids[1:2] == [self.bos_id]:
                ids = ids[1:]
            return ids
        starts = self.start_ids and ids[: len(self.start_ids)] == self.start_ids
        return ids if starts else self.start_ids + ids

    def _ids_and_offsets(self, text: str) -> tuple[list[int], list[Span]]:
        assert self.backend is not None
        _reset(self.backend, False)
        encoding = self.backend.encode(text, add_special_tokens=False)
        return encoding.ids, encoding.offsets

    def _special_span(self, text: str, token_id: int, span: Span) -> Span | None:
        """The span of a special token's text, without the white space in `span`; None for other tokens."""
        content = self.special_text.get(token_id)
        start = -1 if content is None else text.find(content, *span)
        return None if content is None or start < 0 else (start, start + len(content))

    def _is_ordinary(self, ids: Iterable[int]) -> bool:
        return self.special_text.keys().isdisjoint(ids)

    def _ordinary(self, before: list[int], text: str) -> list[int]:
        """Ids of `text` after `before`, with special-token text as ordinary text even if the vocabulary has it."""
        ids = self.continuation(before, text, as_text=True)
        if self._is_ordinary(ids) or self.special is None:
            return ids
        ids = list(before)
        for piece in re.split(f"({self.special.pattern})", text):
            is_special = self.special.fullmatch(piece) is not None
            piece_ids = self._by_character(piece) if is_special else self.continuation(ids, piece)
            ids += piece_ids if piece_ids is not None else self.continuation(ids, piece, as_text=True)
        return ids[len(before) :]

    def _by_character(self, text: str) -> list[int] | None:
        """The ids of `text`, encoded character by character; None if the vocabulary lacks one."""
        before = self.batch_without_start(["x"])[0]
        char_ids = {char: self._char_ids(before, char) for char in set(text)}
        if any(ids is None for ids in char_ids.values()):
            return None
        return [token_id for char in text for token_id in char_ids[char] or ()]

    def _char_ids(self, before: list[int], char: str) -> list[int] | None:
        """The ids of one character by its tokens' names: of SentencePiece, byte fallback or byte-level BPE."""
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(char)
        spellings = (
            [char.replace(" ", "▁")],
            [f"<0x{byte:02X}>" for byte in char.encode()],
            list(byte_level[0][0]) if byte_level else [],
        )
        for tokens in spellings:
            token_ids = [self.token_id(token) for token in tokens]
            ids = [
                token_id
                for token_id in token_ids
                if token_id is not None and token_id not in self.special_text
            ]
            complete = ids and len(ids) == len(token_ids)
            if complete and self.decode([*before, *ids]) == self.decode(before) + char:
                return ids
        return None


def _end(offsets: list[Span], token: int, text: str) -> int:
    return offsets[token][0] if token < len(offsets) else len(text)


def _overlaps(span: Span, data: Sequence[Span]) -> bool:
    return any(start < span[1] and span[0] < end for start, end in data)


def _any_of(texts: Iterable[str]) -> re.Pattern[str] | None:
    longest_first = sorted({text for text in texts if text}, key=lambda text: (-len(text), text))
    return re.compile("|".join(map(re.escape, longest_first))) if longest_first else None


def _reset(backend: Tokenizer, as_text: bool) -> None:
    """Reset the backend's options: other callers of the same tokenizer may have changed them."""
    if backend.truncation is not None:
        backend.no_truncation()
    if backend.padding is not None:
        backend.no_padding()
    if backend.encode_special_tokens != as_text:
        backend.encode_special_tokens = as_text


def _batch(backend: Tokenizer, texts: Sequence[str], as_text: bool) -> list[Encoding]:
    _reset(backend, as_text)
    try:
        return backend.encode_batch_fast(list(texts), add_special_tokens=False)
    finally:
        if as_text:
            backend.encode_special_tokens = False


def _start_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids that the tokenizer puts before a text."""
    with_special = list(tokenizer("x")["input_ids"])
    ids = list(tokenizer("x", add_special_tokens=False)["input_ids"])
    starts = (i for i in range(len(with_special)) if with_special[i : i + len(ids)] == ids)
    return with_special[: next(starts, 0)]


def _backend(tokenizer: PreTrainedTokenizerBase) -> Tokenizer | None:
    """The tokenizer's Rust backend; None if there is none or it gives different ids."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if not isinstance(backend, Tokenizer):
        return None
    samples = ["서울의 아침\n\n### 제목:\n", " A storm,  closed\tit.\n", f"x{tokenizer.eos_token or ''}y\n"]
    encode: Callable[..., dict[str, list[list[int]]]] = tokenizer
    expected = encode(samples, add_special_tokens=False, split_special_tokens=False)["input_ids"]
    return backend if [encoding.ids for encoding in _batch(backend, samples, False)] == expected else None
