"""Rows as the model will see them: the ones asked for, read once, each with the tokens it is trained on."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any

from yeonma.data.rows import Row, Rows
from yeonma.errors import UserError
from yeonma.inspect.audit import Audit
from yeonma.tokenization.dataset import Dataset
from yeonma.tokenization.explain import View, explain

FIRST_ROWS = 3
ROWS_A_CHUNK = 64


@dataclass(frozen=True)
class RowSelection:
    """Row numbers; None for all of them."""

    numbers: frozenset[int] | None

    def __contains__(self, number: int) -> bool:
        return self.numbers is None or number in self.numbers


def select_rows(rows: str | None, count: int) -> RowSelection:
    """What `--rows` says of a data set of `count` rows: `17,40`, `5-8`, `all`, `none`; the first three without it.

    Raises UserError for anything else, and for numbers of rows that are not there.
    """
    if rows is None:
        return RowSelection(frozenset(range(1, min(FIRST_ROWS, count) + 1)))
    if rows.strip() in ("all", "none"):
        return RowSelection(None if rows.strip() == "all" else frozenset())
    numbers: set[int] = set()
    for part in rows.split(","):
        found = re.fullmatch(r"\s*(\d{1,18})\s*(?:-\s*(\d{1,18})\s*)?", part)
        if found is None:
            cure = "give numbers such as 17,40 or 5-8, or all"
            raise UserError(f'"{part.strip()}" is no row', place="--rows", cure=cure)
        first, last = int(found[1]), int(found[2] or found[1])
        if not 1 <= first <= last <= count:
            missing = last if first <= last else f"{first}-{last}"
            raise UserError(
                f"there is no row {missing}", place="--rows", cure=f"the data has rows 1 to {count}"
            )
        numbers.update(range(first, last + 1))
    return RowSelection(frozenset(numbers))


def views_of(
    dataset: Dataset, tokenizer: Any, wanted: RowSelection, *, in_full: bool = True
) -> Iterator[View]:
    """The wanted rows of the training data's source, held out or not. Reads no further than the last of them.

    `in_full` as in `explain`.
    """
    chosen = (row for row in _until(dataset.train.rows, wanted) if row.number in wanted)
    while chunk := list(islice(chosen, ROWS_A_CHUNK)):
        texts = [dataset.task.render(dataset.template, row, dataset.columns) for row in chunk]
        yield from explain(texts, chunk, tokenizer, dataset.rules, dataset.task, in_full=in_full)


def _until(rows: Rows, wanted: RowSelection) -> Iterator[Row]:
    if wanted.numbers is None:
        yield from rows
    elif wanted.numbers:
        yield from islice(rows, max(wanted.numbers))


def view_json(view: View) -> str:
    """One example as a line. `trained` has a 0 or 1 for each token; a row that is left out has no tokens.

    An answer of preference data has its `role` as well.
    """
    return _line(
        {
            "row": view.row,
            **({} if view.role is None else {"role": view.role}),
            "token_ids": list(view.token_ids),
            "trained": [int(trained) for trained in view.trained],
            "prompt": view.prompt,
            "answer": view.answer,
            "cut_characters": view.cut_characters,
            "variant": view.variant,
            "left_out": view.left_out,
        }
    )


def audit_json(audit: Audit, more: dict[str, Any]) -> str:
    """The line that ends the output: the audit, and `more` beside it."""
    return _line(
        {"audit": {**asdict(audit), "work": {**asdict(audit.work), "saved": audit.work.saved}}, **more}
    )


def held_out_rows(dataset: Dataset) -> Sequence[int]:
    """The rows of the training data's source that validation was drawn from it."""
    held_out = dataset.validation
    if held_out is None or held_out.rows is not dataset.train.rows:
        return ()
    return held_out.store.row_numbers[held_out.positions].tolist()


def _line(value: dict[str, Any]) -> str:
    return json.dumps(value, ensure_ascii=False) + "\n"
