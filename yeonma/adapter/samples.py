"""samples.json of an adapter folder: the rows of the model card, with the prompt ids of training.

`yeonma verify` uses them to check that tokenizer and template still give these ids. No torch here.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from yeonma.data.rows import Row
from yeonma.data.task import TASKS, Task, columns_used
from yeonma.data.template import Rendered, Template
from yeonma.errors import UserError
from yeonma.files import damage_as_user_error
from yeonma.messages import tr
from yeonma.shown import json_text
from yeonma.tokenization.dataset import Dataset, DatasetPart, PreparedSet
from yeonma.tokenization.example import Example, LeftOut, TokenRules, Unit
from yeonma.tokenization.example_encoder import encode_prompt
from yeonma.tokenization.store import TokenStore
from yeonma.tokenization.task_encoders import TASK_ENCODERS

SAMPLES = "samples.json"
MAX_NEW_TOKENS = 128


@dataclass(frozen=True)
class SampleRow:
    """A row of the run's data, with the columns that the template reads, including answers."""

    row_number: int
    row: dict[str, Any]
    prompt_ids: list[int]
    """The row's prompt in training, or its last one; shortened if that was necessary for the answer."""

    def as_row(self) -> Row:
        place = tr("{file}, row {number}", file=SAMPLES, number=self.row_number)
        return Row(self.row_number, self.row, place)


@dataclass(frozen=True)
class Samples:
    task: Task
    rows: tuple[SampleRow, ...]

    def to_json(self) -> str:
        rows = [asdict(row) for row in self.rows]
        return json_text({"kind": self.task.name, "samples": rows}, default=str) + "\n"


def take_samples(
    part: DatasetPart, task: Task, template: Template, columns: Mapping[str, str] | None, count: int
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
    last_examples = [int(np.flatnonzero(store.row_numbers == number)[-1]) for number in numbers]
    examples = [store.example(last) for last in last_examples]
    return [example.token_ids[: example.prompt_length] for example in examples]


def asked_sets(dataset: Dataset) -> list[PreparedSet]:
    """The data sets whose rows are answered for the card: not whole texts, and not rows that are replayed."""
    return [one for one in dataset.sets if not one.template.is_text and one.settings.share is None]


def with_room(
    prompts: Sequence[np.ndarray],
    rendered: Sequence[Rendered],
    rows: Sequence[Row],
    tokenizer: Any,
    rules: TokenRules,
    positions: int | None,
    most_tokens: int,
) -> list[np.ndarray]:
    """The prompts, shortened as `yeonma generate` does where the model has no positions left for an answer of
    `most_tokens`; as they are where nothing can be shortened."""
    result = list(prompts)
    for index, prompt in enumerate(prompts):
        if positions is not None and len(prompt) + most_tokens > positions:
            with suppress(UserError):
                result[index] = encode_prompt(
                    rendered[index], rows[index], tokenizer, rules.within(positions), most_tokens
                )
    return result


def read_samples(folder: Path) -> Samples | None:
    """The samples in a folder, or None without a samples.json, as in folders of earlier versions.

    Raises UserError if the file is damaged.
    """
    path = folder / SAMPLES
    if not path.exists():
        return None
    with damage_as_user_error(path):
        content = json.loads(path.read_text("utf-8"))
        rows = tuple(
            SampleRow(**{field.name: entry[field.name] for field in fields(SampleRow)})
            for entry in content["samples"]
        )
        for row in rows:
            ids = row.prompt_ids
            if not (isinstance(ids, list) and all(type(number) is int for number in (row.row_number, *ids))):
                raise TypeError(tr("ids and row numbers are whole numbers"))
            if not isinstance(row.row, dict):
                raise TypeError(tr("a row is an object"))
        return Samples(TASKS[content["kind"]], rows)


def prompts_now(
    samples: Samples,
    template: Template,
    columns: Mapping[str, str] | None,
    tokenizer: Any,
    rules: TokenRules,
) -> list[list[int] | None]:
    """The prompt ids that training would give the sample rows now; None for a row that would be left out.

    Raises UserError as rendering and encoding do.
    """
    rows = [sample.as_row() for sample in samples.rows]
    if not rows:
        return []
    task = samples.task
    rendered = [task.render(template, row, columns) for row in rows]
    rules = replace(rules, row_weights=None)  # samples have only the columns that make the text
    outcomes = TASK_ENCODERS[task.name].encode(rendered, rows, tokenizer, rules)
    last_prompts: dict[int, list[int]] = {}
    for example in _examples(outcomes):
        last_prompts[example.row] = example.token_ids[: example.prompt_length].tolist()
    return [last_prompts.get(row.number) for row in rows]


def _examples(outcomes: Iterable[Example | Unit | LeftOut]) -> Iterable[Example]:
    for outcome in outcomes:
        if isinstance(outcome, Unit):
            yield from (example for _, example in outcome.members)
        elif isinstance(outcome, Example):
            yield outcome


def _columns_read(task: Task, template: Template, columns: Mapping[str, str] | None) -> list[str]:
    return sorted(columns_used(task, template, columns))
