"""Settings to examples: the template chosen, the validation rows drawn, the summary printed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.runs import TEMPLATE, articles, characters, write_jsonl
from yeonma.config.settings import DataSettings, TokenSettings
from yeonma.errors import UserError
from yeonma.tokenization.dataset import Dataset, describe, prepare_dataset


def prepared(
    data: Path, lines: list[str] | None = None, *, seed: int = 42, tokens: Any = None, **settings: Any
) -> Dataset:
    data_settings = DataSettings(data_path=str(data), **{"template": TEMPLATE, **settings})
    say = (lines if lines is not None else []).append
    dataset = prepare_dataset(
        data_settings, tokens or TokenSettings(), characters(), seed, say, lambda _: None
    )
    describe(dataset, say)
    return dataset


def rows_of(part: Any) -> list[int]:
    return part.store.row_numbers[part.positions].tolist()


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "rows.jsonl", articles(20))


def test_without_validation_every_row_is_trained(data: Path) -> None:
    dataset = prepared(data)
    assert rows_of(dataset.train) == list(range(1, 21))
    assert dataset.validation is None


@pytest.mark.parametrize(("size", "count"), [(3, 3), (0.25, 5), (1, 1), (0.001, 1)])
def test_rows_held_out_are_not_trained(data: Path, size: float, count: int) -> None:
    dataset = prepared(data, val_set_size=size)
    assert dataset.validation is not None
    held_out = rows_of(dataset.validation)
    assert len(held_out) == count
    assert sorted(held_out + rows_of(dataset.train)) == list(range(1, 21))


def test_the_draw_is_the_seeds(data: Path) -> None:
    draws = [rows_of(prepared(data, val_set_size=5, seed=seed).validation) for seed in (1, 1, 2)]
    assert draws[0] == draws[1] != draws[2]


def test_rows_that_are_left_out_are_not_drawn(tmp_path: Path) -> None:
    rows = articles(20)
    for number in range(0, 20, 2):
        rows[number]["title"] = "a title far longer than the limit lets an answer be" * 4
    data = write_jsonl(tmp_path / "rows.jsonl", rows)
    lines: list[str] = []
    dataset = prepared(data, lines, val_set_size=4, tokens=TokenSettings(cutoff_len=150))
    assert dataset.validation is not None
    assert len(rows_of(dataset.validation)) == 4
    assert sorted(rows_of(dataset.validation) + rows_of(dataset.train)) == list(range(2, 21, 2))
    assert f"{data}: 10 left out: rows 1, 3, 5, 7, 9, 11, 13, 15, 17, 19" in lines


def test_validation_rows_of_their_own(tmp_path: Path, data: Path) -> None:
    more = write_jsonl(tmp_path / "more.jsonl", articles(4, seed=9))
    lines: list[str] = []
    dataset = prepared(data, lines, val_data_path=str(more))
    assert dataset.validation is not None
    assert rows_of(dataset.validation) == [1, 2, 3, 4]
    assert rows_of(dataset.train) == list(range(1, 21))
    assert [line.partition(": ")[0] for line in lines] == [str(data), str(more)]


def test_both_kinds_of_validation_are_refused(tmp_path: Path, data: Path) -> None:
    with pytest.raises(
        UserError, match="val_set_size and val_data_path are both given; give only one of them"
    ):
        prepared(data, val_set_size=2, val_data_path=str(data))


def test_holding_out_every_row_is_refused(data: Path) -> None:
    with pytest.raises(UserError, match="20 validation rows of 20 leave nothing to train"):
        prepared(data, val_set_size=20)


def test_the_template_that_the_columns_satisfy_is_chosen_and_said(data: Path) -> None:
    lines: list[str] = []
    dataset = prepared(data, lines, template=None)
    assert dataset.template.name == "title"
    assert "title" in lines[0]


def test_counts_are_said(data: Path) -> None:
    lines: list[str] = []
    dataset = prepared(data, lines, tokens=TokenSettings(cutoff_len=90))
    tokens, trained = int(dataset.train.store.lengths.sum()), dataset.train.trained_tokens
    assert lines[0] == f"{data}: 20 rows, 20 examples, {tokens:,} tokens, {trained:,} of them trained"
    counts = dataset.train.store.counts
    assert counts.shortened > 0
    assert lines[1] == (
        f"{data}: {counts.shortened} examples shortened by {counts.cut_characters:,} characters to fit"
    )


def test_special_token_text_in_the_data_is_said(tmp_path: Path) -> None:
    rows = articles(3)
    rows[1]["document"] += " </s>"
    lines: list[str] = []
    data = write_jsonl(tmp_path / "rows.jsonl", rows)
    prepared(data, lines)
    assert f"{data}: rows with special-token text, encoded as ordinary text: 1 (row 2)" in lines


def test_the_first_rows_of_a_part_are_its_own(data: Path) -> None:
    dataset = prepared(data, val_set_size=6)
    assert dataset.validation is not None
    first = dataset.validation.first_rows(3)
    assert [row.number for row in first] == sorted(rows_of(dataset.validation))[:3]
    documents = [row["document"] for row in articles(20)]
    assert [row.values["document"] for row in first] == [documents[row.number - 1] for row in first]
    assert len(dataset.validation.first_rows(100)) == 6


def test_positions_are_into_the_store(data: Path) -> None:
    dataset = prepared(data, val_set_size=6)
    everything = np.concatenate([dataset.train.positions, dataset.validation.positions])  # type: ignore[union-attr]
    assert sorted(everything.tolist()) == list(range(20))
