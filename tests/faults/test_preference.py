"""Faults of preference data, by their numbers in the list of faults."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.conftest import WAY_OUT
from tests.pairs import chat_folder, dpo, pairs, tuned
from tests.runs import write_jsonl

GOOD = pairs(4)
QUESTION = {"role": "user", "content": "title?"}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return chat_folder(tmp_path_factory.mktemp("models") / "llama")


def row_messages(done_out: str, data: Path) -> list[str]:
    """The run's messages about its data file, without the path."""
    start = f"{data}: "
    return [line.removeprefix(start) for line in done_out.splitlines() if line.startswith(start)]


def answer(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def turns(chosen: str, rejected: str) -> dict[str, object]:
    return {"messages": [QUESTION], "chosen": answer(chosen), "rejected": [answer(rejected)]}


@pytest.mark.parametrize("form", ["text", "turns", "dialogues"])
def test_fault_66_pairs_with_equal_answers_are_left_out(tmp_path: Path, base: Path, form: str) -> None:
    rows: list[dict[str, object]] = [dict(row) for row in GOOD]
    equal: dict[str, object] = {"prompt": "x\n", "chosen": "same", "rejected": "same"}
    if form == "turns":
        rows, equal = [turns(row["chosen"], row["rejected"]) for row in GOOD], turns("same", "same")
    if form == "dialogues":
        rows = [{side: [QUESTION, answer(row[side])] for side in ("chosen", "rejected")} for row in GOOD]
        equal = {side: [QUESTION, answer("same")] for side in ("chosen", "rejected")}
    data = write_jsonl(tmp_path / "rows.jsonl", [rows[0], equal, *rows[1:], equal])
    done = tuned(tmp_path / "out", base, data, batch_size=9)
    assert [line["examples"] for line in done.steps] == [4]
    messages = row_messages(done.out, data)
    assert messages[0].startswith("6 rows, 4 pairs, ")
    assert messages[1] == "chosen equals rejected: 2 left out (rows 2, 6)"


def test_fault_66_data_with_only_equal_pairs_is_an_error(tmp_path: Path, base: Path) -> None:
    data = write_jsonl(tmp_path / "rows.jsonl", [{"prompt": "x", "chosen": "a", "rejected": "a"}])
    done = dpo(tmp_path / "out", base, data)
    assert done.status == 2
    assert done.err.startswith(f"yeonma: {data}: no row is left of 1: ")
    assert not done.folder.exists()


def test_fault_66_over_limit_error_still_leaves_equal_pairs_out(tmp_path: Path, base: Path) -> None:
    data = write_jsonl(tmp_path / "rows.jsonl", [*GOOD, {"prompt": "x", "chosen": "a", "rejected": "a"}])
    done = tuned(tmp_path / "out", base, data, over_limit="error", max_steps=1)
    assert "chosen equals rejected: 1 left out (row 5)" in row_messages(done.out, data)


@pytest.mark.parametrize(
    ("values", "state"),
    [
        ({}, "missing"),
        ({"rejected": None}, "null"),
        ({"rejected": " \n"}, "empty"),
        ({"rejected": []}, "empty"),
    ],
)
@pytest.mark.parametrize("prompt", ["prompt", "messages"])
def test_fault_67_missing_or_empty_answer_is_refused(
    tmp_path: Path, base: Path, prompt: str, values: dict[str, object], state: str
) -> None:
    prompt_columns = {"prompt": "x\n"} if prompt == "prompt" else {"messages": [QUESTION]}
    good = {**prompt_columns, "chosen": "a", "rejected": "b"}
    data = write_jsonl(tmp_path / "rows.jsonl", [good, {**prompt_columns, "chosen": "a", **values}, good])
    done = dpo(tmp_path / "out", base, data)
    cure = "a pair needs both answers (chosen and rejected); fill it or remove the row"
    problem = f'yeonma: {data}:2: field "rejected" is {state}; {cure}\n'
    assert (done.status, done.err) == (2, f"{problem}yeonma: {WAY_OUT}\n")
    assert not done.folder.exists()


def test_fault_67_empty_answers_are_reported_by_their_column_names(tmp_path: Path, base: Path) -> None:
    good = {"prompt": "x\n", "better": "a", "worse": "b"}
    data = write_jsonl(tmp_path / "rows.jsonl", [good, {**good, "better": "", "worse": None}])
    done = dpo(tmp_path / "out", base, data, columns={"chosen": "better", "rejected": "worse"})
    cure = "a pair needs both answers (better and worse); fill it or remove the row"
    assert done.err.splitlines() == [
        f'yeonma: {data}:2: field "better" is empty; {cure}',
        f'yeonma: {data}:2: field "worse" is null; {cure}',
        f"yeonma: {WAY_OUT}",
    ]


@pytest.mark.parametrize("empty", [{"role": "assistant", "content": " "}, [answer("")], [QUESTION]])
def test_fault_67_empty_or_non_assistant_turn_is_refused(tmp_path: Path, base: Path, empty: object) -> None:
    row = {"messages": [QUESTION], "chosen": answer("a"), "rejected": empty}
    data = write_jsonl(tmp_path / "rows.jsonl", [turns("a", "b"), row])
    done = dpo(tmp_path / "out", base, data)
    assert done.status == 2
    assert done.err.startswith(f"yeonma: {data}:2: ")
    assert not done.folder.exists()


@pytest.mark.parametrize("form", ["text", "turns"])
def test_fault_68_answers_that_differ_only_in_white_space_are_reported(
    tmp_path: Path, base: Path, form: str
) -> None:
    rows = [
        {"prompt": "x\n", "chosen": "a b", "rejected": other}
        for other in ("a  b", "c", " a b", "ab", "a b c")
    ]
    if form == "turns":
        rows = [turns(row["chosen"], row["rejected"]) for row in rows]  # type: ignore[misc]
    data = write_jsonl(tmp_path / "rows.jsonl", rows)
    done = tuned(tmp_path / "out", base, data, batch_size=9)
    warning = "pairs whose chosen and rejected answers differ only in white space: "
    warnings = [line for line in row_messages(done.out, data) if line.startswith(warning)]
    if form == "text":
        assert warnings == [f"{warning}3 (rows 1, 3, 4)"]
        assert [line["examples"] for line in done.steps] == [5]  # they are trained on nevertheless
    else:
        assert warnings == [f"{warning}3 (rows 1, 3, 4)"]


def test_fault_69_pairs_with_equal_tokens_are_left_out(tmp_path: Path, base: Path) -> None:
    """Answers are never cut. Different texts become equal if the tokenizer knows none of the letters that differ."""
    rows = [*GOOD, {"prompt": "x\n", "chosen": "an Ä", "rejected": "an Ö"}]
    data = write_jsonl(tmp_path / "rows.jsonl", rows)
    done = tuned(tmp_path / "out", base, data, batch_size=9)
    assert [line["examples"] for line in done.steps] == [4]
    reason = "chosen and rejected are equal as tokens, after the prompt was fitted"
    assert f"{reason}: 1 left out (row 5)" in row_messages(done.out, data)


def test_fault_69_cutting_the_prompt_keeps_both_answers_whole(tmp_path: Path, base: Path) -> None:
    rows = [{"prompt": "x" * 50, "chosen": "a" * 20, "rejected": "a" * 29 + "b"}]
    data = write_jsonl(tmp_path / "rows.jsonl", rows)
    done = tuned(tmp_path / "out", base, data, cutoff_len=40)
    assert done.steps[0]["tokens"] == 9 + 21 + 31
    assert done.steps[0]["trained_tokens"] == 21 + 31


DIFFERENT: dict[str, dict[str, object]] = {
    "from the first turn": {
        "chosen": [QUESTION, answer("a")],
        "rejected": [{"role": "user", "content": "name?"}, answer("b")],
    },
    "from a later question": {
        "chosen": [QUESTION, answer("a"), QUESTION, answer("b")],
        "rejected": [QUESTION, answer("a"), {"role": "user", "content": "name?"}, answer("c")],
    },
    "in their number of questions": {
        "chosen": [QUESTION, answer("a"), QUESTION, answer("b")],
        "rejected": [{"role": "system", "content": "be brief"}, QUESTION, answer("c")],
    },
}


@pytest.mark.parametrize("where", DIFFERENT)
def test_fault_70_turn_lists_with_different_prompts_are_refused(
    tmp_path: Path, base: Path, where: str
) -> None:
    good = {side: [QUESTION, answer(side)] for side in ("chosen", "rejected")}
    data = write_jsonl(tmp_path / "rows.jsonl", [good, DIFFERENT[where]])
    done = dpo(tmp_path / "out", base, data)
    assert done.status == 2
    assert done.err.startswith(f"yeonma: {data}:2: chosen and rejected differ from turn ")
    assert "their prompts differ; give both answers the same turns before them" in done.err
    assert not done.folder.exists()
