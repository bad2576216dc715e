from __future__ import annotations

from fractions import Fraction
from typing import Any

import pytest

from yeonma.config.data_sets import DataSetSettings, data_sets, is_entry
from yeonma.config.parse import config_from_keywords, read_config, to_yaml
from yeonma.config.settings import DataSettings
from yeonma.errors import UserError


def read(*argv: str) -> DataSettings:
    return read_config(DataSettings, argv, verb="sft").config


def sets_of(data_path: Any, **settings: Any) -> tuple[DataSetSettings, ...]:
    return data_sets(DataSettings(data_path=data_path, **settings))


def problems_of(data_path: Any, **settings: Any) -> list[str]:
    with pytest.raises(UserError) as error:
        sets_of(data_path, **settings)
    return [str(problem) for problem in error.value.problems]


def test_a_single_path_has_the_settings_of_the_run() -> None:
    (one,) = sets_of(
        "a/rows.csv",
        data_split="train[:9]",
        encoding="cp949",
        delimiter=";",
        columns={"document": "body"},
        template="title",
        max_rows=7,
        val_set_size=0.5,
    )
    assert (one.path, one.name, one.split, one.encoding) == ("a/rows.csv", "a/rows.csv", "train[:9]", "cp949")
    assert (one.delimiter, one.columns, one.template) == (";", {"document": "body"}, "title")
    assert (one.limit, one.val_set_size, one.weight, one.repeats) == (7, 0.5, None, 1)


def test_an_entrys_own_settings_come_before_those_of_the_run() -> None:
    path, entry = sets_of(
        ["a.jsonl", {"path": "b.csv", "split": "test", "limit": 3, "template": "alpaca", "val_set_size": 2}],
        max_rows=5,
        template="title",
        val_set_size=0.1,
    )
    assert (path.split, path.limit, path.template, path.val_set_size) == ("train", 5, "title", 0.1)
    assert (entry.split, entry.limit, entry.template, entry.val_set_size) == ("test", 3, "alpaca", 2)


def test_an_entry_that_says_how_to_validate_needs_no_val_set_size() -> None:
    _, entry = sets_of(["a.jsonl", {"path": "b.jsonl", "val_split": "test"}], val_set_size=0.1)
    assert (entry.val_set_size, entry.val_split) == (0, "test")


def test_weights_are_exact_and_one_where_others_have_one() -> None:
    weights = [one.weight for one in sets_of([{"path": "a", "weight": 0.1}, "b", {"path": "c", "weight": 3}])]
    assert weights == [Fraction(1, 10), Fraction(1), Fraction(3)]
    assert [one.weight for one in sets_of(["a", "b"])] == [None, None]


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["data/a.jsonl", "data/b.jsonl"], ["a.jsonl", "b.jsonl"]),
        (["x/rows.jsonl", "y/rows.jsonl"], ["x/rows.jsonl", "y/rows.jsonl"]),
        (["rows.jsonl", {"path": "rows.jsonl", "split": "test"}], ["rows.jsonl train", "rows.jsonl test"]),
        (["rows.jsonl", "rows.jsonl"], ["rows.jsonl (1)", "rows.jsonl (2)"]),
        (["org/set:ko", "org/set:en"], ["set:ko", "set:en"]),
    ],
)
def test_names_are_short_and_unique(paths: list[Any], names: list[str]) -> None:
    assert [one.name for one in sets_of(paths)] == names


def test_all_problems_of_all_entries_are_reported_at_once() -> None:
    problems = problems_of(
        [
            {"path": "a.jsonl", "wieght": 2},
            {"template": "title"},
            {"path": "b.jsonl", "weight": -1, "limit": 0},
            3,
            {"path": "c.jsonl", "columns": {"document": 1}, "repeats": 1.5},
            {"path": "d.jsonl", "val_set_size": 2, "val_split": "test"},
        ]
    )
    assert problems == [
        'data_path[1]: unknown key "wieght"; did you mean "weight"?',
        "data_path[2]: it has no path; write path: and the file's name",
        "data_path[3].weight: -1 is not valid; give a number above 0",
        "data_path[3].limit: 0 is not valid; give a number of rows",
        "data_path[4]: neither a path nor an entry: 3; give a path, or an entry such as "
        "{path: chats.jsonl, weight: 2}",
        "data_path[5].columns: {'document': 1} is not valid; give a mapping such as {document: body}",
        "data_path[5].repeats: 1.5 is not valid; give a whole number of at least 1",
        "data_path[6].val_set_size: val_set_size and val_split are both given; give only one of them",
    ]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0, True, "2", 1e9])
def test_a_weight_is_a_number_above_zero(value: object) -> None:
    (problem,) = problems_of([{"path": "a.jsonl", "weight": value}])
    assert problem.startswith("data_path[1].weight:")


def test_weights_and_repeats_do_not_go_together() -> None:
    (problem,) = problems_of([{"path": "a", "weight": 2}, {"path": "b", "repeats": 3}])
    assert problem.endswith("give either weights, or repeats")


def test_one_validation_path_for_each_data_set() -> None:
    assert [one.val_path for one in sets_of(["a", "b"], val_data_path=["c", None])] == ["c", None]
    (problem,) = problems_of(["a", "b"], val_data_path="c")
    assert problem == (
        "val_data_path: 1 path for 2 data sets; give one for each data set in a list, or `val_path` in the "
        "entries of data_path"
    )
    assert problems_of(["a"], val_data_path=["c", "d"]) == [
        "val_data_path: 2 paths for 1 data set; give one path"
    ]


def test_ways_to_validate_exclude_each_other() -> None:
    assert problems_of("a", val_set_size=3, val_data_path="b") == [
        "val_set_size: val_set_size and val_data_path are both given; give only one of them"
    ]
    assert problems_of("a", val_data_path="b", val_split="test") == [
        "val_data_path: val_data_path and val_split are both given; give only one of them"
    ]


def test_an_empty_list_is_an_error() -> None:
    assert problems_of([]) == ["data_path: the list is empty; give at least one path"]


def test_only_a_mapping_with_a_path_and_no_other_columns_is_an_entry() -> None:
    assert is_entry({"path": "a.jsonl", "weight": 2})
    assert not is_entry({"path": "a.jsonl", "answer": "b"})
    assert not is_entry({"question": "a", "answer": "b"})


def test_the_command_line_takes_paths_as_words_and_as_a_list() -> None:
    assert read("--data_path", "a.jsonl").data_path == "a.jsonl"
    assert read("--data_path", "a.jsonl", "b.csv", "--max_rows", "3").data_path == ["a.jsonl", "b.csv"]
    listed = read("--data_path", "[a.jsonl, {path: b.csv, weight: 2}]").data_path
    assert listed == ["a.jsonl", {"path": "b.csv", "weight": 2}]


def test_a_path_is_never_read_as_yaml(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "[1, 2]").touch()
    for path in ("org/name:config", "a: b.jsonl", "{rows}.jsonl", "[1, 2]", "1e5", "null.jsonl"):
        assert read("--data_path", path).data_path == path


def test_entries_stay_the_same_through_settings_yaml(tmp_path: Any) -> None:
    data_path = [
        "a.jsonl",
        {"path": "학습.csv", "weight": 0.25, "columns": {"answer": "제목"}, "split": "train[:9]"},
    ]
    given = config_from_keywords(DataSettings, {"data_path": data_path}).config
    (tmp_path / "settings.yaml").write_text(to_yaml(given), encoding="utf-8")
    assert read("--config", str(tmp_path / "settings.yaml")) == given
    assert data_sets(given)[1].columns == {"answer": "제목"}
