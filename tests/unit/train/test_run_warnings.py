"""Warnings about a run as a whole: its learning rate, its number of rows, its answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.runs import TEMPLATE, articles, characters, write_jsonl
from yeonma.config.settings import DataSettings, StepSettings, TokenSettings
from yeonma.tokenization.dataset import Dataset, prepare_dataset
from yeonma.train.prepare import plan_of
from yeonma.train.run_warnings import highest_rate, run_warnings


def dataset_of(data_path: Any, **settings: Any) -> Dataset:
    data = DataSettings(data_path=data_path, template=TEMPLATE, **settings)
    return prepare_dataset(data, TokenSettings(), characters(), 42, lambda _: None, lambda _: None)


@pytest.fixture
def forty(tmp_path: Path) -> Dataset:
    return dataset_of(str(write_jsonl(tmp_path / "rows.jsonl", articles(40))))


def warned(dataset: Dataset, **step: Any) -> list[str]:
    settings = StepSettings(**{"batch_size": 4, "num_epochs": 2, **step})  # 20 steps
    return run_warnings(settings, dataset, plan_of(dataset, settings))


@pytest.mark.parametrize(
    "step",
    [
        {},
        {"warmup_steps": 19},
        {"warmup_ratio": 0.9, "lr_scheduler": "cosine"},
        {"warmup_steps": 5, "lr_scheduler": "cosine_with_restarts", "lr_scheduler_kwargs": {"num_cycles": 2}},
        {"lr_scheduler": "constant", "warmup_steps": 500},  # which has none, and says so
        {"lr_scheduler": "constant_with_warmup", "warmup_steps": 3},
        {"lr_scheduler": "inverse_sqrt", "warmup_steps": 3},
        {"batch_size": 40},
    ],
)
def test_a_sound_run_has_no_warning(forty: Dataset, step: dict[str, Any]) -> None:
    assert warned(forty, **step) == []


@pytest.mark.parametrize(
    "schedule", ["linear", "cosine", "constant_with_warmup", "polynomial", "inverse_sqrt"]
)
def test_fault_94_a_warm_up_longer_than_the_run_names_the_rate_that_is_reached(
    forty: Dataset, schedule: str
) -> None:
    (line,) = warned(forty, lr_scheduler=schedule, warmup_steps=1900, learning_rate=1e-3)
    assert line == (
        "the learning rate reaches 1e-05 instead of 0.001: the warm-up takes 1,900 steps, and the run has 20 steps; "
        "lower warmup_steps or warmup_ratio"
    )


def test_fault_94_a_warm_up_of_the_whole_run(forty: Dataset) -> None:
    (line,) = warned(forty, warmup_ratio=1.0, learning_rate=1e-3)
    assert line.startswith("the learning rate reaches 0.00095 instead of 0.001: the warm-up takes 20 steps")


def test_fault_94_a_learning_rate_of_0_in_every_step(forty: Dataset) -> None:
    assert warned(forty, max_steps=1, warmup_ratio=0.03) == [
        "the learning rate is 0 in every step, so nothing is trained: the warm-up takes 1 step, and the run has "
        "1 step; lower warmup_steps or warmup_ratio"
    ]
    assert (
        warned(forty, lr_scheduler="inverse_sqrt", lr_scheduler_kwargs={"timescale": 100}, max_steps=1) == []
    )


def test_fault_94_a_schedule_that_is_low_from_the_start(forty: Dataset) -> None:
    step = {
        "lr_scheduler": "warmup_stable_decay",
        "lr_scheduler_kwargs": {"num_decay_steps": 1, "num_stable_steps": 0},
        "warmup_steps": 1,
        "max_steps": 2,
    }
    lines = warned(forty, **step, learning_rate=1e-3)
    assert lines == []  # the second step has all of it
    low = {**step, "lr_scheduler": "polynomial", "lr_scheduler_kwargs": {"power": 400.0}, "max_steps": 20}
    (line,) = warned(forty, **{**low, "warmup_steps": 0, "warmup_ratio": 1.0}, learning_rate=1e-3)
    assert "instead of 0.001" in line


@pytest.mark.parametrize("total", [1, 2, 20, 5000])
@pytest.mark.parametrize("warmup", [0, 1, 7, 6000])
def test_the_highest_rate_is_that_of_the_steps(total: int, warmup: int) -> None:
    step = StepSettings(learning_rate=1.0, warmup_steps=warmup)
    rates = [
        number / max(1, warmup) if number < warmup else (total - number) / max(1, total - warmup)
        for number in range(total)
    ]
    assert highest_rate(step, total) == pytest.approx(max(rates))


def test_fault_94_fewer_rows_than_a_batch(forty: Dataset) -> None:
    assert warned(forty, batch_size=41) == [
        "a step takes 41 examples, and an epoch has 40: every step is a whole epoch; lower batch_size"
    ]


def test_fault_94_fewer_than_twenty_rows(tmp_path: Path) -> None:
    for count in (2, 19, 20):
        dataset = dataset_of(str(write_jsonl(tmp_path / f"{count}.jsonl", articles(count))))
        expected = f"only {count} examples to train on: from fewer than 20 a model learns them by heart"
        assert warned(dataset, batch_size=2) == ([expected] if count < 20 else [])


def test_fault_94_fewer_rows_of_a_data_set_than_a_step_takes(tmp_path: Path) -> None:
    many = str(write_jsonl(tmp_path / "many.jsonl", articles(30, seed=1)))
    few = str(write_jsonl(tmp_path / "few.jsonl", articles(3, seed=2)))
    dataset = dataset_of([{"path": many, "weight": 1}, {"path": few, "weight": 1}])
    assert warned(dataset, batch_size=6) == []
    assert warned(dataset, batch_size=8) == [
        "few.jsonl: a step takes 4 examples of it, and there are 3: each comes several times in one step; "
        "lower batch_size or its weight"
    ]


def test_fault_94_one_answer_for_all_rows(tmp_path: Path) -> None:
    rows = [{**row, "title": "storm"} for row in articles(30)]
    dataset = dataset_of(str(write_jsonl(tmp_path / "same.jsonl", rows)))
    assert warned(dataset) == [
        "all 30 answers are the same, so the model learns to give this one to anything"
    ]
    rows[17]["title"] = "other"
    assert warned(dataset_of(str(write_jsonl(tmp_path / "not.jsonl", rows)))) == []
