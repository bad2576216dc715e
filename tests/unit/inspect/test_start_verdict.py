"""The verdict at the start of a run agrees with `inspect`, comes before weights are loaded, and ends no training."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.runs import SETTINGS, Done, arguments, articles, command, model_folder, write_jsonl
from yeonma.inspect import estimate as estimating
from yeonma.inspect import fit_verdict, start_verdict
from yeonma.inspect.forecast import Alternative
from yeonma.inspect.probe import known_rate
from yeonma.model.memory_trace import Blueprint
from yeonma.train.run import RunStart


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_folder(tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "rows.jsonl", articles(12))


def run(verb: str, base: Path, data: Path, **settings: object) -> Done:
    folder = data.parent
    keywords = {
        **SETTINGS,
        "base_model": base,
        "data_path": data,
        "cache_dir": folder / "cache",
        "card_rows": 0,
    }
    extra = {"rows": "none"} if verb == "inspect" else {"output_dir": folder / "out"}
    done = command(folder, verb, *arguments({**keywords, **extra, **settings}))
    assert done.status == 0, done.err
    return done


def verdict_in(text: str) -> str:
    (line,) = re.findall(r"^(?:forecast|verdict): (.*)$", text, re.MULTILINE)
    return line


def needed(verdict: str) -> str:
    (size,) = re.findall(r"^needs ([\d.]+ [MG]B) of ", verdict)
    return size


def test_the_verdict_is_that_of_inspect_and_costs_no_second_forecast(
    base: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inspected = verdict_in(run("inspect", base, data).out)
    monkeypatch.setattr(start_verdict, "estimate", lambda *_, **__: pytest.fail("computed anew"))
    started = run("sft", base, data)
    lines = started.out.splitlines()
    told = verdict_in(started.out)
    assert needed(told) == needed(inspected) and told.endswith(inspected.partition(": ")[2])
    loaded = next(index for index, line in enumerate(lines) if "parameters trained" in line)
    assert lines.index(f"forecast: {told}") < loaded


def test_without_inspect_the_forecast_is_computed_once_and_nothing_is_measured(
    base: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    computed: list[bool] = []

    def counted(*arguments: Any, with_alternatives: bool = True, **keywords: Any) -> Any:
        computed.append(with_alternatives)
        return estimating.estimate(*arguments, with_alternatives=with_alternatives, **keywords)

    monkeypatch.setattr(start_verdict, "estimate", counted)
    first, again = (verdict_in(run("sft", base, data, overwrite=True).out) for _ in range(2))
    assert computed == [False]
    assert needed(first) == needed(again) and first.endswith(": fits")
    assert not list((data.parent / "cache").glob("*.rate"))
    shown = run("inspect", base, data).out  # which shows alternatives, though the run computed none
    assert "  with dtype bfloat16: " in shown
    assert verdict_in(shown).partition(": ")[2].startswith("fits; ")
    assert re.search(r": fits; (about \d+|under 1s)", verdict_in(run("sft", base, data, overwrite=True).out))


def test_a_run_that_does_not_fit_is_warned_with_cures_before_weights_are_loaded(
    base: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size, unit = needed(verdict_in(run("sft", base, data, micro_batch_size=4).out)).split()
    memory = int(0.7 * float(size) * {"MB": 1e6, "GB": 1e9}[unit])
    forecasts: list[Any] = []

    def noted(*arguments: Any, **keywords: Any) -> Any:
        forecasts.append(estimating.estimate(*arguments, **keywords))
        saved = Alternative("micro_batch_size 1", forecasts[-1].memory.peak // 2, "the same result", True)
        forecasts[-1] = replace(forecasts[-1], alternatives=(saved,))
        return forecasts[-1]

    # a device that has little: what this machine reports of itself is the only thing that is replaced
    monkeypatch.setattr(start_verdict, "estimate", noted)
    monkeypatch.setattr(start_verdict, "memory_for_run", lambda target, processes: memory)
    done = run("sft", base, data, micro_batch_size=4, overwrite=True)
    assert len(forecasts) == 1
    lines = done.out.splitlines()
    warned = next(index for index, line in enumerate(lines) if line.startswith("warning: forecast: needs "))
    assert lines[warned].endswith(" on cpu: does not fit")
    assert lines[warned + 1].startswith("  fits with: --micro_batch_size 1: ")
    assert warned < next(index for index, line in enumerate(lines) if "parameters trained" in line)
    assert (data.parent / "out" / "adapter_model.safetensors").is_file()  # it is a warning


def test_a_forecast_that_fails_ends_no_training(
    base: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any, **__: Any) -> Blueprint:
        raise RuntimeError("no such operator\nand more")

    monkeypatch.setattr(start_verdict, "estimate", fails)
    done = run("sft", base, data)
    assert "no forecast: no such operator\n" in done.out and "saved to" in done.out


def test_a_run_that_goes_on_is_told_the_time_of_the_steps_that_are_left(
    base: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run("inspect", base, data)
    times: dict[int, float] = {}

    def noted(start: RunStart) -> None:
        target = start_verdict.target_device(start.config.model.device)
        forecast = start_verdict._forecast(start, target, None)
        folder = data.parent / "cache"
        assert known_rate(folder, target.device, target.dtype(start.config.model)) is not None
        for done in (0, 1):
            timed = start_verdict._timed(forecast, replace(start, steps_done=done), target)
            assert timed.time is not None
            times[done] = timed.time.seconds
        whole = start_verdict._timed(forecast, replace(start, steps_done=forecast.steps), target)
        assert whole.time is None
        assert times[1] == pytest.approx(times[0] * (1 - 1 / forecast.steps))

    monkeypatch.setattr(start_verdict, "log_verdict", noted)
    run("sft", base, data)
    assert len(times) == 2
    assert fit_verdict.fits_or_unknown("unknown") and not fit_verdict.fits_or_unknown("may not fit")
