"""Faults of the data, by their numbers in the list of faults: bytes, formats and files. test_data_rows.py has the
faults within rows.
"""

from __future__ import annotations

import io
import json
import os
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.faults.conftest import Accepted, Refused, Write
from tests.tables import table_as

KOREAN = [{"document": "a storm", "title": "x"}, {"document": "서울의 아침", "title": "첫 영하"}]
PLAIN = [{"document": "a b", "title": "t"}, {"document": "c d", "title": "u"}]
LINE = '{"document": "a b", "title": "t"}'
AGAIN = "write the file again"
TEXT_KINDS = ("jsonl", "json", "csv", "tsv")
TEMPLATE = "{document}\n{title}"


def text_of(kind: str, table: list[dict[str, str]]) -> str:
    """The table in the given format, one row per line, without escapes."""
    lines = [json.dumps(row, ensure_ascii=False) for row in table]
    if kind == "jsonl":
        return "".join(f"{line}\n" for line in lines)
    return "[" + ",\n".join(lines) + "]\n" if kind == "json" else table_as(kind, table).decode()


# The row before the Korean one is line 1 of JSON, line 2 of CSV.
KOREAN_BEGINS = {"jsonl": "2:15", "json": "2:15", "csv": "3:1", "tsv": "3:1"}


@pytest.mark.parametrize("kind", TEXT_KINDS)
@pytest.mark.parametrize("encoding", ["cp949", "euc-kr"])
def test_fault_01_cp949_bytes(
    write: Write, refused: Refused, accepted: Accepted, kind: str, encoding: str
) -> None:
    data = write(f"a.{kind}", text_of(kind, KOREAN).encode(encoding))
    cure = "if that is the file's encoding, give --encoding cp949"
    assert refused(data) == [f"a.{kind}:{KOREAN_BEGINS[kind]}: not utf-8 text; {cure}"]
    if encoding == "cp949" and kind in ("jsonl", "csv"):  # the suggested fix works
        run = accepted(data, encoding="cp949", template=TEMPLATE)
        assert run.texts[1] == ("서울의 아침\n", "첫 영하<|endoftext|>")


@pytest.mark.parametrize("kind", TEXT_KINDS)
def test_fault_02_utf_8_with_byte_order_mark_is_accepted(write: Write, accepted: Accepted, kind: str) -> None:
    data = write(f"a.{kind}", text_of(kind, KOREAN).encode("utf-8-sig"))
    assert accepted(data, template=TEMPLATE).texts[1] == ("서울의 아침\n", "첫 영하<|endoftext|>")


@pytest.mark.parametrize("kind", TEXT_KINDS)
def test_fault_03_utf_16(write: Write, refused: Refused, accepted: Accepted, kind: str) -> None:
    text = text_of(kind, KOREAN)
    data = write(f"a.{kind}", text.encode("utf-16"))
    cure = "if that is the file's encoding, give --encoding utf-16"
    assert refused(data) == [f"a.{kind}:1:1: not utf-8 text; {cure}"]
    plain = text_of(kind, PLAIN)  # without a byte order mark, all its bytes are also valid UTF-8
    for order in ("le", "be"):
        (line,) = refused(write(f"{order}.{kind}", plain.encode(f"utf-16-{order}")))
        assert line.startswith(f"{order}.{kind}:1:") and line.endswith(f"{cure}-{order}")
    assert accepted(data, encoding="utf-16", template=TEMPLATE).texts[1][0] == "서울의 아침\n"


@pytest.mark.parametrize("kind", TEXT_KINDS)
def test_fault_04_byte_order_mark_in_the_middle(write: Write, refused: Refused, kind: str) -> None:
    text = text_of(kind, PLAIN)
    data = write(f"a.{kind}", f"{text}\ufeff{text}")
    line = text.count("\n") + 1
    what = "a byte order mark (U+FEFF) in the middle of the file"
    assert refused(data) == [f"a.{kind}:{line}:1: {what}; remove it; joining files leaves such marks"]


def test_fault_05_malformed_json(write: Write, refused: Refused) -> None:
    wrong = '{"document": "a", "title": }\n{"document" "a"}\n'
    value = "write text in double quotes, a number, true, false, null, [...] or {...}"
    assert refused(write("a.jsonl", f"{LINE}\n{wrong}{LINE}\n{{document: 1}}\n")) == [
        f"a.jsonl:2:28: not JSON: expecting value; {value}",
        'a.jsonl:3:13: not JSON: expecting \':\' delimiter; write "column": "value"',
        "a.jsonl:5:2: not JSON: expecting property name enclosed in double quotes; "
        'write "column": "value", in double quotes, and no comma after the last one',
    ]
    assert refused(write("a.json", f'[{LINE},\n{{"document": "a",\n "title": }}]')) == [
        f"a.json:3:11: not JSON: expecting value; {value}"
    ]
    (line,) = refused(write("b.json", f"[{LINE}\n{LINE}]"))
    assert line.startswith("b.json:2:1: not JSON: expecting") and "put a comma between two rows" in line


def test_fault_06_truncated_last_line(write: Write, refused: Refused) -> None:
    (line,) = refused(write("a.jsonl", f"{LINE}\n{LINE[:-8]}"))
    assert line.startswith("a.jsonl:2:") and line.endswith(f": the last line is truncated; {AGAIN}")
    (line,) = refused(write("a.json", f"[{LINE},\n{LINE[:-8]}"))
    assert line.startswith("a.json:2:") and line.endswith(f": the file is truncated; {AGAIN}")
    (line,) = refused(write("b.json", f"[{LINE},\n{LINE}"))
    assert line.startswith("b.json:2:34: ") and line.endswith(f": the file is truncated; {AGAIN}")
    cure = "put cells with commas or line breaks in quotes"
    assert refused(write("a.csv", "document,title\na,b\nc")) == [f"a.csv:3: 1 cell; the header has 2; {cure}"]
    cure = 'close it, and write " inside a quoted cell as ""'
    assert refused(write("b.csv", 'document,title\na,b\nc,"d')) == [
        f"b.csv:3:3: a quote that is never closed; {cure}"
    ]
    complete = table_as("parquet", PLAIN)
    for content in (complete[:-9], complete[:4] + complete[40:], b""):
        (line,) = refused(write("a.parquet", content))
        assert line.startswith("a.parquet: not a readable Parquet file: ")
        assert line.endswith(f"; {AGAIN}")


def test_fault_07_two_objects_on_a_line(write: Write, refused: Refused) -> None:
    assert refused(write("a.jsonl", f"{LINE}\n{LINE}{LINE}\n{LINE} {LINE}\n{LINE},\n")) == [
        "a.jsonl:2:34: a second object on the line; write one object a line",
        "a.jsonl:3:35: a second object on the line; write one object a line",
        "a.jsonl:4:34: text after the object; write one object a line",
    ]


def test_fault_08_blank_lines_are_skipped(write: Write, accepted: Accepted) -> None:
    row, other = (json.dumps(row) for row in PLAIN)
    expected = [("a b\n", "t<|endoftext|>"), ("c d\n", "u<|endoftext|>")]
    for name, content in {
        "a.jsonl": f"\n{row}\n  \t\n\n{other}\n\n",
        "a.json": f"\n\n[{row}\n\n,\n{other}\n]\n\n",
        "a.csv": "\ndocument,title\n\na b,t\n  \n\r\nc d,u\n\n",
        "a.tsv": "document\ttitle\n\na b\tt\n\n  \nc d\tu",
    }.items():
        assert accepted(write(name, content), template=TEMPLATE).texts == expected, name


def test_fault_09_json_list_in_a_jsonl_file(write: Write, refused: Refused) -> None:
    cure = "name the file .json, or write one object a line"
    data = write("a.jsonl", f"\n[{LINE},\n{LINE}]\n")
    assert refused(data) == [f"a.jsonl:2: a JSON list in a .jsonl file; {cure}"]


def test_fault_10_no_rows(write: Write, refused: Refused) -> None:
    cure = "give a file with at least one row"
    for kind in TEXT_KINDS:
        for text in ("", "\n\n", "\ufeff"):
            data = write(f"a.{kind}", text)
            assert refused(data) == [f"a.{kind}: no rows; {cure}"]
    assert refused(write("b.json", " [ ]\n")) == [f"b.json: no rows; {cure}"]
    assert refused(write("b.csv", "document,title\n")) == [f"b.csv: a header but no rows; {cure}"]
    assert refused(write("b.tsv", "document\ttitle\n\n")) == [f"b.tsv: a header but no rows; {cure}"]
    sink = io.BytesIO()
    pq.write_table(pa.table({"document": pa.array([], pa.string())}), sink)
    assert refused(write("b.parquet", sink.getvalue())) == [f"b.parquet: no rows; {cure}"]


def test_fault_14_nan_and_infinity_in_json(write: Write, refused: Refused) -> None:
    wrong = [f'{{"document": "a", "title": "b", "x": {word}}}' for word in ("NaN", "[-Infinity]", "Infinity")]
    assert refused(write("a.jsonl", "\n".join([LINE, *wrong]))) == [
        "a.jsonl:2:38: NaN is not JSON; write null or a number",
        "a.jsonl:3:39: -Infinity is not JSON; write null or a number",
        "a.jsonl:4:38: Infinity is not JSON; write null or a number",
    ]
    assert refused(write("a.json", f"[{LINE},\n{wrong[0]}]")) == [
        "a.json:2:38: NaN is not JSON; write null or a number"
    ]


def test_fault_16_duplicate_json_key(write: Write, refused: Refused) -> None:
    top = '{"document": "a", "document": "b", "title": "c"}'
    deep = '{"document": "a", "title": "c", "x": [{"y": 1, "y": 2}]}'
    cure = "keep one"
    assert refused(write("a.jsonl", f"{LINE}\n{top}\n{deep}\n")) == [
        f'a.jsonl:2:19: the key "document" appears twice in one object; {cure}',
        f'a.jsonl:3:48: the key "y" appears twice in one object; {cure}',
    ]
    assert refused(write("a.json", f"[{LINE},\n{top}]")) == [
        f'a.json:2:19: the key "document" appears twice in one object; {cure}'
    ]


def test_fault_17_duplicate_csv_header(write: Write, refused: Refused) -> None:
    cure = "give each column a unique name"
    for kind, separator in (("csv", ","), ("tsv", "\t")):
        text = "\ndocument,title,x,title,x\na,b,c,d,e\n".replace(",", separator)
        assert refused(write(f"a.{kind}", text)) == [
            f'a.{kind}:{line}: the header has "{column}" twice; {cure}'
            for line, column in ((2, "title"), (2, "x"))
        ]
    sink = io.BytesIO()
    pq.write_table(pa.table([["a"], ["b"], ["c"]], names=["document", "title", "title"]), sink)
    assert refused(write("a.parquet", sink.getvalue())) == [
        f'a.parquet: two columns are named "title"; {cure}'
    ]


def test_fault_18_unclosed_csv_quote(write: Write, refused: Refused) -> None:
    cure = 'close it, and write " inside a quoted cell as ""'
    for kind, separator in (("csv", ","), ("tsv", "\t")):
        text = 'document,title\n"a\nb",c\nd,"e\nf,g\nh,i\n'.replace(",", separator)
        assert refused(write(f"a.{kind}", text)) == [f"a.{kind}:4:3: a quote that is never closed; {cure}"]


def test_fault_28_missing_empty_or_irregular_data_path(
    tmp_path: Path, write: Write, refused: Refused
) -> None:
    good = write("rows/train.jsonl", f"{LINE}\n")
    assert refused(tmp_path / "rows/trian.jsonl") == [
        'rows/trian.jsonl: no such file or folder; did you mean "train.jsonl"?'
    ]
    assert refused(tmp_path / "nowhere/a.csv") == ["nowhere/a.csv: no such file or folder; check its name"]
    (tmp_path / "empty").mkdir()
    (line,) = refused(tmp_path / "empty")
    assert line.startswith("empty: a folder without data files; give a .jsonl, .ndjson, ")
    pipes = ("pipe.jsonl", "pipe", "in/pipe.csv", "saved/state.json", "splits/dataset_dict.json")
    for pipe in pipes:
        (tmp_path / pipe).parent.mkdir(exist_ok=True)
        os.mkfifo(tmp_path / pipe)
    for path, place in (("pipe.jsonl", "pipe.jsonl"), ("pipe", "pipe"), ("in", "in/pipe.csv")):
        (line,) = refused(tmp_path / path)
        assert line.startswith(f"{place}: not a regular file; give a .jsonl, ")
    (line,) = refused(tmp_path / "splits")
    assert line.startswith("splits/dataset_dict.json: not a regular file; ")
    (line,) = refused(tmp_path / "saved")
    assert line.startswith("saved/state.json: not a regular file; ")
    (line,) = refused(good, val_data_path=tmp_path / "pipe.jsonl")  # also for the validation file
    assert line.startswith("pipe.jsonl: not a regular file; ")


def test_fault_28_saved_data_set_with_a_missing_file(
    tmp_path: Path, refused: Refused, accepted: Accepted
) -> None:
    datasets.Dataset.from_list(PLAIN).save_to_disk(str(tmp_path / "saved"))
    assert len(accepted(tmp_path / "saved").texts) == 2
    next((tmp_path / "saved").glob("*.arrow")).unlink()
    (line,) = refused(tmp_path / "saved")
    assert line.startswith("saved: the saved data set cannot be read: ")


def test_fault_29_data_set_that_needs_its_own_code_is_refused(
    tmp_path: Path, write: Write, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = f"open({str(tmp_path / 'ran')!r}, 'w')"
    script = write("someone/news/news.py", code)
    write("someone/news/train.jsonl", f"{LINE}\n")
    write("other/load.py", code)
    what = "the data set needs its own Python code ({}), which Yeonma never runs"
    cure = "give its data files (.parquet, .jsonl, ...), or on the hub --data_revision refs/convert/parquet"
    assert refused(script.parent) == [f"someone/news: {what.format('news.py')}; {cure}"]
    assert refused(tmp_path / "other") == [f"other: {what.format('load.py')}; {cure}"]
    (line,) = refused(script)
    assert line.startswith("someone/news/news.py: the data set needs its own Python code (")
    monkeypatch.chdir(tmp_path)  # a local folder with the name of a hub data set
    assert refused("someone/news") == [f"someone/news: {what.format('news.py')}; {cure}"]

    # As from the hub: `datasets` raises its own error for such a repository, here in a local folder.
    load_dataset = datasets.load_dataset
    monkeypatch.setattr(
        datasets,
        "load_dataset",
        lambda name, *arguments, **keywords: load_dataset(f"someone/{name}", *arguments, **keywords),
    )
    assert refused("news") == [f"news: {what.format('news.py')}; {cure}"]
    assert not (tmp_path / "ran").exists()


def test_errors_of_a_file_are_reported_together_up_to_twenty(write: Write, refused: Refused) -> None:
    rows = [
        '{"document": null, "title": "a"}',
        LINE,
        '{"document": "a", "title": {"a": 3}}',
        '{"document": NaN}',
        "x",
    ]
    lines = refused(write("a.jsonl", "\n".join(rows)))
    assert [line.partition(": ")[0] for line in lines] == [
        "a.jsonl:1",
        "a.jsonl:3",
        "a.jsonl:4:14",
        "a.jsonl:5:1",
    ]
    many = refused(write("b.jsonl", '{"document": "a", "title": ""}\n' * 5000))
    assert len(many) == 21
    assert many[-2:] == [
        'b.jsonl:20: field "title" is empty; the template uses document, title',
        "b.jsonl: there are more such problems",
    ]


def test_training_columns_of_a_saved_data_set_choose_the_template(
    tmp_path: Path, write: Write, accepted: Accepted
) -> None:
    datasets.Dataset.from_list(PLAIN).save_to_disk(str(tmp_path / "saved"))
    both = {"document": "a", "title": "b", "prompt": "c", "completion": "d"}  # fits two templates
    validation = write("b.jsonl", json.dumps(both))
    run = accepted(tmp_path / "saved", template=None, val_data_path=validation)
    assert "template title, because the columns are document, title" in run.done.out


def test_errors_of_data_template_and_folders_are_reported_together(
    tmp_path: Path, write: Write, refused: Refused
) -> None:
    data, template = write("a.jsonl", f"{LINE}{LINE}\n"), write("title.txt", "{document\n{title}")
    (tmp_path / "model").mkdir()
    lines = refused(data, val_data_path=tmp_path / "b.csv", template=template, base_model=tmp_path / "model")
    assert [line.partition(": ")[0] for line in lines] == ["model", "title.txt:1:1", "a.jsonl:1:34", "b.csv"]
