"""The preference benchmark: selection of pairs, arithmetic and tables. Nothing is timed here."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def _benchmarks_on_path(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    yield


@pytest.fixture
def tables() -> Any:
    import tables  # type: ignore[import-not-found]

    return tables


@pytest.fixture
def dpo() -> Any:
    import dpo  # type: ignore[import-not-found]

    return dpo


@pytest.fixture
def workloads() -> Any:
    import dpo_workloads  # type: ignore[import-not-found]

    return dpo_workloads


def run(contender: str, number: int, seconds: float, **changed: Any) -> dict[str, Any]:
    """A run of two steps and a reference pass that takes as long as one step."""
    return {
        "workload": "short",
        "contender": contender,
        "round": number,
        "reference_seconds": seconds,
        "seconds": [seconds, seconds],
        "losses": [0.7, 0.5],
        "accuracies": [0.0, 1.0],
        "peak_memory_bytes": 2_000_000_000,
        "matrix_rates": [1e9, 1e9],
        "frozen_rate": 4e9,
        **changed,
    }


def result(*runs: dict[str, Any]) -> dict[str, Any]:
    workload = {"about": "short", "epochs": 1, "pairs": 12, "prompt_tokens": 100.0, "answer_tokens": 50.0}
    contenders = {
        "yeonma-4": ("Yeonma", 4),
        "yeonma-1": ("Yeonma", 1),
        "trl-4": ("TRL DPOTrainer", 4),
        "trl-precomputed-4": ("TRL DPOTrainer", 4),
        "trl-1": ("TRL DPOTrainer", 1),
    }
    return {
        "date": "2000-01-01",
        "command": "python x",
        "machine": {"cpu": "CPU", "cores": 2, "memory_bytes": 2**34},
        "versions": {"torch": "1"},
        "model": {"name": "m", "type": "llama", "parameters": 2_000_000},
        "data": {"name": "d.json"},
        "settings": {"beta": 0.1, "lora_r": 16, "targets": ["up_proj"], "batch_size": 8},
        "workloads": {"short": workload},
        "ours": "yeonma-4",
        "contenders": {
            name: {"label": name, "library": library, "micro_batch": size}
            for name, (library, size) in contenders.items()
        },
        "runs": list(runs),
        "failures": [],
    }


def test_speed_includes_the_reference_pass_and_all_steps(tables: Any) -> None:
    assert tables.pairs_per_second(run("yeonma-4", 1, 2.0), {"pairs": 12, "epochs": 3}) == 36 / 6


def test_ratios_are_taken_per_round_and_loss_gaps_per_step(tables: Any) -> None:
    ours = [run("yeonma-4", number, 1.0) for number in (1, 2, 3)]
    theirs = [
        run("trl-1", number, seconds, losses=[0.7, 0.501])
        for number, seconds in ((1, 2.0), (2, 6.0), (3, 4.0), (4, 99.0))
    ]
    line = tables.pair_lines(result(*ours, *theirs))[1]
    assert (line.contender, line.rounds) == ("trl-1", 3)
    assert (line.ratio.median, line.ratio.least, line.ratio.most) == pytest.approx((4.0, 2.0, 6.0))
    assert line.loss_gap == pytest.approx(0.001)


def test_section_shows_contenders_fastest_trl_memory_and_failures(tables: Any) -> None:
    measured = result(
        run("yeonma-4", 1, 1.0, peak_memory_bytes=1_000_000_000),
        run("trl-4", 1, 3.0, reference_seconds=0.0),
        run("trl-precomputed-4", 1, 2.0, peak_memory_bytes=1_600_000_000),
    )
    measured["failures"] = [{"contender": "trl-1", "workload": "short", "error": "out of luck"}]
    section = tables.dpo_section(measured)
    assert "| short | **yeonma-4** | 4.000 |  | 1 s | 50% | 1.00 GB | 0.6000 |" in section
    assert "| short | trl-4 | 2.000 | 2.00x as fast | in the steps | 50% | 2.00 GB | 0.6000 |" in section
    assert "- short: 2.00 times trl-" in section
    assert "- short, peak memory beside TRL's lowest: 62% at micro-batch 4" in section
    assert "trl-1 failed at short: `out of luck`" in section


def test_workloads_with_too_few_steps_are_listed(tables: Any) -> None:
    twelve_steps = {**run("yeonma-4", 1, 1.0), "seconds": [1.0] * 12, "workload": "long"}
    assert tables.too_few_steps(result(run("yeonma-4", 1, 1.0), twelve_steps)) == ["short"]
    assert tables.too_few_steps(result(twelve_steps)) == []


def test_pairs_are_selected_by_length_in_data_order(workloads: Any) -> None:
    lengths = [
        workloads.Lengths(*counts)
        for counts in (
            (59, 10, 10),
            (60, 10, 249),
            (400, 10, 250),
            (400, 100, 100),
            (200, 40, 60),
            (701, 1, 1),
            (90, 90, 90),
        )
    ]
    assert workloads.select("short", lengths, 2) == [1, 3]
    # Both prompts are exactly four times as long as an answer.
    assert workloads.select("long", lengths, 2) == [3, 4]
    with pytest.raises(ValueError, match="short needs 9 pairs; the data has 4"):
        workloads.select("short", lengths, 9)


def test_measurements_are_joined_only_with_equal_settings(dpo: Any) -> None:
    before, now = result(run("yeonma-4", 1, 1.0)), result()
    now["command"], now["workloads"] = "python y", {"long": {"about": "long"}}
    joined = dpo.joined(before, now)
    assert list(joined["workloads"]) == ["short", "long"]
    assert joined["runs"] == before["runs"]
    assert joined["command"] == "python x ; python y"
    now["settings"] = {**now["settings"], "beta": 0.2}
    with pytest.raises(SystemExit, match="another settings"):
        dpo.joined(before, now)
