"""A row as the texts of its examples: where the answers stand, what is data, what a prompt is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from yeonma.text.frame import Piece
from yeonma.text.rows import Row
from yeonma.text.template import Rendered
from yeonma.tokens.chat import Chat, Message
from yeonma.tokens.encode import Span, TextEncoder


@dataclass(frozen=True)
class Prompt:
    """What is asked, as text. `data`: character spans of data, or None where no special-token text is in it."""

    text: str
    data: tuple[Span, ...] | None


@dataclass(frozen=True)
class Draft:
    """One example as text. `answers` are the character spans of what is trained; the last one ends the text.

    `ended`: the text holds the end token already; otherwise EOS may follow. `rendered` holds just the turns that this
    example needs, so that it can be shortened and drafted again.
    """

    rendered: Rendered
    row: Row
    text: str
    answers: tuple[Span, ...]
    ended: bool
    data: tuple[Span, ...] | None


def prompt_of(rendered: Rendered, row: Row, encoder: TextEncoder, chat: Chat | None) -> Prompt:
    """The prompt that generation feeds; a final assistant turn of a turn list is not part of it."""
    if rendered.answer_role is None:
        pieces = _pieces(rendered)
        return _plain(pieces, encoder)
    assert chat is not None
    messages = _messages(rendered)
    if not rendered.answer and messages and messages[-1]["role"] == "assistant":
        messages = messages[:-1]
    text = chat.prompt(messages, row.place)
    tainted = any(encoder.has_special(message["content"]) for message in messages)
    return Prompt(text, tuple(chat.data_of(messages, text, row.place)) if tainted else None)


def drafts_of(
    rendered: Rendered, row: Row, encoder: TextEncoder, chat: Chat | None, *, end_needed: bool
) -> list[Draft]:
    """The row's examples: one, or for a turn list that its chat template rewrites as it grows one for each answer.

    `end_needed`: every answer must end with a token of its own. Raises UserError with the row's place where the
    model's chat template refuses the row.
    """
    if rendered.answer_role is None or rendered.answer:
        return [_single(rendered, row, encoder, chat)]
    asked = split_turns(rendered)
    drafts = [_single(part, row, encoder, chat) for part in asked]
    joint = _joint(drafts) if len(drafts) > 1 else None
    if joint is not None and not (end_needed and not all(draft.ended for draft in drafts)):
        return [joint]
    return drafts


def split_turns(rendered: Rendered) -> list[Rendered]:
    """A turn list up to each of its assistant turns that something stands before."""
    roles = [turn.role for turn in rendered.turns]
    return [
        replace(rendered, turns=rendered.turns[: number + 1])
        for number, role in enumerate(roles)
        if role == "assistant" and number > 0
    ]


def data_spans(draft: Draft, chat: Chat | None) -> list[tuple[int, int, str]]:
    """Start and end in the draft's text of each stretch of a prompt field's data, with the field's name.

    In turns, contents that the chat template changes by more than blanks at their edges are left out.
    """
    turns = draft.rendered.turns
    if draft.rendered.answer_role is None:
        return _spans_of(_pieces(draft.rendered), 0, draft.answers[0][0], draft.text)
    assert chat is not None
    messages = _messages(draft.rendered)
    if not draft.rendered.answer:
        turns, messages = turns[:-1], messages[:-1]
    prompt = draft.text[: draft.answers[-1][0]]
    contents = chat.data_of(messages, prompt, draft.row.place)
    if len(contents) != len(turns):
        return []
    return [
        span
        for turn, (start, end) in zip(turns, contents, strict=True)
        for span in _spans_of(turn.pieces, start, end, draft.text)
    ]


def _spans_of(pieces: Sequence[Piece], start: int, end: int, text: str) -> list[tuple[int, int, str]]:
    """The fields' spans where `pieces`, perhaps without blanks at their edges, stand at `start` to `end` of `text`."""
    at = start - _joined(pieces).find(text[start:end])
    spans = []
    for piece in pieces:
        left, right = max(at, start), min(at + len(piece.text), end)
        if piece.field is not None and left < right:
            spans.append((left, right, piece.field))
        at += len(piece.text)
    return spans


def _single(rendered: Rendered, row: Row, encoder: TextEncoder, chat: Chat | None) -> Draft:
    """The draft of one answer: the last."""
    prompt = prompt_of(rendered, row, encoder, chat)
    if rendered.answer_role is None:
        whole = _plain([*_pieces(rendered), *rendered.answer], encoder)
        return Draft(rendered, row, whole.text, ((len(prompt.text), len(whole.text)),), False, whole.data)
    assert chat is not None
    messages = _messages(rendered)
    if rendered.answer:
        messages.append({"role": "assistant", "content": _joined(rendered.answer)})
    answer = chat.answer(messages, prompt.text, row.place)
    text = prompt.text + answer.text
    data = prompt.data
    if data is not None or encoder.has_special(messages[-1]["content"]):
        data = data if data is not None else tuple(chat.data_of(messages[:-1], prompt.text, row.place))
        data = (*data, (len(prompt.text) + answer.content[0], len(prompt.text) + answer.content[1]))
    return Draft(rendered, row, text, ((len(prompt.text), len(text)),), answer.ended, data)


def _joint(drafts: Sequence[Draft]) -> Draft | None:
    """The drafts of a turn list as one, where each is how the next begins."""
    last = drafts[-1]
    if not all(last.text.startswith(draft.text) for draft in drafts):
        return None
    prompts = [draft.text[: draft.answers[0][0]] for draft in drafts]
    if not all(later.startswith(earlier.text) for later, earlier in zip(prompts[1:], drafts, strict=False)):
        return None
    return replace(last, answers=tuple(draft.answers[0] for draft in drafts))


def _plain(pieces: Sequence[Piece], encoder: TextEncoder) -> Prompt:
    text = _joined(pieces)
    if not encoder.has_special(text):
        return Prompt(text, None)
    data, at = [], 0
    for piece in pieces:
        if piece.field is not None:
            data.append((at, at + len(piece.text)))
        at += len(piece.text)
    return Prompt(text, tuple(data) if encoder.specials_in(text, data) else None)


def _pieces(rendered: Rendered) -> list[Piece]:
    return [piece for turn in rendered.turns for piece in turn.pieces]


def _joined(pieces: Sequence[Piece]) -> str:
    return "".join([piece.text for piece in pieces])


def _messages(rendered: Rendered) -> list[Message]:
    return [{"role": str(turn.role), "content": _joined(turn.pieces)} for turn in rendered.turns]
