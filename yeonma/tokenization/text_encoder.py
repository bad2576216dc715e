"""Text to ids and on: a tokenizer's own rules, continuing a text, and special-token text inside data."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from tokenizers import Encoding, Tokenizer, pre_tokenizers
from transformers import PreTrainedTokenizerBase

Span = tuple[int, int]
"""Start and end of a stretch of characters, the end exclusive."""

# Texts that a continuation is tried after: one of them keeps its own ids whatever follows, in every tokenizer met.
_BEFORE = ("\n", "x", "0", "가", ".")


@dataclass(frozen=True)
class TextEncoder:
    """One tokenizer's way from text to ids.

    `start_ids` stand before every text (BOS, or nothing); what a tokenizer's rules put after a text is left off.
    `special` finds the special tokens' text; `control` also finds tokens that only chat templates treat as special.
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
        """Whether some special token's text stands in `text`."""
        return self.special is not None and self.special.search(text) is not None

    def specials_in(self, text: str, data: Sequence[Span]) -> bool:
        """Whether some special token's text in `text` touches its `data` spans."""
        marks = self.special.finditer(text) if self.special is not None else ()
        return any(_touches(mark.span(), data) for mark in marks)

    def token_id(self, text: str) -> int | None:
        """The id of a token by its name."""
        number = self.tokenizer.convert_tokens_to_ids(text)
        return number if isinstance(number, int) else None

    def batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, with the tokenizer's start tokens and at most one BOS at the front."""
        return [self._started(ids) for ids in self._bare(texts)]

    def bare(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text alone, as other tools take a rendered text."""
        return self._bare(texts)

    def decode(self, ids: Sequence[int]) -> str:
        return str(
            self.tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
        )

    def continuation(self, before: Sequence[int], text: str, *, as_text: bool = False) -> list[int]:
        """Ids that continue `before` with `text`: no BOS, no dummy prefix, so that decoding appends just `text`.

        Takes the ids that `text` has after some stable text; the last resort spells it character by character. Text
        that the tokenizer cannot give back (unknown characters, normalisation) gets the ids it has after stable text.
        `as_text`: special-token text in `text` is ordinary text.
        """
        if not text:
            return []
        if not before:
            return self._bare([text], as_text)[0]
        before = self._tail(before)
        wanted = self.decode(before) + text
        near: list[int] | None = None
        for prefix in _BEFORE if as_text else (*_BEFORE, *list(self.special_text.values())[:3]):
            head, whole = self._bare([prefix, prefix + text], as_text)
            ids = whole[len(head) :]
            if whole[: len(head)] != head or (as_text and not self._is_ordinary(ids)):
                continue
            if self.decode(before + ids) == wanted:
                return ids
            if prefix in _BEFORE and near is None and not self.decode(whole).endswith(text):
                near = ids
        spelled = self._spelled(text) if near is None else None
        if spelled is not None and self.decode(before + spelled) == wanted:
            return spelled
        return near or self._bare([text], as_text)[0]

    def with_data(self, text: str, data: Sequence[Span], before: Sequence[int] = ()) -> tuple[list[int], int]:
        """Ids of `text` and the number of special-token texts that touch its `data` spans.

        Those are encoded as ordinary text; the others stay special tokens. `before`: ids that these continue; without
        them the start tokens are added. Needs a `backend`, for its character offsets.
        """
        ids, offsets = self._bare_offsets(text)
        marks = [self._literal(text, number, span) for number, span in zip(ids, offsets, strict=True)]
        loose = [mark is not None and _touches(mark, data) for mark in marks]
        out, here = list(before), 0
        while here < len(ids):
            there = here + 1
            if loose[here]:  # on to the next special token that stays one
                while there < len(ids) and (marks[there] is None or loose[there]):
                    there += 1
                out += self._ordinary(out, text[offsets[here][0] : _end(offsets, there, text)])
            elif here == 0 and before and marks[0] is None:
                while there < len(ids) and marks[there] is None:
                    there += 1
                out += self.continuation(out, text[: _end(offsets, there, text)])
            else:
                out.append(ids[here])
            here = there
        return (out[len(before) :] if before else self._started(out)), sum(loose)

    def _tail(self, ids: Sequence[int]) -> list[int]:
        """The end of `ids`, long enough to see how text goes on from it: it begins with a whole character."""
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
            found = self.tokenizer(list(texts), add_special_tokens=False, split_special_tokens=as_text)
            return [list(ids) for ids in found["input_ids"]]
        return [encoding.ids for encoding in _batch(self.backend, texts, as_text)]

    def _bare_offsets(self, text: str) -> tuple[list[int], list[Span]]:
        assert self.backend is not None
        _settle(self.backend, False)
        encoding = self.backend.encode(text, add_special_tokens=False)
        return encoding.ids, encoding.offsets

    def _literal(self, text: str, number: int, span: Span) -> Span | None:
        """Where the special token's text stands (its span may take in blanks around it); None for other tokens."""
        content = self.special_text.get(number)
        start = -1 if content is None else text.find(content, *span)
        return None if content is None or start < 0 else (start, start + len(content))

    def _is_ordinary(self, ids: Iterable[int]) -> bool:
        return self.special_text.keys().isdisjoint(ids)

    def _ordinary(self, before: list[int], text: str) -> list[int]:
        """`text` after `before`, special-token text in it as ordinary text, even if the vocabulary has it."""
        ids = self.continuation(before, text, as_text=True)
        if self._is_ordinary(ids) or self.special is None:
            return ids
        whole = list(before)
        for piece in re.split(f"({self.special.pattern})", text):
            found = self._spelled(piece) if self.special.fullmatch(piece) else self.continuation(whole, piece)
            whole += found if found is not None else self.continuation(whole, piece, as_text=True)
        return whole[len(before) :]

    def _spelled(self, text: str) -> list[int] | None:
        """One or more ids for each character by itself, or None where the vocabulary lacks one."""
        anchor = self._bare(["x"])[0]
        found = {letter: self._letter(anchor, letter) for letter in set(text)}
        if any(ids is None for ids in found.values()):
            return None
        return [number for letter in text for number in found[letter] or ()]

    def _letter(self, anchor: list[int], letter: str) -> list[int] | None:
        in_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(letter)
        names = (
            [letter.replace(" ", "▁")],
            [f"<0x{byte:02X}>" for byte in letter.encode()],
            list(in_bytes[0][0]) if in_bytes else [],
        )
        for tokens in names:
            found = [self.token_id(token) for token in tokens]
            ids = [number for number in found if number is not None and number not in self.special_text]
            known = ids and len(ids) == len(found)
            if known and self.decode([*anchor, *ids]) == self.decode(anchor) + letter:
                return ids
        return None


def _end(offsets: list[Span], token: int, text: str) -> int:
    return offsets[token][0] if token < len(offsets) else len(text)


def _touches(span: Span, data: Sequence[Span]) -> bool:
    return any(start < span[1] and span[0] < end for start, end in data)


def _any_of(texts: Iterable[str]) -> re.Pattern[str] | None:
    longest_first = sorted({text for text in texts if text}, key=lambda text: (-len(text), text))
    return re.compile("|".join(map(re.escape, longest_first))) if longest_first else None


def _settle(backend: Tokenizer, as_text: bool) -> None:
    """The backend's switches, which other callers of the same tokenizer may have left on."""
    if backend.truncation is not None:
        backend.no_truncation()
    if backend.padding is not None:
        backend.no_padding()
    if backend.encode_special_tokens != as_text:
        backend.encode_special_tokens = as_text


def _batch(backend: Tokenizer, texts: Sequence[str], as_text: bool) -> list[Encoding]:
    _settle(backend, as_text)
    try:
        return backend.encode_batch_fast(list(texts), add_special_tokens=False)
    finally:
        if as_text:
            backend.encode_special_tokens = False


def _start_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What the tokenizer's own rules put before a text."""
    whole = list(tokenizer("x")["input_ids"])
    bare = list(tokenizer("x", add_special_tokens=False)["input_ids"])
    starts = (at for at in range(len(whole)) if whole[at : at + len(bare)] == bare)
    return whole[: next(starts, 0)]


def _backend(tokenizer: PreTrainedTokenizerBase) -> Tokenizer | None:
    """The Rust tokenizer within, or None where there is none or it gives other ids than the tokenizer around it."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if not isinstance(backend, Tokenizer):
        return None
    samples = ["서울의 아침\n\n### 제목:\n", " A storm,  closed\tit.\n", f"x{tokenizer.eos_token or ''}y\n"]
    expected: Callable[..., dict[str, list[list[int]]]] = tokenizer
    wanted = expected(samples, add_special_tokens=False, split_special_tokens=False)["input_ids"]
    return backend if [found.ids for found in _batch(backend, samples, False)] == wanted else None
