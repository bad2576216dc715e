"""Whether token ids give a text back, and ids of an answer whose blanks a token beside it would take.

Some tokenizers change text (normal forms, letter case, unknown characters). Some have added tokens that take the blanks
beside them along: in `<|assistant|>\\n    x = 1`, all blanks before the code.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any
from unicodedata import is_normalized, normalize

from yeonma.data.template import Rendered
from yeonma.data.template_syntax import joined
from yeonma.tokenization.text_encoder import Span, TextEncoder

_ASCII = "x \t y\n\n    z\r\n" + "".join(map(chr, range(0x20, 0x7F))) + " .\n"
_WIDE = "한漢ﬁＡ①\u200b\ufffd😀" + "".join(map(chr, (*range(0x1000, 0xF000, 0x1000), 0xE0067)))
# Every byte of UTF-8 is in it, but for those of planes without characters
_COMPOSED = _ASCII + normalize("NFC", "".join(map(chr, range(0xA1, 0x800))) + _WIDE + chr(0x100000))
_DECOMPOSED = "x\u1112\u1161\u11abe\u0301"


@dataclass(frozen=True)
class Losses:
    """What a tokenizer may change in a text, found by encoding samples of all characters."""

    ascii: bool
    composed: bool
    """Text in Unicode's composed form (NFC)."""
    decomposed: bool
    before: re.Pattern[str] | None
    """A blank and an added token that takes it along, and `after` the reverse."""
    after: re.Pattern[str] | None

    def may_change(self, text: str) -> bool:
        """Whether the tokenizer may change this text. Usually False at once."""
        if self.ascii:
            return True
        if not text.isascii() and (self.composed or (self.decomposed and not is_normalized("NFC", text))):
            return True
        return any(pattern is not None and pattern.search(text) for pattern in (self.before, self.after))


def losses_of(encoder: TextEncoder) -> Losses:
    return _losses(encoder.tokenizer)


@lru_cache(maxsize=4)
def _losses(tokenizer: Any) -> Losses:
    encoder = TextEncoder.of(tokenizer)
    added = tokenizer.added_tokens_decoder.values()
    before = [re.escape(token.content) for token in added if token.lstrip and token.content]
    after = [re.escape(token.content) for token in added if token.rstrip and token.content]

    def changes(sample: str) -> bool:
        if encoder.control is not None:  # marks such as <s> are tokens
            sample = encoder.control.sub("x", sample)
        return not encoder.decode(encoder.batch_without_start([sample])[0]).endswith(sample)

    return Losses(
        ascii=changes(_ASCII),
        composed=changes(_COMPOSED),
        decomposed=changes(_DECOMPOSED),
        before=re.compile(f"\\s(?:{'|'.join(before)})") if before else None,
        after=re.compile(f"(?:{'|'.join(after)})\\s+") if after else None,
    )


def parts_of(rendered: Rendered) -> list[str]:
    """The texts of a row: of its turns and its answer, or of its fields."""
    if rendered.answer_role is None:
        return [
            piece.text for piece in (*rendered.prompt_pieces, *rendered.answer) if piece.field is not None
        ]
    return [*(turn.text for turn in rendered.turns), *([joined(rendered.answer)] if rendered.answer else [])]


def gives_back(encoder: TextEncoder, text: str, ids: Sequence[int], parts: Sequence[str]) -> bool:
    """Whether the text of `ids` contains the parts, as far as `text` does: texts of fields or turns."""
    decoded = encoder.decode(ids)
    written = [part if part in text else part.strip() for part in parts]
    return all(part in decoded for part in written if part in text)


def takes_blanks(losses: Losses, text: str, answer: Span) -> bool:
    """Whether a token beside the answer takes blanks at its beginning, or one within it those before the token."""
    start, end = answer
    if losses.after is not None and text[start : start + 1].isspace():
        head = text[:start].rstrip()
        for mark in losses.after.finditer(text, max(len(head) - 100, 0)):
            if mark.start() < start < mark.end():
                return True
    return losses.before is not None and losses.before.search(text, start, end) is not None


def answer_ids(encoder: TextEncoder, before: Sequence[int], answer: str) -> list[int]:
    """Ids that continue `before` with the answer. Its text up to the first special token is encoded without it, so that
    the token takes no blanks of it."""
    mark = encoder.special.search(answer) if encoder.special is not None else None
    end = mark.start() if mark is not None else len(answer)
    ids = encoder.continuation(before, answer[:end])
    return ids + (encoder.batch_without_start([answer[end:]])[0] if end < len(answer) else [])
