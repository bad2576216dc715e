"""How long a run takes, by phase: measured for people to read, and in no file that must be equal after a kill."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from yeonma.durations import in_two_units
from yeonma.messages import tr

RunPhase = Literal["loading", "reference", "training", "validation", "saving", "answers"]
WORDS_OF_PHASES: dict[RunPhase, str] = {
    "loading": tr("loading"),
    "reference": tr("reference"),
    "training": tr("training"),
    "validation": tr("validation"),
    "saving": tr("saving"),
    "answers": tr("answers for the card"),
}


@dataclass
class PhaseClock:
    """The seconds of each phase of one call of a run. It begins in the phase `loading`."""

    now: Callable[[], float] = time.perf_counter
    seconds: dict[RunPhase, float] = field(default_factory=lambda: dict.fromkeys(WORDS_OF_PHASES, 0.0))

    def __post_init__(self) -> None:
        self._phase: RunPhase = "loading"
        self._since = self.now()

    def enter(self, phase: RunPhase) -> None:
        """Ends the current phase and begins another one."""
        now = self.now()
        self.seconds[self._phase] += now - self._since
        self._phase, self._since = phase, now

    def move(self, phase: RunPhase, seconds: float) -> None:
        """Counts seconds of the current phase for another one, such as an evaluation within training."""
        self.seconds[phase] += seconds
        self._since += seconds

    def summary(self) -> str:
        """`took 3m12s: training 2m40s, validation 20s, saving 12s`, up to now, without phases below half a second."""
        self.enter(self._phase)
        shown = [
            f"{WORDS_OF_PHASES[phase]} {in_two_units(seconds)}"
            for phase, seconds in self.seconds.items()
            if seconds >= 0.5
        ]
        total = in_two_units(sum(self.seconds.values()))
        if not shown:
            return tr("took {time}", time=total)
        return tr("took {time}: {phases}", time=total, phases=", ".join(shown))
