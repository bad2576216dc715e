"""Which turns of a row are prompt and which are trained answers, and the conversations up to them."""

from __future__ import annotations

from dataclasses import replace

from yeonma.data.template import Rendered
from yeonma.data.turns import Turn
from yeonma.errors import UserError
from yeonma.tokenization.chat_template import Chat
from yeonma.tokenization.conversation import Conversation
from yeonma.tokenization.example import TokenRules


def prompt_part(rendered: Rendered) -> Rendered:
    """The row without the answer to generate: a final assistant turn of a turn list."""
    turns = rendered.turns
    if not rendered.answer and turns and turns[-1].role == "assistant" and len(turns) > rendered.first_answer:
        turns = turns[:-1]
    return replace(rendered, turns=turns, answer=(), answer_turn=None)


def split_turns(rendered: Rendered, train_on: str) -> list[Rendered]:
    """The turn list cut after each of its assistant turns that are trained, never one at its start."""
    last = len(rendered.turns) - 1
    while last >= 0 and rendered.turns[last].role != "assistant":
        last -= 1
    return [
        replace(rendered, turns=rendered.turns[: number + 1])
        for number, turn in enumerate(rendered.turns)
        if turn.role == "assistant"
        and number >= max(rendered.first_answer, 1)
        and _is_trained(turn.turn, train_on, number == last)
    ]


def _is_trained(turn: Turn | None, train_on: str, is_last: bool) -> bool:
    weight = None if turn is None else turn.weight
    if weight == 0 or (train_on == "marked" and weight is None):
        return False
    return is_last or train_on != "last"


def likely_conversations(
    rendered: Rendered, chat: Chat, rules: TokenRules
) -> list[tuple[Conversation, bool]]:
    """What the chat template will probably be asked for: prompts (true) and the texts up to their answers (false)."""
    if rendered.answer_role is None:
        return []
    try:
        whole = chat.conversation(rendered, "", with_answer=True)
    except UserError:  # the row itself will say so
        return []
    count = len(whole.messages)
    if rendered.answer:
        ends = [count]
    elif rendered.turns[-1:] and rendered.turns[-1].role == "assistant":
        ends = [len(part.turns) for part in split_turns(rendered, rules.train_on)]
    else:
        return [(whole, True)]
    parts = [replace(whole, messages=whole.messages[:end]) for end in ends]
    return [
        pair for part in parts if len(part.messages) > 1 for pair in ((part.before_last, True), (part, False))
    ]
