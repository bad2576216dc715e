"""`--data_split`: slices mean what they mean in the library `datasets`, for every source."""

from __future__ import annotations

from pathlib import Path

import datasets
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.tables import error_of, jsonl, table_as, values
from yeonma.data.rows import glance, open_rows
from yeonma.data.splits import parse_split, without_slices
from yeonma.errors import UserError

TABLE = [{"text": f"row {number}"} for number in range(1, 24)]


def of_the_library(text: str, count: int) -> list[tuple[str, int, int]]:
    """Split, first row and the one behind the last, as `datasets` reads a text."""
    lengths = {"train": count, "test": count, "a.b": count}
    absolute = datasets.ReadInstruction.from_spec(text).to_absolute(lengths)
    return [(part.splitname, part.from_, max(part.from_, part.to)) for part in absolute]


numbers = st.one_of(st.none(), st.integers(-30, 30))
percents = st.one_of(st.none(), st.integers(-100, 100))


@st.composite
def slices(draw: st.DrawFn) -> str:
    name = draw(st.sampled_from(["train", "test", "a.b"]))
    kind = draw(st.sampled_from(["", "numbers", "percent", "both"]))
    if not kind:
        return name
    unit = "" if kind == "numbers" else "%"
    start, stop = (draw(numbers if kind == "numbers" else percents) for _ in range(2))
    first = "" if start is None else f"{start}{unit}"
    last = "" if stop is None else f"{stop}{unit if kind != 'both' else ''}"
    return f"{name}[{first}:{last}]"


@given(st.lists(slices(), min_size=1, max_size=3), st.integers(0, 250))
def test_slices_have_the_bounds_of_the_library(parts: list[str], count: int) -> None:
    ours = [(part.name, *part.bounds(count)) for part in parse_split(" + ".join(parts))]
    assert ours == of_the_library(" + ".join(parts), count)


@given(slices(), st.integers(100, 999))
def test_rounding_down_has_the_bounds_of_the_library(text: str, count: int) -> None:
    if "%" in text:
        text += "(pct1_dropremainder)"
        ((name, start, stop),) = of_the_library(text, count)
        assert [(part.name, *part.bounds(count)) for part in parse_split(text)] == [(name, start, stop)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", '"" is no split'),
        (
            "train[1]",
            '"train[1]" is no split and no slice of one; write train, train[:1000] or train[10%:20%]',
        ),
        ("train[:10", "is no split"),
        ("train+", '"" is no split'),
        ("train[:_]", "has no valid numbers"),
        ("train[:101%]", "more than 100% in train[:101%]; give -100% to 100%"),
        (
            "train[:10%](up)",
            'unknown rounding "up" in train[:10%](up); give one of closest, pct1_dropremainder',
        ),
        ("train[:10](closest)", "only slices in per cent are rounded in train[:10](closest)"),
    ],
)
def test_what_is_no_slice_is_an_error(text: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_split(text)
    assert message in str(caught.value)
    assert str(caught.value).startswith("--data_split: ")


def test_validation_rows_come_from_the_same_splits_whole() -> None:
    assert without_slices("train") == "train"
    assert without_slices("train[:10%]+test[3:]+train[50%:]") == "train+test"
    assert without_slices("no-such[name") == "no-such[name"


SOURCES = ["jsonl", "csv", "json", "parquet", "arrow", "xlsx", "folder", "saved", "one saved"]


def source(kind: str, folder: Path) -> str:
    """The table in a source of this kind; in a folder, its first 10 rows are in the first file."""
    if kind == "folder":
        for name, rows in (("a", TABLE[:10]), ("b", TABLE[10:])):
            (folder / f"train-{name}.jsonl").write_text(jsonl(rows))
        (folder / "test.jsonl").write_text(jsonl(TABLE[:1]))
        return str(folder)
    if kind == "saved":
        whole = datasets.Dataset.from_list(TABLE)
        datasets.DatasetDict(train=whole, test=whole.select([0])).save_to_disk(str(folder / "saved"))
        return str(folder / "saved")
    if kind == "one saved":
        datasets.Dataset.from_list(TABLE).save_to_disk(str(folder / "saved"))
        return str(folder / "saved")
    path = folder / f"a.{kind}"
    path.write_bytes(table_as(kind, TABLE))
    return str(path)


@pytest.mark.parametrize("kind", SOURCES)
def test_every_source_can_be_sliced(tmp_path: Path, kind: str) -> None:
    path = source(kind, tmp_path)
    whole = open_rows(path)
    places = [row.place for row in whole]
    identities = {whole.identity}
    for text, first, last in [
        ("train[:5]", 0, 5),
        ("train[8:12]", 8, 12),
        ("train[20:]", 20, 23),
        ("train[-4:-1]", 19, 22),
        ("train[10%:50%]", 2, 12),
        ("train[:100]", 0, 23),
    ]:
        rows = open_rows(path, split=text)
        assert values(rows) == values(rows) == TABLE[first:last]
        assert [row.number for row in rows] == list(range(1, last - first + 1))
        assert [row.place for row in rows] == places[first:last]
        identities.add(rows.identity)
    assert len(identities) == 7
    for text in ("train[23:]", "train[5:5]", "train[9:3]", "train[:0%]"):
        assert "no rows; give data, or a slice of it, that has rows" in error_of(path, split=text)


def test_a_glance_slices_unless_that_needs_the_number_of_rows(tmp_path: Path) -> None:
    path = source("jsonl", tmp_path)
    glanced = glance(path, split="train[3:5]")
    assert glanced is not None
    assert values(glanced) == TABLE[3:5]
    assert glanced.identity == ""
    assert glance(path, split="train[-3:]") is glance(path, split="train[:50%]") is None


@pytest.mark.parametrize("kind", ["folder", "saved"])
def test_splits_and_slices_are_joined_in_their_order(tmp_path: Path, kind: str) -> None:
    rows = open_rows(source(kind, tmp_path), split="test + train[-2:]+train[:1]")
    assert values(rows) == [TABLE[0], *TABLE[-2:], TABLE[0]]
    assert [row.number for row in rows] == [1, 2, 3, 4]


@pytest.mark.parametrize("kind", ["jsonl", "one saved"])
def test_data_without_splits_is_not_joined(tmp_path: Path, kind: str) -> None:
    message = error_of(source(kind, tmp_path), split="train[:1]+train[5:]")
    assert message.endswith(
        "it has no splits that could be joined; give one slice with --data_split, such as train[:1000]"
    )


def test_rows_before_a_slice_are_read_and_rows_behind_it_are_not(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(jsonl(TABLE[:3]) + "no json\n" + jsonl(TABLE[4:]))
    assert values(open_rows(str(path), split="train[1:3]")) == TABLE[1:3]
    assert error_of(str(path), split="train[10:12]").startswith("a.jsonl:4:1: not JSON")


@pytest.mark.parametrize("kind", ["jsonl", "folder", "saved"])
def test_only_the_first_rows_are_read(tmp_path: Path, kind: str) -> None:
    path = source(kind, tmp_path)
    for count in (1, 12, 23, 24):
        rows = open_rows(path, max_rows=count)
        assert values(rows) == values(rows) == TABLE[:count]
    assert values(open_rows(path, split="train[5:]", max_rows=2)) == TABLE[5:7]
    identities = [open_rows(path, max_rows=count).identity for count in (None, 1, 2, 1)]
    assert len(set(identities)) == 3
    assert identities[1] == identities[3]


def test_columns_are_those_of_the_rows_that_are_read(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": 1}\n{"b": 1}\n{"c": 1}\n')
    assert open_rows(str(path), max_rows=2).columns == ("a", "b")
    assert open_rows(str(path), split="train[1:]").columns == ("b", "c")
