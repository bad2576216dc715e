"""A forecast is computed once for the same settings, data and versions, and again if any of them changes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.runs import SETTINGS, Done, arguments, articles, command, model_folder, write_jsonl
from yeonma.inspect import estimate as estimating


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_folder(tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture
def estimates(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry per forecast that is computed."""
    calls: list[int] = []
    real = estimating.estimate

    def counted(*arguments: Any, **named: Any) -> Any:
        calls.append(1)
        return real(*arguments, **named)

    monkeypatch.setattr(estimating, "estimate", counted)
    return calls


def inspected(base: Path, data: Path, **settings: object) -> dict[str, Any]:
    expected = {"base_model": base, "data_path": data, "rows": "none", "json": True, **SETTINGS, **settings}
    done: Done = command(data.parent, "inspect", *arguments(expected))
    assert done.status == 0, done.err
    (line,) = done.out.splitlines()
    return json.loads(line)["forecast"]


def test_a_second_look_makes_no_forecast_and_shows_the_same(
    base: Path, tmp_path: Path, estimates: list[int]
) -> None:
    data = write_jsonl(tmp_path / "rows.jsonl", articles(12))
    first, second = (inspected(base, data, cache_dir=tmp_path / "cache") for _ in range(2))
    assert len(estimates) == 1
    for forecast in (first, second):
        assert forecast.pop("time")["measured_by"] == "rate"
    assert first == second
    assert first["parameters_trained"] > 0


@pytest.mark.parametrize(
    "changed",
    [
        {"lora_r": 2},
        {"micro_batch_size": 1},
        {"gradient_checkpointing": True},
        {"dtype": "bfloat16"},
        {"cutoff_len": 60},
        {"val_set_size": 3},
        {"nproc": 2},
        {"seed": 7},
    ],
    ids=lambda changed: next(iter(changed)),
)
def test_another_run_has_a_forecast_of_its_own(
    base: Path, tmp_path: Path, estimates: list[int], changed: dict[str, object]
) -> None:
    data = write_jsonl(tmp_path / "rows.jsonl", articles(12))
    inspected(base, data, cache_dir=tmp_path / "cache")
    inspected(base, data, cache_dir=tmp_path / "cache", **changed)
    assert len(estimates) == 2


def test_a_damaged_one_is_made_again(base: Path, tmp_path: Path, estimates: list[int]) -> None:
    data = write_jsonl(tmp_path / "rows.jsonl", articles(12))
    first = inspected(base, data, cache_dir=tmp_path / "cache")
    (cached,) = (tmp_path / "cache").glob("*.forecast")
    for damage in ("", "[]", cached.read_text()[:-9]):
        cached.write_text(damage)
        assert (
            inspected(base, data, cache_dir=tmp_path / "cache")["parameters_trained"]
            == first["parameters_trained"]
        )
    assert len(estimates) == 4


def test_a_probe_and_a_price_say_what_the_run_costs(base: Path, tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "rows.jsonl", articles(12))
    forecast = inspected(base, data, cache_dir=tmp_path / "cache", probe=True, price=3.6)
    assert forecast["time"]["measured_by"] == "probe"
    assert forecast["price"]["of_the_run"] == pytest.approx(3.6 * forecast["time"]["seconds"] / 3600)


def test_layers_that_the_model_has_not_are_told_though_weights_are_not_read(
    base: Path, tmp_path: Path
) -> None:
    data = write_jsonl(tmp_path / "rows.jsonl", articles(12))
    expected = {"base_model": base, "data_path": data, **SETTINGS, "lora_target_modules": "[q_prj]"}
    done = command(tmp_path, "inspect", *arguments(expected))
    assert done.status == 2
    assert "q_proj" in done.err
