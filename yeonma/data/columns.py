"""Columns of a data set: the built-in template that they fit, the column that fills a field, and its text."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Literal

from yeonma.data.rows import Row, Rows
from yeonma.data.strict_json import described
from yeonma.data.turns import check_characters, is_turn_list
from yeonma.data.words import any_of
from yeonma.errors import Problem, UserError, brief, did_you_mean
from yeonma.messages import later, tr

Columns = Mapping[str, str] | None
"""`--columns`: field of the template -> column of the data, if their names differ."""

ROWS_INSPECTED = 100
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
MEDIA_COLUMNS = ("images", "image", "videos", "video", "audios", "audio")
"""Columns of what the text of a prompt is about, and which is not text."""
PROMPT_COLUMNS = (*SYSTEM_COLUMNS, *TOOL_COLUMNS, HISTORY, "context", *MEDIA_COLUMNS)
"""Columns that usually belong to the prompt: a built-in template that does not use them is no fit."""
SIDE_COLUMNS = (*SYSTEM_COLUMNS, *TOOL_COLUMNS, KWARGS_COLUMN)
"""Columns that are part of the prompt of a turn list without standing in the template."""


ROWS_NAMED = 10


@dataclass
class UnusedColumn:
    """A column that usually belongs to the prompt, and that the template does not use.

    `count` rows have something in it; `rows` are the first of their numbers.
    """

    name: str
    count: int = 0
    rows: list[int] = field(default_factory=list)

    def note(self, row: Row) -> None:
        if is_filled(row.values[self.name]):
            self.count += 1
            self.rows += [row.number] if len(self.rows) < ROWS_NAMED else []


@dataclass(frozen=True)
class Recognised:
    """The built-in template that a data set's columns fit, and a line to print that says why."""

    template: str
    shown: str
    """The columns by which it was chosen, for the reason."""
    columns: tuple[tuple[str, str], ...] = ()
    """The `--columns` that the template needs, as (field, column), if their names differ."""
    system_columns: tuple[str, ...] = ()
    """Those of system turns, in a template with turns."""
    holds_turns: bool = False
    """Whether the columns of texts hold turns."""

    @property
    def reason(self) -> str:
        """A line that says why this template was chosen."""
        values = {"template": self.template, "shown": self.shown}
        if self.holds_turns:
            return tr("template {template}, because the columns are {shown}, and they hold turns", **values)
        if self.system_columns:
            names = any_of(self.system_columns)
            return tr(
                "template {template}, because the columns are {shown}; system turns are in {names}",
                names=names,
                **values,
            )
        return tr("template {template}, because the columns are {shown}", **values)


@dataclass(frozen=True)
class Form:
    """The columns of a built-in template: one of every group in `needs`, and `optional` ones if they exist."""

    template: str
    needs: tuple[tuple[str, ...], ...]
    answer: str
    optional: tuple[str, ...] = ()

    def __str__(self) -> str:
        needs = ", ".join(map(any_of, self.needs))
        return tr("{template} needs {needs}", template=self.template, needs=needs)


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
        Problem(
            tr('the data has no column "{column}"', column=column), "--columns", _suggestion(column, names)
        )
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
            return Recognised(with_turns[template], shown)
        shown = ", ".join(used[column] for column in names if column in used)
        return Recognised(template, shown)
    listed = ", ".join(names) or tr("none")
    if fitting:
        problem = tr(
            "the columns ({listed}) fit several templates: {fitting}",
            listed=listed,
            fitting=", ".join(fitting),
        )
        raise UserError(problem, place="--template", cure=tr("choose one of them"))
    if mapped := _with_other_capitals(names, columns, forms):
        cure = tr("give --columns '{{{mapped}}}', or rename the columns", mapped=mapped)
        raise UserError(
            tr("the columns ({listed}) fit no built-in template", listed=listed),
            place="--template",
            cure=cure,
        )
    needs = "; ".join(map(str, forms))
    cure = tr("give a template, or map its fields to your columns with --columns ({needs})", needs=needs)
    raise UserError(
        tr("the columns ({listed}) fit no built-in template", listed=listed), place="--template", cure=cure
    )


def _with_other_capitals(names: Sequence[str], columns: Mapping[str, str], forms: Sequence[Form]) -> str:
    """What `--columns` must say if one template fits but for capitals and blanks in the columns' names; else empty."""
    plain = {name.strip().lower(): name for name in names}
    fitting = [used for form in forms if (used := _columns_used(form, list(plain), columns))]
    if len(plain) != len(names) or len(fitting) != 1:
        return ""
    return ", ".join(f"{name}: {plain[name]}" for name in fitting[0] if plain[name] != name)


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


def filled_columns(rows: Rows) -> list[str]:
    """The columns, without those that usually belong to the prompt and hold nothing in the first rows."""
    filled = {
        name
        for row in islice(rows, ROWS_INSPECTED)
        for name, value in row.values.items()
        if name in PROMPT_COLUMNS and is_filled(value)
    }
    return [name for name in rows.columns if name not in PROMPT_COLUMNS or name in filled]


def field_text(row: Row, column: str) -> str | None:
    """The text in a column, verbatim; None if it is missing, null, empty or only white space.

    A number or a boolean is the text of `number_text`.

    Raises:
        UserError: it is neither, or contains a NUL or half a surrogate pair.
    """
    value = row.values.get(column)
    if value is None:
        return None
    if not isinstance(value, str):
        text = number_text(value)
        if text is None:
            raise _not_text(value, column, row.place)
        return text
    if not value or value.isspace():
        return None
    check_characters(value, column, row.place, is_column=True)
    return value


def without_value(where: str, state: Literal["missing", "null", "empty"]) -> str:
    """The problem that a field has no value."""
    if state == "missing":
        return tr("{where} is missing", where=where)
    return tr("{where} is null", where=where) if state == "null" else tr("{where} is empty", where=where)


def number_text(value: object) -> str | None:
    """A number or boolean as text: `3`, `1.0`, `true`; None for other values, infinities and NaN.

    A float has the fewest digits that give the same number: 0.1, 1.0, 1e+16.
    """
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return int.__repr__(value)
    if isinstance(value, float) and math.isfinite(value):
        return float.__repr__(value)
    return None


WEIGHT_COLUMNS = ("weight", "loss_weight")
"""Columns that probably hold the weights of rows."""


def row_weight(row: Row, column: str | None) -> float:
    """The row's weight in the loss, from a column with numbers, also as text; 1 without a column.

    Raises UserError for what is not a finite number from 0 up.
    """
    if column is None:
        return 1.0
    value = row.values.get(column)
    try:
        weight = float(value) if isinstance(value, (str, int, float)) else math.nan
    except (ValueError, OverflowError):
        weight = math.nan
    if not math.isfinite(weight) or weight < 0:
        shown = f'"{brief(value)}"' if isinstance(value, str) else described(value)
        problem = tr('field "{column}" is {shown}, not a weight', column=column, shown=shown)
        raise UserError(problem, place=row.place, cure=tr("write a number from 0 up"))
    return weight


def kinds_of_numbers(row: Row, columns: Iterable[str]) -> Iterator[tuple[str, str]]:
    """(column, `numbers` or `booleans`) for those of the columns whose value is a number or a boolean."""
    for column in columns:
        value = row.values.get(column)
        if value is not None and not isinstance(value, str) and isinstance(value, (int, float)):
            yield column, later("booleans") if isinstance(value, bool) else later("numbers")


def _not_text(value: object, column: str, place: str) -> UserError:
    """The error for a value that a template's field cannot show, with a way to show it if there is one."""
    problem, cure = (
        tr('field "{column}" is {value}, not text', column=column, value=described(value)),
        tr("a template's field takes text"),
    )
    if isinstance(value, float) or value == []:
        problem = tr('field "{column}" is an empty list', column=column) if value == [] else problem
        cure = tr("fill it or remove the row")
    elif is_turn_list(value):
        cure = tr("turn lists need --template chat")
    elif isinstance(value, (Mapping, list, tuple)):
        paths = any_of(f'"{path}"' for path in (*_path_to_text(value, column), f"json({column})"))
        cure = tr("map the field to {paths} with --columns, in these quotes", paths=paths)
    return UserError(problem, place=place, cure=cure)


def _path_to_text(value: Mapping[str, object] | Sequence[object], column: str) -> list[str]:
    """The path of a text or number within the value of a column; none if there is none at the next level."""
    if not isinstance(value, Mapping):
        return [f"{column}[0]"] if _is_plain(value[0]) else []
    named = {
        name: part[0] if isinstance(part, (list, tuple)) and len(part) == 1 else part
        for name, part in value.items()
    }
    return [f"{column}.{name}" for name, part in named.items() if _is_plain(part)][:1]


def _is_plain(value: object) -> bool:
    return isinstance(value, str) or number_text(value) is not None


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
    return did_you_mean(column, names) or tr("it has {names}", names=", ".join(names) or tr("none"))
