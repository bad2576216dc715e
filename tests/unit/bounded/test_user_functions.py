"""Functions of the user's in a process of their own: what they give, and what is said when they fail."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from yeonma.bounded.user_functions import UserFunctions, check_function, content_of_file
from yeonma.errors import UserError

SOURCE = """
import os
import random
from helper import TWICE

def number(row, answer):
    return TWICE * len(answer)

def several(row, answer):
    print("looking at", row["id"])
    return {"long": len(answer) > 3, "drawn": random.random()}

def environment(row, answer):
    return {name: float(name in os.environ) for name in ("RANK", "HOME")}

def nothing(row, answer):
    return None

def infinite(row, answer):
    return float("inf")

def text(row, answer):
    return "1"

def empty(row, answer):
    return {}

def nested(row, answer):
    return {"a": [1]}

def key(row, answer):
    return row["lost"]

def ends(row, answer):
    print("before the end")
    os._exit(3)

def leaves(row, answer):
    raise SystemExit(1)

def forever(row, answer):
    while True:
        pass

not_a_function = 3
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "helper.py").write_text("TWICE = 2\n")
    place = tmp_path / "own scores.py"
    place.write_text(SOURCE)
    return place


@pytest.fixture
def functions() -> Iterator[UserFunctions]:
    with UserFunctions(call_seconds=20.0) as made:
        yield made


def test_functions_give_numbers_by_name(file: Path, functions: UserFunctions) -> None:
    assert functions.values(file, "number", {}, "가나다", "row 1") == {"number": 6.0}
    first = functions.values(file, "several", {"id": 7}, "abcd", "row 1")
    assert first == functions.values(file, "several", {"id": object()}, "efgh", "row 2")  # the same draw
    assert first["long"] == 1.0 and 0 <= first["drawn"] < 1


def test_they_have_the_users_environment_without_the_runs_ranks(
    file: Path, functions: UserFunctions, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    assert functions.values(file, "environment", {}, "", "row 1") == {
        "RANK": 0.0,
        "HOME": float("HOME" in os.environ),
    }


@pytest.mark.parametrize(
    ("name", "line", "message"),
    [
        ("nothing", None, "TypeError: it returned None, not a finite number or a dict of numbers"),
        ("infinite", None, "TypeError: it returned inf, not a finite number"),
        ("text", None, "TypeError: it returned '1', not a finite number"),
        ("empty", None, "ValueError: it returned an empty dict"),
        ("nested", None, "TypeError: it returned [1], not a finite number"),
        ("key", 32, "KeyError: 'lost'"),
        ("leaves", 39, "SystemExit: 1"),
        ("not_a_function", None, "TypeError: 'int' object is not callable"),
        ("ends", None, "it ended the process that ran it"),
    ],
)
def test_what_fails_names_file_line_function_row_and_answer(
    file: Path, functions: UserFunctions, name: str, line: int | None, message: str
) -> None:
    with pytest.raises(UserError) as caught:
        functions.values(file, name, {"id": 1}, "an answer", "rows.jsonl:7")
    (problem,) = caught.value.problems
    assert problem.place == (str(file) if line is None else f"{file}:{line}")
    assert f'the function {name} failed on the answer "an answer" to rows.jsonl:7: {message}' in problem.what
    if name == "ends":
        assert "it printed last: before the end" in problem.cure
    assert functions.values(file, "number", {}, "a", "row 1") == {"number": 2.0}  # it goes on, or anew


def test_a_function_that_does_not_end_is_ended(file: Path) -> None:
    with UserFunctions(call_seconds=1.0) as functions:
        with pytest.raises(UserError, match="it did not end within 1 seconds"):
            functions.values(file, "forever", {}, "x", "row 1")
        assert functions.values(file, "number", {}, "a", "row 1") == {"number": 2.0}


def test_an_import_that_fails_names_its_line(tmp_path: Path, functions: UserFunctions) -> None:
    (tmp_path / "one.py").write_text("import json\nimport no_such_package\n\ndef f(row, answer): return 1\n")
    with pytest.raises(UserError) as caught:
        functions.values(tmp_path / "one.py", "f", {}, "", "row 1")
    (problem,) = caught.value.problems
    assert problem.place == f"{tmp_path / 'one.py'}:2"
    assert "importing it failed: ModuleNotFoundError: No module named 'no_such_package'" in problem.what


def test_files_are_read_for_the_function_before_anything_runs(file: Path, tmp_path: Path) -> None:
    for name in ("number", "not_a_function", "TWICE", "random"):
        check_function(file, name, "answer_metrics")
    with pytest.raises(UserError, match='it defines no "nummber"; did you mean "number"'):
        check_function(file, "nummber", "answer_metrics")
    with pytest.raises(UserError, match="cannot be read"):
        check_function(tmp_path / "none.py", "f", "answer_metrics")
    (tmp_path / "broken.py").write_text("x = 1\ndef f(row, answer:\n")
    with pytest.raises(UserError, match=r"broken\.py:2: it is no Python"):
        check_function(tmp_path / "broken.py", "f", "answer_metrics")
    assert content_of_file(file, "answer_metrics") != content_of_file(tmp_path / "helper.py", "x")
