"""Faults that only cause a warning with their count and first rows, numbered as in the list of faults."""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from tests.faults.conftest import Accepted, Write
from tests.runs import arguments, command, write_jsonl

TEMPLATE = "{document}\n{title}"


def rows(count: int, **changed: Mapping[str, str]) -> list[dict[str, str]]:
    """Rows without duplicates. `r3={...}` changes the third."""
    plain = [{"document": f"{number}. article", "title": f"title {number}"} for number in range(1, count + 1)]
    return [{**row, **changed.get(f"r{number}", {})} for number, row in enumerate(plain, start=1)]


def lines_with(out: str, phrase: str) -> list[str]:
    """The lines with the phrase after the data's path, which itself contains the test's name."""
    return [
        line for line in out.splitlines() if ".jsonl: " in line and phrase in line.rpartition(".jsonl: ")[2]
    ]


def assert_one_line(out: str, phrase: str, count: int, numbers: Sequence[int]) -> None:
    """Checks that exactly one line has the phrase, with the number of rows and the first row numbers."""
    (line,) = lines_with(out, phrase)
    listed = f"{'row' if count == 1 else 'rows'} {', '.join(map(str, numbers))}"
    assert listed in line
    assert re.search(rf"\b{count}\b", line.replace(listed, "").rpartition(".jsonl: ")[2]), line


PHRASES = (
    "over 10 MB",
    "decomposed",
    "zero-width",
    "carriage returns",
    "no-break space",
    "word for nothing",
    "whole number with .0",
    "special-token text",
    "repeat an earlier row",
    "validation rows that are also training rows",
)


def test_faultless_rows_cause_no_warning(tmp_path: Path, accepted: Accepted) -> None:
    data = write_jsonl(tmp_path / "a.jsonl", rows(20))
    out = accepted(data, template=TEMPLATE, val_set_size=5).done.out
    assert [phrase for phrase in PHRASES if lines_with(out, phrase)] == []


@pytest.mark.slow
def test_fault_19_a_row_of_ten_megabytes(tmp_path: Path, accepted: Accepted) -> None:
    long = "a storm closed the harbour. " * (11_000_000 // 28)
    data = write_jsonl(tmp_path / "a.jsonl", rows(4, r3={"document": long}))
    taken = accepted(data, template=TEMPLATE, cutoff_len=60)
    assert_one_line(taken.done.out, "over 10 MB", 1, [3])
    assert [len(prompt) < 400 for prompt, _ in taken.texts] == [True] * 4  # shortened to cutoff_len
    assert taken.texts[2][0].startswith("a storm closed")
    assert taken.texts[2][1] == "title 3<|endoftext|>"


def test_fault_25_decomposed_hangul(tmp_path: Path, accepted: Accepted) -> None:
    korean = {"document": "서울의 아침", "title": "첫 영하"}
    decomposed = {key: unicodedata.normalize("NFD", text) for key, text in korean.items()}
    data = write_jsonl(
        tmp_path / "a.jsonl", rows(20, r2=korean, r3=decomposed, r17={"title": decomposed["title"]})
    )
    taken = accepted(data, template=TEMPLATE)
    assert_one_line(taken.done.out, "decomposed", 2, [3, 17])
    assert len(taken.texts) == 20


@pytest.mark.parametrize("hidden", ["\u200b", "\u200c", "\ufeff", "\u2060"])
def test_fault_25_zero_width_characters(write: Write, accepted: Accepted, hidden: str) -> None:
    table = rows(20, r3={"document": f"an{hidden} article"}, r17={"title": f"title{hidden}"})
    for ascii_only in (True, False):
        text = "".join(json.dumps(row, ensure_ascii=ascii_only) + "\n" for row in table)
        taken = accepted(write("a.jsonl", text), template=TEMPLATE)
        assert_one_line(taken.done.out, "zero-width", 2, [3, 17])
        assert len(taken.texts) == 20


def test_fault_83_line_ends_of_windows_and_no_break_spaces(write: Write, accepted: Accepted) -> None:
    table = rows(20, r3={"document": "a\r\nb"}, r9={"title": "a\u00a0"}, r17={"title": "c\rd"})
    lines = [json.dumps(row) for row in table]
    for name, text in (
        ("a.jsonl", "".join(f"{line}\n" for line in lines)),
        ("b.jsonl", "".join(f"{line}\r\n" for line in lines)),  # of the file, not of a text
    ):
        taken = accepted(write(name, text), template=TEMPLATE)
        assert_one_line(taken.done.out, "carriage returns", 2, [3, 17])
        assert_one_line(taken.done.out, "no-break space", 1, [9])
        assert taken.texts[2][0] == "a\r\nb\n"


def test_fault_118_words_for_nothing_and_gaps_of_pandas(write: Write, accepted: Accepted) -> None:
    cells = [f"article {n},{title}" for n, title in enumerate(("1", "2.0", "nan", "4.0", "N/A", "6"))]
    path = write("a.csv", "document,title\n" + "\n".join(cells) + "\n")
    out = accepted(path, template=TEMPLATE).done.out
    assert "a.csv: rows whose answer is a word for nothing, such as NaN, None or null: 2 (rows 3, 5)" in out
    assert (
        "a.csv: rows whose answer is a whole number with .0, where no answer is a fraction: 2 (rows 2, 4)"
        in out
    )


def test_fault_26_special_token_text_in_the_data(tmp_path: Path, accepted: Accepted) -> None:
    table = rows(20, r3={"document": "a <|im_end|> b"}, r17={"title": "c <|endoftext|> d"})
    data = write_jsonl(tmp_path / "a.jsonl", table)
    taken = accepted(data, template=TEMPLATE)
    assert_one_line(taken.done.out, "special-token text", 2, [3, 17])
    store, tokenizer = taken.prepared.dataset.train.store, taken.prepared.tokenizer
    assert taken.texts[2][0] == "a <|im_end|> b\n"
    ids = store[2].token_ids.tolist()
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") not in ids  # as ordinary text
    assert store[16].token_ids.tolist().count(tokenizer.eos_token_id) == 1  # the answer's own end


def test_fault_27_duplicate_rows(tmp_path: Path, accepted: Accepted) -> None:
    duplicate = {"document": "same", "title": "same title"}
    data = write_jsonl(tmp_path / "a.jsonl", rows(20, r1=duplicate, r3=duplicate, r17=duplicate))
    taken = accepted(data, template=TEMPLATE)
    (line,) = lines_with(taken.done.out, "repeat an earlier row")
    assert "rows 1, 3, 17" in line or "rows 3, 17" in line
    assert len(taken.texts) == 20


def test_fault_27_validation_rows_that_are_also_training_rows(tmp_path: Path, accepted: Accepted) -> None:
    training = write_jsonl(tmp_path / "a.jsonl", rows(20))
    shared = [rows(20)[number - 1] for number in (3, 17)]
    validation = write_jsonl(tmp_path / "b.jsonl", [{"document": "new", "title": "new"}, *shared])
    taken = accepted(training, val_data_path=validation, template=TEMPLATE)
    (line,) = lines_with(taken.done.out, "validation rows that are also training rows")
    assert "2" in line and ("rows 3, 17" in line or "rows 2, 3" in line)
    other = write_jsonl(tmp_path / "c.jsonl", [{"document": "new", "title": "new"}])
    quiet = accepted(training, val_data_path=other, template=TEMPLATE).done.out
    assert lines_with(quiet, "validation rows that are also training rows") == []


def test_fault_27_duplicates_split_into_training_and_validation(tmp_path: Path, accepted: Accepted) -> None:
    # an odd number of rows is drawn for validation, so at least one pair is split
    duplicates = [row for row in rows(10) for _ in range(2)]
    data = write_jsonl(tmp_path / "a.jsonl", duplicates)
    taken = accepted(data, template=TEMPLATE, val_set_size=5)
    assert len(lines_with(taken.done.out, "validation rows that are also training rows")) == 1


def test_fault_94_warnings_about_the_run_stand_in_inspect_and_at_its_start(
    tmp_path: Path, accepted: Accepted, chat_base: Path
) -> None:
    data = write_jsonl(tmp_path / "a.jsonl", rows(5))
    step = {"template": TEMPLATE, "max_steps": 1, "warmup_steps": 500, "batch_size": 8}
    out = accepted(data, **step).done.out
    words = arguments({"base_model": chat_base, "data_path": data, **step})
    inspected = command(tmp_path, "inspect", *words).out
    for warning in (
        "the learning rate is 0 in every step, so nothing is trained: the warm-up takes 500 steps",
        "a step takes 8 examples, and an epoch has 5",
        "only 5 examples to train on",
    ):
        assert f"warning: {warning}" in out
        assert f"! {warning}" in inspected
