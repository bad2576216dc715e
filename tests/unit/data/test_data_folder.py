"""Folders: splits by the names of files and folders, and by the README of a clone from the hub."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.tables import error_of, values
from yeonma.data.rows import glance, open_rows

Folder = Callable[..., str]


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    """Makes a folder named `set`. Every data file has one row, with the file's name in it."""

    def make(*names: str, card: str | None = None) -> str:
        root = tmp_path / "set"
        for name in names:
            path = root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.suffix == ".parquet":
                pq.write_table(pa.table({"file": [name]}), path)
            else:
                path.write_text(
                    f'{{"file": {json.dumps(name)}}}\n' if path.suffix == ".jsonl" else f"file\n{name}\n"
                )
        if card is not None:
            root.mkdir(exist_ok=True)
            (root / "README.md").write_text(card)
        return str(root)

    return make


def files(path: str, split: str = "train") -> list[object]:
    """The files that are read, in order."""
    rows = open_rows(path, split=split)
    glanced = glance(path, split=split)
    assert glanced is not None
    assert [row.values for row in glanced] == [row.values for row in rows]
    return [row["file"] for row in values(rows)]


# Splits by name


@pytest.mark.parametrize(
    "names",
    [
        ("train.jsonl", "test.jsonl", "validation.jsonl"),
        (
            "data/train-00000-of-00002.parquet",
            "data/train-00001-of-00002.parquet",
            "data/test-00000-of-00001.parquet",
        ),
        ("data/train.jsonl", "data/dev.jsonl"),
        ("train/a.jsonl", "train/b.jsonl", "test/a.jsonl"),
        ("data/train/a.csv", "data/test/a.csv"),
        ("my_train_file.csv", "eval_1.csv", "training2.csv", "notes.csv"),
        ("x-train.jsonl", "x-test.jsonl"),
        ("Train.jsonl", "Test.jsonl"),
    ],
)
def test_the_split_is_that_of_the_library(folder: Folder, names: tuple[str, ...]) -> None:
    path = folder(*names)
    read = files(path)
    assert 0 < len(read) < len(names)
    if not any(name.startswith(("Train", "notes")) for name in names):  # the library looks for lower case
        patterns = datasets.data_files.get_data_patterns(path)
        expected = datasets.data_files.DataFilesDict.from_patterns(patterns, path)["train"]
        assert sorted(f"{path}/{name}" for name in read) == sorted(expected)
    assert all("train" in str(name).lower() for name in read)


def test_a_split_is_chosen_and_the_others_are_told(folder: Folder) -> None:
    path = folder(
        "train-a.jsonl",
        "train-b.jsonl",
        "val.jsonl",
        "test.jsonl",
        "more.jsonl",
        "LICENSE",
        ".git/train.jsonl",
    )
    assert files(path) == ["train-a.jsonl", "train-b.jsonl"]
    assert open_rows(path).notes == (
        f'{path}: the split "train" is read (2 files); not test, validation, more.jsonl',
    )
    for split in ("validation", "val", "dev"):
        assert files(path, split) == ["val.jsonl"]
    assert error_of(path, split="tests") == (
        'set: no split "tests"; it has test, train, validation; did you mean "test"?'
    )
    assert open_rows(path).identity != open_rows(path, split="val").identity


def test_files_of_one_split_or_none_are_all_read(folder: Folder) -> None:
    path = folder("a.jsonl", "b.jsonl", "test.jsonl")
    assert files(path) == ["a.jsonl", "b.jsonl", "test.jsonl"]
    assert open_rows(path).notes == (f'{path}: its files are those of the split "test"',)
    assert open_rows(path, split="test").notes == ()


def test_shards_of_a_split_with_any_name_are_found(folder: Folder) -> None:
    path = folder("data/ko-00000-of-00001.parquet", "data/en.news-00000-of-00001.parquet")
    assert files(path, "ko") == ["data/ko-00000-of-00001.parquet"]
    assert files(path, "en.news") == ["data/en.news-00000-of-00001.parquet"]
    assert error_of(path) == 'set: no split "train"; it has en.news, ko; choose one with --data_split'


def test_a_chosen_split_has_one_format(folder: Folder) -> None:
    path = folder("train.csv", "train.jsonl", "test.jsonl")
    assert error_of(path).startswith("set: files of several formats: .csv, .jsonl")
    assert files(path, "test") == ["test.jsonl"]


def test_pointers_of_git_lfs_are_no_data(folder: Folder) -> None:
    path = folder("data/train.jsonl")
    text = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
    (Path(path) / "data" / "train.jsonl").write_text(text)
    assert error_of(path) == (
        "set/data/train.jsonl: a pointer of Git LFS, not the data itself; run `git lfs pull` in its folder"
    )


# Splits by the README

CARD = """---
license: cc0-1.0
configs:
- config_name: default
  data_files:
  - split: train
    path: ko/first-*.jsonl
  - split: extra
    path:
    - more/**
    - ko/last.jsonl
---
# A data set
"""


def test_the_readme_says_which_files_a_split_has(folder: Folder) -> None:
    path = folder(
        "ko/first-1.jsonl", "ko/first-2.jsonl", "ko/last.jsonl", "more/a/b.jsonl", "more/c.jsonl", card=CARD
    )
    assert files(path) == ["ko/first-1.jsonl", "ko/first-2.jsonl"]
    assert files(path, "extra") == ["more/a/b.jsonl", "more/c.jsonl", "ko/last.jsonl"]
    assert open_rows(path).notes == (f'{path}: the split "train" is read (2 files); not extra',)
    assert error_of(path, split="test").startswith('set: no split "test"; it has train, extra')
    for split in ("train", "extra"):
        library = datasets.load_dataset_builder(path).config.data_files[split]
        assert [f"{path}/{name}" for name in files(path, split)] == [str(file) for file in library]


@pytest.mark.parametrize(
    ("data_files", "expected"),
    [
        ("data_files: a/x.jsonl", ["a/x.jsonl"]),
        ("data_files:\n  - a/*.jsonl\n  - b/z.jsonl", ["a/x.jsonl", "a/y.jsonl", "b/z.jsonl"]),
        ("data_files:\n    train: a/y.jsonl", ["a/y.jsonl"]),
        ("data_dir: a\n  data_files: x.jsonl", ["a/x.jsonl"]),
        ("data_dir: a", ["a/x.jsonl", "a/y.jsonl"]),
    ],
)
def test_every_form_of_data_files_is_understood(folder: Folder, data_files: str, expected: list[str]) -> None:
    card = f"---\nconfigs:\n- config_name: x\n  {data_files}\n---\n"
    assert files(folder("a/x.jsonl", "a/y.jsonl", "b/z.jsonl", card=card)) == expected


def test_one_of_several_configs_is_named_after_a_colon(folder: Folder) -> None:
    configs = "".join(f"- config_name: {name}\n  data_files: {name}.jsonl\n" for name in ("ko", "en"))
    card = f"---\nconfigs:\n{configs}{{}}---\n"
    path = folder("ko.jsonl", "en.jsonl", card=card.format(""))
    assert error_of(path) == "set: several configs: ko, en; name one: set:ko"
    assert files(f"{path}:ko") == ["ko.jsonl"]
    assert files(f"{path}:en") == ["en.jsonl"]
    assert error_of(f"{path}:eng").endswith('set: no config "eng"; did you mean "en"?')
    folder(card=card.format("  default: true\n"))
    assert files(path) == ["en.jsonl"]
    folder(card="no front matter")
    assert error_of(f"{path}:ko").endswith('set: no config "ko"; its README names none')


@pytest.mark.parametrize("pattern", ["../other/*.jsonl", "/etc/*.jsonl", "https://example.org/a.jsonl"])
def test_a_readme_cannot_name_files_outside_the_folder(folder: Folder, pattern: str) -> None:
    path = folder("a.jsonl", card=f"---\nconfigs:\n- config_name: x\n  data_files: {pattern}\n---\n")
    assert error_of(path).startswith(
        f'set/README.md: "{pattern}" is not inside the folder; download its files'
    )


def test_missing_files_of_a_config_are_an_error(folder: Folder) -> None:
    path = folder("a.jsonl", card="---\nconfigs:\n- config_name: x\n  data_files: data/*.parquet\n---\n")
    assert error_of(path).startswith('set/README.md: no data files for the split "train" (data/*.parquet)')
    folder(card="---\nconfigs:\n- config_name: x\n  data_dir: nowhere\n---\n")
    assert error_of(path).startswith('set/README.md: no folder "nowhere"; download the whole data set')


@pytest.mark.parametrize(
    "card",
    [
        "---\nconfigs: [\n---\n",
        "---\nconfigs: x\nconfigs: y\n---\n",
        "---\nconfigs: text\n---\n",
        "---\nconfigs:\n- data_files: 3\n---\n",
        "---\nconfigs:\n- config_name: x\n  data_files: 3\n---\n",
        "---\nconfigs:\n- config_name: x\n  data_files: [{split: a}]\n---\n",
        "---\nconfigs:\n- config_name: x\n  data_files: {train: 3}\n---\n",
    ],
)
def test_a_readme_that_cannot_be_understood_is_told(folder: Folder, card: str) -> None:
    path = folder("train.jsonl", "test.jsonl", card=card)
    assert files(path) == ["train.jsonl"]
    note = open_rows(path).notes[0]
    assert note.startswith(f"{path}/README.md")
    assert note.endswith("so files are chosen by their names")


@pytest.mark.parametrize(
    "card", ["", "# Text\n", "---\nlicense: mit\n---\n", "---\n", "---\nconfigs: []\n---\n"]
)
def test_a_readme_without_configs_leaves_splits_to_the_names(folder: Folder, card: str) -> None:
    path = folder("train.jsonl", "test.jsonl", card=card)
    assert files(path) == ["train.jsonl"]
    assert open_rows(path).notes == (f'{path}: the split "train" is read (1 file); not test',)
