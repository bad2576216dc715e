"""An example as stretches of text: what is frame, field, trained answer and end token, and what was cut.

What is shown is decoded from the example's own ids. Frame and fields are then told apart by laying the text that was
tokenised over it; where a tokenizer does not give that text back (it normalises, say), only prompt and answer are.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from yeonma.data.preference_pairs import RenderedLabel, RenderedPair
from yeonma.data.rows import Row
from yeonma.data.task import ANSWERS, LABELLED, PAIRS, Task
from yeonma.data.template import Piece, Rendered
from yeonma.tokenization.example import Example, LeftOut, TokenRules
from yeonma.tokenization.example_encoder import (
    EncodeResult,
    ExampleEncoder,
    ExampleText,
    data_spans,
    encoder_for,
)
from yeonma.tokenization.preference_encoder import make_pairs
from yeonma.tokenization.text_encoder import TextEncoder

StretchKind = Literal["start", "frame", "field", "prompt", "answer", "end", "cut"]
"""`start`: the tokenizer's first tokens. `prompt`: frame or field, which could not be told apart. `end`: the special
tokens that end an answer. `cut`: text that is in the row and not in the example."""


@dataclass(frozen=True)
class Stretch:
    """Text of one kind. `field`: whose text it is, for `field` and `cut`."""

    text: str
    kind: StretchKind
    field: str | None
    trained: bool


@dataclass(frozen=True)
class TokenView:
    """One token. `text` is what it adds to the text; empty where a later token completes the character."""

    id: int
    text: str
    name: str
    kind: StretchKind
    trained: bool


@dataclass(frozen=True)
class View:
    """One example, or one that is left out (then without tokens), as a person may look at it.

    `role`: what the answer of preference data is to be, such as `chosen`; None elsewhere.
    `token_ids` and `trained` are the example's; `tokens` says more of each, `stretches` of the text, or both are empty.

    `prompt` and `answer` are the texts that were tokenised; of a turn list, what stands before its last answer and
    that answer. An EOS that is appended as a token is not in them.
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
    """The views of rendered rows, `texts` as `task.render` gives them, in order. A turn list may have several; a pair
    has two. Raises UserError as the encoding of that kind.

    Without `in_full` they have neither stretches nor tokens, which take most of the time.
    """
    views = []
    with encoder_for(tokenizer, rules, [task.preferred(text) for text in texts]) as desk:
        for whole, role, made in _MAKERS[task.name](desk, texts, rows):
            view = _view(made, role)
            if in_full:
                spans = data_spans(made.draft, desk.chat)
                cuts = _cuts(spans, made.draft.rendered, whole, rules.shrink_side)
                view = _with_texts(view, made, _marks(made.draft, spans), cuts, desk.encoder)
            views.append(view)
    return views


Making = tuple[Rendered, "str | None", EncodeResult]
"""What a row was before it was shortened, the role of its answer, and what came of it."""


def _answers(desk: ExampleEncoder, texts: Sequence[Rendered], rows: Sequence[Row]) -> Iterator[Making]:
    whole = {row.number: text for text, row in zip(texts, rows, strict=True)}
    for made in desk.encode(texts, rows):
        yield whole[made.draft.row.number], None, made


def _pairs(desk: ExampleEncoder, pairs: Sequence[RenderedPair], rows: Sequence[Row]) -> Iterator[Making]:
    for pair, made in zip(pairs, make_pairs(desk, pairs, rows), strict=True):
        sides = zip((pair.chosen, pair.rejected), ("chosen", "rejected"), made.drafts, strict=True)
        for number, (whole, role, draft) in enumerate(sides):
            outcome = made.outcome
            one = outcome if isinstance(outcome, LeftOut) else outcome.members[number][1]
            yield whole, role, EncodeResult(draft, one)


def _labelled(
    desk: ExampleEncoder, labelled: Sequence[RenderedLabel], rows: Sequence[Row]
) -> Iterator[Making]:
    roles = {
        row.number: "desirable" if each.desirable else "undesirable"
        for each, row in zip(labelled, rows, strict=True)
    }
    for whole, _, made in _answers(desk, [each.rendered for each in labelled], rows):
        yield whole, roles[made.draft.row.number], made


_MAKERS: dict[str, Callable[[ExampleEncoder, Sequence[Any], Sequence[Row]], Iterator[Making]]] = {
    ANSWERS.name: _answers,
    PAIRS.name: _pairs,
    LABELLED.name: _labelled,
}


def token_texts(ids: Sequence[int], encoder: TextEncoder) -> list[str]:
    """What each token adds to the text; the parts of a character all come with the token that completes it."""
    texts: list[str] = []
    start = seen = 0  # a window that decodes as it does within the whole, and what of it has been given
    for end in range(1, len(ids) + 1):
        before, now = encoder.decode(ids[start:seen]), encoder.decode(ids[start:end])
        if now.endswith("\ufffd") and end < len(ids):
            texts.append("")
            continue
        texts.append(now[len(before) :])
        start, seen = seen, end
    return texts


Mark = tuple[StretchKind, "str | None"]
"""StretchKind and field of a character."""

_START: Mark = ("start", None)
_PROMPT: Mark = ("prompt", None)
_ANSWER: Mark = ("answer", None)
_END: Mark = ("end", None)

_MEETING = 6
"""So many equal characters say that two texts have come together again."""

_STEPS = sorted(((here, there) for here in range(17) for there in range(9)), key=sum)[1:]
"""What may be stepped over in the decoded text and in the draft, the shortest first."""

Cut = tuple[int, str, str]
"""Where in the draft's text something is missing, its field, and the text."""


def _marks(draft: ExampleText, spans: Sequence[tuple[int, int, str]]) -> list[Mark]:
    marks: list[Mark] = [("frame", None)] * len(draft.text)
    for start, end, field in spans:
        marks[start:end] = [("field", field)] * (end - start)
    for start, end in draft.answers:
        marks[start:end] = [_ANSWER] * (end - start)
    return marks


def _cuts(spans: Sequence[tuple[int, int, str]], short: Rendered, whole: Rendered, side: str) -> list[Cut]:
    before, after = _texts_of_fields(whole), _texts_of_fields(short)
    found = []
    for start, end, field in spans:
        full, kept = before.get(field, ""), after.get(field, "")
        if len(kept) < len(full):
            ahead = {"end": len(kept), "start": 0}.get(side, _common(full, kept))
            found.append((min(start + ahead, end), field, full[ahead : len(full) - (len(kept) - ahead)]))
    return found


def _common(a: str, b: str) -> int:
    """How many characters two texts begin with in common."""
    pairs = enumerate(zip(a, b, strict=False))
    return next((at for at, (left, right) in pairs if left != right), min(len(a), len(b)))


def _texts_of_fields(rendered: Rendered) -> dict[str, str]:
    pieces: Iterator[Piece] = (piece for turn in rendered.turns for piece in turn.pieces)
    return {piece.field: piece.text for piece in pieces if piece.field is not None}


def _view(made: EncodeResult, role: str | None) -> View:
    draft, outcome = made.draft, made.outcome
    start, end = draft.answers[-1]
    view = View(
        row=outcome.row,
        place=draft.row.place,
        role=role,
        prompt=draft.text[:start],
        answer=draft.text[start:end],
        token_ids=(),
        trained=(),
        stretches=(),
        tokens=(),
        prompt_length=0,
        cut_characters=0,
        variant=draft.rendered.variant,
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
    view: View, made: EncodeResult, marks: list[Mark], cuts: list[Cut], encoder: TextEncoder
) -> View:
    if isinstance(made.outcome, LeftOut):
        kinds = [(kind, field, False) for kind, field in marks]
        return replace(view, stretches=tuple(_stretches(made.draft.text, kinds, cuts)))
    tokens, stretches = _laid_over(made.outcome, made.draft, marks, cuts, encoder)
    return replace(view, tokens=tokens, stretches=stretches)


def _laid_over(
    example: Example, draft: ExampleText, marks: list[Mark], cuts: list[Cut], encoder: TextEncoder
) -> tuple[tuple[TokenView, ...], tuple[Stretch, ...]]:
    """Tokens and stretches of the decoded ids, with the marks of the draft's text laid over them."""
    ids, trained = example.token_ids.tolist(), example.trained.tolist()
    texts = token_texts(ids, encoder)
    text, ends = "".join(texts), _ends(ids, trained, encoder)
    border = sum(map(len, texts[: example.prompt_length]))
    start = _start(text, draft.text, encoder)
    places = _places(text, draft.text, start)
    if places is None:  # where something is missing is not known: say it before the answer
        marks = [_PROMPT] * border + [_ANSWER] * (len(text) - border)
        cuts = [(border, field, lost) for _, field, lost in cuts]
    else:
        marks = [_START if at < start else marks[place] for at, place in enumerate(places)]
        marks += [_END] * (len(text) - len(places))
        cuts = [(bisect_left(places, at, lo=start), field, lost) for at, field, lost in cuts]
    tokens: list[TokenView] = []
    kinds: list[tuple[StretchKind, str | None, bool]] = []
    for at, number in enumerate(ids):
        here = marks[len(kinds) : len(kinds) + len(texts[at])] or marks[len(kinds) : len(kinds) + 1]
        if ends[at]:
            here = [_END] * len(here)
        kinds += [(kind, field, trained[at]) for kind, field in here[: len(texts[at])]]
        name = str(encoder.tokenizer.convert_ids_to_tokens(number))
        kind = here[0][0] if here else "end"
        tokens.append(TokenView(number, texts[at], name, kind, trained[at]))
    return tuple(tokens), tuple(_stretches(text, kinds, cuts))


def _ends(ids: Sequence[int], trained: Sequence[bool], encoder: TextEncoder) -> list[bool]:
    """Which tokens are the special ones that end an answer."""
    special = encoder.special_text.keys() - ({encoder.tokenizer.unk_token_id} - {encoder.eos_id})
    ends = [False] * len(ids)
    for at in reversed(range(len(ids))):
        last = at + 1 == len(ids) or not trained[at + 1] or ends[at + 1]
        ends[at] = trained[at] and last and ids[at] in special
    return ends


def _start(text: str, draft: str, encoder: TextEncoder) -> int:
    """Where the draft's text begins in the decoded one: behind start tokens that are not in the draft."""
    behind = encoder.decode(encoder.start_ids) if encoder.start_ids else ""
    return len(behind) if text.startswith(behind) and not draft.startswith(behind) else 0


def _places(text: str, draft: str, start: int) -> list[int] | None:
    """For each character of `text` from its first to that which ends the draft, its place in `draft`.

    Small differences are stepped over: the blanks that some decoders add, characters that became others or `<unk>`.
    None where the texts do not come together again. The first `start` characters have no place of their own.
    """
    places, here, there = [0] * start, start, 0
    while there < len(draft) and here < len(text):
        if text[here] == draft[there]:
            places.append(there)
            here, there = here + 1, there + 1
            continue
        steps = next(
            (steps for steps in _STEPS if _meet(text, draft, here + steps[0], there + steps[1])), None
        )
        if steps is None:
            return None
        places += [there] * steps[0]
        here, there = here + steps[0], there + steps[1]
    return places if there == len(draft) else None


def _meet(text: str, draft: str, here: int, there: int) -> bool:
    ahead = draft[there : there + _MEETING]
    if not ahead:  # the draft is at its end: what follows in the text is not of it
        return True
    return text.startswith(ahead, here)


def _stretches(
    text: str, kinds: Sequence[tuple[StretchKind, str | None, bool]], cuts: Sequence[Cut]
) -> list[Stretch]:
    found: list[Stretch] = []
    at = 0
    for border, field, lost in [*sorted(cuts), (len(text), "", "")]:
        for (kind, of, trained), run in groupby(range(at, border), key=lambda index: kinds[index]):
            indices = list(run)
            found.append(Stretch(text[indices[0] : indices[-1] + 1], kind, of, trained))
        if lost:
            found.append(Stretch(lost, "cut", field, False))
        at = border
    return found
