"""Text files: errors name the file, line, column and fix; valid content is read verbatim."""

from __future__ import annotations

import json
import os

import pytest

from tests.tables import TABLE, Write, error_of, jsonl, table_as, values
from yeonma.data.rows import Row, open_rows
from yeonma.data.text_file import CHUNK

# Encodings


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv"])
@pytest.mark.parametrize("encoding", ["utf-8-sig", "cp949", "utf-16", "utf-16-le", "utf-32"])
def test_file_is_read_in_the_given_encoding(write: Write, kind: str, encoding: str) -> None:
    table = TABLE[:2]
    path = write(f"a.{kind}", table_as(kind, table).decode().encode(encoding))
    settings = {} if encoding == "utf-8-sig" else {"encoding": encoding}
    assert values(open_rows(path, **settings)) == table


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv"])
@pytest.mark.parametrize("encoding", ["cp949", "euc-kr", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_wrong_encoding_error_suggests_the_right_one(write: Write, kind: str, encoding: str) -> None:
    text = {"jsonl": jsonl(TABLE[:1]), "json": "[" + jsonl(TABLE[:1]) + "]", "csv": "본문,제목\n가나,다라\n"}[
        kind
    ]
    expected = {"euc-kr": "cp949"}.get(encoding, encoding)
    message = error_of(write(f"a.{kind}", text.encode(encoding)))
    assert f"--encoding {expected}" in message
    assert message.startswith(f"a.{kind}:1:")


def test_undecodable_bytes_are_reported_with_line_and_column(write: Write) -> None:
    good = jsonl(TABLE[:1]).encode() * (CHUNK // 50)
    message = error_of(write("a.jsonl", good + '{"a": "가'.encode() + b'\xff\xfe"}\n'))
    assert message.startswith(f"a.jsonl:{CHUNK // 50 + 1}:9: not utf-8 text; give the file's encoding")
    message = error_of(write("a.jsonl", jsonl(TABLE)), encoding="ascii")
    assert message == "a.jsonl:1:15: not ascii text; if that is the file's encoding, give --encoding utf-8"


def test_unknown_encoding_is_an_error(write: Write) -> None:
    path = write("a.jsonl", jsonl(TABLE))
    assert error_of(path, encoding="cp94") == (
        '--encoding: unknown text encoding "cp94"; did you mean "cp949"?'
    )
    assert "unknown text encoding" in error_of(path, encoding="rot13")


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv"])
def test_a_byte_order_mark_in_the_middle_is_an_error(write: Write, kind: str) -> None:
    text = {
        "jsonl": '{"a": 1}\n\ufeff{"a": 2}\n',
        "json": '[{"a": 1},\n\ufeff{"a": 2}]',
        "csv": "a,b\n\ufeff1,2\n",
    }
    message = error_of(write(f"a.{kind}", text[kind]))
    assert message.startswith(f"a.{kind}:2:1: a byte order mark (U+FEFF) in the middle of the file")


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv"])
def test_nul_character_is_an_error(write: Write, kind: str) -> None:
    text = {
        "jsonl": '{"a": 1}\n{"a": "\0"}',
        "json": '[{"a": 1},\n{"a": "\0"}]',
        "csv": "a,b\n1234567\0,2\n",
    }
    assert error_of(write(f"a.{kind}", text[kind])) == f"a.{kind}:2:8: a NUL character (U+0000); remove it"


# JSON

INVALID_LINES = {
    '{"a": 1,, "b": 2}': "9: not JSON: ",
    '{"a": 1} {"a": 2}': "10: a second object on the line; write one object a line",
    '{"a": 1}, ': "9: text after the object",
    "3": "1: a row must be an object, not a number",
    ' ["a"]': "2: a row must be an object, not a list",
    '{"a": NaN}': "7: NaN is not JSON; write null or a number",
    '{"a": "1e999", "b": [-1e999]}': "22: -1e999 is too large a number; write it as text",
    '{"a": "NaN", "b": [-Infinity]}': "20: -Infinity is not JSON",
    '{"a": 1, "b": {"a": 2, "c": 3, "a": 4}}': '32: the key "a" appears twice in one object',
    '{"a": 1, "b": "a:", "\\u0061" : 2}': '21: the key "a" appears twice',
    '{"a": "\\ud83d\\ude00 \\ud83d"}': "21: half a character: \\ud83d is a lone surrogate; remove it",
    '{"a": "\\ude00"}': "8: half a character: \\ude00 is a lone surrogate",
    '{"a": "\\\\ud83d\\ude00"}': "15: half a character: \\ude00 is a lone surrogate",
    '{"a": "\\ud83d\\n"}': "8: half a character: \\ud83d is a lone surrogate",
    '{"a": "\\ud83dx\\ude00"}': "8: half a character",
    '{"a": "x\\u0000"}': "9: a NUL character (\\u0000)",
    '{"a": "\t"}': "8: not JSON: invalid control character",
    '{"a": ' + "9" * 5000 + "}": "1: a number with too many digits",
    '{"a": ' + "[" * 100_000: "1: too deeply nested",
}


@pytest.mark.parametrize("line", INVALID_LINES)
def test_invalid_json_line_is_reported_with_line_and_column(write: Write, line: str) -> None:
    assert error_of(write("a.jsonl", f'{{"a": 0}}\n\n{line}\n{{"a": 5}}\n')).startswith(
        f"a.jsonl:3:{INVALID_LINES[line]}"
    )


@pytest.mark.parametrize("row", [line for line in INVALID_LINES if line[0] == "{" and "1}" not in line])
def test_invalid_row_in_a_json_list_is_reported_with_line_and_column(write: Write, row: str) -> None:
    message = error_of(write("a.json", f'[{{"a": 0}},\n\n{row},\n{{"a": 5}}]\n'))
    assert message.startswith(f"a.json:3:{INVALID_LINES[row].split(':')[0]}:")


def test_valid_escapes_that_look_invalid_are_read(write: Write) -> None:
    text = '{"a": "\\\\ud83d \\\\u0000 \\ud83d\\ude00 \\\\\\uD55C \\\\\\ud83d\\udE00", "NaN": "Infinity \\ufeff"}\n'
    (row,) = values(open_rows(write("a.jsonl", text)))
    assert row == {"a": "\\ud83d \\u0000 😀 \\한 \\😀", "NaN": "Infinity \ufeff"}


def test_up_to_ten_invalid_lines_are_reported_at_once(write: Write) -> None:
    text = '{"a": 1}\n{"a": NaN}\n{"a": 1}\n{"a" 1}\n' + "[]\n" * 20
    lines = error_of(write("a.jsonl", text)).splitlines()
    assert [line.split(":")[1] for line in lines] == ["2", "4", *map(str, range(5, 13))]


@pytest.mark.parametrize("tail", ['{"a": "x', '{"a": 1', '{"a"', '{"a": tr', '{"a": "\\u12', "{"])
def test_truncated_last_line_is_reported(write: Write, tail: str) -> None:
    message = error_of(write("a.jsonl", '{"a": 0}\n' + tail))
    assert message.startswith("a.jsonl:2:")
    assert "the last line is truncated" in message
    message = error_of(write("a.json", '[{"a": 0},\n' + tail))
    assert message.startswith("a.json:2:")
    assert "the file is truncated" in message


def test_file_truncated_inside_a_character_is_reported(write: Write) -> None:
    message = error_of(write("a.jsonl", '{"a": 0}\n{"a": "한'.encode()[:-1]))
    assert message == (
        "a.jsonl:2:8: the file ends inside a utf-8 character: its last line is truncated; write the file again"
    )


def test_an_object_over_several_lines_among_lines_is_reported_once(write: Write) -> None:
    message = error_of(write("a.jsonl", '{"document": ""}\n' + json.dumps(TABLE[0], indent=2)))
    assert message.count("\n") == 0
    assert message.startswith("a.jsonl:2:")
    assert "the line ends before its object; write one object a line" in message


def test_json_list_in_jsonl_suggests_the_other_suffix(write: Write) -> None:
    assert error_of(write("a.jsonl", "\n" + json.dumps(TABLE, indent=1))) == (
        "a.jsonl:2: a JSON list in a .jsonl file; name the file .json, or write one object a line"
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1]", "a.json:1: a row must be an object, not a number"),
        ('[{"a": 1}\n{"a": 2}]', 'a.json:2:1: not JSON: expecting "," or "]" after a row'),
        ('[{"a": 1},\n]', "a.json:2:1: not JSON: expecting value"),
        ('[{"a": 1}]\n[]', "a.json:2:1: text after the list"),
        ('[{"a": 1}', 'a.json:1:10: not JSON: expecting "," or "]" after a row: the file is truncated'),
        ('"a"', "a.json:1:1: a .json file must hold a list of objects"),
    ],
)
def test_invalid_json_list_is_reported_with_its_position(write: Write, text: str, message: str) -> None:
    assert error_of(write("a.json", text)).startswith(message)


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.tsv"])
@pytest.mark.parametrize("text", ["", "\n \n", "\ufeff"])
def test_an_empty_file_is_an_error(write: Write, name: str, text: str) -> None:
    if name.endswith("sv") and " " in text:
        text = "\n\n"
    assert error_of(write(name, text)).startswith(f"{name}: no rows")


def test_empty_json_list_and_header_only_csv_are_errors(write: Write) -> None:
    assert error_of(write("a.json", " [ ] ")).startswith("a.json: no rows")
    assert error_of(write("a.csv", "a,b\n")).startswith("a.csv: a header but no rows")


def test_json_list_rows_across_chunk_borders_are_read(write: Write) -> None:
    table = [{"a": '한\\"\U0001f600' * (7 * number % 9_001), "b": number} for number in range(0, 40_000, 177)]
    for settings in ({"indent": 1}, {"ensure_ascii": False}):
        path = write("a.json", json.dumps(table, **settings))
        assert os.path.getsize(path) > 4 * CHUNK
        assert values(open_rows(path)) == table


# CSV


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a,b,a\n1,2,3\n", 'a.csv:1: the header has "a" twice; give each column a unique name'),
        ('a,b\n1,2\n"x\ny",z"\n"1\n2",\'3\n4,"five\nsix\n', "a.csv:7:3: a quote that is never closed"),
        ('a,b\n1,"two\n3,"four"\n', "a.csv:2:3: a quoted cell with text after its closing quote, at 3:4"),
        ('a,b\n"on""e" x,2\n', "a.csv:2:1: a quoted cell with text after its closing quote, at 2:8"),
        ('a,b\n"1\n2",3\n4\n5,6,7\n', "a.csv:4: 1 cell; the header has 2"),
    ],
)
def test_invalid_csv_is_reported_with_its_position(write: Write, text: str, message: str) -> None:
    assert error_of(write("a.csv", text)).startswith(message)
    assert error_of(write("a.tsv", text.replace(",", "\t"))).startswith(message.replace(".csv", ".tsv"))


def test_all_lines_with_a_wrong_number_of_cells_are_reported(write: Write) -> None:
    message = error_of(write("a.csv", "a,b\n1\n1,2\n1,2,3\n"))
    assert [line.split(";")[0] for line in message.splitlines()] == ["a.csv:2: 1 cell", "a.csv:4: 3 cells"]


def test_error_messages_for_wide_csv_and_long_names_are_short(write: Write) -> None:
    wide = ",".join(f"column {number}" for number in range(100_000))
    assert error_of(write("a.csv", f"{wide}\n1\n")).startswith("a.csv:2: 1 cell; the header has 100000")
    long = "x" * 100_000
    for name, text in (("a.csv", f"{long},{long}\n1,2\n"), ("a.jsonl", f'{{"{long}": 1, "{long}": 2}}')):
        assert len(error_of(write(name, text))) < 300


def test_a_cell_of_ten_megabytes_is_read(write: Write) -> None:
    cell = "긴 글, " * 1_000_000
    (row,) = open_rows(write("a.csv", f'a,b\n"{cell}",x\n'))
    assert row == Row(1, {"a": cell, "b": "x"}, row.place)
