"""The benchmark's arithmetic and tables; nothing is timed here."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def tables(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import tables  # type: ignore[import-not-found]

    yield tables


@pytest.fixture
def harness(tables: Any) -> Any:
    import harness  # type: ignore[import-not-found]

    return harness


def run(
    contender: str, number: int, seconds: float, rate: float = 100e9, tokens: int = 50, **fields: Any
) -> dict[str, Any]:
    """A run of three steps; the first is slow."""
    return {
        "workload": "alpaca",
        "contender": contender,
        "round": number,
        "seconds": [60.0, seconds, seconds],
        "tokens": [10, tokens, tokens],
        "trained_tokens": [1, 3, 4],
        "losses": [4.0, 2.0, 1.0],
        "peak_memory_bytes": 2_000_000_000,
        "matrix_rates": [rate, rate],
        "frozen_rate": 4e9,
        **fields,
    }


def result(*runs: dict[str, Any]) -> dict[str, Any]:
    work = {"about": "short rows", "frame_tokens": 20, "steps": [{"tokens": 10, "trained_tokens": 1}]}
    libraries = {"ours": "Yeonma", "theirs-1": "Theirs", "theirs-4": "Theirs"}
    return {
        "date": "2000-01-01",
        "command": "python x",
        "machine": {"cpu": "CPU", "cores": 2, "memory_bytes": 2**34},
        "versions": {"torch": "1"},
        "model": {
            "name": "m",
            "type": "llama",
            "parameters": 2_000_000,
            "non_embedding_parameters": 1_000_000,
        },
        "data": {"name": "d.json"},
        "settings": {"rows": 24, "lora_r": 16, "targets": ["up_proj"], "batch_size": 8},
        "workloads": {"alpaca": work},
        "ours": "ours",
        "contenders": {name: {"label": name, "library": library} for name, library in libraries.items()},
        "runs": list(runs),
        "failures": [],
    }


def test_speed_excludes_the_first_step(tables: Any) -> None:
    assert tables.tokens_per_second(run("ours", 1, seconds=2.0)) == 25.0


def test_epoch_loss_is_the_mean_over_trained_tokens(tables: Any) -> None:
    assert tables.epoch_loss(run("ours", 1, seconds=1.0)) == (4.0 * 1 + 2.0 * 3 + 1.0 * 4) / 8


def test_speed_ratio_is_the_median_of_the_ratios_within_rounds(tables: Any) -> None:
    ours = [run("ours", number, seconds) for number, seconds in ((1, 1.0), (2, 2.0), (3, 4.0))]
    theirs = [run("theirs-1", number, seconds) for number, seconds in ((1, 2.0), (2, 6.0), (3, 6.0))]
    line = tables.lines(result(*ours, *theirs))[1]
    assert (line.contender, line.ratio) == ("theirs-1", tables.Ratio(2.0, least=1.5, most=3.0))
    assert line.tokens_per_second == 50 / 6


def test_compute_share_uses_the_median_matrix_rate(tables: Any) -> None:
    runs = [run("ours", 1, 1.0, rate=100e6), run("ours", 2, 1.0, rate=400e6), run("ours", 3, 1.0, rate=500e6)]
    (line,) = tables.lines(result(*runs))
    assert line.share == 4 * 1_000_000 * 50 / 400e6


def test_losses_are_compared_by_step_and_only_for_the_same_rows(tables: Any) -> None:
    same = run("theirs-1", 1, 1.0, losses=[4.0, 2.25, 1.0])
    other = run("theirs-4", 1, 1.0, tokens=51)
    ours, first, second = tables.lines(result(run("ours", 1, 1.0), same, other))
    assert (ours.loss_gap, first.loss_gap, second.loss_gap) == (0.0, 0.25, None)


def test_a_contender_is_compared_only_in_rounds_that_have_ours(tables: Any) -> None:
    table_lines = tables.lines(result(run("ours", 1, 1.0), run("theirs-1", 1, 2.0), run("theirs-1", 2, 9.0)))
    assert [(line.contender, line.ratio.median) for line in table_lines] == [("ours", 1.0), ("theirs-1", 2.0)]


def test_ours_is_compared_with_the_fastest_setting_of_the_other_library(tables: Any) -> None:
    runs = [run("ours", 1, 1.0), run("theirs-1", 1, 3.0), run("theirs-4", 1, 2.0)]
    assert tables.best(result(*runs)) == ["- alpaca: 2.00 times theirs-4, its fastest here"]


def test_a_table_has_a_row_for_every_contender_and_names_failures(tables: Any) -> None:
    results = result(run("ours", 1, 1.0), run("theirs-1", 1, 2.0))
    results["failures"] = [{"contender": "theirs-4", "workload": "alpaca", "error": "out of luck"}]
    section = tables.sft_section(results)
    assert (
        "| alpaca | **ours** | 50 |  | 0% | 2.00 GB | 1.7500 |".replace("1.7500", f"{14 / 8:.4f}") in section
    )
    assert "| alpaca | theirs-1 | 25 | 2.00x as fast | 0% |" in section
    assert "theirs-4 failed at alpaca: `out of luck`" in section


def test_saving_section_shows_the_share_of_run_time_spent_saving(tables: Any) -> None:
    header = {key: result()[key] for key in ("date", "command", "machine", "versions")}
    settings = {"lora_r": 16, "batch_size": 8, "max_steps": 4, "save_steps": 2}
    section = tables.saving_section(
        {
            **header,
            "model": "m",
            "data": {"name": "rows.jsonl"},
            "settings": settings,
            "save_seconds": [0.5, 1.5],
            "step_seconds": [20.0, 24.0, 26.0, 28.0],
            "checkpoint_bytes": 62_000_000,
        }
    )
    assert "Saves: 0.50, 1.50 s. Steps: 98 s, 25.00 each in the middle." in section
    assert "**Saving took 2.00% of the run.**" in section
    assert "A checkpoint has 62 MB" in section


def test_section_is_put_only_between_its_comments(tables: Any) -> None:
    page = "a\n<!-- sft -->\nold\n<!-- /sft -->\nb\n"
    assert tables.put(page, "sft", "new") == "a\n<!-- sft -->\n\nnew\n\n<!-- /sft -->\nb\n"
    with pytest.raises(ValueError, match="tokenize_rows"):
        tables.put(page, "tokenize_rows", "new")


def test_slow_settings_of_a_peer_are_measured_only_in_the_first_round(tables: Any, harness: Any) -> None:
    names = ["yeonma-8", "transformers-4", "trl-1", "trl-4", "trl-packed"]
    results = result()

    def names_to_measure() -> list[str]:
        return harness.worth_measuring(results, "alpaca", names, names[2:], tables.tokens_per_second)  # type: ignore[no-any-return]

    assert names_to_measure() == names
    results["runs"] = [
        run(name, 1, seconds) for name, seconds in zip(names, (1.0, 9.0, 2.0, 2.1, 3.0), strict=True)
    ]
    assert names_to_measure() == names[:4]
    results["runs"].append(run("trl-1", 2, 0.1))
    assert names_to_measure() == names[:4]
    results["failures"] = [{"contender": "trl-1", "workload": "alpaca", "error": "out of luck"}]
    assert names_to_measure() == [*names[:2], "trl-4"]


def test_a_measurement_replaces_the_earlier_one_of_its_round(tmp_path: Path, harness: Any) -> None:
    script = tmp_path / "script.py"
    write = "import json, sys; job = json.load(open(sys.argv[1])); assert job['speed'], 'no speed';"
    script.write_text(
        f"{write} json.dump({{'speed': job['speed']}}, open(job['folder'] + '/measured.json', 'w'))"
    )
    results, key = result(), {"round": 1, "workload": "alpaca", "contender": "ours"}
    for speed in (1, 2):
        job = {"folder": str(tmp_path), "speed": speed}
        assert harness.measure_contender(results, key, str(script), job) == {**key, "speed": speed}
    assert results["runs"] == [{**key, "speed": 2}]
    assert harness.measure_contender(results, key, str(script), {"folder": str(tmp_path), "speed": 0}) is None
    assert results["runs"] == []
    assert results["failures"] == [{**key, "error": "AssertionError: no speed"}]


def test_a_shown_command_has_no_folders(tables: Any) -> None:
    shown = tables.shown_command(
        "sft.py", ["--data", "/some/where/rows.json", "--model", "x/y/", "--rows", "8"]
    )
    assert shown == "python benchmarks/sft.py --data rows.json --model y --rows 8"


def test_benchmarks_page_shows_the_stored_results(tables: Any) -> None:
    page = (ROOT / "docs" / "benchmarks.md").read_text("utf-8")
    stored = {
        path.stem: json.loads(path.read_text("utf-8"))
        for path in (ROOT / "benchmarks" / "results").glob("*.json")
    }
    assert tables.page_of(page, stored) == page


def test_generate_section_counts_equal_answers_and_compares_within_rounds(tables: Any) -> None:
    import generate  # type: ignore[import-not-found]

    runs = [{"answers": [[1, 2], [3]]}, {"answers": [[1, 2], [4]]}]
    assert generate.equal_answers(runs[:1], [[1, 2], [3]]) == 2
    assert generate.equal_answers(runs, [[1, 2], [3]]) == 1

    def measured(contender: str, number: int, seconds: float) -> dict[str, Any]:
        fields = {
            "prompt_tokens": 6400,
            "new_tokens": 640,
            "peak_memory_bytes": 10**9,
            "matrix_rates": [1e11],
        }
        return {"contender": contender, "round": number, "seconds": seconds, **fields}

    section = tables.generate_section(
        {
            **{key: result()[key] for key in ("date", "command", "machine", "versions")},
            "model": "m",
            "rows": 64,
            "new_tokens": 10,
            "ours": "a",
            "contenders": {"a": {"label": "A"}, "b": {"label": "B"}},
            "equal": {"a": 63, "b": 64},
            "runs": [measured("a", 1, 2), measured("b", 1, 8), measured("a", 2, 4), measured("b", 2, 12)],
        }
    )
    assert "| **A** | 3.0 | 240 |  | 1.00 GB | 63 of 64 |" in section
    assert "| B | 10.0 | 67 | 3.50x as fast (3.00-4.00) | 1.00 GB | 64 of 64 |" in section
