"""A short run of every target, the same cases each time; and that the harness catches what it is there for."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from time import monotonic

import pytest
from hypothesis import strategies as st

from tests.fuzz.__main__ import shared
from tests.fuzz.harness import Target, run_target
from tests.fuzz.place import Hang, Place, bounded, bounded_memory
from tests.fuzz.targets import CASES, target_of
from yeonma.errors import UserError


@pytest.mark.parametrize("name", CASES)
def test_whatever_is_read_ends_in_success_or_in_an_error_that_helps(name: str, tmp_path: Path) -> None:
    tally = run_target(target_of(name), CASES[name] // 50, tmp_path, first_seed=0)
    assert tally.failures == []
    assert tally.cases == CASES[name] // 50
    assert tally.refused > 0  # that the sound case is accepted is seen to first


def harmless(case: int, place: Place) -> None:
    if case % 2:
        raise UserError("odd", place="case")


def target(read: Callable[[int, Place], None]) -> Target:
    def some(case: int, place: Place) -> None:
        harmless(case, place)
        if case == 4:
            read(case, place)

    return Target(
        "own", st.sampled_from(range(6)), 0, lambda case: {"data": b"x"}, some, lambda folder: {"out/a": b"1"}
    )


def told(read: Callable[[int, Place], None], folder: Path) -> str:
    tally = run_target(target(read), 40, folder, first_seed=0)
    return "\n".join(tally.failures)


def test_cases_are_counted_by_what_became_of_them(tmp_path: Path) -> None:
    tally = run_target(target(lambda case, place: None), 40, tmp_path, first_seed=0)
    assert tally.accepted + tally.refused == tally.cases == 40
    assert tally.accepted > 5 and tally.refused > 5 and not tally.failures


@pytest.mark.parametrize(
    ("read", "words"),
    [
        (lambda case, place: {}["x"], "KeyError"),
        (lambda case, place: Path("out/b").write_text("b"), "written, changed or removed: out/b"),
        (lambda case, place: Path("out/a").write_text("22"), "written, changed or removed: out/a"),
        (lambda case, place: Path("data").unlink(), "written, changed or removed: data"),
        (lambda case, place: (place.cache / "x.tmp").mkdir(parents=True), "left in the token cache: x.tmp"),
        (lambda case, place: bytearray(1 << 40), "MemoryError"),
        (lambda case, place: fail(UserError([])), "a UserError that says nothing"),
        (lambda case, place: fail(UserError("wrong")), "neither place nor cure"),
        (lambda case, place: fail(UserError("x" * 30_000, place="a")), "a message of"),
        (lambda case, place: fail(SystemExit(3)), "SystemExit: 3"),
    ],
)
def test_what_a_case_must_not_do_is_a_failure(
    read: Callable[[int, Place], None], words: str, tmp_path: Path
) -> None:
    found = told(read, tmp_path)
    assert words in found
    assert "own: 4\n" in found  # the case is named


def fail(error: BaseException) -> None:
    raise error


def test_a_case_that_does_not_end_is_ended_and_named(tmp_path: Path) -> None:
    began = monotonic()
    with pytest.raises(Hang), bounded("case 7", tmp_path / "last-case.txt", seconds=0.2):
        while True:
            with suppress(Exception):
                monotonic()
    assert monotonic() - began < 10
    assert (tmp_path / "last-case.txt").read_text() == "case 7\n"


def test_memory_is_bounded_for_a_while_only() -> None:
    with bounded_memory(1 << 30), pytest.raises(MemoryError):
        bytearray(1 << 31)
    assert len(bytearray(1 << 10)) == 1 << 10


def test_the_working_directory_and_the_environment_come_back(tmp_path: Path) -> None:
    before = os.getcwd(), dict(os.environ)
    told(lambda case, place: fail(ValueError("no")), tmp_path)
    assert (os.getcwd(), dict(os.environ)) == before


@pytest.mark.parametrize("cases", [1, 7, 100, 10_000])
def test_cases_are_shared_out_whole(cases: int) -> None:
    assert sum(shared(cases, list(CASES)).values()) == cases
