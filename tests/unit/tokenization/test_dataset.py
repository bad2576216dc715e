"""From settings to examples: the chosen template, the validation rows, and the printed summary and warnings."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unicodedata import normalize

import numpy as np
import pytest

from tests.runs import TEMPLATE, articles, characters, write_jsonl
from tests.tokenizers import CHATML, byte_level
from yeonma.config.settings import DataSettings, TokenSettings
from yeonma.errors import UserError
from yeonma.tokenization.dataset import (
    Dataset,
    data_warnings,
    describe,
    format_rows,
    overlap_of,
    prepare_dataset,
)


def prepare(
    data: Path,
    lines: list[str] | None = None,
    *,
    seed: int = 42,
    tokens: Any = None,
    tokenizer: Any = None,
    **settings: Any,
) -> Dataset:
    data_settings = DataSettings(data_path=str(data), **{"template": TEMPLATE, **settings})
    print_line = (lines if lines is not None else []).append
    dataset = prepare_dataset(
        data_settings, tokens or TokenSettings(), tokenizer or characters(), seed, print_line, lambda _: None
    )
    describe(dataset, print_line)
    return dataset


def test_columns_with_numbers_are_named_once_also_if_the_tokens_are_cached(tmp_path: Path) -> None:
    rows = [{"document": "a b", "score": 1.5, "title": "x", "unused": 3}] * 3
    rows += [
        {"document": 7, "score": None, "title": True, "unused": 3},
        {"document": 8, "score": 2, "title": 0},
    ]
    data = write_jsonl(tmp_path / "rows.jsonl", rows)
    more = write_jsonl(tmp_path / "more.jsonl", rows[3:])
    template = "{document} {score}\n{title}\n---\n{document}\n{title}"
    for _ in range(2):
        lines: list[str] = []
        tokens = TokenSettings(cache_dir=str(tmp_path / "cache"))
        dataset = prepare(data, lines, tokens=tokens, template=template, val_data_path=str(more))
        told = [line for line in lines if "written as text" in line]
        assert told == [
            "column document holds numbers, written as text",
            "column score holds numbers, written as text",
            "column title holds booleans, written as text",
            "column title holds numbers, written as text",
        ]
        decoded = characters().decode(dataset.train.store[3].token_ids)
        assert decoded == "7\ntrue</s>"


def test_rows_of_texts_tell_nothing_about_numbers(data: Path) -> None:
    lines: list[str] = []
    prepare(data, lines)
    assert not [line for line in lines if "written as text" in line]


def test_a_path_of_the_columns_setting_is_read_in_training_and_validation_rows(tmp_path: Path) -> None:
    nested = [{"document": row["document"], "made": {"title": [row["title"]]}} for row in articles(20)]
    data = write_jsonl(tmp_path / "nested.jsonl", nested)
    flat = prepare(write_jsonl(tmp_path / "flat.jsonl", articles(20)), val_set_size=4)
    columns = {"answer": "made.title"}
    drawn = prepare(data, columns=columns, val_set_size=4)
    given = prepare(data, columns=columns, val_data_path=str(data))
    assert given.sets[0].validation is not None
    assert rows_of(drawn.train) == rows_of(flat.train)
    for dataset in (drawn, given):
        for _, part in dataset.sets[0].sources:
            assert part.store.token_ids.tolist() == flat.train.store.token_ids.tolist()
            (first,) = part.first_rows(1)
            assert first.values["made.title"] == articles(20)[first.number - 1]["title"]


def rows_of(part: Any) -> list[int]:
    return part.store.row_numbers[part.positions].tolist()


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "rows.jsonl", articles(20))


def test_without_validation_every_row_is_trained(data: Path) -> None:
    dataset = prepare(data)
    assert rows_of(dataset.train) == list(range(1, 21))
    assert dataset.sets[0].validation is None


@pytest.mark.parametrize(("size", "count"), [(3, 3), (0.25, 5), (1, 1), (0.001, 1)])
def test_held_out_rows_are_not_trained(data: Path, size: float, count: int) -> None:
    dataset = prepare(data, val_set_size=size)
    assert dataset.sets[0].validation is not None
    held_out = rows_of(dataset.sets[0].validation)
    assert len(held_out) == count
    assert sorted(held_out + rows_of(dataset.train)) == list(range(1, 21))


def test_seed_determines_the_validation_rows(data: Path) -> None:
    validation_rows = [
        rows_of(prepare(data, val_set_size=5, seed=seed).sets[0].validation) for seed in (1, 1, 2)
    ]
    assert validation_rows[0] == validation_rows[1] != validation_rows[2]


def test_max_rows_limits_the_training_rows_and_those_drawn_from_them(tmp_path: Path, data: Path) -> None:
    dataset = prepare(data, max_rows=12, val_set_size=3)
    assert dataset.sets[0].validation is not None
    assert sorted(rows_of(dataset.sets[0].validation) + rows_of(dataset.train)) == list(range(1, 13))
    assert dataset.train.store.key != prepare(data).train.store.key
    assert prepare(data, max_rows=12).train.store.key == dataset.train.store.key
    separate = prepare(data, max_rows=2, val_data_path=str(write_jsonl(tmp_path / "more.jsonl", articles(4))))
    assert separate.sets[0].validation is not None
    assert (len(separate.train.positions), len(separate.sets[0].validation.positions)) == (2, 4)


def test_a_slice_applies_to_the_training_rows_alone(tmp_path: Path, data: Path) -> None:
    more = write_jsonl(tmp_path / "more.jsonl", articles(4, seed=9))
    dataset = prepare(data, data_split="train[15:]", val_data_path=str(more))
    assert dataset.sets[0].validation is not None
    assert (rows_of(dataset.train), rows_of(dataset.sets[0].validation)) == ([1, 2, 3, 4, 5], [1, 2, 3, 4])
    assert next(iter(dataset.train.rows)).place == f"{data}:16"


def test_how_the_data_is_read_is_told_first(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    for split, count in (("train", 3), ("test", 2)):
        rows = [f"{row['document']};{row['title']}\n" for row in articles(count)]
        (folder / f"{split}.csv").write_text("document;title\n" + "".join(rows))
    lines: list[str] = []
    dataset = prepare(folder, lines, val_data_path=str(folder / "test.csv"))
    assert rows_of(dataset.train) == [1, 2, 3]
    assert lines[:3] == [
        f'{folder}: the split "train" is read (1 file); not test',
        f"{folder}/train.csv: columns are separated by ;",
        f"{folder}/test.csv: columns are separated by ;",
    ]


def test_rows_over_the_limit_are_not_drawn_for_validation(tmp_path: Path) -> None:
    rows = articles(20)
    for number in range(0, 20, 2):
        rows[number]["title"] = "a title far longer than the limit lets an answer be" * 4
    data = write_jsonl(tmp_path / "rows.jsonl", rows)
    lines: list[str] = []
    dataset = prepare(data, lines, val_set_size=4, tokens=TokenSettings(cutoff_len=150))
    assert dataset.sets[0].validation is not None
    assert len(rows_of(dataset.sets[0].validation)) == 4
    assert sorted(rows_of(dataset.sets[0].validation) + rows_of(dataset.train)) == list(range(2, 21, 2))
    assert f"{data}: 10 left out: rows 1, 3, 5, 7, 9, 11, 13, 15, 17, 19" in lines


def test_val_data_path_supplies_the_validation_rows(tmp_path: Path, data: Path) -> None:
    validation_data = write_jsonl(tmp_path / "more.jsonl", articles(4, seed=9))
    lines: list[str] = []
    dataset = prepare(data, lines, val_data_path=str(validation_data))
    assert dataset.sets[0].validation is not None
    assert rows_of(dataset.sets[0].validation) == [1, 2, 3, 4]
    assert rows_of(dataset.train) == list(range(1, 21))
    assert [line.partition(": ")[0] for line in lines] == [str(data), str(validation_data)]


def test_val_set_size_with_val_data_path_is_refused(tmp_path: Path, data: Path) -> None:
    with pytest.raises(
        UserError, match="val_set_size and val_data_path are both given; give only one of them"
    ):
        prepare(data, val_set_size=2, val_data_path=str(data))


def test_holding_out_every_row_is_refused(data: Path) -> None:
    with pytest.raises(UserError, match="20 validation rows of 20 leave nothing to train"):
        prepare(data, val_set_size=20)


def test_matching_template_is_chosen_and_printed(data: Path) -> None:
    lines: list[str] = []
    dataset = prepare(data, lines, template=None)
    assert dataset.template.name == "title"
    assert "title" in lines[0]


def test_row_and_token_counts_are_printed(data: Path) -> None:
    lines: list[str] = []
    dataset = prepare(data, lines, tokens=TokenSettings(cutoff_len=90))
    tokens, trained = int(dataset.train.store.lengths.sum()), dataset.train.trained_tokens
    assert lines[0] == f"{data}: 20 rows, 20 examples, {tokens:,} tokens, {trained:,} of them trained"
    counts = dataset.train.store.counts
    assert counts.shortened > 0
    assert lines[1] == (
        f"{data}: {counts.shortened} examples shortened by {counts.cut_characters:,} characters to fit"
    )


def test_special_token_text_in_the_data_is_reported(tmp_path: Path) -> None:
    rows = articles(3)
    rows[1]["document"] += " </s>"
    lines: list[str] = []
    data = write_jsonl(tmp_path / "rows.jsonl", rows)
    prepare(data, lines)
    assert f"{data}: rows with special-token text, encoded as ordinary text: 1 (row 2)" in lines


def test_first_rows_returns_only_rows_of_its_part(data: Path) -> None:
    dataset = prepare(data, val_set_size=6)
    assert dataset.sets[0].validation is not None
    first = dataset.sets[0].validation.first_rows(3)
    assert [row.number for row in first] == sorted(rows_of(dataset.sets[0].validation))[:3]
    documents = [row["document"] for row in articles(20)]
    assert [row.values["document"] for row in first] == [documents[row.number - 1] for row in first]
    assert len(dataset.sets[0].validation.first_rows(100)) == 6


def test_train_and_validation_positions_cover_the_store(data: Path) -> None:
    dataset = prepare(data, val_set_size=6)
    positions = np.concatenate([dataset.train.positions, dataset.sets[0].validation.positions])  # type: ignore[union-attr]
    assert sorted(positions.tolist()) == list(range(20))


def late_system(folder: Path, filled: dict[int, str]) -> Path:
    """200 rows of instruction and output, of which some, by their numbers, have a system prompt."""
    rows = [
        {"instruction": f"do {n}", "output": f"done {n}", "system": filled.get(n, "" if n < 120 else None)}
        for n in range(1, 201)
    ]
    return write_jsonl(folder / "rows.jsonl", rows)


def test_a_prompt_column_that_only_late_rows_fill_is_refused_with_a_cure_that_works(tmp_path: Path) -> None:
    data = late_system(tmp_path, {150: "Be kind.", 190: "Be brief."})
    tokens = TokenSettings(cache_dir=str(tmp_path / "cache"))
    for _ in range(2):  # whether the tokens are cached or not
        lines: list[str] = []
        prepare(data, lines, tokens=tokens, template="alpaca")
        (told,) = (line for line in lines if line.startswith("column system"))
        assert told.endswith("rows that hold something in it: 2 (rows 150, 190)")
        with pytest.raises(UserError) as caught:
            prepare(data, tokens=tokens, template=None)
        assert ", and is filled in rows 150, 190; give --template alpaca-turns" in str(caught.value)
    lines = []
    data_settings = DataSettings(data_path=str(data), template="alpaca-turns")
    prepare_dataset(data_settings, tokens, byte_level(), 42, lines.append, lambda _: None)
    assert not any("is not used" in line for line in lines)


def test_a_prompt_column_that_no_row_fills_is_only_named(tmp_path: Path) -> None:
    lines: list[str] = []
    prepare(late_system(tmp_path, {}), lines, template=None)
    assert "columns not used: system" in lines and not any("is not used" in line for line in lines)


def test_a_prompt_column_that_no_first_row_has_is_found(tmp_path: Path) -> None:
    rows = [{"document": "a", "title": f"b{n}"} for n in range(1100)]
    data = write_jsonl(tmp_path / "rows.jsonl", [*rows, {**rows[0], "context": "c"}])
    with pytest.raises(UserError, match=r"column context, .* filled in row 1101; write a template"):
        prepare(data, template=None)


# Warnings


def prepare_with_lines(
    folder: Path, rows: list[dict[str, str]], **settings: Any
) -> tuple[Dataset, list[str]]:
    lines: list[str] = []
    data = write_jsonl(folder / "rows.jsonl", rows)
    return prepare(data, lines, template="{document}\nTitle:\n{title}", **settings), lines


def test_ordinary_data_gives_no_warnings(tmp_path: Path) -> None:
    dataset, lines = prepare_with_lines(tmp_path, articles(20), val_set_size=4)
    assert data_warnings(*dataset.train.examples) == []
    assert len(lines) == 1


def test_every_kind_of_warning_lists_its_rows(tmp_path: Path) -> None:
    rows = articles(12)
    rows[1]["document"] = normalize("NFD", "서울의 아침")
    rows[3]["title"] = "a\u200btitle"
    rows[4]["title"] = "\u2060a title"
    rows[2]["title"] = "NaN"
    rows[5]["document"] += "</s>\r\n"
    rows[6]["document"] += "\u00a0"
    rows[7] = {key: f" {text.upper()}" for key, text in rows[0].items()}
    rows[9] = {**rows[2], "title": "another answer"}
    rows[10] = dict(rows[2])
    dataset, lines = prepare_with_lines(tmp_path, rows)
    warnings = {warning.kind: warning.rows for warning in data_warnings(*dataset.train.examples)}
    assert warnings == {
        "nothing": (3, 11),
        "decomposed": (2,),
        "zero_width": (4, 5),
        "carriage_return": (6,),
        "no_break_edge": (7,),
        "not_given_back": (2, 3, 4, 5, 6, 7, 8, 11),  # this vocabulary lacks some of their characters
        "special_text": (6,),
        "repeated": (8, 11),
        "asked_again": (10,),
    }
    assert any(line.endswith("rows that repeat an earlier row: 2 (rows 8, 11)") for line in lines)
    assert any(line.endswith("rows with decomposed Hangul (NFD): 1 (row 2)") for line in lines)


def test_answers_whose_blanks_the_chat_template_removes_are_reported(tmp_path: Path) -> None:
    answers = ["plain", "    x = 1\n", "in  side", "end "]
    rows = [
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": a}]} for a in answers
    ]
    data = write_jsonl(tmp_path / "rows.jsonl", rows)
    trimming = CHATML.replace("message['content'] +", "message['content'] | trim +")
    for chat_template, reported in ((trimming, (2, 4)), (CHATML, ())):
        dataset = prepare(data, tokenizer=byte_level(chat_template), template="chat")
        warnings = {warning.kind: warning.rows for warning in data_warnings(*dataset.train.examples)}
        assert warnings.get("trimmed", ()) == reported


@pytest.mark.parametrize(
    ("titles", "warned"),
    [
        (["1", "2.0", "nan", "0.0"], (2, 4)),
        (["1.0", "0.0", "2.0", "5.0"], (1, 2, 3, 4)),
        (["1.0", "0.5", "2.0", "3.0"], ()),
        (["1.0", "0.0", "2.0", "unknown"], ()),
        (["1", "2", "3", "nan"], ()),
    ],
)
def test_whole_numbers_with_a_fraction_are_reported_if_no_answer_is_one(
    tmp_path: Path, titles: list[str], warned: tuple[int, ...]
) -> None:
    rows = [{**row, "title": title} for row, title in zip(articles(4), titles, strict=True)]
    dataset, _ = prepare_with_lines(tmp_path, rows)
    warnings = {warning.kind: warning.rows for warning in data_warnings(*dataset.train.examples)}
    assert warnings.get("whole_fraction", ()) == warned
    assert warnings.get("nothing", ()) == tuple(n for n, title in enumerate(titles, 1) if title == "nan")


def test_numbers_of_json_are_seen_like_their_texts(tmp_path: Path) -> None:
    rows = [{"document": f"{n}. a", "title": title} for n, title in enumerate((1, 2.0, 3, 4.0))]
    data = write_jsonl(tmp_path / "rows.jsonl", rows)
    dataset = prepare(data, template="{document}\n{title}")
    (warning,) = data_warnings(*dataset.train.examples)
    assert (warning.kind, warning.rows) == ("whole_fraction", (2, 4))


def test_warnings_cover_only_rows_at_the_given_positions(tmp_path: Path) -> None:
    rows = articles(6)
    rows[4] = dict(rows[1])
    dataset, _ = prepare_with_lines(tmp_path, rows)
    store = dataset.train.store
    assert [warning.rows for warning in data_warnings(store, np.arange(6))] == [(5,)]
    assert data_warnings(store, np.array([0, 2, 3, 4, 5])) == []


def test_validation_rows_that_are_also_trained_are_reported(tmp_path: Path) -> None:
    rows = articles(8)
    held_out = write_jsonl(tmp_path / "held_out.jsonl", [*articles(3, seed=5), rows[6], rows[2]])
    dataset, lines = prepare_with_lines(tmp_path, rows, val_data_path=str(held_out))
    assert dataset.sets[0].validation is not None
    overlap = overlap_of(dataset.train.examples, dataset.sets[0].validation.examples)
    assert overlap is not None
    assert overlap.rows == (4, 5)
    assert f"{held_out}: validation rows that are also training rows: 2 (rows 4, 5)" in lines
    assert overlap_of(dataset.train.examples, (dataset.sets[0].validation.store, np.arange(3))) is None


def test_drawn_validation_rows_with_trained_duplicates_are_reported(tmp_path: Path) -> None:
    rows = articles(10)
    dataset, lines = prepare_with_lines(tmp_path, rows + rows, val_set_size=5)
    assert dataset.sets[0].validation is not None
    held_out = dataset.sets[0].validation.store.row_numbers[dataset.sets[0].validation.positions].tolist()
    trained_twins = [row for row in held_out if (row + 10 if row <= 10 else row - 10) not in held_out]
    assert trained_twins
    assert any(
        f"validation rows that are also training rows: {len(trained_twins)} (" in line for line in lines
    )


def test_long_row_list_ends_with_the_number_of_further_rows() -> None:
    assert format_rows([4]) == "row 4"
    assert format_rows(list(range(1, 13))) == "rows 1, 2, 3, 4, 5, 6, 7, 8, 9, 10 and 2 more"
    assert format_rows([1, 2], count=1202) == "rows 1, 2 and 1,200 more"
