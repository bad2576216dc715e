"""Kinds of data: rows with one answer, with two to choose between, or with one and a label.

A `Task` turns a row into text. `tokenization/task_encoders.py` turns the text into tokens, and `train/losses.py` trains
on them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from yeonma.config.loss_sum import LABEL_LOSSES, weighted_losses
from yeonma.data.columns import (
    MEDIA_COLUMNS,
    PROMPT_COLUMNS,
    WEIGHT_COLUMNS,
    WITH_TURNS,
    Columns,
    Recognised,
    column_of,
    filled_columns,
    recognise,
)
from yeonma.data.preference_pairs import (
    fields_of_label,
    fields_of_pair,
    labelled_shape,
    missing_label_columns,
    missing_pair_columns,
    notes_of_pairs,
    pair_shape,
    recognise_labelled,
    recognise_pairs,
    render_label,
    render_pairs,
)
from yeonma.data.rows import Row, Rows
from yeonma.data.template import BUILT_IN, Rendered, Template, load_template
from yeonma.data.template_syntax import Piece, visible
from yeonma.data.text_checks import Notes, notes_of
from yeonma.data.words import all_of
from yeonma.errors import Problem, UserError, did_you_mean
from yeonma.files import user_path
from yeonma.messages import counted, later, tr


@dataclass(frozen=True)
class Task:
    """A kind of data and the functions that turn its rows into text. `notes` and `preferred` take what `render`
    returns."""

    name: str
    """Part of the key of token stores."""
    units: str
    """What a step counts, for messages: `examples`, `pairs`. Shown with `tr`."""
    count: Callable[[int], str]
    """`1 example`, `2 examples`."""
    recognise: Callable[[Rows, Columns], Recognised]
    """Chooses the built-in template that fits the columns."""
    fields: Callable[[Template], frozenset[str]]
    """The fields read from a row."""
    text_fields: Callable[[Template], frozenset[str]]
    """Those of them that are texts; none for turn lists."""
    missing_columns: Callable[[Template, Sequence[str], Columns], list[Problem]]
    """The fields that no column fills."""
    render: Callable[[Template, Row, Columns], Any]
    """Fills the template with a row. Raises UserError for a row that does not fit."""
    notes: Callable[[Any], Notes]
    preferred: Callable[[Any], Rendered]
    """The row with the answer that the model should give; with no answer if its only one is undesirable."""
    shape: Callable[[Rows, Columns], dict[str, str]] = lambda rows, columns: {}
    """What `--columns` would say about turns in forms that have other names for their columns."""
    continues_template: bool = False
    """Whether, without `--template`, the template of the adapter to continue takes precedence over a built-in one."""


def _texts(fields: Callable[[Template], frozenset[str]]) -> Callable[[Template], frozenset[str]]:
    return lambda template: frozenset() if template.is_chat else fields(template)


ANSWERS = Task(
    name="answers",
    units=later("examples"),
    count=lambda number: counted(number, "example"),
    recognise=lambda rows, columns: _recognise_answers(rows, columns),
    fields=lambda template: template.fields,
    text_fields=_texts(lambda template: template.fields),
    missing_columns=Template.missing_columns,
    render=Template.render,
    notes=notes_of,
    preferred=lambda rendered: rendered,
)
DRAWN = replace(ANSWERS, continues_template=True)
"""Rows whose prompts the model answers itself."""
PAIRS = Task(
    name="pairs",
    units=later("pairs"),
    count=lambda number: counted(number, "pair"),
    recognise=recognise_pairs,
    fields=fields_of_pair,
    text_fields=_texts(fields_of_pair),
    missing_columns=missing_pair_columns,
    render=render_pairs,
    notes=notes_of_pairs,
    preferred=lambda pairs: pairs[0].chosen,
    shape=pair_shape,
    continues_template=True,
)
LABELLED = Task(
    name="labelled answers",
    units=later("labelled answers"),
    count=lambda number: counted(number, "labelled answer"),
    recognise=recognise_labelled,
    fields=fields_of_label,
    text_fields=_texts(lambda template: template.fields),
    missing_columns=missing_label_columns,
    render=render_label,
    notes=lambda label: notes_of(label.rendered),
    shape=labelled_shape,
    preferred=lambda label: label.rendered if label.desirable else replace(label.rendered, answer=()),
    continues_template=True,
)
TASKS = {task.name: task for task in (ANSWERS, PAIRS, LABELLED)}


def task_for_loss(loss: str | None) -> Task:
    """The task of a preference loss or a sum of several; of supervised training if `loss` is None."""
    if loss is None:
        return ANSWERS
    return LABELLED if weighted_losses(loss)[0][0] in LABEL_LOSSES else PAIRS


@dataclass(frozen=True)
class Choice:
    """A template, the columns that fill it, the reason if it was chosen by the columns or the adapter, and the columns
    of the data that it does not use."""

    template: Template
    columns: dict[str, str] | None
    reason: str = ""
    unused: tuple[str, ...] = ()
    weighs_rows: bool = False
    """Whether rows of this task may have weights."""

    def without_unused(self, rows: Rows, row_weights: str | None) -> Choice:
        """The choice, whose unused columns do not include the one with the rows' weights. Raises UserError if the data
        has no such column."""
        if row_weights is not None and row_weights not in rows.columns:
            cure = did_you_mean(row_weights, rows.columns) or tr(
                "it has {columns}", columns=", ".join(rows.columns)
            )
            raise UserError(
                tr('the data has no column "{row_weights}"', row_weights=row_weights),
                place="row_weights",
                cure=cure,
            )
        return replace(self, unused=tuple([name for name in self.unused if name != row_weights]))

    @property
    def notes(self) -> list[str]:
        """Lines to print."""
        shown = ", ".join(map(visible, self.unused))
        unused = tr("columns not used: {columns}", columns=shown) if self.unused else ""
        fields = "" if self.reason else _fields_note(self.template)
        weights = [name for name in self.unused if self.weighs_rows and name in WEIGHT_COLUMNS]
        if weights:
            unused = tr(
                "columns not used: {columns} (--row_weights {weights} makes it the weight of the rows in the loss)",
                columns=shown,
                weights=weights[0],
            )
        return [line for line in (self.reason, fields, unused) if line]


def choose_template(
    task: Task,
    setting: str | None,
    rows: Rows,
    columns: dict[str, str] | None,
    adapter: str | None = None,
) -> Choice:
    """The template that `--template` gives, or else one that fits the data.

    For preferences and rewards it is the template of the `adapter` folder to continue, if it has one and the columns
    fill it, so that prompts stay as they were trained. Otherwise it is the built-in template that fits the columns.

    Raises UserError as `load_template`, and if none or several built-in templates fit.
    """
    if setting is not None:
        given = load_template(setting)
        shape = task.shape(rows, columns) if given.is_chat else {}
        choice = _with_unused(task, Choice(given, {**shape, **(columns or {})} or None), rows)
        if choice.template.is_text and task is not ANSWERS:
            cure = tr("use a template with a prompt and an answer")
            raise UserError(tr("whole texts have no answers to prefer"), place="--template", cure=cure)
        if "completion" in choice.unused and choice.template.is_chat and "prompt" in (columns or {}).values():
            cure = tr("use --template {with_turns}", with_turns=WITH_TURNS["prompt-completion"])
            raise UserError(tr('the column "completion" would be lost'), place="--template", cure=cure)
        return choice
    if adapter is not None and task.continues_template:
        path = user_path(adapter) / "template.txt"
        template = load_template(str(path)) if path.is_file() else None
        if template and not template.is_chat and not task.missing_columns(template, rows.columns, columns):
            reason = tr("template {path}, from the adapter to continue", path=path)
            return _with_unused(task, Choice(template, columns, reason), rows)
    recognised = task.recognise(rows, columns)
    choice = Choice(
        template=load_template(recognised.template),
        columns={**dict(recognised.columns), **(columns or {})} or None,
        reason=recognised.reason,
    )
    choice = _with_unused(task, choice, rows)
    lost = [name for name in choice.unused if name in PROMPT_COLUMNS and name in filled_columns(rows)]
    if lost:
        raise lost_columns(recognised.template, lost)
    return choice


def lost_columns(template: str, lost: Sequence[str], rows: str = "", better: str | None = None) -> UserError:
    """The error for columns of the prompt that a built-in template, chosen by the columns, does not use.

    `rows`: those that fill them, if the first rows do not. `better`: a built-in template that uses them.
    """
    if set(lost) <= set(MEDIA_COLUMNS):
        cure = tr(
            "Yeonma trains on text alone: leave out rows that need more; or give --template {template} to train "
            "without",
            template=template,
        )
    elif better:
        cure = tr(
            "give --template {better}; or give --template {template} to train without",
            better=better,
            template=template,
        )
    else:
        cure = tr(
            "write a template that has {{{lost}}}; or give --template {template} to train without",
            lost=lost[0],
            template=template,
        )
    return UserError(_lost(template, lost, rows), place="--template", cure=cure)


def _lost(template: str, lost: Sequence[str], rows: str) -> str:
    values = {"template": template, "lost": all_of(lost), "rows": rows}
    if len(lost) == 1:
        if not rows:
            return tr(
                "the built-in template {template} does not use the column {lost}, which usually belongs to the prompt",
                **values,
            )
        return tr(
            "the built-in template {template} does not use the column {lost}, which usually belongs to the prompt, "
            "and is filled in {rows}",
            **values,
        )
    if not rows:
        return tr(
            "the built-in template {template} does not use the columns {lost}, which usually belong to the prompt",
            **values,
        )
    return tr(
        "the built-in template {template} does not use the columns {lost}, which usually belong to the prompt, and are "
        "filled in {rows}",
        **values,
    )


def using(task: Task, template: str, names: Iterable[str], columns: Columns) -> str | None:
    """The built-in template that has what `template` has and uses these columns as well, or None."""
    other = WITH_TURNS.get(template)
    return other if other and columns_used(task, load_template(other), columns).issuperset(names) else None


def _fields_note(template: Template) -> str:
    """Which fields of a template of the user's own are trained, if a closing tag stands just before the answer: the
    field before it may be reasoning, which should be trained as well."""
    variant = template.variants[0]
    if variant.answer_role is not None or not variant.prompt_fields or template.name in BUILT_IN:
        return ""
    prompt, answer = (
        all_of(f"{{{name}}}" for name in fields) for fields in (variant.prompt_fields, variant.answer_fields)
    )
    parts = [part for turn in variant.turns for part in turn.parts]
    border = parts[-1].text if isinstance(parts[-1], Piece) else ""
    if re.search(r"</\w+>|\[/\w+\]", border) is None:
        return ""
    last = variant.prompt_fields[-1]
    return tr(
        "{answer} is the answer, {prompt} the prompt; a line [answer] above {{{last}}} makes it "
        "part of the answer",
        answer=answer,
        prompt=prompt,
        last=last,
    )


def _with_unused(task: Task, choice: Choice, rows: Rows) -> Choice:
    used = columns_used(task, choice.template, choice.columns)
    holders = {re.split(r"[.\[]", name.removeprefix("json(").removesuffix(")"))[0] for name in used}
    unused = tuple([name for name in rows.columns if name not in used | holders])
    return replace(choice, unused=unused, weighs_rows=task is ANSWERS)


def columns_used(task: Task, template: Template, columns: Columns) -> set[str]:
    """The columns of the data that a task reads with this template."""
    named = {column_of(name, columns, template.answer_field) for name in task.fields(template)}
    return named | {(columns or {}).get(name, name) for name in template.side_columns}


def _recognise_answers(rows: Rows, columns: Columns) -> Recognised:
    """The built-in template for rows with one answer. `prompt` and `completion` may hold turns."""
    recognised = recognise(filled_columns(rows), columns)
    text, turns = "prompt-completion", WITH_TURNS["prompt-completion"]
    if recognised.template != text:
        return recognised
    first = next(iter(rows)).values
    names = (column_of(name, columns, "completion") for name in ("prompt", "completion"))
    if not any(isinstance(first.get(name), (list, Mapping)) for name in names):
        return recognised
    return replace(recognised, template=turns, holds_turns=True)
