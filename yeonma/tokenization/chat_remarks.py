"""What the model's chat template adds to the rows by itself, and what of them it ignores."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from yeonma.data.rows import Row
from yeonma.data.task import Task
from yeonma.data.template import Rendered, RenderedTurn
from yeonma.data.template_syntax import visible
from yeonma.data.text_checks import FIRST_KEY, WITH_SYSTEM, WITHOUT_SYSTEM, Notes
from yeonma.errors import UserError, brief
from yeonma.messages import tr
from yeonma.tokenization.chat_template import PROBE, Chat, chat_of
from yeonma.tokenization.conversation import ChatMessage, Conversation
from yeonma.tokenization.example import TokenRules
from yeonma.tokenization.text_encoder import TextEncoder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MOST_CHARACTERS = 100
MOST_KEYS = 15
"""Kinds of keys that are told apart."""
TRIALS = 5
"""So many rows with a key are rendered with and without it. If it makes no difference, the template ignores it."""

Key = tuple[str, str]
"""The role of a turn and one of its keys. The role is empty for what belongs to the whole row."""

TOOLS: Key = ("", "tools")
EARLIER_REASONING: Key = ("assistant", "reasoning")
CALLS: Key = ("assistant", "tool_calls")

_WITHOUT_MEANING = ("tool_call_id", "id", "index", "type", "refusal")
"""Keys of turns that say nothing which a model could read."""
_CLOSES_REASONING = re.compile(r"</?(seed:)?think(ing)?>|\[/THINK\]|<\|END_THINKING\|>")
_ROLES = re.compile(r"^#*\s*(system|developer|user)\b:?\s*|[<\[]+/?\w+[>\]]+", re.IGNORECASE)
_PLACE = tr("chat template")


@dataclass(frozen=True)
class ChatRemarks:
    """What to say about rows and the chat template. The bits are those of `Notes.flags`."""

    own_system: str = ""
    """The system prompt, shortened, that it writes for conversations without a system turn; or empty."""
    beside_system: str = ""
    """The text, shortened, that it writes besides the conversation's own system turn; or empty."""
    ignored: tuple[tuple[int, str], ...] = ()
    """(bit, what the chat template ignores)."""

    @property
    def by_bit(self) -> list[tuple[str, int, str]]:
        """(kind, bit, what to say) of every remark."""
        own = tr(
            'the chat template adds a system prompt of its own, "{own_system}"', own_system=self.own_system
        )
        beside = tr(
            'the chat template adds text of its own to the system prompt, "{beside_system}"',
            beside_system=self.beside_system,
        )
        return [
            *([("own_system", WITHOUT_SYSTEM, own)] if self.own_system else []),
            *([("beside_system", WITH_SYSTEM, beside)] if self.beside_system else []),
            *(("ignored", bit, what) for bit, what in self.ignored),
        ]


@dataclass
class ChatWatch:
    """Makes the notes of rows while they are encoded, and finds out what the chat template does with their keys.

    A key is tried in the first rows that have it: it is ignored if the chat template writes the same without it.
    """

    task: Task
    tokenizer: PreTrainedTokenizerBase
    rules: TokenRules
    has_turns: bool = False
    bits: dict[Key, int] = field(default_factory=dict)
    trials: Counter[Key] = field(default_factory=Counter)
    read: set[Key] = field(default_factory=set)
    """The keys that make a difference."""

    def notes(self, texts: Sequence[Any], rows: Sequence[Row]) -> list[Notes]:
        """The notes of rows that the chat template has written. `texts`: what the task's `render` returns.

        Raises UserError as `chat_of`.
        """
        notes = [self.task.notes(text) for text in texts]
        to_try: list[tuple[Key, Rendered, str]] = []
        for index, (text, row) in enumerate(zip(texts, rows, strict=True)):
            rendered = self.task.preferred(text)
            if rendered.answer_role is None:
                continue
            self.has_turns = True
            flags = WITH_SYSTEM if rendered.turns and rendered.turns[0].role == "system" else WITHOUT_SYSTEM
            for key in sorted(_keys_of(rendered)):
                flags |= self._bit(key)
                if key not in self.read and self.trials[key] < TRIALS:
                    self.trials[key] += 1
                    to_try.append((key, rendered, row.place))
            notes[index] = replace(notes[index], flags=notes[index].flags | flags)
        if to_try:
            encoder = TextEncoder.of(self.tokenizer)
            with chat_of(encoder, self.rules.thinking, self.rules.chat_template_kwargs) as chat:
                for key, rendered, place in to_try:
                    if key not in self.read and makes_difference(chat, rendered, key, place):
                        self.read.add(key)
        return notes

    def remarks(self) -> ChatRemarks:
        """What to say about the rows so far."""
        if not self.has_turns:
            return ChatRemarks()
        encoder = TextEncoder.of(self.tokenizer)
        with chat_of(encoder, self.rules.thinking, self.rules.chat_template_kwargs) as chat:
            own, beside = own_system(chat), beside_system(chat)
        ignored: dict[int, list[Key]] = {}
        for key, bit in self.bits.items():
            ignored.setdefault(bit, []).append(key)
        listed = [
            (bit, " and ".join(map(_described, unread)))
            for bit, keys in ignored.items()
            if (unread := [key for key in keys if key not in self.read])
        ]
        return ChatRemarks(own, beside, tuple(listed))

    def _bit(self, key: Key) -> int:
        number = min(len(self.bits), MOST_KEYS - 1)
        return self.bits.setdefault(key, FIRST_KEY << number)


def own_system(chat: Chat) -> str:
    """The system prompt, shortened, that the chat template writes where a conversation has none; empty if it writes
    none."""
    user, answer, again = (PROBE.format(number=number) for number in range(3))
    turns = [("user", user), ("assistant", answer), ("user", again)]
    try:
        first = chat.prompt(_conversation(chat, turns[:1]), _PLACE)
        whole = chat.prompt(_conversation(chat, turns), _PLACE)
    except UserError:
        return ""
    header = _header(chat, whole, answer, again)
    return _shown(chat, first[: max(first.find(user), 0)].removesuffix(header))


def beside_system(chat: Chat) -> str:
    """The text, shortened, that the chat template writes beside a system turn of the conversation; or empty."""
    user, answer, again, system = (PROBE.format(number=number) for number in range(4))
    turns = [("system", system), ("user", user), ("assistant", answer), ("user", again)]
    try:
        first = chat.prompt(_conversation(chat, turns[:2]), _PLACE)
        whole = chat.prompt(_conversation(chat, turns), _PLACE)
    except UserError:
        return ""
    header = _header(chat, whole, answer, again).strip()
    before = first[: max(first.find(user), 0)].replace(system, "\n")
    return _shown(chat, before.replace(header, "\n") if header else before)


def _conversation(chat: Chat, turns: Iterable[tuple[str, str]]) -> Conversation:
    return Conversation([{"role": role, "content": text} for role, text in turns], kwargs=chat.kwargs)


def _header(chat: Chat, whole: str, answer: str, again: str) -> str:
    """What the chat template writes before a user's text, after an answer."""
    between = whole[whole.find(answer) + len(answer) : max(whole.find(again), 0)]
    return between.removeprefix(chat.habits.trailer or "")


def _shown(chat: Chat, text: str) -> str:
    """The text without special tokens, tags and names of roles, in one line and shortened; empty without letters."""
    control = chat.encoder.control
    pieces = [text] if control is None else control.sub("\0", text).split("\0")
    words = " ".join(_ROLES.sub("", piece.strip()) for piece in pieces).split()
    shown = " ".join(words)
    return visible(brief(shown, MOST_CHARACTERS)) if any(map(str.isalpha, shown)) else ""


# Keys


def _keys_of(rendered: Rendered) -> set[Key]:
    """What the row has besides roles and texts."""
    keys = {TOOLS} if rendered.tools else set()
    turns = _with_answer(rendered)
    last_user = _last_user([turn.role for turn in turns])
    for index, turn in enumerate(turns):
        source = turn.turn
        if index < last_user and turn.role == "assistant":
            if (source is not None and source.reasoning) or _CLOSES_REASONING.search(turn.text):
                keys.add(EARLIER_REASONING)
        if source is None:
            continue
        if source.tool_calls:
            keys.add(CALLS)
        if source.other:
            keys |= {
                (source.role, key)
                for key, value in source.other_keys.items()
                if key not in _WITHOUT_MEANING and value not in ("", [], {})
            }
    return keys


def _with_answer(rendered: Rendered) -> Sequence[RenderedTurn]:
    if rendered.answer_turn is None or not rendered.answer:
        return rendered.turns
    return (*rendered.turns, RenderedTurn("assistant", rendered.answer, rendered.answer_turn))


def _last_user(roles: Sequence[object]) -> int:
    return max((index for index, role in enumerate(roles) if role == "user"), default=0)


def makes_difference(chat: Chat, rendered: Rendered, key: Key, place: str) -> bool:
    """Whether the chat template writes something else without this key of the row; True also if it cannot be tried."""
    try:
        conversation = chat.conversation(rendered, place, with_answer=True)
        if key == EARLIER_REASONING:
            return _writes_earlier_reasoning(chat, conversation, place)
    except UserError:
        return True
    if key == TOOLS:
        last, variants = 0, [replace(conversation, tools=())]
    else:
        last = next((i for i, message in enumerate(conversation.messages) if _has(message, key)), 0)
        variants = list(_without(conversation, key))
    written = _written(chat, conversation, last, place)
    return not any(written) or any(_written(chat, variant, last, place) != written for variant in variants)


def _has(message: ChatMessage, key: Key) -> bool:
    return message["role"] == key[0] and key[1] in message


def _without(conversation: Conversation, key: Key) -> Iterator[Conversation]:
    """The conversation without the key, and with another text in it. A template may write a default without it."""
    name = key[1]
    for other in (False, True):
        messages = []
        for message in conversation.messages:
            rest = {k: value for k, value in message.items() if k != name}
            value = _other_value(message[name]) if _has(message, key) and other else None
            changed = rest if value is None else {**rest, name: value}
            messages.append(changed if _has(message, key) else message)
        yield replace(conversation, messages=messages)


def _other_value(value: object) -> object | None:
    """Another value of the same kind; None where none is known."""
    probe = PROBE.format(number=1)
    if isinstance(value, list) and value and isinstance(value[0], dict) and "function" in value[0]:
        return [{**call, "function": {**call["function"], "name": probe}} for call in value]
    return probe if isinstance(value, str) else None


def _written(chat: Chat, conversation: Conversation, last: int, place: str) -> list[str]:
    """The conversation as the chat template writes it: the whole, and up to the message `last` as the end of an
    example. Empty texts where it refuses that."""
    cut = replace(conversation, messages=conversation.messages[: last + 1])
    is_answer = conversation.messages[last]["role"] == "assistant"
    texts = []
    for part, generate in ((conversation, False), (cut, not is_answer)):
        try:
            texts.append(chat.render(part, place, generate=generate))
        except UserError:
            texts.append("")
    return texts


def _writes_earlier_reasoning(chat: Chat, conversation: Conversation, place: str) -> bool:
    """Whether the prompt of the last user turn shows reasoning of the answers before it. Raises UserError."""
    last = _last_user([message["role"] for message in conversation.messages])
    probe, messages = PROBE.format(number=1), list(conversation.messages[: last + 1])
    found = False
    for index, message in enumerate(messages):
        reasoning, _ = chat.parts(message, "") if message["role"] == "assistant" else (None, "")
        if reasoning:
            found = True
            messages[index] = {
                key: value.replace(reasoning, probe) if isinstance(value, str) else value
                for key, value in message.items()
            }
    return not found or probe in chat.prompt(replace(conversation, messages=messages), place)


def _described(key: Key) -> str:
    if key == TOOLS:
        return tr("the chat template ignores the tools that rows offer")
    if key == EARLIER_REASONING:
        return tr("the chat template does not show the reasoning of earlier turns")
    if key == CALLS:
        return tr("the chat template ignores tool calls of earlier turns")
    return tr(
        'the chat template ignores the key "{key}" of {role} turns', key=visible(brief(key[1])), role=key[0]
    )
