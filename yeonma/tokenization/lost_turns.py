"""Turns of which the chat template writes nothing: their text would be in no token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from yeonma.errors import Problem, UserError
from yeonma.messages import tr
from yeonma.tokenization.chat_template import PROBE, Chat
from yeonma.tokenization.conversation import Conversation

_CURES = {
    "system": tr("put its text into the user's turn, or use a model whose chat template writes system turns"),
    "tool": tr("put the result into a user's turn, or use a model whose chat template writes tool results"),
}

_NAMES = {"system": tr("system or developer"), "tool": tr("tool or function")}


def check_turns(chat: Chat, conversation: Conversation, prompt: str, place: str) -> None:
    """Raises UserError with a problem for every turn whose text leaves no trace in the prompt.

    A turn is tried only if its text is not found: then the template must write something else for another text.
    """
    contents = [message["content"] for message in conversation.messages]
    problems = []
    for index, (message, content) in enumerate(zip(conversation.messages, contents, strict=True)):
        if not isinstance(content, str) or not content.strip() or message.get("tool_calls"):
            continue
        is_main = message["role"] in ("user", "assistant")
        others = [] if is_main else contents[:index] + contents[index + 1 :]
        if _stands_in(prompt, content.strip(), others) or _makes_difference(
            chat, conversation, index, prompt, place
        ):
            continue
        role = str(message["role"])
        cure = _CURES.get(role, tr("use a model whose chat template writes it, or another role"))
        problems.append(
            Problem(
                tr(
                    "the model's chat template writes nothing of the {role} turn, turn {index}",
                    role=_NAMES.get(role, role),
                    index=index + 1,
                ),
                place,
                cure,
            )
        )
    if problems:
        raise UserError(problems)


def _stands_in(prompt: str, content: str, others: Sequence[object]) -> bool:
    """Whether the content stands in the prompt, and not only as part of the other contents."""
    if content not in prompt:
        return False
    texts = [text for text in others if isinstance(text, str) and content in text]
    return not texts or prompt.count(content) > sum(text.count(content) for text in texts)


def _makes_difference(chat: Chat, conversation: Conversation, index: int, prompt: str, place: str) -> bool:
    """Whether the template writes something else for another text in this turn; True also if it refuses that."""
    messages = list(conversation.messages)
    messages[index] = {**messages[index], "content": PROBE.format(number=index)}
    try:
        return chat.prompt(replace(conversation, messages=messages), place) != prompt
    except UserError:
        return True
