"""Turn lists: a conversation in one column, in OpenAI's form (`role`, `content`) or ShareGPT's (`from`, `value`).

A turn may also have reasoning, tool calls, a weight and other keys, which go to the model's chat template.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from yeonma.data.rows import Row
from yeonma.data.strict_json import described
from yeonma.data.words import all_of, field_name
from yeonma.errors import Problem, UserError, did_you_mean
from yeonma.messages import counted, tr

Role = Literal["system", "user", "assistant", "tool"]

ROLES: dict[str, Role] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "tool_call": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "tool_response": "tool",
}
"""Role names in OpenAI messages and in ShareGPT -> roles of chat templates."""

CALL_ROLES = ("function_call", "tool_call")
"""ShareGPT's roles whose text is a tool call in JSON."""
REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
WEIGHT_KEYS = ("weight", "loss", "train")
_READ_KEYS = {
    "role",
    "content",
    "from",
    "value",
    "tool_calls",
    "function_call",
    *REASONING_KEYS,
    *WEIGHT_KEYS,
}


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call of a tool. `arguments`: a JSON object as text."""

    name: str
    arguments: str
    id: str | None = None


@dataclass(frozen=True, slots=True)
class Turn:
    """One turn of a conversation."""

    role: Role
    text: str
    reasoning: str | None = None
    """The assistant's reasoning before its text, if it stands in a key of its own."""
    tool_calls: tuple[ToolCall, ...] = ()
    weight: float | None = field(default=None, compare=False)
    """The weight of the turn's tokens in the loss, from 0 to 1; None if the turn is not marked."""
    has_content: bool = True
    """False for a tool call whose content is null."""
    other: str = ""
    """The turn's other keys, such as `name` and `tool_call_id`: a JSON object as text, or empty."""

    @property
    def is_plain(self) -> bool:
        """Whether the turn is role and text alone."""
        keys = self.reasoning or self.tool_calls or self.other
        return self.weight is None and self.has_content and not keys

    @property
    def other_keys(self) -> dict[str, Any]:
        return dict(json.loads(self.other)) if self.other else {}


def turns_of(row: Row, column: str) -> tuple[Turn, ...]:
    """The turns in a column, without empty system turns. Does not check that there is an answer.

    Content may be a list of text parts, which are joined. A list of [question, answer] pairs of text is a history in
    Alpaca's form: user and assistant turns.

    Raises:
        UserError: it is not a list, or turns are faulty. Messages name the place in the row, as `messages[2].role`.
    """
    return turn_list(row.values.get(column), column, row.place)


def turn_list(value: object, column: str, place: str) -> tuple[Turn, ...]:
    """The turns in a value. Raises UserError as `turns_of`."""
    if not isinstance(value, Sequence) or isinstance(value, str):
        problem = tr(
            'field "{column}" is {value}, not a list of turns', column=column, value=described(value)
        )
        raise UserError(problem, place=place, cure=tr('write [{{"role": "user", "content": "..."}}, ...]'))
    turns: list[Turn] = []
    problems: list[Problem] = []
    for index, entry in enumerate(value):
        try:
            if _is_exchange(entry):
                turns += _exchange(entry, f"{column}[{index}]", place)
                continue
            turn = turn_of(entry, f"{column}[{index}]", place)
            turns += [turn] if turn is not None else []
        except UserError as error:
            problems += error.problems
    if problems:
        raise UserError(problems)
    if not turns:
        raise UserError(
            tr('field "{column}" has no turns', column=column), place=place, cure=tr("remove the row")
        )
    return tuple(turns)


def turn_of(entry: object, where: str, place: str) -> Turn | None:
    """One turn, or None for an empty system turn. `where` is its place in the row, such as `messages[2]`.

    Raises:
        UserError: it is not a turn, its role is unknown, its text is missing or empty, or another key is faulty.
    """
    if not isinstance(entry, Mapping):
        problem = tr("{where} is {entry}, not a turn", where=where, entry=described(entry))
        raise UserError(problem, place=place, cure=tr('write {{"role": "user", "content": "..."}}'))
    role_key, text_key = ("from", "value") if entry.get("from") is not None else ("role", "content")
    role = _role(entry.get(role_key), f"{where}.{role_key}", place)
    content = entry.get(text_key)
    is_call = entry.get(role_key) in CALL_ROLES
    if len(entry) == 2 and isinstance(content, str) and content.strip() and not is_call:
        return Turn(role, _content(content, f"{where}.{text_key}", place))  # the usual turn, read fast
    calls = _tool_calls(entry, role, where, place)
    if is_call and not calls:
        calls, content = _calls_in_text(content, f"{where}.{text_key}", place), None
    has_content = content is not None or not calls
    turn = Turn(
        role=role,
        text=_content(content, f"{where}.{text_key}", place) if has_content else "",
        reasoning=_reasoning(entry, role, where, place),
        tool_calls=calls,
        weight=_weight(entry, role, where, place),
        has_content=has_content,
        other=_other_keys(entry, where, place),
    )
    if turn.text.strip() or role == "tool" or turn.tool_calls:
        return turn
    if role == "system":
        return None
    raise UserError(
        tr("{where}.{text_key} is empty", where=where, text_key=text_key),
        place=place,
        cure=tr("fill it or remove the row"),
    )


def is_turn_list(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(entry, Mapping) for entry in value)


def with_system(turns: Sequence[Turn], text: str, column: str, place: str) -> tuple[Turn, ...]:
    """The turns after a system turn with this text. Raises UserError if they begin with another one."""
    if not text.strip() or (turns and turns[0] == Turn("system", text)):
        return tuple(turns)
    if turns and turns[0].role == "system":
        problem = tr(
            'the turns begin with a system turn, and the column "{column}" has another system prompt',
            column=column,
        )
        raise UserError(problem, place=place, cure=tr("keep one of them"))
    return (Turn("system", text), *turns)


def tools_of(value: object, column: str, place: str) -> tuple[dict[str, Any], ...]:
    """The tools that a column offers: a list of descriptions in OpenAI's form, or such a list as JSON text.

    A description without {"type": "function", "function": ...} around it gets it. Raises UserError if it is no such
    list.
    """
    if isinstance(value, str):
        if not value.strip():
            return ()
        try:
            value = json.loads(value)
        except ValueError:
            raise UserError(
                tr('field "{column}" is text, but not JSON', column=column), place=place, cure=_TOOL_CURE
            ) from None
    if value is None or value == {}:
        return ()
    value = [value] if isinstance(value, Mapping) else value
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise UserError(
            tr('field "{column}" is {value}, not a list of tools', column=column, value=described(value)),
            place=place,
            cure=_TOOL_CURE,
        )
    tools = []
    for index, tool in enumerate(value):
        tool = _json_object(tool)
        function = tool if tool is None or "function" not in tool else tool["function"]
        if tool is None or not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            problem = tr("{column}[{index}] is not the description of a tool", column=column, index=index)
            raise UserError(problem, place=place, cure=_TOOL_CURE)
        if function is tool and tool.keys() == {"type", "name"}:
            raise UserError(
                tr("{column}[{index}] has a name alone", column=column, index=index),
                place=place,
                cure=_TOOL_CURE,
            )
        described_tool = {"type": "function", "function": tool} if function is tool else tool
        tools.append(_without_nulls(described_tool))
    return tuple(tools)


_TOOL_CURE = tr('write [{{"type": "function", "function": {{"name": "...", "parameters": {{...}}}}}}, ...]')


def object_of(value: object, column: str, place: str) -> dict[str, Any]:
    """A JSON object in a column, as an object or as text; empty for null and blank text. Raises UserError."""
    if value is None or (isinstance(value, str) and not value.strip()):
        return {}
    found = _json_object(value)
    if found is None:
        problem = tr('field "{column}" is {value}, not an object', column=column, value=described(value))
        raise UserError(problem, place=place, cure=tr('write {{"enable_thinking": false}}, for example'))
    return _without_nulls(found)


def check_characters(text: str, where: str, place: str, *, is_column: bool = False) -> None:
    """Raises UserError for a NUL character and for a lone surrogate, which no tokenizer encodes."""
    if "\0" in text:
        where = field_name(where) if is_column else where
        problem = tr(
            "{where} contains a NUL character (U+0000) after {characters}",
            where=where,
            characters=counted(text.index("\0"), "character"),
        )
        raise UserError(problem, place=place, cure=tr("remove it"))
    try:
        text.encode()
    except UnicodeEncodeError as error:
        code = f"U+{ord(text[error.start]):04X}"
        where = field_name(where) if is_column else where
        problem = tr(
            "{where} contains half a character, the lone surrogate {code}, after {characters}",
            where=where,
            code=code,
            characters=counted(error.start, "character"),
        )
        raise UserError(problem, place=place, cure=tr("remove it")) from None


def _role(name: object, where: str, place: str) -> Role:
    if isinstance(name, str) and name in ROLES:
        return ROLES[name]
    if name is None:
        raise UserError(
            tr("{where} is missing", where=where), place=place, cure=tr('a turn has "role" and "content"')
        )
    shown = f'"{name}"' if isinstance(name, str) else described(name)
    cure = did_you_mean(str(name), ROLES) or tr("roles are {roles}", roles=", ".join(ROLES))
    raise UserError(tr("{where}: unknown role {shown}", where=where, shown=shown), place=place, cure=cure)


def _content(content: object, where: str, place: str) -> str:
    """The text of a turn: text, or a list of OpenAI's text parts."""
    if content is None:
        raise UserError(tr("{where} is missing", where=where), place=place, cure=tr("a turn needs text"))
    if isinstance(content, str):
        check_characters(content, where, place)
        return content
    if not isinstance(content, Sequence):
        raise UserError(
            tr("{where} is {content}, not text", where=where, content=described(content)),
            place=place,
            cure=tr("a turn takes text"),
        )
    texts = []
    for index, part in enumerate(content):
        part_where = f"{where}[{index}]"
        part_type = part.get("type") if isinstance(part, Mapping) else None
        if not isinstance(part, Mapping) or part_type != "text" or not isinstance(part.get("text"), str):
            other_type = part_type not in (None, "text")
            problem = (
                tr('{part_where} is of type "{part_type}"', part_where=part_where, part_type=part_type)
                if other_type
                else tr("{part_where} is not a text part", part_where=part_where)
            )
            cure = tr('only parts of the form {{"type": "text", "text": "..."}} can be trained')
            raise UserError(problem, place=place, cure=cure)
        texts.append(_content(part["text"], f"{part_where}.text", place))
    return "".join(texts)


# Keys of a turn besides role and text


def _reasoning(entry: Mapping[str, object], role: Role, where: str, place: str) -> str | None:
    given = {key: entry[key] for key in REASONING_KEYS if entry.get(key) not in (None, "")}
    if not given:
        return None
    key, value = next(iter(given.items()))
    if role != "assistant":
        problem = tr("{where}.{key}: only an assistant turn has reasoning", where=where, key=key)
        raise UserError(problem, place=place, cure=tr("remove it"))
    if any(other != value for other in given.values()):
        problem = tr("{where} has different texts in {given}", where=where, given=all_of(given))
        raise UserError(problem, place=place, cure=tr("keep one of them"))
    text = _content(value, f"{where}.{key}", place)
    return text if text.strip() else None


def _weight(entry: Mapping[str, object], role: Role, where: str, place: str) -> float | None:
    given = {key: entry[key] for key in WEIGHT_KEYS if entry.get(key) is not None}
    if not given:
        return None
    weights = set()
    for key, value in given.items():
        if not isinstance(value, (bool, int, float)) or not 0 <= value <= 1 or math.isnan(value):
            problem = tr(
                "{where}.{key} is {value}, not a weight", where=where, key=key, value=described(value)
            )
            raise UserError(problem, place=place, cure=tr("write true, false or a number from 0 to 1"))
        weights.add(float(value))
    if len(weights) > 1:
        problem = tr("{where} has different weights in {given}", where=where, given=all_of(given))
        raise UserError(problem, place=place, cure=tr("keep one of them"))
    (weight,) = weights
    if role != "assistant":
        if weight > 0 and "weight" not in given:
            problem = tr(
                "{where}.{given}: a {role} turn cannot be trained",
                where=where,
                given=next(iter(given)),
                role=role,
            )
            cure = tr("remove it; --train_on_inputs trains whole prompts")
            raise UserError(problem, place=place, cure=cure)
        return None
    return weight


def _tool_calls(entry: Mapping[str, object], role: Role, where: str, place: str) -> tuple[ToolCall, ...]:
    calls = entry.get("tool_calls") or []
    key = "tool_calls"
    if not calls and (legacy := entry.get("function_call")):
        calls, key = [legacy], "function_call"
    if isinstance(calls, Mapping) or not isinstance(calls, Sequence) or isinstance(calls, str):
        problem = tr(
            "{where}.{key} is {calls}, not a list of calls", where=where, key=key, calls=described(calls)
        )
        raise UserError(problem, place=place, cure=_CALL_CURE)
    if calls and role != "assistant":
        raise UserError(
            tr("{where}.{key}: only an assistant turn calls tools", where=where, key=key),
            place=place,
            cure=tr("remove it"),
        )
    return tuple(_tool_call(call, f"{where}.{key}[{index}]", place) for index, call in enumerate(calls))


_CALL_CURE = tr('write [{{"type": "function", "function": {{"name": "...", "arguments": {{...}}}}}}]')


def _tool_call(call: object, where: str, place: str) -> ToolCall:
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(call, Mapping) or not isinstance(function, Mapping):
        raise UserError(
            tr("{where} is {call}, not a call", where=where, call=described(call)),
            place=place,
            cure=_CALL_CURE,
        )
    name, arguments = function.get("name"), function.get("arguments", function.get("parameters"))
    if not isinstance(name, str) or not name:
        raise UserError(tr("{where} has no name of a function", where=where), place=place, cure=_CALL_CURE)
    values = {} if arguments in (None, "") else _json_object(arguments)
    if values is None:
        problem = tr(
            "{where}: the arguments of {name} are {arguments}, not an object",
            where=where,
            name=name,
            arguments=described(arguments),
        )
        raise UserError(problem, place=place, cure=tr("write a JSON object, or one as text"))
    call_id = call.get("id")
    text = json.dumps(_without_nulls(values) if values is arguments else values, ensure_ascii=False)
    check_characters(text, where, place)
    return ToolCall(name, text, call_id if isinstance(call_id, str) else None)


def _calls_in_text(content: object, where: str, place: str) -> tuple[ToolCall, ...]:
    """The calls that ShareGPT's role `function_call` writes as JSON text."""
    try:
        value = json.loads(content) if isinstance(content, str) else content
    except ValueError:
        cure = tr('write {{"name": "...", "arguments": {{...}}}} as its text')
        raise UserError(
            tr("{where} is not a tool call in JSON", where=where), place=place, cure=cure
        ) from None
    calls = value if isinstance(value, list) else [value]
    return tuple(_tool_call(call, f"{where}[{index}]", place) for index, call in enumerate(calls))


def _other_keys(entry: Mapping[str, object], where: str, place: str) -> str:
    others = {key: value for key, value in entry.items() if key not in _READ_KEYS and value is not None}
    if not others:
        return ""
    try:
        text = json.dumps(others, ensure_ascii=False)
    except (TypeError, ValueError):
        problem = tr("{where} has a key whose value JSON cannot express", where=where)
        raise UserError(problem, place=place, cure=tr("remove it, or write it as text")) from None
    check_characters(text, where, place)
    return text


def _is_exchange(entry: object) -> bool:
    """Whether an entry is a [question, answer] pair, as in Alpaca's `history`."""
    return (
        isinstance(entry, Sequence)
        and not isinstance(entry, str)
        and len(entry) == 2
        and all(isinstance(text, str) for text in entry)
    )


def _exchange(entry: Any, where: str, place: str) -> list[Turn]:
    turns = []
    for index, (role, text) in enumerate(zip(("user", "assistant"), entry, strict=True)):
        turn = turn_of({"role": role, "content": text}, f"{where}[{index}]", place)
        turns += [turn] if turn is not None else []
    return turns


def _json_object(value: object) -> dict[str, Any] | None:
    """An object, given as such or as JSON text; None if it is neither."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            return None
    return dict(value) if isinstance(value, Mapping) else None


def _without_nulls(value: Any) -> Any:
    """The value without null entries of objects: Parquet files write null for every key that some other row has."""
    if isinstance(value, Mapping):
        return {key: _without_nulls(part) for key, part in value.items() if part is not None}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_without_nulls(part) for part in value]
    return value
