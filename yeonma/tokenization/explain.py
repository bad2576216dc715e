"""Examples as text to read: frame, fields, trained answer, end token, and what was cut.

The text is decoded from the example's ids. Aligning it with the text that was tokenised tells frame from fields. If the
tokenizer does not reproduce that text (because it normalises, say), only prompt and answer are distinguished.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import TYPE_CHECKING, Any, Literal

from yeonma.data.rows import Row
from yeonma.data.task import ANSWERS, Task
from yeonma.data.template import Rendered
from yeonma.data.template_syntax import Piece, joined
from yeonma.errors import UserError
from yeonma.tokenization.chat_template import Chat
from yeonma.tokenization.example import Example, LeftOut, TokenRules
from yeonma.tokenization.example_encoder import (
    EncodeResult,
    ExampleEncoder,
    ExampleText,
    encoder_for,
    example_texts,
)
from yeonma.tokenization.task_encoders import TASK_ENCODERS
from yeonma.tokenization.text_encoder import TextEncoder
from yeonma.tokenization.trained_turns import prompt_part

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SpanKind = Literal[
    "start", "frame", "field", "prompt", "answer", "end", "cut", "tools", "reasoning", "call", "untrained"
]
"""`start`: the tokenizer's start tokens. `prompt`: frame or field, if they cannot be distinguished. `end`: the special
tokens that end an answer. `cut`: text of the row that is not in the example. `tools`: what the chat template writes
about tools. `reasoning` and `call`: of an assistant's turn, trained or not. `untrained`: the text of an assistant's
turn that is not trained."""


@dataclass(frozen=True)
class TextSpan:
    """A run of text of one kind. `field`: the name of the field, for the kinds `field` and `cut`."""

    text: str
    kind: SpanKind
    field: str | None
    trained: bool
    weight: float = 1.0
    """The weight of its tokens in the loss."""


@dataclass(frozen=True)
class TokenView:
    """A token. `text` is what it adds to the decoded text; empty if a later token completes the character."""

    id: int
    text: str
    name: str
    kind: SpanKind
    trained: bool
    weight: float = 1.0


@dataclass(frozen=True)
class View:
    """An example to read. One that is left out has no tokens.

    `role`: the role of the answer in preference data, such as `chosen`; None elsewhere. `token_ids`, `trained` and
    `weights` (None if all are 1) are the example's; `tokens` and `text_spans` describe them in detail, or are empty.

    `prompt` and `answer` are the texts that were tokenised; for a turn list, its last answer and the text before it.
    They do not include an EOS that is appended as a token.
    """

    row: int
    place: str
    role: str | None
    prompt: str
    answer: str
    token_ids: tuple[int, ...]
    trained: tuple[bool, ...]
    text_spans: tuple[TextSpan, ...]
    tokens: tuple[TokenView, ...]
    prompt_length: int
    """Tokens before the last answer: the prompt of generation."""
    cut_characters: int
    variant: int
    straddles: bool
    special_text: int
    left_out: str | None
    dropped_turns: int = 0
    weights: tuple[float, ...] | None = None
    data_set: str = ""
    """The name of its data set, if there are several."""
    is_held_out: bool = False
    """Whether its row is a validation row."""


def explain(
    texts: Sequence[Any],
    rows: Sequence[Row],
    tokenizer: PreTrainedTokenizerBase,
    rules: TokenRules,
    task: Task = ANSWERS,
    *,
    in_full: bool = True,
) -> list[View]:
    """The views of rows, in order. A turn list may have several; a pair has two.

    `texts` are the results of `task.render` for the rows. Without `in_full`, views have neither `text_spans` nor
    `tokens`, which take most of the time. Raises UserError as the task's `encode`.
    """
    views = []
    with encoder_for(tokenizer, rules, [task.preferred(text) for text in texts]) as encoder:
        for answer in TASK_ENCODERS[task.name].answers(encoder, texts, rows):
            text = answer.result.text
            view = _view(answer.result, answer.role)
            if in_full:
                spans = data_spans(text, encoder.chat)
                cuts = _cuts(spans, text.rendered, answer.rendered, rules.shrink_side)
                marks = _marks(text, spans, encoder)
                view = _with_texts(view, answer.result, marks, cuts, encoder.encoder)
            views.append(view)
    return views


def bad_row_view(row: LeftOut) -> View:
    """The view of a bad row: nothing but why it is left out."""
    return View(
        row=row.row,
        place=row.place,
        role=None,
        prompt="",
        answer="",
        token_ids=(),
        trained=(),
        text_spans=(),
        tokens=(),
        prompt_length=0,
        cut_characters=0,
        variant=0,
        straddles=False,
        special_text=0,
        left_out=row.reason,
    )


def token_texts(ids: Sequence[int], encoder: TextEncoder) -> list[str]:
    """What each token adds to the decoded text. A character of several tokens comes with the last of them."""
    texts: list[str] = []
    # The window ids[start:end] decodes as it does within the full text; texts has the text of ids[:done].
    start = done = 0
    for end in range(1, len(ids) + 1):
        before, window = encoder.decode(ids[start:done]), encoder.decode(ids[start:end])
        if window.endswith("\ufffd") and end < len(ids):
            texts.append("")
            continue
        texts.append(window[len(before) :])
        start, done = done, end
    return texts


Mark = tuple[SpanKind, "str | None"]
"""Kind and field of a character."""
CharacterKind = tuple[SpanKind, "str | None", bool, float]
"""Kind and field of a character, whether it is trained, and its weight in the loss."""

_START: Mark = ("start", None)
_PROMPT: Mark = ("prompt", None)
_ANSWER: Mark = ("answer", None)
_END: Mark = ("end", None)

_EQUAL_CHARACTERS = 6
"""After a difference, two texts are aligned again where this many characters are equal."""

_SKIPS = sorted(((decoded, source) for decoded in range(17) for source in range(9)), key=sum)[1:]
"""How many characters alignment may skip in the decoded text and in its source, the fewest first."""

Cut = tuple[int, str, str]
"""Position in the source text at which text is missing, its field, and the missing text."""


def _marks(text: ExampleText, spans: Sequence[tuple[int, int, str]], encoder: ExampleEncoder) -> list[Mark]:
    marks: list[Mark] = [("frame", None)] * len(text.text)
    if text.rendered.tools and encoder.chat is not None:
        start, end = _tools_span(text, encoder.chat)
        marks[start:end] = [("tools", None)] * (end - start)
    of_assistant = {
        piece.field
        for turn in text.rendered.turns
        for piece in turn.pieces
        if turn.role == "assistant" and piece.field is not None
    }
    for start, end, field in spans:
        marks[start:end] = [("untrained" if field in of_assistant else "field", field)] * (end - start)
    for start, end, kind in _untrained_parts(text, encoder):
        marks[start:end] = [(kind, None)] * (end - start)
    for start, end in text.answers:
        marks[start:end] = [_ANSWER] * (end - start)
    for start, end, kind in text.parts:
        marks[start:end] = [(kind, None)] * (end - start)
    return marks


def _tools_span(text: ExampleText, chat: Chat) -> tuple[int, int]:
    """The span of what the chat template writes about tools: what it does not write without them."""
    conversation = chat.conversation(prompt_part(text.rendered), text.row.place)
    without = chat.prompt(replace(conversation, tools=()), text.row.place)
    prompt = text.text[: text.answers[-1][0]]
    start = common_length(prompt, without)
    end = len(prompt) - common_length(prompt[start:][::-1], without[start:][::-1])
    while 0 < start < end and prompt[start - 1] == prompt[end - 1]:  # begin with the turn's own header
        start, end = start - 1, end - 1
    return start, end


def _untrained_parts(text: ExampleText, encoder: ExampleEncoder) -> Iterator[tuple[int, int, SpanKind]]:
    """The spans of reasoning and tool calls in assistant turns that are not trained."""
    if encoder.chat is None:
        return
    trained, position = {start for start, _ in text.answers}, 0
    rules = replace(encoder.rules, train_on="last", add_eos_token=False)
    for index, turn in enumerate(text.rendered.turns):
        source = turn.turn
        if turn.role != "assistant" or source is None or not (source.reasoning or source.tool_calls):
            continue
        marked = replace(turn, turn=replace(source, weight=None))
        turns = (*text.rendered.turns[:index], marked)
        until = replace(text.rendered, turns=turns, answer=(), answer_turn=None, first_answer=0)
        try:
            alone = example_texts(until, text.row, encoder.encoder, encoder.chat, rules)[-1]
        except UserError:  # it is not trained, so that the chat template need not write it
            continue
        if text.text.startswith(alone.text):
            yield from alone.parts if alone.answers[-1][0] not in trained else ()
            position = len(alone.text)
            continue
        for start, end, kind in alone.parts:  # it is written in another way than at the end
            at = text.text.find(alone.text[start:end], position, text.answers[-1][0])
            if at >= 0:
                position = at + end - start
                yield at, position, kind


def _cuts(
    spans: Sequence[tuple[int, int, str]], shortened: Rendered, original: Rendered, side: str
) -> list[Cut]:
    full_texts, short_texts = _texts_of_fields(original), _texts_of_fields(shortened)
    cuts = _dropped_turns(spans, full_texts, short_texts)
    for start, end, field in spans:
        full, short = full_texts.get(field, ""), short_texts.get(field, "")
        if len(short) < len(full):
            before = {"end": len(short), "start": 0}.get(side, common_length(full, short))
            cuts.append((min(start + before, end), field, full[before : len(full) - (len(short) - before)]))
    return cuts


def _dropped_turns(
    spans: Sequence[tuple[int, int, str]], full: Mapping[str, str], short: Mapping[str, str]
) -> list[Cut]:
    """The old turns that a conversation lost, at the place of the first turn after them."""
    names = list(full)
    kept = [names.index(field) for _, _, field in spans if field in full]
    last = max(kept, default=-1)
    cuts = []
    for index, name in enumerate(names):
        if name not in short and index < last:
            following = min(number for number in kept if number > index)
            at = next(start for start, _, field in spans if field == names[following])
            cuts.append((at, name, full[name]))
    return cuts


def common_length(a: Sequence[object], b: Sequence[object]) -> int:
    """The length of the common beginning of two sequences or texts."""
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
        text_spans=(),
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
        dropped_turns=outcome.dropped_turns,
        weights=None if outcome.weights is None else tuple(outcome.weights.tolist()),
    )


def _with_texts(
    view: View, result: EncodeResult, marks: list[Mark], cuts: list[Cut], encoder: TextEncoder
) -> View:
    if isinstance(result.outcome, LeftOut):
        kinds = [(kind, field, False, 1.0) for kind, field in marks]
        return replace(view, text_spans=tuple(_text_spans(result.text.text, kinds, cuts)))
    tokens, text_spans = _decoded(result.outcome, result.text.text, marks, cuts, encoder)
    return replace(view, tokens=tokens, text_spans=text_spans)


def _decoded(
    example: Example, source: str, marks: list[Mark], cuts: list[Cut], encoder: TextEncoder
) -> tuple[tuple[TokenView, ...], tuple[TextSpan, ...]]:
    """Tokens and text spans of the decoded ids, with the marks of the `source` text that was tokenised."""
    ids, trained = example.token_ids.tolist(), example.trained.tolist()
    weights = [1.0] * len(ids) if example.weights is None else example.weights.tolist()
    texts = token_texts(ids, encoder)
    text, ends = "".join(texts), _ends(ids, trained, encoder)
    border = sum(map(len, texts[: example.prompt_length]))
    start = _start(text, source, encoder)
    positions = _align(text, source, start)
    if positions is None:  # it is unknown where text was cut: show the cut before the answer
        marks = [_PROMPT] * border + [_ANSWER] * (len(text) - border)
        cuts = [(border, field, lost) for _, field, lost in cuts]
    else:
        marks = [_START if i < start else marks[position] for i, position in enumerate(positions)]
        marks += [_END] * (len(text) - len(positions))
        cuts = [(bisect_left(positions, position, lo=start), field, lost) for position, field, lost in cuts]
    tokens: list[TokenView] = []
    kinds: list[CharacterKind] = []
    for index, token_id in enumerate(ids):
        length = len(texts[index])
        token_marks = marks[len(kinds) : len(kinds) + length] or marks[len(kinds) : len(kinds) + 1]
        if ends[index] and [kind for kind, _ in token_marks[:1]] != ["call"]:
            token_marks = [_END] * len(token_marks)
        kinds += [(kind, field, trained[index], weights[index]) for kind, field in token_marks[:length]]
        name = str(encoder.tokenizer.convert_ids_to_tokens(token_id))
        kind = token_marks[0][0] if token_marks else "end"
        tokens.append(TokenView(token_id, texts[index], name, kind, trained[index], weights[index]))
    return tuple(tokens), tuple(_text_spans(text, kinds, cuts))


def _ends(ids: Sequence[int], trained: Sequence[bool], encoder: TextEncoder) -> list[bool]:
    """Whether a token is a special token that ends an answer."""
    special = encoder.special_text.keys() - ({encoder.tokenizer.unk_token_id} - {encoder.eos_id})
    ends = [False] * len(ids)
    for index in reversed(range(len(ids))):
        at_end = index + 1 == len(ids) or not trained[index + 1] or ends[index + 1]
        ends[index] = trained[index] and at_end and ids[index] in special
    return ends


def _start(text: str, source: str, encoder: TextEncoder) -> int:
    """The position in the decoded text at which the source begins, after start tokens that are not in the source."""
    start = encoder.decode(encoder.start_ids) if encoder.start_ids else ""
    return len(start) if text.startswith(start) and not source.startswith(start) else 0


def _align(text: str, source: str, start: int) -> list[int] | None:
    """The position in `source` of every character of `text`, up to the end of the source.

    Skips small differences: spaces that some decoders add, characters that became others or `<unk>`. None if the texts
    cannot be aligned again. The first `start` characters are not in the source.
    """
    positions, i, j = [0] * start, start, 0  # i is in the text, j in the source
    while j < len(source) and i < len(text):
        if text[i] == source[j]:
            positions.append(j)
            i, j = i + 1, j + 1
            continue
        skips = next((skips for skips in _SKIPS if _aligned(text, source, i + skips[0], j + skips[1])), None)
        if skips is None:
            return None
        positions += [j] * skips[0]
        i, j = i + skips[0], j + skips[1]
    return positions if j == len(source) else None


def _aligned(text: str, source: str, i: int, j: int) -> bool:
    following = source[j : j + _EQUAL_CHARACTERS]
    return not following or text.startswith(following, i)  # text past the source's end is not part of it


def _text_spans(text: str, kinds: Sequence[CharacterKind], cuts: Sequence[Cut]) -> list[TextSpan]:
    text_spans: list[TextSpan] = []
    start = 0
    for border, cut_field, lost in [*sorted(cuts, key=lambda cut: cut[0]), (len(text), "", "")]:
        for kind, run in groupby(range(start, border), key=lambda index: kinds[index]):
            indices = list(run)
            text_spans.append(TextSpan(text[indices[0] : indices[-1] + 1], *kind))
        if lost:
            text_spans.append(TextSpan(lost, "cut", cut_field, False))
        start = border
    return text_spans


def data_spans(text: ExampleText, chat: Chat | None) -> list[tuple[int, int, str]]:
    """(start, end, field) of the prompt fields' data in the text.

    Turns whose content the chat template changes, except for white space at the edges, are left out.
    """
    if text.rendered.answer_role is None:
        return _spans_of(text.rendered.prompt_pieces, 0, text.answers[0][0], text.text)
    assert chat is not None
    before = prompt_part(text.rendered)
    prompt = text.text[: text.answers[-1][0]]
    conversation = chat.conversation(before, text.row.place)
    contents = chat.content_spans(conversation, prompt, text.row.place)
    return [
        piece
        for turn, span in zip(before.turns, contents, strict=True)
        if span is not None
        for piece in _spans_of(turn.pieces, *span, text.text)
    ]


def _spans_of(pieces: Sequence[Piece], start: int, end: int, text: str) -> list[tuple[int, int, str]]:
    """The fields' spans in `text`. The pieces are at `start` to `end`, perhaps without white space at the edges."""
    position = start - joined(pieces).find(text[start:end])
    spans = []
    for piece in pieces:
        left, right = max(position, start), min(position + len(piece.text), end)
        if piece.field is not None and left < right:
            spans.append((left, right, piece.field))
        position += len(piece.text)
    return spans
