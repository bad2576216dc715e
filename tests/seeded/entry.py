"""What the tables of seeded faults have in common."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from tests.served_runs import verify

MOST_SECONDS = 60.0
"""That the questions to a server may take."""
Lab = TypeVar("Lab")


@dataclass(frozen=True)
class Target:
    """A server, and the folder of the run that it should serve."""

    run: Path
    url: str
    model: str = ""
    """Its name there; empty if it is the only one or has the folder's name."""

    @property
    def options(self) -> Sequence[str]:
        return ("--model", self.model) if self.model else ()


@dataclass(frozen=True)
class Seeded(Generic[Lab]):
    """A fault, or with no cause a right server."""

    name: str
    server: str
    """yeonma serve, a proxy before it, llama.cpp or vLLM."""
    cause: str | None
    at: Callable[[Lab], AbstractContextManager[Target]]


@dataclass(frozen=True)
class Outcome:
    """What `yeonma verify --served` said, and how long the questions took."""

    status: int
    causes: Sequence[str]
    seconds: float

    def is_right(self, seeded: Seeded[Lab]) -> bool:
        """Whether the fault's cause is named first, or for a right server none is."""
        named = list(self.causes[:1])
        return named == ([seeded.cause] if seeded.cause else []) and self.status == (1 if seeded.cause else 0)


def outcome_of(seeded: Seeded[Lab], lab: Lab) -> Outcome:
    """Of the fault's server, started by the lab."""
    with seeded.at(lab) as target:
        begin = time.monotonic()
        status, causes, _ = verify(target.run, target.url, *target.options)
        return Outcome(status, causes, time.monotonic() - begin)
