"""Faults within rows, by their numbers in the list of faults."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.faults.conftest import Accepted, Refused, Write
from tests.runs import write_jsonl
from tests.tables import table_as

TEMPLATE = "{document}\n{title}"
VARIANTS = "{document}, {note}\n{title}\n---\n{document}\n{title}"
USES = "the template uses document, title"
END = "<|endoftext|>"
Rows = Sequence[Mapping[str, object]]


def write_as(write: Write, kind: str, rows: Rows) -> Path:
    """The rows as a file `a.KIND`, with one row per line in text formats."""
    if kind in ("jsonl", "json"):
        lines = [json.dumps(row) for row in rows]
        text = "".join(f"{line}\n" for line in lines) if kind == "jsonl" else "[" + ",\n".join(lines) + "]"
        return write(f"a.{kind}", text)
    return write(f"a.{kind}", table_as(kind, [dict(row) for row in rows]))  # type: ignore[arg-type]


def location(kind: str, row: int) -> str:
    """How messages name that row, counted from 1, in a file of `write_as`."""
    suffixes = {"parquet": f" row {row}", "csv": f":{row + 1}", "tsv": f":{row + 1}"}
    return f"a.{kind}{suffixes.get(kind, f':{row}')}"


@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet"])
def test_fault_11_a_number_where_text_is_expected_is_written_as_text(
    write: Write, accepted: Accepted, kind: str
) -> None:
    rows = [{"document": "a", "title": 3}, {"document": "b", "title": 4}]
    assert accepted(write_as(write, kind, rows), template=TEMPLATE).texts == [
        ("a\n", f"3{END}"),
        ("b\n", f"4{END}"),
    ]
    unused_numbers = write_as(write, kind, [{"document": "a", "title": "b", "id": 7, "score": 0.5}])
    assert accepted(unused_numbers, template=TEMPLATE).texts == [("a\n", f"b{END}")]


def test_fault_11_a_list_or_object_where_text_is_expected(
    write: Write, refused: Refused, accepted: Accepted
) -> None:
    rows: Rows = [{"document": ["a"], "title": "b"}, {"document": {"a": "b"}, "title": True}]
    assert refused(write_as(write, "jsonl", rows), template=TEMPLATE) == [
        'a.jsonl:1: field "document" is a list, not text; '
        'map the field to "document[0]" or "json(document)" with --columns, in these quotes',
        'a.jsonl:2: field "document" is an object, not text; '
        'map the field to "document.a" or "json(document)" with --columns, in these quotes',
    ]
    assert accepted(write("a.csv", "document,title\n1,2\n"), template=TEMPLATE).texts == [("1\n", f"2{END}")]


@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet"])
def test_fault_12_null_in_a_used_field(write: Write, refused: Refused, accepted: Accepted, kind: str) -> None:
    rows = [
        {"document": "a", "note": "n", "title": "b"},
        {"document": None, "note": None, "title": "b"},
        {"document": "c", "note": None, "title": None},
    ]
    data = write_as(write, kind, rows)
    assert refused(data, template=TEMPLATE) == [
        f'{location(kind, 2)}: field "document" is null; {USES}',
        f'{location(kind, 3)}: field "title" is null; {USES}',
    ]
    assert refused(data, template=VARIANTS) == refused(data, template=TEMPLATE)
    valid = write_as(write, kind, [rows[0], {**rows[2], "title": "d"}])
    assert accepted(valid, template=VARIANTS).texts == [("a, n\n", f"b{END}"), ("c\n", f"d{END}")]


def test_fault_12_a_field_missing_in_some_rows(write: Write, refused: Refused, accepted: Accepted) -> None:
    rows = [{"document": "a", "title": "b", "note": "n"}, {"titel": "c", "document": "d"}]
    cure = f'{USES}; did you mean "titel"?'
    assert refused(write_as(write, "jsonl", rows)) == [f'a.jsonl:2: field "title" is missing; {cure}']
    valid = write_as(write, "jsonl", [rows[0], {"document": "d", "title": "c"}])
    assert accepted(valid, template=VARIANTS).texts == [("a, n\n", f"b{END}"), ("d\n", f"c{END}")]


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "tsv", "parquet"])
def test_fault_13_an_empty_answer(write: Write, refused: Refused, kind: str) -> None:
    blank = ("", "  ", "\n\u3000\u00a0")
    rows = [{"document": "a", "title": "b"}, *({"document": "c", "title": text} for text in blank)]
    for template in (TEMPLATE, "{document}\n{title}."):
        assert refused(write_as(write, kind, rows), template=template) == [
            f'{location(kind, row)}: field "title" is empty; {USES}' for row in (2, 3, 4)
        ]


def test_fault_13_an_empty_answer_in_a_turn_list(write: Write, refused: Refused, chat_base: Path) -> None:
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": " \n"}]
    data = write_as(write, "jsonl", [{"messages": turns}])
    what = "messages[1].content is empty; fill it or remove the row"
    assert refused(data, base_model=chat_base, template=None) == [f"a.jsonl:1: {what}"]


@pytest.mark.parametrize("kind", ["csv", "tsv"])
def test_fault_15_an_empty_cell_in_a_used_field(
    write: Write, refused: Refused, accepted: Accepted, kind: str
) -> None:
    header, complete, partial, empty = "document,note,title", "a,n,b", "c,,d", ",n,"
    lines = [line.replace(",", "," if kind == "csv" else "\t") for line in (header, complete, partial, empty)]
    assert refused(write(f"a.{kind}", "\n".join(lines)), template="{document} {note}\n{title}") == [
        f'a.{kind}:3: field "note" is empty; the template uses document, note, title',
        f'a.{kind}:4: field "document" is empty; the template uses document, note, title',
        f'a.{kind}:4: field "title" is empty; the template uses document, note, title',
    ]
    data = write(f"a.{kind}", "\n".join(lines[:3]))
    assert accepted(data, template=VARIANTS).texts == [("a, n\n", f"b{END}"), ("c\n", f"d{END}")]


def test_fault_20_frame_and_answer_over_the_limit(write: Write, refused: Refused, accepted: Accepted) -> None:
    rows = [{"document": "a" * 90, "title": "b" * (60 if number in (2, 5) else 3)} for number in range(1, 7)]
    data, settings = write_as(write, "jsonl", rows), {"cutoff_len": 40, "template": TEMPLATE}
    run = accepted(data, **settings)
    assert "a.jsonl: 2 left out: rows 2, 5\n" in run.done.out.replace(f"{data.parent}/", "")
    assert [answer for _, answer in run.texts] == [f"bbb{END}"] * 4
    cure = "raise --cutoff_len, or leave such rows out with --over_limit drop"
    assert refused(data, **settings, over_limit="error") == [
        f'a.jsonl:{row}: 152 tokens, and too long with one character of "document"; cutoff_len is 40; {cure}'
        for row in (2, 5)
    ]
    cure = "raise --cutoff_len, or shorten the template"
    assert refused(data, **{**settings, "cutoff_len": 4}) == [
        f"a.jsonl: no row is left of 6: each is over cutoff_len 4; {cure}"
    ]


def turn(role: object, content: object) -> dict[str, object]:
    return {"role": role, "content": content}


QUESTION, ANSWER = turn("user", "q"), turn("assistant", "a")


def test_fault_21_an_unknown_role(write: Write, refused: Refused, chat_base: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"messages": [QUESTION, ANSWER, turn("asistant", "b"), turn("narrator", "c")]},
        {"messages": [QUESTION, turn(3, "b")]},
        {"messages": [{"content": "a"}, ANSWER]},
    ]
    lines = refused(write_jsonl(write("a.jsonl", ""), rows), base_model=chat_base, template=None)
    known = "roles are system, developer, user, human, assistant, "
    assert lines[0] == ('a.jsonl:1: messages[2].role: unknown role "asistant"; did you mean "assistant"?')
    assert lines[1].startswith(f'a.jsonl:1: messages[3].role: unknown role "narrator"; {known}')
    assert lines[2].startswith(f"a.jsonl:2: messages[1].role: unknown role a number (3); {known}")
    assert lines[3] == 'a.jsonl:3: messages[0].role is missing; a turn has "role" and "content"'
    sharegpt = [{"from": "human", "value": "q"}, {"from": "gtp", "value": "a"}]
    data = write_jsonl(write("a.jsonl", ""), [{"conversations": sharegpt}])
    assert refused(data, base_model=chat_base, template=None) == [
        'a.jsonl:1: conversations[1].from: unknown role "gtp"; did you mean "gpt"?'
    ]


@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet"])
def test_fault_22_a_turn_list_without_an_assistant_turn(
    write: Write, refused: Refused, chat_base: Path, kind: str
) -> None:
    rows = [{"messages": turns} for turns in ([QUESTION, ANSWER], [QUESTION, QUESTION], [ANSWER], [])]
    assert refused(write_as(write, kind, rows), base_model=chat_base, template=None) == [
        f'{location(kind, 2)}: "messages" has no assistant turn: there is nothing to train; '
        "add the answer, or remove the row",
        f'{location(kind, 3)}: "messages" has no turn before the answer; add the question, or remove the row',
        f'{location(kind, 4)}: field "messages" has no turns; remove the row',
    ]


def test_fault_23_a_lone_surrogate(write: Write, refused: Refused, accepted: Accepted) -> None:
    rows = [r'"\ud83d\ude00"', r'"\ud83d x"', r'"x \ude00"', r'{"y": "\ud83d\ud83d\ude00"}']
    lines = [f'{{"document": "a", "title": "b", "x": {row}}}' for row in rows]
    what = "half a character: {} is a lone surrogate; remove it"
    assert refused(write("a.jsonl", "\n".join(lines))) == [
        f"a.jsonl:2:39: {what.format(chr(92) + 'ud83d')}",
        f"a.jsonl:3:41: {what.format(chr(92) + 'ude00')}",
        f"a.jsonl:4:45: {what.format(chr(92) + 'ud83d')}",
    ]
    assert refused(write("a.json", f"[{lines[0]},\n{lines[1]}]")) == [
        f"a.json:2:39: {what.format(chr(92) + 'ud83d')}"
    ]
    for name in ("a.jsonl", "a.json", "a.csv", "a.tsv"):  # as bytes, a lone surrogate is not valid UTF-8
        (line,) = refused(write(name, b"\xed\xa0\xbd"))
        assert line.startswith(f"{name}:1:1: not utf-8 text; give the file's encoding")
    surrogate_pair = write("a.jsonl", r'{"document": "\ud83d\ude00", "title": "b"}')
    assert accepted(surrogate_pair, template=TEMPLATE).texts == [("\U0001f600\n", f"b{END}")]


def test_fault_24_a_nul_character(write: Write, refused: Refused) -> None:
    escaped = [r'{"document": "a\u0000", "title": "b"}', r'{"document": "a", "title": "\u0000"}']
    assert refused(write("a.jsonl", "\n".join(escaped))) == [
        "a.jsonl:1:16: a NUL character (\\u0000); remove it",
        "a.jsonl:2:29: a NUL character (\\u0000); remove it",
    ]
    assert refused(write("a.json", f"[\n{escaped[0]}]")) == [
        "a.json:2:16: a NUL character (\\u0000); remove it"
    ]
    rows = [{"document": "a", "title": "b"}, {"document": "Q", "title": "d"}]
    for kind, position in {"jsonl": "2:15", "json": "2:15", "csv": "3:1", "tsv": "3:1"}.items():
        text = write_as(write, kind, rows).read_text().replace("Q", "\0")
        assert refused(write(f"a.{kind}", text)) == [
            f"a.{kind}:{position}: a NUL character (U+0000); remove it"
        ]
    table_with_nul = write_as(write, "parquet", [*rows, {"document": "e\0", "title": "f"}])
    assert refused(table_with_nul) == [
        'a.parquet row 3: field "document" contains a NUL character (U+0000) after 1 character; remove it'
    ]
