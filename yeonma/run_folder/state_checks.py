"""What a checkpoint's state.json must hold: the types and bounds of every value that a run would go on with.

Checksums show accidents. A folder that was edited, or written by another program, may have sums that are right.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

from yeonma.errors import brief
from yeonma.messages import counted, tr

_SHA256 = re.compile("[0-9a-f]{64}")
_LARGEST = 2**63 - 1


def check_state(state: Mapping[str, Any]) -> None:
    """Raises ValueError for a value that no run writes. `state`: the attributes of RunProgress by name."""
    for name, value in state.items():
        if not _CHECKS[name](value):
            raise ValueError(tr("{name} is {value}", name=name, value=brief(repr(value))))
    step, best, total = state["step"], state["best_step"], state["identity"].get("steps")
    if best is not None and best > step:
        raise ValueError(tr("the best step, {best}, comes after step {step}", best=best, step=step))
    score = state["best_score"]
    if best is None and score is not None:
        raise ValueError(tr("it has a best_score and no best_step"))
    if score is None and (best is None) != (state["best_loss"] is None):
        raise ValueError(tr("it has only one of best_step and best_loss"))
    if type(total) is int and step > total:
        steps = counted(total, "step")
        raise ValueError(tr("it is the state of step {step} of a run of {steps}", step=step, steps=steps))


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value <= _LARGEST


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) <= _LARGEST and math.isfinite(value)


def _is_sizes(value: Any) -> bool:
    return type(value) is list and all(_is_count(size) and size > 0 for size in value)


def _is_log_sums(value: Any) -> bool:
    return type(value) is dict and all(
        type(recorded) is dict
        and recorded.keys() == {"lines", "sha256"}
        and _is_count(recorded["lines"])
        and type(recorded["sha256"]) is str
        and _SHA256.fullmatch(recorded["sha256"]) is not None
        for recorded in value.values()
    )


_CHECKS: Mapping[str, Callable[[Any], bool]] = {
    "step": lambda value: _is_count(value) and value > 0,
    "schedule": lambda value: type(value) is dict,
    "best_loss": lambda value: value is None or _is_number(value),
    "best_step": lambda value: value is None or (_is_count(value) and value > 0),
    "evaluations_without_gain": _is_count,
    "identity": lambda value: type(value) is dict,
    "environment": lambda value: (
        type(value) is dict and all(type(text) is str or _is_count(text) for text in value.values())
    ),
    "micro_batches": _is_sizes,
    "micro_batch_tokens": _is_sizes,
    "evaluation_due": lambda value: type(value) is bool,
    "carried": lambda value: type(value) is dict and all(map(_is_number, value.values())),
    "logs": _is_log_sums,
    "best_score": lambda value: value is None or _is_number(value),
}
