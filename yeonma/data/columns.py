"""The forms that data comes in: texts in columns, turn lists, and which built-in template a data set's columns suit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from yeonma.data.rows import Row
from yeonma.data.strict_json import kind_of
from yeonma.errors import Problem, UserError, did_you_mean

Columns = Mapping[str, str] | None
"""`--columns`: field of the template -> column of the data, where their names differ."""

Role = Literal["system", "user", "assistant", "tool"]

# Role names of OpenAI messages and of ShareGPT's, and what they stand for.
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


@dataclass(frozen=True, slots=True)
class Turn:
    """One turn of a turn list."""

    role: Role
    text: str


@dataclass(frozen=True)
class Recognised:
    """The built-in template that a data set's columns suit, and one printable line that says why."""

    template: str
    reason: str
    columns: tuple[tuple[str, str], ...] = ()
    """What `--columns` would say to name the data's columns to the template, where their names differ."""


@dataclass(frozen=True)
class Form:
    """What a built-in template needs: one column of each group; `optional` columns it uses where they are there."""

    template: str
    needs: tuple[tuple[str, ...], ...]
    answer: str
    optional: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.template} needs {', '.join(' or '.join(group) for group in self.needs)}"


FORMS = (
    Form("title", (("document",), ("title",)), "title"),
    Form("alpaca", (("instruction",), ("output",)), "output", ("input",)),
    Form("orca", (("question",), ("response",)), "response", ("system", "system_prompt")),
    Form("chat", (("messages", "conversations"),), ""),  # the answers are turns, not a column
    Form("prompt-completion", (("prompt",), ("completion",)), "completion"),
)


def recognise(
    columns: Sequence[str],
    columns_setting: Mapping[str, str] | None = None,
    forms: Sequence[Form] = FORMS,
) -> Recognised:
    """Choose the built-in template whose fields the columns satisfy, after `--columns` (field -> column).

    Raises:
        UserError: `--columns` names a column that is not there, or no template fits, or several do.
    """
    columns_setting = columns_setting or {}
    problems = [
        Problem(f'the data has no column "{column}"', "--columns", _near(column, columns))
        for column in columns_setting.values()
        if column not in columns
    ]
    if problems:
        raise UserError(problems)
    fitting = {form.template: found for form in forms if (found := _found(form, columns, columns_setting))}
    if len(fitting) == 1:
        ((template, found),) = fitting.items()
        names = ", ".join(found[column] for column in columns if column in found)
        return Recognised(template, f"template {template}, because the columns are {names}")
    listed = ", ".join(columns) or "none"
    if fitting:
        what = f"the columns ({listed}) fit several templates: {', '.join(fitting)}"
        raise UserError(what, place="--template", cure="choose one of them")
    needs = "; ".join(map(str, forms))
    cure = f"give one, or say with --columns which column is which field ({needs})"
    raise UserError(f"the columns ({listed}) fit no built-in template", place="--template", cure=cure)


def column_of(field: str, columns_setting: Mapping[str, str] | None, answer_field: str) -> str:
    """The column that fills `field`: the one `--columns` names, or the one of its own name.

    In `--columns`, `answer` also stands for the answer field.
    """
    if columns_setting:
        if field in columns_setting:
            return columns_setting[field]
        if field == answer_field and "answer" in columns_setting:
            return columns_setting["answer"]
    return field


def field_text(row: Row, column: str) -> str | None:
    """The text in a column, verbatim; None where it is missing, null, empty or only white space.

    Raises:
        UserError: it is not text, or holds a NUL or half a surrogate pair.
    """
    value = row.values.get(column)
    if value is None:
        return None
    if not isinstance(value, str):
        what = f'field "{column}" is {described(value)}, not text'
        cure = (
            "a turn list needs the template chat" if _is_turn_list(value) else "a template's field takes text"
        )
        raise UserError(what, place=row.place, cure=cure)
    if not value or value.isspace():
        return None
    _check_characters(value, f'field "{column}"', row.place)
    return value


def turns_of(row: Row, column: str) -> tuple[Turn, ...]:
    """The turns of an OpenAI (`role`, `content`) or ShareGPT (`from`, `value`) list; blank system turns are left out.

    Content may be a list of text parts, which are joined. Whether there is an answer is not looked at.

    Raises:
        UserError: no list, or turns that are wrong; the place in the row reads like `messages[2].role`.
    """
    value = row.values.get(column)
    if not isinstance(value, Sequence) or isinstance(value, str):
        what = f'field "{column}" is {described(value)}, not a list of turns'
        raise UserError(what, place=row.place, cure='write [{"role": "user", "content": "..."}, ...]')
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
        raise UserError(f'field "{column}" has no turns', place=row.place, cure="take the row out")
    return tuple(turns)


def turn_of(entry: object, where: str, place: str) -> Turn | None:
    """One turn, None for a blank system turn. `where` is its place in the row, such as `messages[2]`.

    Raises:
        UserError: it is no turn, its role is unknown, or its text is missing or empty.
    """
    if not isinstance(entry, Mapping):
        what = f"{where} is {described(entry)}, not a turn"
        raise UserError(what, place=place, cure='write {"role": "user", "content": "..."}')
    role_key, text_key = ("from", "value") if entry.get("from") is not None else ("role", "content")
    role = _role(entry.get(role_key), f"{where}.{role_key}", place)
    for key in ("tool_calls", "function_call"):
        if entry.get(key):
            what = f"{where}.{key}: calls of tools cannot be trained"
            raise UserError(what, place=place, cure="write the call as the turn's text")
    text = _content(entry.get(text_key), f"{where}.{text_key}", place)
    if text.strip() or role == "tool":
        return Turn(role, text)
    if role == "system":
        return None
    raise UserError(f"{where}.{text_key} is empty", place=place, cure="fill it or take the row out")


def described(value: object) -> str:
    """`a number (3)`, `null`, `a list`: what stands there, for messages."""
    kind = kind_of(value)
    return f"{kind} ({value})" if isinstance(value, (int, float)) else kind


def _found(form: Form, columns: Sequence[str], columns_setting: Mapping[str, str]) -> dict[str, str]:
    """The form's columns that are there and how messages call them; empty where one is missing."""
    found: dict[str, str] = {}
    for group in (*form.needs, form.optional):
        names = ((field, column_of(field, columns_setting, form.answer)) for field in group)
        field, column = next(((field, column) for field, column in names if column in columns), ("", ""))
        if field:
            found[column] = column if field == column else f"{column} (as {field})"
        elif group is not form.optional:
            return {}
    return found


def _near(column: str, columns: Sequence[str]) -> str:
    return did_you_mean(column, columns) or f"it has {', '.join(columns) or 'none'}"


def _role(name: object, where: str, place: str) -> Role:
    if isinstance(name, str) and name in ROLES:
        return ROLES[name]
    if name is None:
        raise UserError(f"{where} is missing", place=place, cure='a turn has "role" and "content"')
    shown = f'"{name}"' if isinstance(name, str) else described(name)
    cure = did_you_mean(str(name), ROLES) or f"roles are {', '.join(ROLES)}"
    raise UserError(f"{where}: {shown} is no known role", place=place, cure=cure)


def _content(content: object, where: str, place: str) -> str:
    """The text of a turn, also out of OpenAI's content parts."""
    if content is None:
        raise UserError(f"{where} is missing", place=place, cure="a turn needs text")
    if isinstance(content, str):
        _check_characters(content, where, place)
        return content
    if not isinstance(content, Sequence):
        raise UserError(f"{where} is {described(content)}, not text", place=place, cure="a turn takes text")
    texts = []
    for index, part in enumerate(content):
        here = f"{where}[{index}]"
        kind = part.get("type") if isinstance(part, Mapping) else None
        if not isinstance(part, Mapping) or kind != "text" or not isinstance(part.get("text"), str):
            what = f'{here} is of type "{kind}"' if kind not in (None, "text") else f"{here} is no text part"
            cure = 'only parts of the form {"type": "text", "text": "..."} can be trained'
            raise UserError(what, place=place, cure=cure)
        texts.append(_content(part["text"], f"{here}.text", place))
    return "".join(texts)


def _check_characters(text: str, where: str, place: str) -> None:
    if "\0" in text:
        what = f"{where} holds a NUL character (U+0000) after {text.index(chr(0))} characters"
        raise UserError(what, place=place, cure="take it out")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        code = f"U+{ord(text[error.start]):04X}"
        what = f"{where} holds half a character, the lone surrogate {code}, after {error.start} characters"
        raise UserError(what, place=place, cure="take it out") from None


def _is_turn_list(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(entry, Mapping) for entry in value)
