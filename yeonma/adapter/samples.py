"""samples.json of an adapter folder: a few rows as they were trained on, with the ids of their prompts.

They are the rows of the model card. With them `yeonma verify` checks that tokenizer and template still give the tokens
of training. No torch here.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from yeonma.data.columns import column_of
from yeonma.data.rows import Row
from yeonma.data.task import TASKS, Task
from yeonma.data.template import Template
from yeonma.errors import UserError
from yeonma.tokenization.dataset import Part
from yeonma.tokenization.example import Example, LeftOut, TokenRules, Unit
from yeonma.tokenization.store import TokenStore
from yeonma.tokenization.task_encoders import TASK_ENCODERS

SAMPLES = "samples.json"


@dataclass(frozen=True)
class SampleRow:
    """A row of the run's data: the columns that the template reads, answers included."""

    row_number: int
    row: dict[str, Any]
    prompt_ids: list[int]
    """The row's (last) prompt as it was trained, shortened to leave room for its own answer if it had to be."""


@dataclass(frozen=True)
class Samples:
    task: Task
    rows: tuple[SampleRow, ...]

    def to_json(self) -> str:
        rows = [asdict(row) for row in self.rows]
        return json.dumps({"kind": self.task.name, "samples": rows}, ensure_ascii=False, default=str) + "\n"


def take_samples(
    part: Part, task: Task, template: Template, columns: Mapping[str, str] | None, count: int
) -> Samples:
    """The first `count` rows of `part`."""
    rows = part.first_rows(count)
    names = _columns_read(task, template, columns)
    prompts = prompts_of(part.store, [row.number for row in rows])
    return Samples(
        task,
        tuple(
            SampleRow(
                row.number, {name: row.values[name] for name in names if name in row.values}, ids.tolist()
            )
            for row, ids in zip(rows, prompts, strict=True)
        ),
    )


def prompts_of(store: TokenStore, numbers: Sequence[int]) -> list[np.ndarray]:
    """The prompt ids of each row's last example, shape (tokens,)."""
    lasts = [int(np.flatnonzero(store.row_numbers == number)[-1]) for number in numbers]
    examples = [store.example(last) for last in lasts]
    return [example.token_ids[: example.prompt_length] for example in examples]


def read_samples(folder: Path) -> Samples | None:
    """What `folder` holds; None where it has no samples.json, as folders of earlier versions.

    Raises UserError where the file is damaged.
    """
    path = folder / SAMPLES
    if not path.exists():
        return None
    try:
        content = json.loads(path.read_text("utf-8"))
        rows = tuple(
            SampleRow(**{field.name: entry[field.name] for field in fields(SampleRow)})
            for entry in content["samples"]
        )
        for row in rows:
            ids = row.prompt_ids
            if not (isinstance(ids, list) and all(type(one) is int for one in (row.row_number, *ids))):
                raise TypeError("ids and row numbers are whole numbers")
            if not isinstance(row.row, dict):
                raise TypeError("a row is an object")
        return Samples(TASKS[content["kind"]], rows)
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError, OSError) as error:
        raise UserError(f"damaged ({error})", place=str(path)) from error


def prompts_now(
    samples: Samples,
    template: Template,
    columns: Mapping[str, str] | None,
    tokenizer: Any,
    rules: TokenRules,
) -> list[list[int] | None]:
    """The prompt ids that the samples' rows would be trained with now; None for one that would be left out.

    Raises UserError as rendering and encoding.
    """
    rows = [
        Row(sample.row_number, sample.row, f"{SAMPLES}, row {sample.row_number}") for sample in samples.rows
    ]
    if not rows:
        return []
    task = samples.task
    rendered = [task.render(template, row, columns) for row in rows]
    outcomes = TASK_ENCODERS[task.name].encode(rendered, rows, tokenizer, rules)
    lasts: dict[int, list[int]] = {}
    for example in _examples(outcomes):
        lasts[example.row] = example.token_ids[: example.prompt_length].tolist()
    return [lasts.get(row.number) for row in rows]


def _examples(outcomes: Iterable[Example | Unit | LeftOut]) -> Iterable[Example]:
    for one in outcomes:
        if isinstance(one, Unit):
            yield from (example for _, example in one.members)
        elif isinstance(one, Example):
            yield one


def _columns_read(task: Task, template: Template, columns: Mapping[str, str] | None) -> list[str]:
    return sorted({column_of(name, columns, template.answer_field) for name in task.fields(template)})
