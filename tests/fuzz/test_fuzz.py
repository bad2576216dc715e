"""A short run of every target, with the same cases every time, and tests of the harness."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from time import monotonic

import pytest
from hypothesis import strategies as st

from tests.fuzz.__main__ import cases_per_target
from tests.fuzz.harness import Target, run_target
from tests.fuzz.sandbox import Hang, Sandbox, bounded, bounded_memory
from tests.fuzz.targets import CASES, target_of
from yeonma.errors import UserError


@pytest.mark.parametrize("name", CASES)
def test_every_target_case_succeeds_or_ends_in_a_helpful_error(name: str, tmp_path: Path) -> None:
    tally = run_target(target_of(name), CASES[name] // 50, tmp_path, first_seed=0)
    assert tally.failures == []
    assert tally.cases == CASES[name] // 50
    assert tally.refused > 0, "nothing was damaged"  # the harness checks that valid cases are accepted


def refuse_odd_cases(case: int, sandbox: Sandbox) -> None:
    if case % 2:
        raise UserError("odd", place="case")


def target_with(read: Callable[[int, Sandbox], None]) -> Target:
    def read_case(case: int, sandbox: Sandbox) -> None:
        refuse_odd_cases(case, sandbox)
        if case == 4:
            read(case, sandbox)

    return Target(
        "own",
        st.sampled_from(range(6)),
        0,
        lambda case: {"data": b"x"},
        read_case,
        lambda folder: {"out/a": b"1"},
    )


def failures_of(read: Callable[[int, Sandbox], None], folder: Path) -> str:
    tally = run_target(target_with(read), 40, folder, first_seed=0)
    return "\n".join(tally.failures)


def saying(text: str) -> UserError:
    """An error with a message that no UserError has by itself."""
    error = UserError("x", place="a")
    error.args = (text,)
    return error


def test_cases_are_counted_as_accepted_or_refused(tmp_path: Path) -> None:
    tally = run_target(target_with(lambda case, sandbox: None), 40, tmp_path, first_seed=0)
    assert tally.accepted + tally.refused == tally.cases == 40
    assert tally.accepted > 5 and tally.refused > 5 and not tally.failures


@pytest.mark.parametrize(
    ("read", "message"),
    [
        (lambda case, sandbox: {}["x"], "KeyError"),
        (lambda case, sandbox: Path("out/b").write_text("b"), "written, changed or removed: out/b"),
        (lambda case, sandbox: Path("out/a").write_text("22"), "written, changed or removed: out/a"),
        (lambda case, sandbox: Path("data").unlink(), "written, changed or removed: data"),
        (
            lambda case, sandbox: (sandbox.cache / "x.tmp").mkdir(parents=True),
            "left in the token cache: x.tmp",
        ),
        (lambda case, sandbox: bytearray(1 << 40), "MemoryError"),
        (lambda case, sandbox: fail(UserError([])), "a UserError without problems"),
        (lambda case, sandbox: fail(UserError("wrong")), "neither place nor cure"),
        (lambda case, sandbox: fail(saying("x" * 30_000)), "a message: 30,000 characters"),
        (lambda case, sandbox: fail(saying("a\x1b[31m")), "a message: '\\x1b'"),
        (lambda case, sandbox: fail(SystemExit(3)), "SystemExit: 3"),
    ],
)
def test_forbidden_behaviour_of_a_case_is_a_failure(
    read: Callable[[int, Sandbox], None], message: str, tmp_path: Path
) -> None:
    failures = failures_of(read, tmp_path)
    assert message in failures
    assert "own: 4\n" in failures  # the case is named


def fail(error: BaseException) -> None:
    raise error


def test_hanging_case_is_stopped_and_saved(tmp_path: Path) -> None:
    started = monotonic()
    with pytest.raises(Hang), bounded("case 7", tmp_path / "last-case.txt", seconds=0.2):
        while True:
            with suppress(Exception):
                monotonic()
    assert monotonic() - started < 60
    assert (tmp_path / "last-case.txt").read_text() == "case 7\n"


def test_bounded_memory_limits_only_its_block() -> None:
    with bounded_memory(1 << 30), pytest.raises(MemoryError):
        bytearray(1 << 31)
    assert len(bytearray(1 << 10)) == 1 << 10


def test_working_directory_and_environment_are_restored(tmp_path: Path) -> None:
    before = os.getcwd(), dict(os.environ)
    failures_of(lambda case, sandbox: fail(ValueError("no")), tmp_path)
    assert (os.getcwd(), dict(os.environ)) == before


@pytest.mark.parametrize("cases", [1, 7, 100, 10_000])
def test_cases_per_target_sum_to_the_requested_number(cases: int) -> None:
    assert sum(cases_per_target(cases, list(CASES)).values()) == cases
