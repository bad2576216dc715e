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


@pytest.fixture(scope="module")
def known(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows of which the cache beside them has a forecast."""
    data = write_jsonl(tmp_path_factory.mktemp("known") / "rows.jsonl", articles(12))
    inspected_forecast(base, data, cache_dir=data.parent / "cache")
    return data


@pytest.fixture
def estimates(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry per forecast that is computed."""
    calls: list[int] = []
    original = estimating.estimate

    def counted(*arguments: Any, **keywords: Any) -> Any:
        calls.append(1)
        return original(*arguments, **keywords)

    monkeypatch.setattr(estimating, "estimate", counted)
    return calls


def inspected_forecast(base: Path, data: Path, **settings: object) -> dict[str, Any]:
    keywords = {"base_model": base, "data_path": data, "rows": "none", "json": True, **SETTINGS, **settings}
    done: Done = command(data.parent, "inspect", *arguments(keywords))
    assert done.status == 0, done.err
    (line,) = done.out.splitlines()
    return json.loads(line)["forecast"]


def test_second_inspect_reuses_the_cached_forecast(base: Path, tmp_path: Path, estimates: list[int]) -> None:
    data = write_jsonl(tmp_path / "rows.jsonl", articles(12))
    first, second = (inspected_forecast(base, data, cache_dir=tmp_path / "cache") for _ in range(2))
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
def test_changed_setting_computes_a_new_forecast(
    base: Path, known: Path, estimates: list[int], changed: dict[str, object]
) -> None:
    inspected_forecast(base, known, cache_dir=known.parent / "cache", **changed)
    assert len(estimates) == 1


def test_damaged_cached_forecast_is_recomputed(base: Path, tmp_path: Path, estimates: list[int]) -> None:
    data = write_jsonl(tmp_path / "rows.jsonl", articles(12))
    first = inspected_forecast(base, data, cache_dir=tmp_path / "cache")
    (cached,) = (tmp_path / "cache").glob("*.forecast")
    for damage in ("", "[]", cached.read_text()[:-9]):
        cached.write_text(damage)
        assert (
            inspected_forecast(base, data, cache_dir=tmp_path / "cache")["parameters_trained"]
            == first["parameters_trained"]
        )
    assert len(estimates) == 4


def test_probe_and_price_give_the_cost_of_the_run(base: Path, tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "rows.jsonl", articles(12))
    forecast = inspected_forecast(base, data, cache_dir=tmp_path / "cache", probe=True, price=3.6)
    assert forecast["time"]["measured_by"] == "probe"
    assert forecast["price"]["of_the_run"] == pytest.approx(3.6 * forecast["time"]["seconds"] / 3600)


def test_inspect_reports_unknown_lora_target_layers(base: Path, tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "rows.jsonl", articles(12))
    keywords = {"base_model": base, "data_path": data, **SETTINGS, "lora_target_modules": "[q_prj]"}
    done = command(tmp_path, "inspect", *arguments(keywords))
    assert done.status == 2
    assert "q_proj" in done.err
