"""An example for a person to read: its frame, fields, trained answer and end token as text, and what was cut.

The text is decoded from the example's ids. Frame and fields are found by aligning it with the text that was tokenised;
if a tokenizer does not give that text back (it normalises, say), only prompt and answer are told apart.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from yeonma.data.rows import Row
from yeonma.data.task import ANSWERS, Task
from yeonma.data.template import Rendered
from yeonma.tokenization.example import Example, LeftOut, TokenRules
from yeonma.tokenization.example_encoder import EncodeResult, ExampleText, data_spans, encoder_for
from yeonma.tokenization.task_encoders import TASK_ENCODERS
from yeonma.tokenization.text_encoder import TextEncoder

StretchKind = Literal["start", "frame", "field", "prompt", "answer", "end", "cut"]
"""`start`: the tokenizer's start tokens. `prompt`: frame or field, which could not be told apart. `end`: the special
tokens that end an answer. `cut`: text of the row that is not in the example."""


@dataclass(frozen=True)
class Stretch:
    """Text of one kind. `field`: the field that it belongs to, for `field` and `cut`."""

    text: str
    kind: StretchKind
    field: str | None
    trained: bool


@dataclass(frozen=True)
class TokenView:
    """One token. `text` is what it adds to the text; empty if a later token completes the character."""

    id: int
    text: str
    name: str
    kind: StretchKind
    trained: bool


@dataclass(frozen=True)
class View:
    """One example, or one that is left out and has no tokens, for a person to read.

    `role`: what the answer is in preference data, such as `chosen`; None elsewhere. `token_ids` and `trained` are the
    example's; `tokens` and `stretches` describe them in detail, or both are empty.

    `prompt` and `answer` are the texts that were tokenised: of a turn list its last answer and the text before it. An
    EOS that is appended as a token is not in them.
    """

    row: int
    place: str
    role: str | None
    prompt: str
    answer: str
    token_ids: tuple[int, ...]
    trained: tuple[bool, ...]
    stretches: tuple[Stretch, ...]
    tokens: tuple[TokenView, ...]
    prompt_length: int
    """Tokens before the last answer: what generation feeds."""
    cut_characters: int
    variant: int
    straddles: bool
    special_text: int
    left_out: str | None


def explain(
    texts: Sequence[Any],
    rows: Sequence[Row],
    tokenizer: PreTrainedTokenizerBase,
    rules: TokenRules,
    task: Task = ANSWERS,
    *,
    in_full: bool = True,
) -> list[View]:
    """The views of rows that `task.render` gave as `texts`, in order. A turn list may have several; a pair has two.
    Raises UserError as the task's `encode`.

    Without `in_full` they have neither stretches nor tokens, which take most of the time.
    """
    views = []
    with encoder_for(tokenizer, rules, [task.preferred(text) for text in texts]) as encoder:
        for answer in TASK_ENCODERS[task.name].answers(encoder, texts, rows):
            text = answer.result.text
            view = _view(answer.result, answer.role)
            if in_full:
                spans = data_spans(text, encoder.chat)
                cuts = _cuts(spans, text.rendered, answer.rendered, rules.shrink_side)
                view = _with_texts(view, answer.result, _marks(text, spans), cuts, encoder.encoder)
            views.append(view)
    return views


def token_texts(ids: Sequence[int], encoder: TextEncoder) -> list[str]:
    """What each token adds to the text; a character that several tokens make comes with the last of them."""
    texts: list[str] = []
    start = given = (
        0  # a window that decodes as it does within the whole, and the end of what was given from it
    )
    for end in range(1, len(ids) + 1):
        before, window = encoder.decode(ids[start:given]), encoder.decode(ids[start:end])
        if window.endswith("\ufffd") and end < len(ids):
            texts.append("")
            continue
        texts.append(window[len(before) :])
        start, given = given, end
    return texts


Mark = tuple[StretchKind, "str | None"]
"""The kind of a character and its field."""

_START: Mark = ("start", None)
_PROMPT: Mark = ("prompt", None)
_ANSWER: Mark = ("answer", None)
_END: Mark = ("end", None)

_EQUAL_CHARACTERS = 6
"""Two texts are aligned again where so many characters are equal."""

_SKIPS = sorted(((decoded, source) for decoded in range(17) for source in range(9)), key=sum)[1:]
"""Characters that alignment may skip in the decoded text and in its source, the fewest first."""

Cut = tuple[int, str, str]
"""Position in the source text where something is missing, its field, and the missing text."""


def _marks(text: ExampleText, spans: Sequence[tuple[int, int, str]]) -> list[Mark]:
    marks: list[Mark] = [("frame", None)] * len(text.text)
    for start, end, field in spans:
        marks[start:end] = [("field", field)] * (end - start)
    for start, end in text.answers:
        marks[start:end] = [_ANSWER] * (end - start)
    return marks


def _cuts(spans: Sequence[tuple[int, int, str]], short: Rendered, whole: Rendered, side: str) -> list[Cut]:
    full_texts, short_texts = _texts_of_fields(whole), _texts_of_fields(short)
    cuts = []
    for start, end, field in spans:
        full, rest = full_texts.get(field, ""), short_texts.get(field, "")
        if len(rest) < len(full):
            ahead = {"end": len(rest), "start": 0}.get(side, _common_length(full, rest))
            cuts.append((min(start + ahead, end), field, full[ahead : len(full) - (len(rest) - ahead)]))
    return cuts


def _common_length(a: str, b: str) -> int:
    """The length of the common beginning of two texts."""
    pairs = enumerate(zip(a, b, strict=False))
    return next((length for length, (left, right) in pairs if left != right), min(len(a), len(b)))


def _texts_of_fields(rendered: Rendered) -> dict[str, str]:
    return {piece.field: piece.text for piece in rendered.prompt_pieces if piece.field is not None}


def _view(result: EncodeResult, role: str | None) -> View:
    text, outcome = result.text, result.outcome
    start, end = text.answers[-1]
    view = View(
        row=outcome.row,
        place=text.row.place,
        role=role,
        prompt=text.text[:start],
        answer=text.text[start:end],
        token_ids=(),
        trained=(),
        stretches=(),
        tokens=(),
        prompt_length=0,
        cut_characters=0,
        variant=text.rendered.variant,
        straddles=False,
        special_text=0,
        left_out=None,
    )
    if isinstance(outcome, LeftOut):
        return replace(view, left_out=outcome.reason)
    return replace(
        view,
        token_ids=tuple(outcome.token_ids.tolist()),
        trained=tuple(outcome.trained.tolist()),
        prompt_length=outcome.prompt_length,
        cut_characters=outcome.cut_characters,
        straddles=outcome.straddles,
        special_text=outcome.special_text,
    )


def _with_texts(
    view: View, result: EncodeResult, marks: list[Mark], cuts: list[Cut], encoder: TextEncoder
) -> View:
    if isinstance(result.outcome, LeftOut):
        kinds = [(kind, field, False) for kind, field in marks]
        return replace(view, stretches=tuple(_stretches(result.text.text, kinds, cuts)))
    tokens, stretches = _decoded(result.outcome, result.text.text, marks, cuts, encoder)
    return replace(view, tokens=tokens, stretches=stretches)


def _decoded(
    example: Example, source: str, marks: list[Mark], cuts: list[Cut], encoder: TextEncoder
) -> tuple[tuple[TokenView, ...], tuple[Stretch, ...]]:
    """Tokens and stretches of the decoded ids, with the marks of the `source` text that was tokenised."""
    ids, trained = example.token_ids.tolist(), example.trained.tolist()
    texts = token_texts(ids, encoder)
    text, ends = "".join(texts), _ends(ids, trained, encoder)
    border = sum(map(len, texts[: example.prompt_length]))
    start = _start(text, source, encoder)
    positions = _align(text, source, start)
    if positions is None:  # where text was cut is unknown: show it before the answer
        marks = [_PROMPT] * border + [_ANSWER] * (len(text) - border)
        cuts = [(border, field, lost) for _, field, lost in cuts]
    else:
        marks = [_START if i < start else marks[position] for i, position in enumerate(positions)]
        marks += [_END] * (len(text) - len(positions))
        cuts = [(bisect_left(positions, position, lo=start), field, lost) for position, field, lost in cuts]
    tokens: list[TokenView] = []
    kinds: list[tuple[StretchKind, str | None, bool]] = []
    for index, token_id in enumerate(ids):
        length = len(texts[index])
        token_marks = marks[len(kinds) : len(kinds) + length] or marks[len(kinds) : len(kinds) + 1]
        if ends[index]:
            token_marks = [_END] * len(token_marks)
        kinds += [(kind, field, trained[index]) for kind, field in token_marks[:length]]
        name = str(encoder.tokenizer.convert_ids_to_tokens(token_id))
        kind = token_marks[0][0] if token_marks else "end"
        tokens.append(TokenView(token_id, texts[index], name, kind, trained[index]))
    return tuple(tokens), tuple(_stretches(text, kinds, cuts))


def _ends(ids: Sequence[int], trained: Sequence[bool], encoder: TextEncoder) -> list[bool]:
    """Which tokens are special ones that end an answer."""
    special = encoder.special_text.keys() - ({encoder.tokenizer.unk_token_id} - {encoder.eos_id})
    ends = [False] * len(ids)
    for index in reversed(range(len(ids))):
        last = index + 1 == len(ids) or not trained[index + 1] or ends[index + 1]
        ends[index] = trained[index] and last and ids[index] in special
    return ends


def _start(text: str, source: str, encoder: TextEncoder) -> int:
    """Where the source begins in the decoded text: after start tokens that are not in the source."""
    start = encoder.decode(encoder.start_ids) if encoder.start_ids else ""
    return len(start) if text.startswith(start) and not source.startswith(start) else 0


def _align(text: str, source: str, start: int) -> list[int] | None:
    """For each character of `text` up to the end of the source, its position in `source`.

    Small differences are skipped: the blanks that some decoders add, characters that became others or `<unk>`. None if
    the texts cannot be aligned again. The first `start` characters have no position of their own.
    """
    positions, here, there = [0] * start, start, 0
    while there < len(source) and here < len(text):
        if text[here] == source[there]:
            positions.append(there)
            here, there = here + 1, there + 1
            continue
        skips = next(
            (skips for skips in _SKIPS if _aligned(text, source, here + skips[0], there + skips[1])), None
        )
        if skips is None:
            return None
        positions += [there] * skips[0]
        here, there = here + skips[0], there + skips[1]
    return positions if there == len(source) else None


def _aligned(text: str, source: str, here: int, there: int) -> bool:
    ahead = source[there : there + _EQUAL_CHARACTERS]
    return not ahead or text.startswith(ahead, here)  # after the source's end, the text is not part of it


def _stretches(
    text: str, kinds: Sequence[tuple[StretchKind, str | None, bool]], cuts: Sequence[Cut]
) -> list[Stretch]:
    stretches: list[Stretch] = []
    start = 0
    for border, cut_field, lost in [*sorted(cuts), (len(text), "", "")]:
        for (kind, field, trained), run in groupby(range(start, border), key=lambda index: kinds[index]):
            indices = list(run)
            stretches.append(Stretch(text[indices[0] : indices[-1] + 1], kind, field, trained))
        if lost:
            stretches.append(Stretch(lost, "cut", cut_field, False))
        start = border
    return stretches
