"""Values within columns, named by a path in `--columns`, and values written as JSON."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from datetime import date

import pytest

from yeonma.data.column_paths import row_with_paths, value_in, with_paths
from yeonma.data.columns import field_text, recognise
from yeonma.data.rows import Row, Rows
from yeonma.data.template import Template
from yeonma.errors import UserError

QUIZ: Mapping[str, object] = {
    "question": "When?",
    "answers": {"text": ["1974"], "start": [6]},
    "choices": ["July", "January"],
    "people": [{"name": "Mia"}, {"name": "Bo", "age": 3}],
    "a.b": {"c.d": "dotted"},
    "a": {"b": "undotted"},
    "none": {"text": None},
    "json(question)": "a column of this name",
}


def row(values: Mapping[str, object] = QUIZ) -> Row:
    return Row(7, values, "quiz.jsonl:7")


def text_at(path: str, values: Mapping[str, object] = QUIZ) -> str | None:
    return field_text(row_with_paths(row(values), [path]), path)


def table(*rows: Mapping[str, object]) -> Rows:
    def read() -> Iterator[Row]:
        return (Row(number, values, f"quiz.jsonl:{number}") for number, values in enumerate(rows, start=1))

    return Rows("quiz.jsonl", "", tuple(dict.fromkeys(name for values in rows for name in values)), read)


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("answers.text", "1974"),
        ("answers.text[0]", "1974"),
        ("answers.start", "6"),
        ("choices[1]", "January"),
        ("people[1].name", "Bo"),
        ("people[1].age", "3"),
        ("a.b.c.d", "dotted"),
    ],
)
def test_a_path_gives_the_value_within_a_column(path: str, text: str) -> None:
    assert text_at(path) == text


@pytest.mark.parametrize(
    "path", ["answers.txt", "answers[0]", "choices[2]", "choices.text", "people.name", "none.text", "no.such"]
)
def test_a_path_that_the_row_lacks_is_a_missing_text(path: str) -> None:
    assert text_at(path) is None


def test_a_column_that_is_really_named_like_a_path_comes_first() -> None:
    values: Mapping[str, object] = {**QUIZ, "answers.text": "real", "answers.text[0]": "real too"}
    assert text_at("answers.text", values) == "real"
    assert text_at("answers.text[0]", values) == "real too"
    assert text_at("json(question)") == "a column of this name"
    rows = table(values)
    assert with_paths(rows, {"answer": "answers.text"}) is rows


def test_the_longest_name_of_a_path_is_taken_at_every_step() -> None:
    assert text_at("a.b", {"a.b": "long", "a": {"b": "short"}}) == "long"
    assert text_at("x.a.b", {"x": {"a.b": "long", "a": {"b": "short"}}}) == "long"


def test_a_list_of_several_texts_is_refused_with_a_path_that_works() -> None:
    values = {"answers": {"text": ["in 1974", "1974"]}}
    with pytest.raises(UserError) as caught:
        text_at("answers.text", values)
    assert str(caught.value) == (
        'quiz.jsonl:7: field "answers.text" is a list, not text; '
        'map the field to "answers.text[0]" or "json(answers.text)" with --columns, in these quotes'
    )
    assert text_at("answers.text[0]", values) == "in 1974"
    assert text_at("json(answers.text)", values) == '["in 1974","1974"]'


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ({"name": "미아", "year": 1990, "tags": [None, True, 1.0]}, None),
        ([], "[]"),
        ("한 줄", '"한 줄"'),
        (3, "3"),
    ],
)
def test_json_of_a_column_is_compact_and_the_same_value_when_read(value: object, text: str | None) -> None:
    written = text_at("json(output)", {"output": value})
    assert written is not None
    assert json.loads(written) == value
    assert ", " not in written and ": " not in written and "\\u" not in written
    assert text is None or written == text


def test_json_of_a_null_is_a_missing_text() -> None:
    assert text_at("json(output)", {"output": None}) is None
    assert text_at("json(answers.none)") is None


def test_what_json_has_no_form_for_is_refused_with_its_row() -> None:
    with pytest.raises(UserError, match=r'quiz.jsonl:7: field "json\(at\)" cannot be .* it holds a date;'):
        text_at("json(at)", {"at": [date(2024, 1, 2)]})
    with pytest.raises(UserError, match=r"quiz.jsonl:7: .* cannot be written as JSON"):
        text_at("json(at)", {"at": float("nan")})


def test_rows_have_the_paths_that_begin_in_a_column_as_columns_of_their_own() -> None:
    columns = {"answer": "answers.text", "question": "question", "note": "no.such", "all": "json(answers)"}
    rows = table(QUIZ, {"question": "Where?", "answers": {"text": ["here"]}}, {"question": "Who?"})
    read = with_paths(rows, columns)
    assert read.columns == (*rows.columns, "answers.text", "json(answers)")
    assert [values.get("answers.text") for values in (row.values for row in read)] == ["1974", "here", None]
    assert [row.number for row in read] == [1, 2, 3]
    assert with_paths(read, columns) is read
    assert with_paths(rows, None) is rows


def test_recognition_and_templates_take_a_path_like_a_column() -> None:
    columns = {"response": "answers.text"}
    rows = with_paths(table({"question": "When?", "answers": {"text": ["1974"]}}), columns)
    recognised = recognise(rows.columns, columns)
    assert recognised.reason == (
        "template orca, because the columns are question, answers.text (as response)"
    )
    template = Template.parse("{question}\n{answer}")
    assert template.missing_columns(rows.columns, {"answer": "answers.text"}) == []
    (first,) = rows
    by_path, by_name = (
        template.render(row, columns)
        for row, columns in (
            (first, {"answer": "answers.text"}),
            (row({"question": "When?", "answer": "1974"}), None),
        )
    )
    assert by_path == by_name


def test_a_value_can_be_looked_up_without_a_column_of_its_own() -> None:
    assert value_in(row(), "people[0]") == {"name": "Mia"}
    assert value_in(row(), "answers.text") == ["1974"]
    assert value_in(row(), "answers.tools") is None
