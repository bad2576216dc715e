"""Text to token ids: a tokenizer's own rules, continuing a text, and special-token text inside data."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from tokenizers import Encoding, Tokenizer, pre_tokenizers
from transformers import PreTrainedTokenizerBase

Span = tuple[int, int]
"""Start and end of some characters, the end exclusive."""

# Texts that a continuation is tried after: one of them keeps its own ids whatever follows, in every known tokenizer.
_BEFORE = ("\n", "x", "0", "가", ".")


@dataclass(frozen=True)
class TextEncoder:
    """Encodes text with one tokenizer.

    `start_ids` precede every text (BOS, or nothing); what a tokenizer's rules append to a text is left out. `special`
    finds the special tokens' text; `control` also finds tokens that only chat templates treat as special.
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
        """Ids of each text, with the tokenizer's start tokens and at most one BOS at the front."""
        return [self._started(ids) for ids in self._bare(texts)]

    def bare(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text without start tokens, as other tools encode a rendered text."""
        return self._bare(texts)

    def decode(self, ids: Sequence[int]) -> str:
        return str(
            self.tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
        )

    def continuation(self, before: Sequence[int], text: str, *, as_text: bool = False) -> list[int]:
        """Ids that continue `before` with `text`: no BOS, no dummy prefix, so that decoding appends just `text`.

        These are the ids that `text` has after some stable text; as a last resort it is spelled character by character.
        Text that the tokenizer cannot give back (unknown characters, normalisation) gets the ids it has after stable
        text. `as_text`: special-token text in `text` is ordinary text.
        """
        if not text:
            return []
        if not before:
            return self._bare([text], as_text)[0]
        before = self._tail(before)
        expected = self.decode(before) + text
        near: list[int] | None = None
        for prefix in _BEFORE if as_text else (*_BEFORE, *list(self.special_text.values())[:3]):
            head, whole = self._bare([prefix, prefix + text], as_text)
            ids = whole[len(head) :]
            if whole[: len(head)] != head or (as_text and not self._is_ordinary(ids)):
                continue
            if self.decode(before + ids) == expected:
                return ids
            if prefix in _BEFORE and near is None and not self.decode(whole).endswith(text):
                near = ids
        spelled = self._spelled(text) if near is None else None
        if spelled is not None and self.decode(before + spelled) == expected:
            return spelled
        return near or self._bare([text], as_text)[0]

    def with_data(self, text: str, data: Sequence[Span], before: Sequence[int] = ()) -> tuple[list[int], int]:
        """Ids of `text` and the number of special-token texts that overlap its `data` spans.

        Those are encoded as ordinary text; the others stay special tokens. `before`: ids that these continue; without
        them the start tokens are added. Needs a `backend`, for its character offsets.
        """
        ids, offsets = self._bare_offsets(text)
        marks = [self._special_span(text, token, span) for token, span in zip(ids, offsets, strict=True)]
        in_data = [mark is not None and _overlaps(mark, data) for mark in marks]
        out, start = list(before), 0
        while start < len(ids):
            end = start + 1
            if in_data[start]:  # on to the next special token that stays one
                while end < len(ids) and (marks[end] is None or in_data[end]):
                    end += 1
                out += self._ordinary(out, text[offsets[start][0] : _end(offsets, end, text)])
            elif start == 0 and before and marks[0] is None:
                while end < len(ids) and marks[end] is None:
                    end += 1
                out += self.continuation(out, text[: _end(offsets, end, text)])
            else:
                out.append(ids[start])
            start = end
        return (out[len(before) :] if before else self._started(out)), sum(in_data)

    def _tail(self, ids: Sequence[int]) -> list[int]:
        """The end of `ids`, which begins with a whole character and is long enough to see how text continues it."""
        size = 32
        while size < len(ids) and "\ufffd" in self.decode(ids[-size:]):
            size *= 4
        return list(ids[-size:])

    def _started(self, ids: list[int]) -> list[int]:
        if self.bos_id is not None and ids[:1] == [self.bos_id]:
            while ids[1:2] == [self.bos_id]:
                ids = ids[1:]
            return ids
        starts = self.start_ids and ids[: len(self.start_ids)] == self.start_ids
        return ids if starts else self.start_ids + ids

    def _bare(self, texts: Sequence[str], as_text: bool = False) -> list[list[int]]:
        if self.backend is None:
            encoded = self.tokenizer(list(texts), add_special_tokens=False, split_special_tokens=as_text)
            return [list(ids) for ids in encoded["input_ids"]]
        return [encoding.ids for encoding in _batch(self.backend, texts, as_text)]

    def _bare_offsets(self, text: str) -> tuple[list[int], list[Span]]:
        assert self.backend is not None
        _reset(self.backend, False)
        encoding = self.backend.encode(text, add_special_tokens=False)
        return encoding.ids, encoding.offsets

    def _special_span(self, text: str, token_id: int, span: Span) -> Span | None:
        """The span of a special token's text, without blanks that `span` includes; None for other tokens."""
        content = self.special_text.get(token_id)
        start = -1 if content is None else text.find(content, *span)
        return None if content is None or start < 0 else (start, start + len(content))

    def _is_ordinary(self, ids: Iterable[int]) -> bool:
        return self.special_text.keys().isdisjoint(ids)

    def _ordinary(self, before: list[int], text: str) -> list[int]:
        """`text` after `before`, its special-token text as ordinary text even if the vocabulary has it."""
        ids = self.continuation(before, text, as_text=True)
        if self._is_ordinary(ids) or self.special is None:
            return ids
        whole = list(before)
        for piece in re.split(f"({self.special.pattern})", text):
            piece_ids = (
                self._spelled(piece) if self.special.fullmatch(piece) else self.continuation(whole, piece)
            )
            whole += piece_ids if piece_ids is not None else self.continuation(whole, piece, as_text=True)
        return whole[len(before) :]

    def _spelled(self, text: str) -> list[int] | None:
        """The ids of each character by itself; None if the vocabulary lacks one."""
        anchor = self._bare(["x"])[0]
        by_letter = {letter: self._letter(anchor, letter) for letter in set(text)}
        if any(ids is None for ids in by_letter.values()):
            return None
        return [token_id for letter in text for token_id in by_letter[letter] or ()]

    def _letter(self, anchor: list[int], letter: str) -> list[int] | None:
        in_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(letter)
        names = (
            [letter.replace(" ", "▁")],
            [f"<0x{byte:02X}>" for byte in letter.encode()],
            list(in_bytes[0][0]) if in_bytes else [],
        )
        for tokens in names:
            known = [self.token_id(token) for token in tokens]
            ids = [
                token_id for token_id in known if token_id is not None and token_id not in self.special_text
            ]
            complete = ids and len(ids) == len(known)
            if complete and self.decode([*anchor, *ids]) == self.decode(anchor) + letter:
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
    """Reset the backend's options, which other callers of the same tokenizer may have changed."""
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
    """The ids that the tokenizer's own rules put before a text."""
    whole = list(tokenizer("x")["input_ids"])
    bare = list(tokenizer("x", add_special_tokens=False)["input_ids"])
    starts = (index for index in range(len(whole)) if whole[index : index + len(bare)] == bare)
    return whole[: next(starts, 0)]


def _backend(tokenizer: PreTrainedTokenizerBase) -> Tokenizer | None:
    """The tokenizer's Rust backend; None if it has none or the backend gives other ids."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if not isinstance(backend, Tokenizer):
        return None
    samples = ["서울의 아침\n\n### 제목:\n", " A storm,  closed\tit.\n", f"x{tokenizer.eos_token or ''}y\n"]
    encode: Callable[..., dict[str, list[list[int]]]] = tokenizer
    expected = encode(samples, add_special_tokens=False, split_special_tokens=False)["input_ids"]
    return backend if [encoding.ids for encoding in _batch(backend, samples, False)] == expected else None
