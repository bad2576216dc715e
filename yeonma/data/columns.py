"""Columns of a data set: the built-in template that they fit, the column that fills a field, and its text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from yeonma.data.rows import Row
from yeonma.data.strict_json import described
from yeonma.data.turns import check_characters, is_turn_list
from yeonma.errors import Problem, UserError, did_you_mean

Columns = Mapping[str, str] | None
"""`--columns`: field of the template -> column of the data, if their names differ."""

SYSTEM_COLUMNS = ("system", "system_prompt")
TOOL_COLUMNS = ("tools", "functions")
KWARGS_COLUMN = "chat_template_kwargs"
ABOUT_A_TEXT = (
    *("id", "url", "link", "source", "meta", "metadata", "license", "date", "timestamp", "added", "created"),
    *("language", "lang", "language_score", "dump", "file_path", "token_count"),
)
"""Columns that may stand beside whole texts. Beside any other, `text` is taken for a field of a template."""
HISTORY = "history"
"""Alpaca's column of earlier turns."""
PROMPT_COLUMNS = (*SYSTEM_COLUMNS, *TOOL_COLUMNS, HISTORY, "context")
"""Columns that usually belong to the prompt: a built-in template that does not use them is no fit."""
SIDE_COLUMNS = (*SYSTEM_COLUMNS, *TOOL_COLUMNS, KWARGS_COLUMN)
"""Columns that are part of the prompt of a turn list without standing in the template."""


@dataclass(frozen=True)
class Recognised:
    """The built-in template that a data set's columns fit, and a line to print that says why."""

    template: str
    reason: str
    columns: tuple[tuple[str, str], ...] = ()
    """The `--columns` that the template needs, as (field, column), if their names differ."""


@dataclass(frozen=True)
class Form:
    """The columns of a built-in template: one of every group in `needs`, and `optional` ones if they exist."""

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
    Form("text", (("text",),), "text"),
)


WITH_TURNS = {"alpaca": "alpaca-turns", "prompt-completion": "prompt-completion-turns"}
"""Built-in text templates -> their counterparts that the model's chat template writes."""


def recognise(
    names: Sequence[str],
    columns: Columns = None,
    forms: Sequence[Form] = FORMS,
    with_turns: Mapping[str, str] = WITH_TURNS,
) -> Recognised:
    """The built-in template whose fields a data set's columns (`names`) fill, given `--columns`.

    `names` are the columns that hold something. With a system prompt, earlier turns or tools, a text template gives way
    to the one in `with_turns`, which has a place for them. Raises:
        UserError: `--columns` names a column that does not exist, or no template fits, or several do.
    """
    columns = columns or {}
    text = column_of("text", columns, "text")
    if any(name != text and name.lower() not in ABOUT_A_TEXT for name in names):
        forms = [form for form in forms if form.template != "text"]
    problems = [
        Problem(f'the data has no column "{column}"', "--columns", _suggestion(column, names))
        for column in columns.values()
        if column not in names
    ]
    if problems:
        raise UserError(problems)
    fitting = {form.template: used for form in forms if (used := _columns_used(form, names, columns))}
    if len(fitting) == 1:
        ((template, used),) = fitting.items()
        beside = [
            name
            for name in (*SYSTEM_COLUMNS, *TOOL_COLUMNS, HISTORY)
            if column_of(name, columns, "") in names
        ]
        if beside and template in with_turns:
            shown = ", ".join((*(used[column] for column in names if column in used), *beside))
            reason = f"template {with_turns[template]}, because the columns are {shown}"
            return Recognised(with_turns[template], reason)
        shown = ", ".join(used[column] for column in names if column in used)
        return Recognised(template, f"template {template}, because the columns are {shown}")
    listed = ", ".join(names) or "none"
    if fitting:
        problem = f"the columns ({listed}) fit several templates: {', '.join(fitting)}"
        raise UserError(problem, place="--template", cure="choose one of them")
    needs = "; ".join(map(str, forms))
    cure = f"give a template, or map its fields to your columns with --columns ({needs})"
    raise UserError(f"the columns ({listed}) fit no built-in template", place="--template", cure=cure)


def column_of(field: str, columns: Columns, answer_field: str) -> str:
    """The column that fills `field`: the one that `--columns` gives, or the one of the same name.

    In `--columns`, `answer` also stands for the answer field.
    """
    if columns:
        if field in columns:
            return columns[field]
        if field == answer_field and "answer" in columns:
            return columns["answer"]
    return field


def is_filled(value: object) -> bool:
    """Whether a column holds something: not null, and neither an empty list or object nor blank text."""
    return bool(value.strip() if isinstance(value, str) else value)


def field_text(row: Row, column: str) -> str | None:
    """The text in a column, verbatim; None if it is missing, null, empty or only white space.

    Raises:
        UserError: it is not text, or contains a NUL or half a surrogate pair.
    """
    value = row.values.get(column)
    if value is None:
        return None
    if not isinstance(value, str):
        problem = f'field "{column}" is {described(value)}, not text'
        cure = "turn lists need --template chat" if is_turn_list(value) else "a template's field takes text"
        raise UserError(problem, place=row.place, cure=cure)
    if not value or value.isspace():
        return None
    check_characters(value, f'field "{column}"', row.place)
    return value


def _columns_used(form: Form, names: Sequence[str], columns: Mapping[str, str]) -> dict[str, str]:
    """Columns that the form uses -> their text in messages. Empty if a required one is missing."""
    used: dict[str, str] = {}
    for group in (*form.needs, form.optional):
        candidates = ((field, column_of(field, columns, form.answer)) for field in group)
        field, column = next(((field, column) for field, column in candidates if column in names), ("", ""))
        if field:
            used[column] = column if field == column else f"{column} (as {field})"
        elif group is not form.optional:
            return {}
    return used


def _suggestion(column: str, names: Sequence[str]) -> str:
    return did_you_mean(column, names) or f"it has {', '.join(names) or 'none'}"
