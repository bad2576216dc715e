"""Rows that `--bad_rows skip` leaves out: they cannot be read, do not fit the template, or fail to be encoded."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from yeonma.data.columns import Columns
from yeonma.data.rows import Row
from yeonma.data.task import Task
from yeonma.data.template import Template
from yeonma.data.template_syntax import visible
from yeonma.data.text_checks import NO_NOTES, Notes
from yeonma.errors import Problem, UserError, brief
from yeonma.messages import in_english, later
from yeonma.tokenization.chat_remarks import ChatWatch
from yeonma.tokenization.example import Example, LeftOut, TokenRules, Unit
from yeonma.tokenization.example_encoder import over_limit_problems
from yeonma.tokenization.task_encoders import TASK_ENCODERS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Outcomes = Sequence[Example | Unit | LeftOut]

MOST_CHARACTERS = 200
_DETAIL = re.compile(r'"[^"]*"|(?<![\w+])\d[\d,.]*(?!\w)')
"""Quoted text, which stays, and numbers, which differ from row to row."""


def encode_good_rows(
    rows: Sequence[Row],
    template: Template,
    columns: Columns,
    tokenizer: PreTrainedTokenizerBase,
    rules: TokenRules,
    watch: ChatWatch,
) -> tuple[list[Notes], Outcomes]:
    """The notes of all rows, and the outcomes of encoding them in their order, with a LeftOut for every bad row.

    Raises UserError for problems that are not those of a row and, with `over_limit` "error", for rows over the limit.
    """
    task = watch.task
    bad: dict[int, LeftOut] = {}
    texts: dict[int, Any] = {}
    for row in rows:
        try:
            if row.fault is not None:
                raise UserError([row.fault])
            texts[row.number] = task.render(template, row, columns)
        except UserError as error:
            bad[row.number] = bad_row(row, error)
    outcomes: Outcomes = ()
    while good := [row for row in rows if row.number not in bad]:
        chosen = [texts[row.number] for row in good]
        try:
            outcomes = TASK_ENCODERS[task.name].encode(
                chosen, good, tokenizer, replace(rules, over_limit="drop")
            )
            break
        except UserError as error:
            bad |= _refused(error, good, texts, tokenizer, rules, task)
    if rules.over_limit == "error":
        if problems := over_limit_problems(outcomes):
            raise UserError(problems)
    good = [row for row in rows if row.number not in bad]
    found = iter(watch.notes([texts[row.number] for row in good], good))
    notes = [NO_NOTES if row.number in bad else next(found) for row in rows]
    return notes, sorted([*outcomes, *bad.values()], key=_row_of)


def bad_row(row: Row, error: UserError) -> LeftOut:
    """The row, left out. Raises `error` itself if it is not about the row, such as one about a setting."""
    if row.fault is None and any(problem.place != row.place for problem in error.problems):
        raise error
    first, *more = error.problems
    reason = str(in_english(first.what))
    if more:
        one, many = later("{what}, and {number} more problem"), later("{what}, and {number} more problems")
        reason = (one if len(more) == 1 else many).format(what=reason, number=len(more))
    return LeftOut(row.number, row.place, visible(brief(reason, MOST_CHARACTERS)), fault_of(first))


def fault_of(problem: Problem) -> str:
    """What is wrong with a row, in English and with N in place of numbers: `messages[N].content is empty`."""
    plain = _DETAIL.sub(lambda match: match[0] if match[0][0] == '"' else "N", str(in_english(problem.what)))
    return visible(brief(plain, MOST_CHARACTERS))


def _refused(
    error: UserError,
    rows: Sequence[Row],
    texts: dict[int, Any],
    tokenizer: PreTrainedTokenizerBase,
    rules: TokenRules,
    task: Task,
) -> dict[int, LeftOut]:
    """The rows that the `error` of encoding them is about. Raises it if there are none."""
    problems: dict[str, list[Problem]] = {}
    for problem in error.problems:
        problems.setdefault(problem.place, []).append(problem)
    times = Counter(row.place for row in rows)
    refused: dict[int, LeftOut] = {}
    for row in rows:
        if row.place not in problems:
            continue
        own = UserError(problems[row.place])
        if times[row.place] > 1:  # several rows on one line: each is tried alone
            alone = replace(rules, over_limit="drop")
            try:
                TASK_ENCODERS[task.name].encode([texts[row.number]], [row], tokenizer, alone)
                continue
            except UserError as error_of_row:
                own = error_of_row
        refused[row.number] = bad_row(row, own)
    if not refused:
        raise error
    return refused


def _row_of(outcome: Example | Unit | LeftOut) -> int:
    return outcome.members[0][1].row if isinstance(outcome, Unit) else outcome.row
