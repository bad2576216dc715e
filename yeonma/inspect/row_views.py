"""Selected rows as the model will see them, with their trained tokens, and their JSON."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from itertools import islice
from typing import TYPE_CHECKING, Any

from yeonma.config.data_sets import data_sets
from yeonma.config.settings import DataSettings
from yeonma.data.rows import Row, Rows, glance
from yeonma.errors import Problem, UserError
from yeonma.messages import tr
from yeonma.shown import json_text
from yeonma.tokenization.dataset import Dataset, PreparedSet
from yeonma.tokenization.explain import View, bad_row_view, explain

if TYPE_CHECKING:
    from yeonma.inspect.audit import Audit

FIRST_ROWS = 3
VIEW_CHUNK_ROWS = 64
MOST_COUNTED = 100_000
"""Rows that are counted before torch is imported, which takes about a second."""


@dataclass(frozen=True)
class RowSelection:
    """Row numbers; None for all of them."""

    numbers: frozenset[int] | None

    def __contains__(self, number: int) -> bool:
        return self.numbers is None or number in self.numbers


def select_rows(rows: str | None, count: int) -> RowSelection:
    """Parse `--rows` for a data set of `count` rows: `17,40`, `5-8`, `all` or `none`; by default, the first three rows.

    Raises UserError for anything else and for row numbers above `count`.
    """
    if rows is None:
        return RowSelection(frozenset(range(1, min(FIRST_ROWS, count) + 1)))
    if rows.strip() in ("all", "none"):
        return RowSelection(None if rows.strip() == "all" else frozenset())
    numbers: set[int] = set()
    for first, last in row_ranges(rows):
        if not 1 <= first <= last <= count:
            raise UserError([_no_row(first, last, count)])
        numbers.update(range(first, last + 1))
    return RowSelection(frozenset(numbers))


def check_rows_there(rows: str | None, data: DataSettings) -> None:
    """Raises UserError for numbers of `--rows` that local files do not have, before torch is imported. Counts no
    further than to the highest number, and not at all if that is high or the data is not a local file."""
    ranges = row_ranges(rows)
    highest = max((max(one) for one in ranges), default=0)
    if not 0 < highest <= MOST_COUNTED:
        return
    counts = []
    for one in data_sets(data):
        found = glance(
            one.path,
            split=one.split,
            encoding=one.encoding,
            delimiter=one.delimiter,
            max_rows=one.limit,
            skip_bad=data.bad_rows == "skip",
        )
        if found is None:
            return
        try:
            counts.append(sum(1 for _ in islice(found, highest)))
        except UserError:  # which the run tells with all others
            return
    count = max(counts)
    for first, last in ranges:
        if not 1 <= first <= last <= count:
            raise UserError([_no_row(first, last, count)])


def _no_row(first: int, last: int, count: int) -> Problem:
    missing = last if first <= last else f"{first}-{last}"
    cure = tr("the data has rows 1 to {count}", count=count)
    return Problem(tr("there is no row {missing}", missing=missing), "--rows", cure)


def row_ranges(rows: str | None) -> list[tuple[int, int]]:
    """The first and last number of each part of `--rows`; none if it names no numbers. Raises UserError for anything
    that can be no row of any data set."""
    ranges = []
    for part in () if rows is None or rows.strip() in ("all", "none") else rows.split(","):
        match = re.fullmatch(r"\s*(\d{1,18})\s*(?:-\s*(\d{1,18})\s*)?", part)
        if match is None:
            cure = tr("give numbers such as 17,40 or 5-8, or all")
            raise UserError(tr('there is no row "{part}"', part=part.strip()), place="--rows", cure=cure)
        ranges.append((int(match[1]), int(match[2] or match[1])))
    return ranges


def views_of(
    dataset: Dataset, tokenizer: Any, selection: RowSelection, *, in_full: bool = True
) -> Iterator[View]:
    """Views of the selected rows of each data set, held out or not. Does not read past the last of them.

    `in_full` as in `explain`.
    """
    for one in dataset.sets:
        held_out = held_out_rows(one)
        name = one.name if len(dataset.sets) > 1 else ""
        for view in _views_of_set(one, dataset, tokenizer, selection, in_full=in_full):
            yield replace(view, data_set=name, is_held_out=view.row in held_out)


def _views_of_set(
    one: PreparedSet, dataset: Dataset, tokenizer: Any, selection: RowSelection, *, in_full: bool
) -> Iterator[View]:
    store = one.train.store
    bad = {left.row: left for left in (store.left_out if store.counts.left_out else []) if left.fault}
    selected = (row for row in _until(one.train.rows, selection) if row.number in selection)
    while chunk := list(islice(selected, VIEW_CHUNK_ROWS)):
        good = [row for row in chunk if row.number not in bad]
        texts = [dataset.task.render(one.template, row, one.columns) for row in good]
        views = explain(texts, good, tokenizer, dataset.rules, dataset.task, in_full=in_full) if good else []
        views += [bad_row_view(bad[row.number]) for row in chunk if row.number in bad]
        yield from sorted(views, key=lambda view: view.row)


def _until(rows: Rows, selection: RowSelection) -> Iterator[Row]:
    if selection.numbers is None:
        yield from rows
    elif selection.numbers:
        yield from islice(rows, max(selection.numbers))


def view_json(view: View) -> str:
    """An example as a line of JSON. `trained` has 0 or 1 per token. A row that is left out has no tokens.

    In preference data, it also has the `role` of the answer; with several data sets, its `data_set`; where not all
    tokens weigh the same, their `weights`.
    """
    return _line(
        {
            **({"data_set": view.data_set} if view.data_set else {}),
            "row": view.row,
            **({} if view.role is None else {"role": view.role}),
            "token_ids": list(view.token_ids),
            "trained": [int(trained) for trained in view.trained],
            **({} if view.weights is None else {"weights": list(view.weights)}),
            "prompt": view.prompt,
            "answer": view.answer,
            "cut_characters": view.cut_characters,
            "variant": view.variant,
            "left_out": view.left_out,
        }
    )


def audit_json(audit: Audit, extra: dict[str, Any]) -> str:
    """The last line of the output: the audit, with the keys of `extra`."""
    return _line(
        {"audit": {**asdict(audit), "work": {**asdict(audit.work), "saved": audit.work.saved}}, **extra}
    )


def held_out_rows(one: PreparedSet) -> frozenset[int]:
    """Numbers of the rows of a data set's training data that are held out for validation."""
    held_out = one.validation
    if held_out is None or held_out.store.key != one.train.store.key:
        return frozenset()
    return frozenset(held_out.store.row_numbers[held_out.positions].tolist())


def _line(value: dict[str, Any]) -> str:
    return json_text(value) + "\n"
