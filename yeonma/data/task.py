"""Kinds of data, one answer a row, two to choose between, or one with a label: how a row becomes text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, get_args

from yeonma.config.settings import LabelLossName
from yeonma.data.columns import Columns, Recognised, recognise
from yeonma.data.preference_pairs import (
    label_without_column,
    notes_of_pair,
    pair_without_column,
    recognise_labelled,
    recognise_pairs,
    render_label,
    render_pair,
)
from yeonma.data.rows import Row, Rows
from yeonma.data.template import Rendered, Template, load_template
from yeonma.data.text_checks import Notes, notes_of
from yeonma.errors import Problem
from yeonma.files import user_path


@dataclass(frozen=True)
class Task:
    """The steps from a row to its text; what `render` gives is what the others take."""

    name: str
    """Also part of the key that tokens are kept under."""
    units: str
    """What a step counts, in words."""
    recognise: Callable[[Rows, Columns], Recognised]
    without_column: Callable[[Template, Sequence[str], Columns], list[Problem]]
    """The columns that the data lacks altogether."""
    render: Callable[[Template, Row, Columns], Any]
    notes: Callable[[Any], Notes]
    wanted: Callable[[Any], Rendered]
    """The row with the answer that is wanted, or none where its only one is not."""


@dataclass(frozen=True)
class Choice:
    """A template, the columns that fill it, and why it was chosen where nobody named it."""

    template: Template
    columns: dict[str, str] | None
    reason: str = ""


ANSWERS = Task(
    name="answers",
    units="examples",
    recognise=lambda rows, columns: recognise(rows.columns, columns),
    without_column=Template.without_column,
    render=Template.render,
    notes=notes_of,
    wanted=lambda rendered: rendered,
)
PAIRS = Task(
    name="pairs",
    units="pairs",
    recognise=recognise_pairs,
    without_column=pair_without_column,
    render=render_pair,
    notes=notes_of_pair,
    wanted=lambda pair: pair.chosen,
)
LABELLED = Task(
    name="labelled answers",
    units="labelled answers",
    recognise=recognise_labelled,
    without_column=label_without_column,
    render=render_label,
    notes=lambda label: notes_of(label.rendered),
    wanted=lambda label: label.rendered if label.desirable else replace(label.rendered, answer=()),
)


def task_for_loss(loss: str | None) -> Task:
    """The data that a preference loss takes; without one, that of supervised training."""
    if loss is None:
        return ANSWERS
    return LABELLED if loss in get_args(LabelLossName) else PAIRS


def choose_template(
    kind: Task,
    setting: str | None,
    rows: Rows,
    columns: dict[str, str] | None,
    continued: str | None = None,
) -> Choice:
    """The template that `--template` names, else the built-in that the columns satisfy.

    Preferences are learnt with the template of the adapter that is `continued`, if its folder has one and the columns
    fill it: what was trained on answers is asked the same way. Raises UserError as `load_template`, and where no
    built-in template fits or several do.
    """
    if setting is not None:
        return Choice(load_template(setting), columns)
    own = user_path(continued) / "template.txt" if continued is not None and kind is not ANSWERS else None
    if own is not None and own.is_file():
        template = load_template(str(own))
        if not template.is_chat and not kind.without_column(template, rows.columns, columns):
            return Choice(template, columns, f"template {own}, of the adapter continued")
    found = kind.recognise(rows, columns)
    return Choice(
        load_template(found.template), {**dict(found.columns), **(columns or {})} or None, found.reason
    )
