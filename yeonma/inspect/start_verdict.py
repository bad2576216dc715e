"""The verdict at the start of a run: what it needs, whether that fits, and about how long it takes.

The forecast is the one of `yeonma inspect`, from its cache if it is there. Nothing is measured: the time follows from
the rate that `inspect` measured on this machine, and is left out if there is none.
"""

from __future__ import annotations

from dataclasses import replace
from hashlib import sha256
from pathlib import Path

from yeonma.errors import first_line
from yeonma.inspect.answer_time import with_run_answers
from yeonma.inspect.estimate import combinations, estimate
from yeonma.inspect.fit_verdict import (
    fits_or_unknown,
    memory_for_run,
    outcome_of,
    verdict_lines,
    verdict_of,
)
from yeonma.inspect.forecast import Forecast, timed_by_rate
from yeonma.inspect.forecast_cache import forecast_key, read_forecast, write_forecast
from yeonma.inspect.probe import known_rate
from yeonma.messages import tr
from yeonma.tokenization.dataset import cache_folder
from yeonma.train.run import RunStart
from yeonma.train.target_device import TargetDevice, target_device


def log_verdict(start: RunStart) -> None:
    """Prints the verdict, and a warning with settings that make the run fit if it does not. Raises nothing: a forecast
    ends no training."""
    target = target_device(start.config.model.device)
    memory_bytes = memory_for_run(target, start.processes)
    try:
        forecast = _forecast(start, target, memory_bytes)
    except Exception as error:  # the code of any model
        start.log(tr("no forecast: {error}", error=first_line(error)))
        return
    verdict = verdict_of(_timed(forecast, start, target), target, memory_bytes)
    if fits_or_unknown(verdict.outcome):
        start.log(tr("forecast: {verdict}", verdict=verdict.sentence))
        return
    start.log(tr("warning: {text}", text=tr("forecast: {verdict}", verdict=verdict.sentence)))
    for name, value in verdict_lines(verdict, forecast)[1:]:
        start.log(f"{name}: {value}")


def _forecast(start: RunStart, target: TargetDevice, memory_bytes: int | None) -> Forecast:
    """With settings that need less memory only if the run may not fit, because tracing these takes seconds."""
    config, source, prepared, processes = start.config, start.source, start.prepared, start.processes
    folder = cache_folder(config.tokens)
    key = forecast_key(config, prepared, target, processes)
    forecast = read_forecast(folder, key)
    if forecast is None:
        forecast = _without_alternatives(start, target, folder, key)
    if fits_or_unknown(outcome_of(forecast.memory.peak, memory_bytes, target.device.type)):
        return forecast
    if forecast.alternatives and forecast.combinations:
        return forecast
    start.log(tr("the run may not fit into memory: looking for settings with which it does"))
    if not forecast.alternatives:
        forecast = estimate(config, source, prepared, target=target, processes=processes)
    process_bytes = forecast.memory.process
    together = combinations(config, source, prepared, target, processes, process_bytes)
    forecast = replace(forecast, combinations=together)
    write_forecast(folder, key, forecast)
    return forecast


def _without_alternatives(start: RunStart, target: TargetDevice, folder: Path, key: str) -> Forecast:
    """Kept under a name of its own, because `inspect` shows the alternatives."""
    key = sha256(f"{key} without alternatives".encode()).hexdigest()
    forecast = read_forecast(folder, key)
    if forecast is None:
        forecast = estimate(
            start.config,
            start.source,
            start.prepared,
            target=target,
            processes=start.processes,
            with_alternatives=False,
        )
        write_forecast(folder, key, forecast)
    return forecast


def _timed(forecast: Forecast, start: RunStart, target: TargetDevice) -> Forecast:
    """With the time of the steps that are left, if the device's rate is known."""
    folder = cache_folder(start.config.tokens)
    rate = known_rate(folder, target.device, target.dtype(start.config.model))
    share = 1 - start.steps_done / forecast.steps
    if rate is None or share <= 0:
        return forecast
    left = replace(forecast, tokens=int(forecast.tokens * share), operations=forecast.operations * share)
    timed = timed_by_rate(left, rate.flops_per_second)
    return with_run_answers(timed, start.config, start.prepared, target, share)
