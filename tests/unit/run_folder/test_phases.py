"""The time of a run by phase."""

from __future__ import annotations

import pytest

from yeonma.run_folder.phases import PhaseClock


class Clock:
    def __init__(self) -> None:
        self.time = 100.0

    def __call__(self) -> float:
        return self.time


def test_phases_sum_to_the_whole_and_moved_seconds_count_once() -> None:
    clock = Clock()
    phases = PhaseClock(clock)
    clock.time += 12
    phases.enter("training")
    clock.time += 100
    phases.move("validation", 20)
    clock.time += 5
    phases.move("saving", 3)
    phases.enter("answers")
    clock.time += 0.25
    assert phases.summary() == "took 1m57s: loading 12s, training 1m22s, validation 20s, saving 3s"
    assert sum(phases.seconds.values()) == pytest.approx(clock.time - 100)
    clock.time += 30
    assert phases.summary().endswith(", saving 3s, answers for the card 30s")


def test_a_call_of_no_time_has_no_parts() -> None:
    assert PhaseClock(Clock()).summary() == "took 0s"
