"""Chat templates, rendered and read with bounds of time, memory and text."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from yeonma.bounded.child import MIB, Bounds, Refused, ask

CHAT_TEMPLATE = Bounds(seconds=10, memory=512 * MIB, result=MIB)
"""For one conversation. The text may have 16 bytes for each byte of the conversation besides."""

_OWN = ("messages", "tools", "add_generation_prompt")


def written_text(
    template: object,
    messages: Sequence[Mapping[str, Any]],
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    add_generation_prompt: bool = False,
    variables: Mapping[str, Any],
) -> str:
    """What the chat template writes of the messages, as transformers' `apply_chat_template` does.

    `variables`: the special tokens and the template's own arguments. Raises OverBounds, and Refused with the error that
    the template raises.
    """
    if not isinstance(template, str):
        raise Refused(f"it is no text, but {type(template).__name__}")
    if not messages:
        raise Refused("the conversation is empty")
    for name in _OWN:
        if name in variables:
            raise Refused(f'"{name}" is not among the arguments that can be given')
    given = {
        "documents": None,
        **variables,
        "tools": None if tools is None else list(tools),
        "add_generation_prompt": add_generation_prompt,
    }
    return ask("render", (template, list(messages), given), CHAT_TEMPLATE).decode("utf-8", "surrogatepass")


def names_in(template: str) -> tuple[frozenset[str], frozenset[str], frozenset[str]] | None:
    """The variables that a chat template reads, the names of keys and attributes in it, and the variables that it sets;
    None if it is not Jinja. Raises OverBounds and Refused."""
    found = json.loads(ask("names", (template,), CHAT_TEMPLATE))
    if found is None:
        return None
    variables, names, assigned = map(frozenset, found)
    return variables, names, assigned
