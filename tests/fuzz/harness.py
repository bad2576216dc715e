"""Running a target's cases: each ends in success or in a UserError, in bounded time and memory, with nothing written.

Cases come from hypothesis and are counted here; the runs that make a failing case smaller do not count.
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

from tests.fuzz.place import Hang, Place, bounded, bounded_memory
from yeonma.errors import UserError

CASES_A_ROUND = 500
MOST_FAILURES = 5
LONGEST_MESSAGE = 20_000


@dataclass(frozen=True)
class Target:
    """`read` does to a case what a user would, in `place`'s folder, and raises UserError where it refuses.

    `files` says what a case puts there; `sound` is a case that must be accepted, which shows that the others can be.
    """

    name: str
    cases: st.SearchStrategy[Any]
    sound: Any
    files: Callable[[Any], Mapping[str, bytes | None]]
    read: Callable[[Any, Place], None]
    pristine: Callable[[Path], Mapping[str, bytes]] = lambda folder: {}
    """The files that lie there in every case; may use an empty folder."""


@dataclass
class Tally:
    """What became of a target's cases."""

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
    """What is no Exception in Python's own order: a panic of a library, a case out of time."""


def run_case(target: Target, case: Any, place: Place, last_case: Path) -> bool:
    """Whether the case was accepted. Raises whatever is wrong: any exception that is no UserError, a change on disk,
    a UserError that does not help."""
    with place.holding(target.files(case)):
        try:
            with bounded(f"{target.name}: {case!r}", last_case):
                target.read(case, place)
        except UserError as error:
            _check_told(error)
            return False
        except (Exception, KeyboardInterrupt):
            raise
        except Hang as hang:
            raise Failed(str(hang)) from hang
        except BaseException as error:  # a panic of Rust's, say
            raise Failed(f"{type(error).__name__}: {error}") from error
    return True


def _check_told(error: UserError) -> None:
    assert error.problems, "a UserError that says nothing"
    for problem in error.problems:
        assert problem.what.strip(), "a problem without words"
        assert problem.place or problem.cure, f"neither place nor cure: {problem.what}"
        assert len(str(problem)) <= LONGEST_MESSAGE, f"a message of {len(str(problem)):,} characters"


def run_target(target: Target, count: int, folder: Path, first_seed: int) -> Tally:
    """`count` cases in `folder`, which must be empty. The same seed draws the same cases."""
    tally = Tally()
    scratch = folder / "scratch"
    scratch.mkdir()
    place = Place.make(folder / "place", target.pristine(scratch))
    last_case = folder / "last-case.txt"
    assert run_case(target, target.sound, place, last_case), "the sound case is refused"
    began, rounds = perf_counter(), 0
    with bounded_memory():
        while tally.cases < count and len(tally.failures) < MOST_FAILURES:
            wanted = min(count - tally.cases, CASES_A_ROUND)
            number = crc32(f"{first_seed} {target.name} {rounds}".encode())
            _round(target, wanted, number, place, last_case, tally)
            rounds += 1
    tally.seconds = perf_counter() - began
    return tally


def _round(target: Target, count: int, number: int, place: Place, last_case: Path, tally: Tally) -> None:
    """So many cases, fewer where one fails."""
    failing: Any = None

    def body(case: Any) -> None:
        nonlocal failing
        began = perf_counter()
        try:
            accepted = run_case(target, case, place, last_case)
        except Exception:
            failing = case
            raise
        if failing is not None:  # hypothesis is making it smaller, and at the end runs the smallest
            return
        if (seconds := perf_counter() - began) > tally.slowest_seconds:
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
