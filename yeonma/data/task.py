"""Kinds of data: rows with one answer, with two to choose between, or with one and a label.

A `Task` turns a row into text. `tokenization/task_encoders.py` turns the text into tokens, and `train/losses.py` trains
on them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, get_args

from yeonma.config.settings import LabelLossName
from yeonma.data.columns import Columns, Recognised, recognise
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
from yeonma.data.template import Rendered, Template, load_template
from yeonma.data.text_checks import Notes, notes_of
from yeonma.errors import Problem
from yeonma.files import user_path


@dataclass(frozen=True)
class Task:
    """A kind of data and the functions that turn its rows into text. `notes` and `preferred` take what `render`
    returns."""

    name: str
    """Part of the key of token stores."""
    units: str
    """What a step counts, for messages: `examples`, `pairs`."""
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
    units="examples",
    recognise=lambda rows, columns: recognise(rows.columns, columns),
    fields=lambda template: template.fields,
    text_fields=_texts(lambda template: template.fields),
    missing_columns=Template.missing_columns,
    render=Template.render,
    notes=notes_of,
    preferred=lambda rendered: rendered,
)
PAIRS = Task(
    name="pairs",
    units="pairs",
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
    units="labelled answers",
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
    """The task of a preference loss; of supervised training if `loss` is None."""
    if loss is None:
        return ANSWERS
    return LABELLED if loss in get_args(LabelLossName) else PAIRS


@dataclass(frozen=True)
class Choice:
    """A template, the columns that fill it, and the reason if it was chosen by the columns or the adapter."""

    template: Template
    columns: dict[str, str] | None
    reason: str = ""


def choose_template(
    task: Task,
    setting: str | None,
    rows: Rows,
    columns: dict[str, str] | None,
    adapter: str | None = None,
) -> Choice:
    """The template that `--template` gives, or else one that fits the data.

    For preference data it is the template of the `adapter` folder to continue, if it has one and the columns fill it,
    so that prompts stay as they were trained. Otherwise it is the built-in template that fits the columns.

    Raises UserError as `load_template`, and if none or several built-in templates fit.
    """
    if setting is not None:
        given = load_template(setting)
        shape = task.shape(rows, columns) if given.is_chat else {}
        return Choice(given, {**shape, **(columns or {})} or None)
    if adapter is not None and task.continues_template:
        path = user_path(adapter) / "template.txt"
        template = load_template(str(path)) if path.is_file() else None
        if template and not template.is_chat and not task.missing_columns(template, rows.columns, columns):
            return Choice(template, columns, f"template {path}, from the adapter to continue")
    recognised = task.recognise(rows, columns)
    return Choice(
        template=load_template(recognised.template),
        columns={**dict(recognised.columns), **(columns or {})} or None,
        reason=recognised.reason,
    )
