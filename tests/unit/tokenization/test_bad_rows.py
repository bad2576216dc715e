"""`--bad_rows skip`: bad rows are left out with their reasons; the others are tokenised as if alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

import yeonma.tokenization.cache
from tests.chat_habits import HABITS
from tests.runs import characters, model_folder, sft, write_jsonl
from tests.tables import Write, arrow_bytes, jsonl
from tests.tokenizers import byte_level
from yeonma.config.settings import DataSettings, TokenSettings
from yeonma.data.rows import Rows, glance, naming_skip, open_rows
from yeonma.data.task import ANSWERS, LABELLED, PAIRS, Task
from yeonma.data.template import Template, load_template
from yeonma.errors import Problem, UserError
from yeonma.tokenization.bad_rows import fault_of
from yeonma.tokenization.cache import build_store, store_key
from yeonma.tokenization.dataset import describe, faults_of, prepare_dataset
from yeonma.tokenization.example import TokenRules
from yeonma.tokenization.store import TokenStore

TEMPLATE = Template.parse("{document}\n\nTitle:{title}")
ROWS: list[dict[str, Any]] = [
    {"document": "one", "title": "1"},
    {"document": "two", "title": ""},
    {"document": "three", "title": "3"},
    {"document": "four"},
    {"document": {"five": 5}, "title": "5"},
    {"document": "six", "title": "6"},
    {"document": "seven", "title": None},
    {"document": ["eight"], "title": "8"},
]
GOOD = [1, 3, 6]
STRICT_CHAT = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def build(
    rows: Rows,
    folder: Path,
    template: Template = TEMPLATE,
    *,
    task: Task = ANSWERS,
    tokenizer: Any = None,
    skip_bad: bool = True,
    columns: dict[str, str] | None = None,
    **rules: Any,
) -> TokenStore:
    tokenizer = tokenizer or byte_level()
    return build_store(
        rows,
        template,
        columns,
        tokenizer,
        TokenRules(**{"cutoff_len": 2048, **rules}),
        folder / "cache",
        None,
        task,
        skip_bad=skip_bad,
    )


def dirty(write: Write, rows: list[dict[str, Any]] = ROWS) -> Rows:
    return open_rows(write("dirty.jsonl", jsonl(rows)), skip_bad=True)


def same_tokens(first: TokenStore, second: TokenStore) -> bool:
    names = ("token_ids", "trained", "starts", "lengths", "prompt_lengths", "units", "roles", "variants")
    return all(np.array_equal(getattr(first, name), getattr(second, name)) for name in names)


def left_out(store: TokenStore) -> dict[int, str]:
    return {row.row: row.reason for row in store.left_out}


# Rows that do not fit the template


@pytest.mark.parametrize("rows_a_chunk", [1, 3, 2000])
def test_good_rows_are_tokenised_as_if_alone_and_keep_their_numbers(
    write: Write, tmp_path: Path, rows_a_chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(yeonma.tokenization.cache, "ROWS_A_CHUNK", rows_a_chunk)
    store = build(dirty(write), tmp_path)
    clean = open_rows(write("clean.jsonl", jsonl([ROWS[number - 1] for number in GOOD])))
    alone = build(clean, tmp_path, skip_bad=False)
    assert same_tokens(store, alone)
    assert store.row_numbers.tolist() == GOOD
    assert store.counts.rows == len(store.row_digests) == len(ROWS)
    assert store.row_digests[np.array(GOOD) - 1].tolist() == alone.row_digests.tolist()


def test_every_bad_row_is_listed_with_place_reason_and_fault(write: Write, tmp_path: Path) -> None:
    rows = dirty(write)
    store = build(rows, tmp_path)
    assert [
        (row.row, row.place.removeprefix(rows.name), row.reason, row.fault) for row in store.left_out
    ] == [
        (2, ":2", 'field "title" is empty', 'field "title" is empty'),
        (4, ":4", 'field "title" is missing', 'field "title" is missing'),
        (5, ":5", 'field "document" is an object, not text', 'field "document" is an object, not text'),
        (7, ":7", 'field "title" is null', 'field "title" is null'),
        (8, ":8", *['field "document" is a list, not text'] * 2),
    ]
    assert store.counts.left_out == 5


def test_without_skip_the_same_rows_are_errors(write: Write, tmp_path: Path) -> None:
    rows = open_rows(write("dirty.jsonl", jsonl(ROWS)))
    with pytest.raises(UserError) as caught:
        build(rows, tmp_path, skip_bad=False)
    assert [problem.place.removeprefix(rows.name) for problem in caught.value.problems] == [
        ":2",
        ":4",
        ":5",
        ":7",
        ":8",
    ]


def test_skipping_is_part_of_the_key(write: Write) -> None:
    arguments = (dirty(write), TEMPLATE, None, byte_level(), TokenRules(cutoff_len=64))
    assert store_key(*arguments, skip_bad=True) != store_key(*arguments)


def test_a_fault_of_the_settings_is_no_bad_row(write: Write, tmp_path: Path) -> None:
    with pytest.raises(UserError, match='--columns: the template has no field "body"'):
        build(dirty(write), tmp_path, columns={"body": "document"})


def test_only_bad_rows_are_an_error_that_says_why(write: Write, tmp_path: Path) -> None:
    rows = dirty(write, [{"document": "a", "title": ""}, {"document": "b"}, {"document": "c", "title": " "}])
    with pytest.raises(UserError) as caught:
        build(rows, tmp_path)
    message = str(caught.value)
    assert message.startswith(
        f'{rows.name}: no row is left of 3: each is bad: field "title" is empty (2); field'
    )
    assert message.endswith("; give a --template and --columns that fit the rows, or mend them")
    rows = dirty(write, [{"document": "a", "title": ""}, {"document": "b", "title": "0" * 99}])
    with pytest.raises(UserError, match="each is over cutoff_len 30 or is bad: field"):
        build(rows, tmp_path, cutoff_len=30)


def test_rows_over_the_limit_are_dropped_or_an_error_as_before(write: Write, tmp_path: Path) -> None:
    rows = dirty(write, [*ROWS, {"document": "nine", "title": "0" * 99}])
    store = build(rows, tmp_path, cutoff_len=60)
    assert store.row_numbers.tolist() == GOOD
    assert [row.row for row in store.left_out if not row.fault] == [9]
    with pytest.raises(UserError) as caught:
        build(rows, tmp_path, cutoff_len=60, over_limit="error")
    assert [problem.place for problem in caught.value.problems] == [f"{rows.name}:9"]


@pytest.mark.parametrize(
    ("problem", "fault"),
    [
        ("messages[2].content is empty", "messages[N].content is empty"),
        ('messages[12].role: unknown role "bot7"', 'messages[N].role: unknown role "bot7"'),
        ("3 cells; the header has 2", "N cells; the header has N"),
        (
            'field "q2" (column "3") is a number (-1.5), not text',
            'field "q2" (column "3") is a number (-N), not text',
        ),
        ("a NUL character (U+0000)", "a NUL character (U+0000)"),
        ("line\none", "lineU+000Aone"),
    ],
)
def test_rows_with_the_same_fault_are_counted_together(problem: str, fault: str) -> None:
    assert fault_of(Problem(problem)) == fault


# Chat templates


def chats(count: int, refused: set[int]) -> list[dict[str, Any]]:
    def turns(number: int) -> list[dict[str, str]]:
        question, answer = (
            {"role": "user", "content": f"q{number}"},
            {"role": "assistant", "content": f"a{number}"},
        )
        return [question, question, answer] if number in refused else [question, answer]

    return [{"messages": turns(number)} for number in range(1, count + 1)]


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json"])
def test_rows_that_the_chat_template_refuses_are_left_out(write: Write, tmp_path: Path, name: str) -> None:
    table, chat, tokenizer = chats(9, {2, 3, 9}), load_template("chat"), byte_level(STRICT_CHAT)
    # in the JSON list, all rows have one place: the only line
    rows = open_rows(write(name, jsonl(table) if name == "rows.jsonl" else json.dumps(table)), skip_bad=True)
    store = build(rows, tmp_path, chat, tokenizer=tokenizer)
    reason = "the model's chat template refuses this row: roles must alternate"
    assert left_out(store) == dict.fromkeys((2, 3, 9), reason)
    good = [row for number, row in enumerate(table, 1) if number not in (2, 3, 9)]
    alone = build(
        open_rows(write("good.jsonl", jsonl(good))), tmp_path, chat, tokenizer=tokenizer, skip_bad=False
    )
    assert same_tokens(store, alone)
    assert store.row_numbers.tolist() == [1, 4, 5, 6, 7, 8]


def test_faulty_turn_lists_are_left_out(write: Write, tmp_path: Path) -> None:
    question, answer = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
    bad: list[Any] = [
        [],
        "text",
        [question],
        [answer],
        [question, {"role": "assistant", "content": ""}],
        [question, {"role": "assistant"}],
        [{"role": "nobody", "content": "x"}, question, answer],
    ]
    rows = dirty(write, [{"messages": turns} for turns in [*bad, [question, answer]]])
    store = build(rows, tmp_path, load_template("chat"), tokenizer=byte_level())
    assert store.row_numbers.tolist() == [8]
    assert sorted(left_out(store)) == [1, 2, 3, 4, 5, 6, 7]


# Preference data


def test_bad_pairs_are_left_out_beside_equal_ones(write: Write, tmp_path: Path) -> None:
    pairs = [
        {"document": "a", "chosen": "x", "rejected": "y"},
        {"document": "b", "chosen": "x"},
        {"document": "c", "chosen": "x", "rejected": "x"},
        {"document": "", "chosen": "x", "rejected": "y"},
        {"document": "d", "chosen": "x", "rejected": "z"},
    ]
    store = build(dirty(write, pairs), tmp_path, task=PAIRS)
    assert store.rows_of(np.arange(store.counts.units)) == [1, 5]
    assert {row.row: bool(row.fault) for row in store.left_out} == {2: True, 3: False, 4: True}


def test_labelled_answers_are_those_of_good_rows(write: Write, tmp_path: Path) -> None:
    table = [{"document": f"d{number}", "title": f"t{number}", "label": True} for number in range(6)]
    good = [row for number, row in enumerate(table) if number not in (1, 4)]
    table[1]["label"], table[4]["title"] = 3, ""
    store = build(dirty(write, table), tmp_path, task=LABELLED)
    alone = build(open_rows(write("good.jsonl", jsonl(good))), tmp_path, task=LABELLED, skip_bad=False)
    assert same_tokens(store, alone)


# Files


FAULTY_FILES = {
    "a.jsonl": (
        b'{"document": "a", "title": "b"}\n{"document": "a",, "title": "b"}\n\n3\n{"document": "c", "title": "d\0"}\n'
        b'\xef\xbb\xbf{"document": "a", "title": "b"}\n{"document": "a", "title": NaN}\n'
        b'{"document": "e", "title": "f"}\n'
        b'{"document": "g", "tit'
    ),
    "a.csv": b'document,title\na,b\nc\n"c\nd",e,f\n,,\n"e",f\n',
    "a.json": b'[{"document": "a", "title": "b"}, 3,\n null, {"document": "e", "title": "f"}]',
    "b.json": b'{"data": [3, {"document": "a", "title": "b"}, [], {"document": "e", "title": "f"}]}',
}


@pytest.mark.parametrize("name", FAULTY_FILES)
def test_records_that_cannot_be_read_are_bad_rows(write: Write, tmp_path: Path, name: str) -> None:
    expected = {
        "a.jsonl": {2: ":2", 3: ":4", 4: ":5", 5: ":6", 6: ":7", 8: ":9"},
        "a.csv": {2: ":3", 3: ":4"},
        "a.json": {2: ":1", 3: ":2"},
        "b.json": {1: ":1", 3: ":1"},
    }[name]
    path = write(name, FAULTY_FILES[name])
    rows = open_rows(path, skip_bad=True)
    store = build(rows, tmp_path)
    assert {row.row: row.place.removeprefix(path) for row in store.left_out} == expected
    assert [dict(row.values) for row in rows if row.fault is None] == [
        {"document": "a", "title": "b"},
        {"document": "e", "title": "f"},
    ]
    assert all(not row.values for row in rows if row.fault is not None)
    assert rows.columns == ("document", "title")
    assert [row.number for row in rows] == list(range(1, store.counts.rows + 1))
    assert store.row_numbers.tolist() == [row.number for row in rows if row.fault is None]
    glanced = glance(path, skip_bad=True)
    assert glanced is not None
    assert list(glanced) == list(rows)
    with pytest.raises(UserError):
        list(open_rows(path))


def test_a_class_label_without_a_name_is_a_bad_row(write: Write, tmp_path: Path) -> None:
    feature = {"_type": "ClassLabel", "names": ["neg", "pos"]}
    metadata = {b"huggingface": json.dumps({"info": {"features": {"title": feature}}})}
    table = pa.table({"document": ["a", "b", "c"], "title": [0, -1, 1]}).replace_schema_metadata(metadata)
    rows = open_rows(write("a.arrow", arrow_bytes(table, pa.ipc.new_stream)), skip_bad=True)
    assert left_out(build(rows, tmp_path)) == {
        2: 'column "title": the class label -1 stands for a missing label'
    }


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b'document,title\na,b\n"c,d\n', "a quote that is never closed"),
        ("a.csv", b"document,title\na,b\n\xff\xfe,d\n", "not utf-8 text"),
        ("a.jsonl", b'{"document": "a", "title": "b"}\n{"document": "\xff\xfe"}\n', "not utf-8 text"),
        ("a.jsonl", b'[{"document": "a", "title": "b"}]\n', "a JSON list in a .jsonl file"),
        ("a.json", b'[{"document": "a", "title": "b"}, {"document": NaN}]', "NaN is not JSON"),
    ],
)
def test_faults_behind_which_reading_cannot_go_on_stay_errors(
    write: Write, tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        build(open_rows(write(name, content), skip_bad=True), tmp_path)


# The data set of a run


def lines_of(path: str, tmp_path: Path, **settings: Any) -> tuple[Any, list[str]]:
    lines: list[str] = []
    data = DataSettings(data_path=path, template="{document}\n\nTitle:{title}", **settings)
    tokens = TokenSettings(cache_dir=str(tmp_path / "cache"))
    dataset = prepare_dataset(data, tokens, characters(), 42, lines.append, lambda _: None)
    describe(dataset, lines.append)
    return dataset, lines


def test_the_summary_lists_the_faults_with_their_rows(write: Write, tmp_path: Path) -> None:
    path = write("dirty.jsonl", jsonl([*ROWS, *[{"document": "x", "title": ""}] * 14]))
    _, lines = lines_of(path, tmp_path, bad_rows="skip")
    assert (
        f'{path}: bad rows left out, field "title" is empty: 15 (rows 2, 9, 10, 11, 12, 13, 14, 15, 16, 17 and 5 more)'
    ) in lines
    assert f'{path}: bad rows left out, field "title" is missing: 1 (row 4)' in lines
    assert len([line for line in lines if "left out" in line]) == 5


def test_many_kinds_of_faults_are_listed_in_bounded_space(write: Write, tmp_path: Path) -> None:
    question, answer = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
    rows = [{"messages": [{"role": f"r{name}", "content": "x"}, answer]} for name in "abcdefghijklmnop"]
    store = build(dirty(write, [{"messages": [question, answer]}, *rows]), tmp_path, load_template("chat"))
    faults = faults_of(store.left_out)
    assert len(faults) == 11
    assert str(faults[-1]) == "6 other faults: 6 (rows 12, 13, 14, 15, 16, 17)"


def test_validation_rows_are_drawn_among_good_rows_and_given_ones_are_checked(
    write: Write, tmp_path: Path
) -> None:
    path = write("dirty.jsonl", jsonl(ROWS))
    dataset, _ = lines_of(path, tmp_path, bad_rows="skip", val_set_size=1)
    drawn = dataset.sets[0].validation.store.row_numbers[dataset.sets[0].validation.positions].tolist()
    trained = dataset.train.store.row_numbers[dataset.train.positions].tolist()
    assert sorted(drawn + trained) == GOOD
    more = write("more.jsonl", jsonl(ROWS[:2]))
    dataset, lines = lines_of(path, tmp_path, bad_rows="skip", val_data_path=more)
    assert len(dataset.sets[0].validation.positions) == 1
    assert f'{more}: bad rows left out, field "title" is empty: 1 (row 2)' in lines
    with pytest.raises(UserError):
        lines_of(path, tmp_path)


def test_the_first_rows_count_bad_ones(write: Write, tmp_path: Path) -> None:
    dataset, _ = lines_of(write("dirty.jsonl", jsonl(ROWS)), tmp_path, bad_rows="skip", max_rows=5)
    assert dataset.train.store.row_numbers.tolist() == [1, 3]
    assert dataset.train.store.counts.rows == 5
    assert [row.number for row in dataset.train.first_rows(9)] == [1, 3]


LONG_LINE = json.dumps({"document": "a", "title": "b" * 40})
GOOD_LINE = '{"document": "a b", "title": "c"}'
WAY_OUT = "bad_rows: bad rows stop the run; --bad_rows skip leaves them out and counts them"


@pytest.mark.parametrize(
    ("name", "text", "settings", "told"),
    [
        ("a.jsonl", f'{GOOD_LINE}\n{{"document": "a"}}\n{{"title": "b"}}\n', {}, True),
        ("a.jsonl", f"{GOOD_LINE}\n{{\n{GOOD_LINE}\n", {}, True),
        ("a.csv", "document,title\na,b\na,b,c,d\n", {}, True),
        ("a.json", f"[{GOOD_LINE}, 7]", {}, True),
        ("a.jsonl", '{"document": "a"}\n{"document": "b"}\n', {}, False),  # then no row is left
        ("a.json", f"[{GOOD_LINE}, {{]", {}, False),  # the file cannot be read on
        ("a.jsonl", f"{GOOD_LINE}\n{LONG_LINE}\n", {"cutoff_len": 12, "over_limit": "error"}, False),
        ("a.jsonl", f"{GOOD_LINE}\n{GOOD_LINE}\n", {"template": "{documents}\n{title}"}, False),
    ],
)
def test_errors_of_bad_rows_name_the_way_out_once_where_it_works(
    tmp_path: Path, name: str, text: str, settings: dict[str, Any], told: bool
) -> None:
    base, data = model_folder(tmp_path / "base"), tmp_path / name
    data.write_text(text)
    options = {"template": "{document}\n{title}", "max_steps": 1, **settings}
    done = sft(tmp_path / "out", base, data, **options)
    assert done.status == 2
    assert done.err.count(WAY_OUT) == told
    assert done.err.rstrip().endswith(WAY_OUT) == told
    if told:
        assert sft(tmp_path / "out", base, data, bad_rows="skip", **options).status == 0


def test_rows_that_the_chat_template_refuses_name_the_way_out(tmp_path: Path) -> None:
    twice = [{"role": "user", "content": "q"}] * 2 + [{"role": "assistant", "content": "a"}]
    rows = [{"messages": twice[1:]}, {"messages": twice}]
    tokenizer = next(habit for habit in HABITS if habit.name == "no system, strict turns").tokenizer()
    data = DataSettings(data_path=str(write_jsonl(tmp_path / "rows.jsonl", rows)))
    settings = TokenSettings(cache_dir=str(tmp_path / "cache"))
    with pytest.raises(UserError) as caught, naming_skip("error"):
        prepare_dataset(data, settings, tokenizer, 0, print, lambda rows: None)
    assert [problem.of_row for problem in caught.value.problems] == [True, False]
    assert str(caught.value.problems[-1]) == WAY_OUT
