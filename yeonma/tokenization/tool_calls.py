"""Tool calls in generated text, in the formats of the common chat templates."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from yeonma.data.turns import ToolCall

FindCalls = Callable[[str], tuple[str, tuple[ToolCall, ...]]]
"""Generated text -> (the text without calls, the calls)."""


_HERMES = re.compile(r"\n?<tool_call>(.*?)(?:</tool_call>|\Z)", re.DOTALL)
"""A call, with the line end that chat templates write before it."""


def call_finder(template: str) -> FindCalls | None:
    """The function that finds calls as this chat template writes them; None if its format is not known.

    Known are Hermes's and Qwen's `<tool_call>` with JSON, Mistral's `[TOOL_CALLS]`, and the bare JSON of Llama 3.
    """
    if "[TOOL_CALLS]" in template:
        return _of_mistral
    if "<tool_call>" in template:
        return None if "<function=" in template else _of_hermes
    if "<|python_tag|>" in template or ('"parameters": ' in template and '"name": ' in template):
        return _of_llama
    return None


def _of_hermes(text: str) -> tuple[str, tuple[ToolCall, ...]]:
    blocks = list(_HERMES.finditer(text))
    calls = [_call(_json(block[1])) for block in blocks]
    if not blocks or None in calls:
        return text, ()
    return _without_blank(_HERMES.sub("", text)), _found(calls)


def _of_mistral(text: str) -> tuple[str, tuple[ToolCall, ...]]:
    content, *parts = text.split("[TOOL_CALLS]")
    calls: list[ToolCall | None] = []
    for part in parts:
        name, arguments_mark, arguments = part.partition("[ARGS]")
        if arguments_mark:
            values = _json(arguments)
            name = re.sub(r"\[CALL_ID\].*", "", name, flags=re.DOTALL).strip()
            calls.append(_call({"name": name, "arguments": values}))
        else:
            listed = _json(part)
            calls += [_call(entry) for entry in (listed if isinstance(listed, list) else [listed])]
    if not calls or None in calls:
        return text, ()
    return _without_blank(content), _found(calls)


def _of_llama(text: str) -> tuple[str, tuple[ToolCall, ...]]:
    start = text.strip().removeprefix("<|python_tag|>").strip()
    values = list(_json_objects(start))
    calls = [_call(value) for value in values]
    if not calls or None in calls:
        return text, ()
    return "", _found(calls)


def _without_blank(text: str) -> str:
    """The text beside calls; empty if it is only blanks between them."""
    return "" if text.isspace() else text


def _json_objects(text: str) -> Iterator[Any]:
    """The JSON values that a text consists of, parted by white space or semicolons; [None] if there is other text."""
    decoder = json.JSONDecoder()
    at = 0
    while at < len(text):
        try:
            value, at = decoder.raw_decode(text, at)
        except ValueError:
            yield None
            return
        yield value
        while at < len(text) and text[at] in " \t\r\n;":
            at += 1


def _json(text: str) -> Any:
    try:
        return json.loads(text.strip())
    except ValueError:
        return None


def _call(value: Any) -> ToolCall | None:
    """The call that a JSON value describes, or None."""
    if not isinstance(value, Mapping) or not isinstance(value.get("name"), str) or not value["name"]:
        return None
    arguments = value.get("arguments", value.get("parameters", {}))
    if isinstance(arguments, str):
        arguments = _json(arguments)
    if not isinstance(arguments, Mapping):
        return None
    call_id = value.get("id")
    text = json.dumps(arguments, ensure_ascii=False)
    return ToolCall(value["name"], text, call_id if isinstance(call_id, str) else None)


def _found(calls: list[ToolCall | None]) -> tuple[ToolCall, ...]:
    return tuple([call for call in calls if call is not None])
