"""Turn lists: a conversation in one column, in OpenAI's form (`role`, `content`) or ShareGPT's (`from`, `value`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from yeonma.data.rows import Row
from yeonma.data.strict_json import described
from yeonma.errors import Problem, UserError, did_you_mean

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
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
}
"""Role names in OpenAI messages and in ShareGPT -> roles of chat templates."""


@dataclass(frozen=True, slots=True)
class Turn:
    """One turn of a conversation."""

    role: Role
    text: str


def turns_of(row: Row, column: str) -> tuple[Turn, ...]:
    """The turns in a column, without empty system turns. Does not check that there is an answer.

    Content may be a list of text parts, which are joined.

    Raises:
        UserError: it is not a list, or turns are faulty. Messages name the place in the row, as `messages[2].role`.
    """
    value = row.values.get(column)
    if not isinstance(value, Sequence) or isinstance(value, str):
        problem = f'field "{column}" is {described(value)}, not a list of turns'
        raise UserError(problem, place=row.place, cure='write [{"role": "user", "content": "..."}, ...]')
    turns: list[Turn] = []
    problems: list[Problem] = []
    for index, entry in enumerate(value):
        try:
            turn = turn_of(entry, f"{column}[{index}]", row.place)
            turns += [turn] if turn is not None else []
        except UserError as error:
            problems += error.problems
    if problems:
        raise UserError(problems)
    if not turns:
        raise UserError(f'field "{column}" has no turns', place=row.place, cure="remove the row")
    return tuple(turns)


def turn_of(entry: object, where: str, place: str) -> Turn | None:
    """One turn, or None for an empty system turn. `where` is its place in the row, such as `messages[2]`.

    Raises:
        UserError: it is not a turn, its role is unknown, or its text is missing or empty.
    """
    if not isinstance(entry, Mapping):
        problem = f"{where} is {described(entry)}, not a turn"
        raise UserError(problem, place=place, cure='write {"role": "user", "content": "..."}')
    role_key, text_key = ("from", "value") if entry.get("from") is not None else ("role", "content")
    role = _role(entry.get(role_key), f"{where}.{role_key}", place)
    for key in ("tool_calls", "function_call"):
        if entry.get(key):
            problem = f"{where}.{key}: tool calls cannot be trained"
            raise UserError(problem, place=place, cure="write the call as the turn's text")
    text = _content(entry.get(text_key), f"{where}.{text_key}", place)
    if text.strip() or role == "tool":
        return Turn(role, text)
    if role == "system":
        return None
    raise UserError(f"{where}.{text_key} is empty", place=place, cure="fill it or remove the row")


def is_turn_list(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(entry, Mapping) for entry in value)


def check_characters(text: str, where: str, place: str) -> None:
    """Raises UserError for a NUL character and for a lone surrogate, which no tokenizer encodes."""
    if "\0" in text:
        problem = f"{where} contains a NUL character (U+0000) after {text.index(chr(0))} characters"
        raise UserError(problem, place=place, cure="remove it")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        code = f"U+{ord(text[error.start]):04X}"
        problem = (
            f"{where} contains half a character, the lone surrogate {code}, after {error.start} characters"
        )
        raise UserError(problem, place=place, cure="remove it") from None


def _role(name: object, where: str, place: str) -> Role:
    if isinstance(name, str) and name in ROLES:
        return ROLES[name]
    if name is None:
        raise UserError(f"{where} is missing", place=place, cure='a turn has "role" and "content"')
    shown = f'"{name}"' if isinstance(name, str) else described(name)
    cure = did_you_mean(str(name), ROLES) or f"roles are {', '.join(ROLES)}"
    raise UserError(f"{where}: unknown role {shown}", place=place, cure=cure)


def _content(content: object, where: str, place: str) -> str:
    """The text of a turn: text, or a list of OpenAI's text parts."""
    if content is None:
        raise UserError(f"{where} is missing", place=place, cure="a turn needs text")
    if isinstance(content, str):
        check_characters(content, where, place)
        return content
    if not isinstance(content, Sequence):
        raise UserError(f"{where} is {described(content)}, not text", place=place, cure="a turn takes text")
    texts = []
    for index, part in enumerate(content):
        part_where = f"{where}[{index}]"
        part_type = part.get("type") if isinstance(part, Mapping) else None
        if not isinstance(part, Mapping) or part_type != "text" or not isinstance(part.get("text"), str):
            other_type = part_type not in (None, "text")
            problem = (
                f'{part_where} is of type "{part_type}"' if other_type else f"{part_where} is not a text part"
            )
            cure = 'only parts of the form {"type": "text", "text": "..."} can be trained'
            raise UserError(problem, place=place, cure=cure)
        texts.append(_content(part["text"], f"{part_where}.text", place))
    return "".join(texts)
