"""Whether a run fits into the memory of its device, and which settings would make it fit."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from yeonma.config.gpus import GPUS
from yeonma.durations import estimated
from yeonma.inspect.forecast import Alternative, Forecast, size
from yeonma.messages import later, tr
from yeonma.run_folder.progress import status_bytes
from yeonma.train.memory_budget import free_memory
from yeonma.train.target_device import TargetDevice

FitOutcome = Literal["fits", "may not fit", "does not fit", "unknown"]
WORDS_OF_OUTCOMES: dict[FitOutcome, str] = {
    "fits": later("fits"),
    "may not fit": later("may not fit"),
    "does not fit": later("does not fit"),
}
VERDICT = later("verdict")
"""The name of the forecast's first line."""
USABLE = {"cpu": 0.85, "cuda": 0.9}
"""The share of memory that a run certainly has. The rest is for the CUDA driver, for holes between tensors, and for
fragments of the CPU's heap. An assumption."""
SAVED = 0.02
"""A setting is named if it saves this part of the peak at least."""
MOST_CURES = 4


@dataclass(frozen=True)
class Verdict:
    """What a forecast means for a device."""

    outcome: FitOutcome
    """unknown: this system does not say how much memory is free."""
    memory_bytes: int | None
    """What the run may have in all, counting what this process holds already."""
    cures: tuple[Alternative, ...]
    """Settings with which it fits; empty if it fits, and if nothing that was tried does."""
    sentence: str
    """With time and price, where they are known."""


def memory_for_run(target: TargetDevice, processes: int = 1) -> int | None:
    """The memory that each process has: that of a planned GPU, or what is free on a device of this machine; None if it
    is not known. Processes on the CPU share its memory, and each has a GPU of its own."""
    if target.gpu is not None:
        return target.gpu.memory_bytes
    free = free_memory(target.device)
    if free is None or target.device.type == "cuda":
        return free
    return (free + (status_bytes("VmRSS") or 0)) // processes


def outcome_of(peak_bytes: int, memory_bytes: int | None, device_type: str) -> FitOutcome:
    """May not fit: by less than the share that is not certain."""
    if memory_bytes is None:
        return "unknown"
    if peak_bytes <= USABLE[device_type] * memory_bytes:
        return "fits"
    return "may not fit" if peak_bytes <= memory_bytes else "does not fit"


def fits_or_unknown(outcome: FitOutcome) -> bool:
    """Whether there is nothing to warn of."""
    return outcome in ("fits", "unknown")


def savings(forecast: Forecast) -> tuple[Alternative, ...]:
    """The settings that, changed alone, save memory."""
    return tuple(one for one in forecast.alternatives if _saves(one, forecast))


def verdict_of(forecast: Forecast, target: TargetDevice, memory_bytes: int | None) -> Verdict:
    """`memory_bytes`: from `memory_for_run`."""
    kind, peak = target.device.type, forecast.memory.peak
    outcome = outcome_of(peak, memory_bytes, kind)
    candidates = [one for one in (*forecast.alternatives, *forecast.combinations) if _saves(one, forecast)]
    cures = () if fits_or_unknown(outcome) else _cures(candidates, memory_bytes, kind)
    is_named = target.gpu is None or bool(target.gpu.source)
    where = _needs(size(peak), None if memory_bytes is None else size(memory_bytes), target.name, is_named)
    parts = [where if outcome == "unknown" else f"{where}: {tr(WORDS_OF_OUTCOMES[outcome])}"]
    if forecast.processes > 1:
        where = tr("each of {processes} processes: {where}", processes=forecast.processes, where=where)
    if forecast.time is not None:
        time = estimated(forecast.time.seconds)
        parts.append(tr("about {time}", time=time) if forecast.time.seconds >= 1 else time)
    if (price := forecast.price) is not None:
        parts.append(
            tr(
                "{of_the_run:,.2f} at {per_hour:g} an hour",
                of_the_run=price.of_the_run,
                per_hour=price.per_hour,
            )
        )
    return Verdict(outcome, memory_bytes, cures, "; ".join(parts))


def _needs(peak: str, memory: str | None, name: str, is_named: bool) -> str:
    """What the run needs of which memory, and on which device if that has a name of its own."""
    if memory is None:
        return (
            tr("needs {peak} on {device}", peak=peak, device=name)
            if is_named
            else tr("needs {peak}", peak=peak)
        )
    if not is_named:
        return tr("needs {peak} of {memory}", peak=peak, memory=memory)
    return tr("needs {peak} of {memory} on {device}", peak=peak, memory=memory, device=name)


def verdict_lines(verdict: Verdict, forecast: Forecast) -> list[tuple[str, str]]:
    """(name, value) lines: the sentence, and what would make the run fit."""
    lines = [(VERDICT, verdict.sentence)]
    lines += [
        (tr("  fits with"), f"{one.options}: {size(one.peak_bytes)} ({one.note})") for one in verdict.cures
    ]
    if fits_or_unknown(verdict.outcome) or verdict.cures:
        return lines
    smallest = min((*forecast.alternatives, *forecast.combinations), key=_peak, default=None)
    if smallest is not None and _saves(smallest, forecast):
        least = f"{smallest.options}: {size(smallest.peak_bytes)} ({smallest.note})"
        lines.append((tr("  needs least with"), least))
    needed = forecast.memory.peak
    large = [gpu for gpu in GPUS if needed <= USABLE["cuda"] * gpu.memory_bytes]
    if large and verdict.memory_bytes is not None and not forecast.device.startswith("cpu"):
        gpu = min(large, key=lambda gpu: gpu.memory_bytes)
        on = tr("{gpu}, which has {memory}, as it is", gpu=gpu.name, memory=size(gpu.memory_bytes))
        lines.append((tr("  fits on"), on))
    return lines


def _peak(alternative: Alternative) -> int:
    return alternative.peak_bytes


def _saves(alternative: Alternative, forecast: Forecast) -> bool:
    return alternative.peak_bytes <= (1 - SAVED) * forecast.memory.peak


def _cures(
    candidates: Iterable[Alternative], memory_bytes: int | None, device_type: str
) -> tuple[Alternative, ...]:
    """Those that fit: the ones with the same result first, then the ones that change fewer settings. None that changes
    all that another one changes, too."""
    fitting = [one for one in candidates if outcome_of(one.peak_bytes, memory_bytes, device_type) == "fits"]
    cures: list[Alternative] = []
    for one in sorted(fitting, key=lambda one: (not one.same_result, len(one.changed))):
        if not any(one.changed >= cure.changed for cure in cures):
            cures.append(one)
    return tuple(cures[:MOST_CURES])
