"""Runs the cases of a target. They must end in success or in a UserError, within limits, and write nothing.

Cases come from hypothesis and are counted here. Runs that shrink a failing case do not count.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any
from zlib import crc32

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from tests.fuzz.sandbox import Hang, Sandbox, bounded, bounded_memory
from tests.hostile import check_messages
from yeonma.errors import UserError

CASES_PER_ROUND = 500
MAX_FAILURES = 5


@dataclass(frozen=True)
class Target:
    """`read` does with a case what a user would, in the sandbox's folder. It raises UserError if the case is refused.

    `files` returns the files of a case. `valid` is a case that must be accepted, which shows that others can be.
    """

    name: str
    cases: st.SearchStrategy[Any]
    valid: Any
    files: Callable[[Any], Mapping[str, bytes | None]]
    read: Callable[[Any, Sandbox], None]
    pristine: Callable[[Path], Mapping[str, bytes]] = lambda folder: {}
    """The files that are there in every case; may use an empty folder."""


@dataclass
class Tally:
    """The outcomes of a target's cases."""

    accepted: int = 0
    refused: int = 0
    failures: list[str] = field(default_factory=list)
    seconds: float = 0.0
    slowest_seconds: float = 0.0
    slowest_case: str = ""

    @property
    def cases(self) -> int:
        return self.accepted + self.refused + len(self.failures)

    def line(self) -> dict[str, float]:
        return {
            "cases": self.cases,
            "accepted": self.accepted,
            "refused": self.refused,
            "failures": len(self.failures),
            "seconds": round(self.seconds, 1),
            "slowest_seconds": round(self.slowest_seconds, 2),
        }


class Failed(Exception):
    """A failure that is not an Exception in Python: a panic in a library, or a time-out."""


def run_case(target: Target, case: Any, sandbox: Sandbox, last_case: Path) -> bool:
    """Whether the case was accepted. Raises for every failure: an exception other than UserError, a change on disk, or
    a UserError that does not help."""
    with sandbox.with_files(target.files(case)):
        try:
            with bounded(f"{target.name}: {case!r}", last_case):
                target.read(case, sandbox)
        except UserError as error:
            _check_message(error)
            return False
        except (Exception, KeyboardInterrupt):
            raise
        except Hang as hang:
            raise Failed(str(hang)) from hang
        except BaseException as error:  # such as a panic in Rust
            raise Failed(f"{type(error).__name__}: {error}") from error
    return True


def _check_message(error: UserError) -> None:
    assert error.problems, "a UserError without problems"
    for problem in error.problems:
        assert problem.what.strip(), "a problem without words"
        assert problem.place or problem.cure, f"neither place nor cure: {problem.what}"
    check_messages(str(error), "a message")


def run_target(target: Target, count: int, folder: Path, first_seed: int) -> Tally:
    """Run `count` cases in `folder`, which must be empty. The same seed gives the same cases."""
    tally = Tally()
    scratch = folder / "scratch"
    scratch.mkdir()
    sandbox = Sandbox.make(folder, target.pristine(scratch))
    last_case = folder / "last-case.txt"
    assert run_case(target, target.valid, sandbox, last_case), "the valid case is refused"
    started, rounds = perf_counter(), 0
    with bounded_memory():
        while tally.cases < count and len(tally.failures) < MAX_FAILURES:
            cases = min(count - tally.cases, CASES_PER_ROUND)
            number = crc32(f"{first_seed} {target.name} {rounds}".encode())
            _round(target, cases, number, sandbox, last_case, tally)
            rounds += 1
    tally.seconds = perf_counter() - started
    return tally


def _round(target: Target, count: int, number: int, sandbox: Sandbox, last_case: Path, tally: Tally) -> None:
    """Run `count` cases, or fewer if one fails."""
    failing: Any = None

    def body(case: Any) -> None:
        nonlocal failing
        started = perf_counter()
        try:
            accepted = run_case(target, case, sandbox, last_case)
        except Exception:
            failing = case
            raise
        if failing is not None:  # hypothesis is shrinking the case, and finally runs the smallest one
            return
        if (seconds := perf_counter() - started) > tally.slowest_seconds:
            tally.slowest_seconds, tally.slowest_case = seconds, repr(case)
        if accepted:
            tally.accepted += 1
        else:
            tally.refused += 1

    rules = settings(
        max_examples=count,
        deadline=None,
        database=None,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
        report_multiple_bugs=False,
        print_blob=False,
    )
    try:
        seed(number)(rules(given(target.cases)(body)))()
    except Exception:
        tally.failures.append(f"{traceback.format_exc()}{target.name}: {failing!r}\n")
