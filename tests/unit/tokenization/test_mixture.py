"""Several data sets: each is tokenised as it would be alone; together they are what one joined file would be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.runs import TEMPLATE, articles, characters, write_jsonl
from yeonma.config.settings import DataSettings, StepSettings, TokenSettings
from yeonma.data.task import ANSWERS, LABELLED, PAIRS, Task
from yeonma.errors import UserError
from yeonma.tokenization.dataset import Dataset, DatasetPart, describe, prepare_dataset
from yeonma.tokenization.store import TokenStore
from yeonma.train.prepare import mixture_lines, plan_of


def prepare(data_path: Any, lines: list[str] | None = None, task: Task = ANSWERS, **settings: Any) -> Dataset:
    data = DataSettings(data_path=data_path, **settings)
    log = (lines if lines is not None else []).append
    dataset = prepare_dataset(
        data, TokenSettings(cutoff_len=200), characters(), 42, log, lambda _: None, task
    )
    describe(dataset, log)
    return dataset


def tokens_of(store: TokenStore, positions: np.ndarray) -> list[tuple[list[int], list[bool], int]]:
    examples = [store.example(int(position)) for position in positions]
    return [(one.token_ids.tolist(), one.trained.tolist(), one.prompt_length) for one in examples]


def tokens_of_part(part: DatasetPart) -> list[tuple[list[int], list[bool], int]]:
    return tokens_of(part.store, part.positions)


@pytest.fixture
def paths(tmp_path: Path) -> list[str]:
    long = {"document": "b", "title": "a title of far more letters than there is room for" * 9}
    rows = [[*articles(9, seed=1)], [*articles(4, seed=2), long, *articles(3, seed=3)], articles(6, seed=4)]
    return [
        str(write_jsonl(tmp_path / f"{name}.jsonl", part)) for name, part in zip("abc", rows, strict=True)
    ]


def test_data_sets_without_weights_are_one_joined_file(paths: list[str], tmp_path: Path) -> None:
    joined = tmp_path / "joined.jsonl"
    joined.write_text("".join(Path(path).read_text("utf-8") for path in paths), "utf-8")
    one, several = prepare(str(joined), template=TEMPLATE), prepare(paths, template=TEMPLATE)
    assert tokens_of_part(several.train) == tokens_of_part(one.train)
    for name in ("row_numbers", "units", "row_digests", "prompt_digests", "row_flags", "cut_characters"):
        assert getattr(several.train.store, name).tolist() == getattr(one.train.store, name).tolist(), name
    assert several.train.store.counts.left_out == 1
    assert [(left.row, left.reason) for left in several.train.store.left_out] == [
        (left.row, left.reason) for left in one.train.store.left_out
    ]
    step = StepSettings(batch_size=5, num_epochs=2)
    steps = [[units.tolist() for units in plan_of(dataset, step).steps()] for dataset in (one, several)]
    assert steps[0] == steps[1]


def test_each_data_set_holds_out_the_rows_that_it_would_alone(paths: list[str]) -> None:
    mixed = prepare(paths, template=TEMPLATE, val_set_size=0.3)
    assert list(mixed.validation) == ["a.jsonl", "b.jsonl", "c.jsonl"]
    start = 0
    for path, part in zip(paths, mixed.validation.values(), strict=True):
        alone = prepare(path, template=TEMPLATE, val_set_size=0.3)
        (held_out,) = alone.validation.values()
        assert tokens_of_part(part) == tokens_of_part(held_out)
        end = start + len(alone.train.positions)
        store, positions = mixed.train.examples
        assert tokens_of(store, positions[start:end]) == tokens_of_part(alone.train)
        start = end
    assert start == len(mixed.train.positions)


def test_rows_are_counted_within_their_data_set(paths: list[str]) -> None:
    dataset = prepare(paths, template=TEMPLATE)
    assert dataset.rows_by_set([1, 9, 10, 17, 18, 23]) == {
        "a.jsonl": [1, 9],
        "b.jsonl": [1, 8],
        "c.jsonl": [1, 6],
    }
    assert dataset.name_rows([9, 10, 17]) == "a.jsonl row 9, b.jsonl rows 1, 8"
    assert prepare(paths[0], template=TEMPLATE).name_rows([2, 5]) == "rows 2, 5"
    for number, row in enumerate(dataset.train.rows, 1):
        assert row.number == number


def test_each_data_set_has_its_own_template_and_columns(tmp_path: Path) -> None:
    first = write_jsonl(tmp_path / "a.jsonl", [{"body": f"text {i}", "headline": f"h{i}"} for i in range(4)])
    second = write_jsonl(tmp_path / "b.jsonl", [{"q": f"why {i}", "a": f"so {i}"} for i in range(3)])
    lines: list[str] = []
    dataset = prepare(
        [
            {
                "path": str(first),
                "template": "{document}: {title}",
                "columns": {"document": "body", "answer": "headline"},
            },
            {"path": str(second), "template": "{q}? {a}"},
        ],
        lines,
    )
    decoded = [characters().decode(ids) for ids, _, _ in tokens_of_part(dataset.train)]
    assert decoded[0] == "text 0: h0</s>"
    assert decoded[-1] == "why 2? so 2</s>"
    assert [one.template.text for one in dataset.sets] == ["{document}: {title}\n", "{q}? {a}\n"]
    assert dataset.template.text == "{document}: {title}\n"
    assert "a.jsonl: 4 rows, 4 examples, 44 tokens, 12 of them trained" in lines


def test_problems_name_the_data_set(tmp_path: Path, paths: list[str]) -> None:
    other = write_jsonl(tmp_path / "other.jsonl", [{"x": "a", "y": "b"}])
    with pytest.raises(UserError) as error:
        prepare([paths[0], str(other)])
    assert all(str(problem).startswith("other.jsonl: template: ") for problem in error.value.problems)


def test_the_part_of_each_data_set_is_told(paths: list[str]) -> None:
    step = StepSettings(batch_size=4, num_epochs=1)
    weighted = prepare(
        [{"path": paths[0], "weight": 1}, {"path": paths[1], "weight": 3}, {"path": paths[2], "weight": 4}],
        template=TEMPLATE,
    )
    plan = plan_of(weighted, step)
    passes = plan.passes()
    assert mixture_lines(weighted, plan) == [
        f"a.jsonl: 12.5% of each step's examples, {passes[0]:.2f} passes in the whole run",
        f"b.jsonl: 37.5% of each step's examples, {passes[1]:.2f} passes in the whole run",
        f"c.jsonl: 50.0% of each step's examples, {passes[2]:.2f} passes in the whole run",
    ]
    repeated = prepare([paths[0], {"path": paths[2], "repeats": 3}], template=TEMPLATE)
    assert mixture_lines(repeated, plan_of(repeated, step)) == [
        "a.jsonl: 33.3% of the examples, 1 time an epoch",
        "c.jsonl: 66.7% of the examples, 3 times an epoch",
    ]
    alone = prepare(paths[0], template=TEMPLATE)
    assert mixture_lines(alone, plan_of(alone, step)) == []


def test_an_epoch_has_the_rows_of_a_data_set_as_often_as_its_repeats_say(paths: list[str]) -> None:
    dataset = prepare([paths[0], {"path": paths[2], "repeats": 3}], template=TEMPLATE)
    plan = plan_of(dataset, StepSettings(batch_size=4, num_epochs=2))
    units = np.concatenate(list(plan.steps()))
    counts = np.bincount(units)
    assert counts.tolist() == [2] * 9 + [6] * 6


def test_rows_that_two_data_sets_have_are_told(tmp_path: Path) -> None:
    rows = articles(6)
    first, second = (
        write_jsonl(tmp_path / "a.jsonl", rows),
        write_jsonl(tmp_path / "b.jsonl", rows[4:] + articles(3, 9)),
    )
    held_out = write_jsonl(tmp_path / "c.jsonl", rows[:2])
    lines: list[str] = []
    prepare([str(first), {"path": str(second), "val_path": str(held_out)}], lines, template=TEMPLATE)
    assert "b.jsonl: training rows that a.jsonl has as well: 2 (rows 1, 2)" in lines
    assert "b.jsonl: validation rows that are also training rows: 2 (rows 1, 2)" in lines


def test_another_split_of_the_same_data_validates(tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "rows.jsonl", articles(10))
    lines: list[str] = []
    dataset = prepare(str(data), lines, template=TEMPLATE, data_split="train[:70%]", val_split="train[70%:]")
    (held_out,) = dataset.validation.values()
    whole = prepare(str(data), template=TEMPLATE)
    assert tokens_of_part(dataset.train) + tokens_of_part(held_out) == tokens_of_part(whole.train)
    assert f"{data} train[70%:]: 3 rows, 3 examples, " in "\n".join(lines)


@pytest.mark.parametrize("task", [PAIRS, LABELLED])
def test_preference_data_mixes_as_one_joined_file(task: Task, tmp_path: Path) -> None:
    def rows(name: str, count: int) -> list[dict[str, Any]]:
        made = []
        for number in range(count):
            answers = (
                {"chosen": f"yes {number}", "rejected": "no"}
                if task is PAIRS
                else {
                    "completion": f"yes {number}",
                    "label": number % 2 == 0,
                }
            )
            made.append({"prompt": f"{name} {number}? ", **answers})
        return made

    parts = [rows("a", 3), rows("b", 5)]
    paths = [
        str(write_jsonl(tmp_path / f"{name}.jsonl", part)) for name, part in zip("ab", parts, strict=True)
    ]
    joined = prepare(str(write_jsonl(tmp_path / "joined.jsonl", parts[0] + parts[1])), task=task)
    mixed = prepare(paths, task=task)
    same = joined.train.store.examples_of(joined.train.units)
    assert tokens_of(mixed.train.store, mixed.train.store.examples_of(mixed.train.units)) == tokens_of(
        joined.train.store, same
    )
    assert mixed.train.store.roles.tolist() == joined.train.store.roles.tolist()
    assert (
        mixed.train.store.unit_lengths.tolist() == joined.train.store.unit_lengths.tolist()
        or task is LABELLED
    )


def test_weights_of_turns_stay_with_their_tokens(tmp_path: Path) -> None:
    def talk(weight: float) -> dict[str, Any]:
        turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "bc", "weight": weight}]
        return {"messages": turns}

    from tests.tokenizers import byte_level

    paths = [
        str(write_jsonl(tmp_path / "a.jsonl", [talk(1), talk(0.5)])),
        str(write_jsonl(tmp_path / "b.jsonl", [talk(0.25), talk(1), talk(0.125)])),
    ]
    data = DataSettings(data_path=paths)
    store = prepare_dataset(
        data, TokenSettings(), byte_level(), 42, lambda _: None, lambda _: None
    ).train.store
    weights = [
        None
        if (one := store.example(index).weights) is None
        else set(one[store.example(index).trained].tolist())
        for index in range(5)
    ]
    assert weights == [None, {0.5}, {0.25}, None, {0.125}]


def test_a_damaged_joined_store_is_written_again(paths: list[str], tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    tokens = TokenSettings(cutoff_len=200, cache_dir=str(cache))
    data = DataSettings(data_path=paths, template=TEMPLATE)

    def prepared() -> DatasetPart:
        return prepare_dataset(data, tokens, characters(), 42, lambda _: None, lambda _: None).train

    first = prepared()
    wanted = tokens_of_part(first)
    stores = len(list(cache.glob("*/meta.json")))
    (first.store.folder / "trained.bin").write_bytes(b"")
    assert tokens_of_part(prepared()) == wanted
    assert len(list(cache.glob("*/meta.json"))) == stores == 4


def test_another_split_of_a_folder_validates(tmp_path: Path) -> None:
    rows = articles(10)
    write_jsonl(tmp_path / "train.jsonl", rows[:7])
    alone = write_jsonl(tmp_path / "validation.jsonl", rows[7:])
    dataset = prepare(str(tmp_path), template=TEMPLATE, val_split="validation")
    (held_out,) = dataset.validation.values()
    assert len(dataset.train.positions) == 7
    assert tokens_of_part(held_out) == tokens_of_part(prepare(str(alone), template=TEMPLATE).train)
    with pytest.raises(UserError, match='did you mean "validation"'):
        prepare(str(tmp_path), template=TEMPLATE, val_split="validatoin")
