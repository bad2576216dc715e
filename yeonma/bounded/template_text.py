"""Chat templates, rendered and read with bounds of time, memory and text."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from yeonma.bounded.child import MIB, Bounds, OverBounds, Refused, ask, packed
from yeonma.bounded.child_program import ANSWER, REFUSED
from yeonma.messages import tr

CHAT_TEMPLATE = Bounds(seconds=10, memory=512 * MIB, result=MIB)
"""For one conversation. The text may have 16 bytes for each byte of the conversation besides."""

_OWN = ("messages", "tools", "add_generation_prompt")


def request_for(
    template: object,
    messages: Sequence[Mapping[str, Any]],
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    add_generation_prompt: bool = False,
    variables: Mapping[str, Any],
) -> bytes:
    """A request to render messages as transformers' `apply_chat_template` does. Equal ones have equal bytes.

    `variables`: the special tokens and the template's own arguments. Raises Refused.
    """
    if not isinstance(template, str):
        raise Refused(tr("it is no text, but {name}", name=type(template).__name__))
    if not messages:
        raise Refused(tr("the conversation is empty"))
    for name in _OWN:
        if name in variables:
            raise Refused(tr('"{name}" is not among the arguments that can be given', name=name))
    given = {
        "documents": None,
        **variables,
        "tools": None if tools is None else list(tools),
        "add_generation_prompt": add_generation_prompt,
    }
    return packed((template, list(messages), given))


def text_of(request: bytes) -> str:
    """What the chat template writes. Raises OverBounds, and Refused with the error that the template raises."""
    return ask("render", (request,), CHAT_TEMPLATE).decode("utf-8", "surrogatepass")


class TextsAhead:
    """Texts that will probably be asked for, rendered many at a time: the two processes then seldom wait for each
    other.

    All of them together have the bounds of one. Where they exceed these, nothing is rendered ahead any more.
    """

    def __init__(self) -> None:
        self._texts: dict[bytes, str | Refused] = {}
        self._within_bounds = True

    def prepare(self, requests: Iterable[bytes]) -> None:
        """Renders these requests, and forgets earlier ones."""
        self._texts.clear()
        wanted = list(dict.fromkeys(requests)) if self._within_bounds else []
        if len(wanted) < 2:
            return
        try:
            answers = memoryview(ask("render many", (wanted,), CHAT_TEMPLATE))
        except (OverBounds, Refused):
            self._within_bounds = False
            return
        position = 0
        for request in wanted:
            kind, count = ANSWER.unpack_from(answers, position)
            position += ANSWER.size + count
            content = bytes(answers[position - count : position])
            self._texts[request] = (
                Refused(content.decode("utf-8", "replace"))
                if kind == REFUSED
                else content.decode("utf-8", "surrogatepass")
            )

    def text_of(self, request: bytes) -> str:
        """As the function `text_of`."""
        text = self._texts.get(request)
        if text is None:
            return text_of(request)
        if isinstance(text, Refused):
            raise text
        return text


def names_in(template: str) -> tuple[frozenset[str], frozenset[str], frozenset[str]] | None:
    """The variables that a chat template reads, the names of keys and attributes in it, and the variables that it sets;
    None if it is not Jinja. Raises OverBounds and Refused."""
    found = json.loads(ask("names", (template,), CHAT_TEMPLATE))
    if found is None:
        return None
    variables, names, assigned = map(frozenset, found)
    return variables, names, assigned
