"""Warnings about a data set: which rows, how many, the first of them; from the token store alone."""

from __future__ import annotations

from pathlib import Path
from unicodedata import normalize

import numpy as np

from tests.runs import articles, characters, write_jsonl
from yeonma.config.settings import DataSettings, TokenSettings
from yeonma.tokenization.data_warnings import data_warnings, listed, overlap_of
from yeonma.tokenization.dataset import Dataset, describe, prepare_dataset


def prepared(place: Path, rows: list[dict[str, str]], **settings: object) -> tuple[Dataset, list[str]]:
    lines: list[str] = []
    data = DataSettings(
        data_path=str(write_jsonl(place / "rows.jsonl", rows)),
        template="{document}\nTitle:\n{title}",
        **settings,  # type: ignore[arg-type]
    )
    tokens = TokenSettings(cache_dir=str(place / "cache"))
    dataset = prepare_dataset(data, tokens, characters(), 42, lines.append, lambda _: None)
    describe(dataset, lines.append)
    return dataset, lines


def test_an_ordinary_data_set_has_no_remarks(tmp_path: Path) -> None:
    dataset, lines = prepared(tmp_path, articles(20), val_set_size=4)
    assert data_warnings(*dataset.train.examples) == []
    assert len(lines) == 1


def test_every_kind_is_counted_with_its_rows(tmp_path: Path) -> None:
    rows = articles(12)
    rows[1]["document"] = normalize("NFD", "서울의 아침")
    rows[3]["title"] = "a\u200btitle"
    rows[4]["title"] = "\u2060a title"
    rows[5]["document"] += "</s>"
    rows[7] = {key: f" {text.upper()}" for key, text in rows[0].items()}
    rows[9] = {**rows[2], "title": "another answer"}
    rows[10] = dict(rows[2])
    dataset, lines = prepared(tmp_path, rows)
    warnings = {warning.kind: warning.rows for warning in data_warnings(*dataset.train.examples)}
    assert warnings == {
        "decomposed": (2,),
        "zero_width": (4, 5),
        "special_text": (6,),
        "repeated": (8, 11),
        "asked_again": (10,),
    }
    assert any(line.endswith("rows that repeat an earlier row: 2 (rows 8, 11)") for line in lines)
    assert any(line.endswith("rows with decomposed Hangul (NFD): 1 (row 2)") for line in lines)


def test_warnings_are_of_the_rows_at_the_positions_alone(tmp_path: Path) -> None:
    rows = articles(6)
    rows[4] = dict(rows[1])
    dataset, _ = prepared(tmp_path, rows)
    store = dataset.train.store
    assert [warning.rows for warning in data_warnings(store, np.arange(6))] == [(5,)]
    assert data_warnings(store, np.array([0, 2, 3, 4, 5])) == []


def test_validation_rows_that_are_also_trained_are_said(tmp_path: Path) -> None:
    rows = articles(8)
    held_out = write_jsonl(tmp_path / "held_out.jsonl", [*articles(3, seed=5), rows[6], rows[2]])
    dataset, lines = prepared(tmp_path, rows, val_data_path=str(held_out))
    assert dataset.validation is not None
    overlap = overlap_of(dataset.train.examples, dataset.validation.examples)
    assert overlap is not None
    assert overlap.rows == (4, 5)
    assert f"{held_out}: validation rows that are also training rows: 2 (rows 4, 5)" in lines
    assert overlap_of(dataset.train.examples, (dataset.validation.store, np.arange(3))) is None


def test_a_drawn_validation_row_may_have_a_twin_among_the_trained(tmp_path: Path) -> None:
    rows = articles(10)
    dataset, lines = prepared(tmp_path, rows + rows, val_set_size=5)
    assert dataset.validation is not None
    held_out = dataset.validation.store.row_numbers[dataset.validation.positions].tolist()
    alone = [row for row in held_out if (row + 10 if row <= 10 else row - 10) not in held_out]
    assert alone
    assert any(f"validation rows that are also training rows: {len(alone)} (" in line for line in lines)


def test_a_long_list_is_cut_short_and_says_so() -> None:
    assert listed([4]) == "row 4"
    assert listed(list(range(1, 13))) == "rows 1, 2, 3, 4, 5, 6, 7, 8, 9, 10 and 2 more"
    assert listed([1, 2], count=1202) == "rows 1, 2 and 1,200 more"
