"""The arithmetic, rows and table of the GPU benchmark. The harness itself runs in tests/slow."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def _scripts(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    yield


@pytest.fixture
def tables() -> Any:
    import gpu_tables  # type: ignore[import-not-found]

    return gpu_tables


@pytest.fixture
def workloads() -> Any:
    import gpu_workloads  # type: ignore[import-not-found]

    return gpu_workloads


@pytest.fixture
def shapes() -> Any:
    import gpu_shapes  # type: ignore[import-not-found]

    return gpu_shapes


@pytest.fixture
def contenders() -> Any:
    import gpu_contenders  # type: ignore[import-not-found]

    return gpu_contenders


def run(contender: str, number: int, seconds: float, **changes: Any) -> dict[str, Any]:
    """The result of three steps, of which the first is slow."""
    return {
        "shape": "tiny",
        "workload": "long",
        "quantization": "none",
        "contender": contender,
        "round": number,
        "seconds": [60.0, seconds, seconds],
        "tokens": [10, 50, 50],
        "losses": [4.0, 2.0, 1.0],
        "reference_seconds": 0.0,
        "peak_memory_bytes": 2_000_000_000,
        "matrix_rates": [1e6, 3e6],
        **changes,
    }


def result(*runs: dict[str, Any]) -> dict[str, Any]:
    steps = [{"tokens": 100, "trained_tokens": 5, "squares": 2000}]
    work = {"about": "long rows", "batch": 8, "packed": None, "pairs": False, "steps": steps}
    model = {"name": "tiny", "non_embedding_parameters": 1000, "layers": 2, "attention_width": 8}
    return {
        "date": "2000-01-01",
        "command": "python x",
        "machine": {"cpu": "CPU", "cores": 2, "memory_bytes": 2**34},
        "gpu": None,
        "versions": {"torch": "1", "trl": None},
        "settings": {"dtype": "bfloat16", "lora_r": 16},
        "ours": "yeonma",
        "contenders": {"long/yeonma": "Ours", "long/theirs": "Theirs"},
        "shapes": {"tiny": {"model": model, "workloads": {"long": work}}},
        "runs": list(runs),
        "failures": [],
        "left_out": [],
    }


def test_speed_excludes_the_first_step_and_spreads_the_reference_time(tables: Any) -> None:
    assert tables.tokens_per_second(run("yeonma", 1, 2.0)) == 25.0
    assert tables.tokens_per_second(run("yeonma", 1, 2.0, reference_seconds=9.0)) == 10.0


def test_operations_are_four_per_parameter_plus_causal_attention(tables: Any) -> None:
    shape = result()["shapes"]["tiny"]
    operations = tables.operations_per_token(shape["model"], shape["workloads"]["long"]["steps"])
    assert operations == 4 * 1000 + 6 * 2 * 8 * 2000 / 100
    (line,) = tables.lines(result(run("yeonma", 1, 1.0)))
    assert line.share == 50 * operations / 2e6


def test_speed_ratios_are_per_round_and_loss_gaps_per_step(tables: Any) -> None:
    ours = [run("yeonma", number, seconds) for number, seconds in ((1, 1.0), (2, 2.0), (3, 4.0))]
    theirs = [
        run("theirs", number, seconds, losses=[4.0, 2.25, 1.0]) for number, seconds in ((1, 2.0), (2, 6.0))
    ]
    line = tables.lines(result(*ours, *theirs))[1]
    assert (line.ratio, line.loss_gap) == (tables.Ratio(2.5, least=2.0, most=3.0), 0.25)
    other = run("theirs", 1, 1.0, tokens=[10, 51, 50])
    assert tables.lines(result(ours[0], other))[1].loss_gap is None


def test_table_lists_contenders_failures_and_what_was_left_out(tables: Any) -> None:
    results = result(run("yeonma", 1, 1.0), run("theirs", 1, 2.0))
    key = {"shape": "tiny", "workload": "long", "quantization": "fp8"}
    results["failures"] = [{**key, "contender": "theirs", "error": "out of luck"}]
    results["left_out"] = [{**key, "contender": "unsloth-4", "why": "unsloth is not installed"}]
    section = tables.gpu_section(results)
    assert "| tiny | long | bfloat16 | **Ours** | 50 |  | 15% | 2.00 GB | 2.3333 |  |" in section
    assert (
        "| tiny | long | bfloat16 | Theirs | 25 | 2.00x as fast | 7% | 2.00 GB | 2.3333 | 0e+00 |" in section
    )
    assert "- tiny, long, theirs: `out of luck`" in section
    assert "Not measured: unsloth-4: unsloth is not installed." in section


def test_workload_rows_have_their_stated_lengths_in_tokens(
    workloads: Any, shapes: Any, tmp_path: Path
) -> None:
    tokenizer = shapes.word_tokenizer(512)
    names = list(workloads.WORKLOADS)
    prepared = workloads.prepare_workloads(tmp_path, tokenizer, names, 2, tiny=True)
    assert [step["tokens"] for step in prepared["long"]["steps"]] == [8 * (64 + 3)] * 2
    assert [step["trained_tokens"] for step in prepared["long"]["steps"]] == [8 * 3] * 2
    assert [step["tokens"] for step in prepared["dpo"]["steps"]] == [8 * 2 * (32 + 8)] * 2
    assert [step["trained_tokens"] for step in prepared["dpo"]["steps"]] == [8 * 2 * 8] * 2
    assert all(step["squares"] > step["tokens"] ** 2 / 16 for step in prepared["alpaca"]["steps"])
    assert prepared["packed"]["packed"] == 64 and prepared["long"]["packed"] is None
    full = workloads.of_size(workloads.WORKLOADS["long"], tiny=False)
    (row,) = workloads.rows_of(full, 1, 511)
    assert (
        len(tokenizer(row["prompt"] + row["completion"])["input_ids"]) == 2048 + 31
    )  # without the end token


def test_shapes_have_the_parameter_counts_of_the_models_they_name(shapes: Any) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    expected = {"llama-2-7b": 6_738_415_616, "llama-3-8b": 8_030_261_248, "qwen3-0.6b": 596_049_920}
    for name, count in expected.items():
        shape = dict(shapes.SHAPES[name])
        config = AutoConfig.for_model(shape.pop("model_type"), **shape)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        assert sum(weight.numel() for weight in model.parameters()) == count, name


def test_contenders_that_cannot_run_are_left_out_with_a_reason(
    contenders: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(contenders, "find_spec", lambda name: None)
    unpacked, packed = {"packed": None}, {"packed": 8192}
    for name, package in (("trl-1", "trl"), ("unsloth-4", "unsloth"), ("factory-4", "llamafactory")):
        assert contenders.lacking(contenders.SFT[name], "none", unpacked) == f"{package} is not installed"
    assert contenders.lacking(contenders.SFT["transformers-4"], "none", unpacked) == ""
    assert contenders.lacking(contenders.SFT["transformers-4"], "fp8", unpacked) == "it has no fp8 here"
    assert "bitsandbytes" in contenders.lacking(contenders.SFT["transformers-4"], "nf4", unpacked)
    monkeypatch.setattr(contenders, "find_spec", lambda name: name)
    assert "packed workload" in contenders.lacking(contenders.SFT["trl-packing"], "none", unpacked)
    assert contenders.lacking(contenders.SFT["trl-packing-liger"], "none", packed) == ""
    assert contenders.lacking(contenders.SFT["yeonma"], "none", unpacked) == ""


def test_peer_is_searched_for_by_its_own_python(
    contenders: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "llamafactory").mkdir()
    (tmp_path / "llamafactory" / "__init__.py").touch()
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))  # a child process reads it, this process does not
    factory, unpacked = contenders.SFT["factory-4"], {"packed": None}
    assert contenders.lacking(factory, "none", unpacked) == "llamafactory is not installed"
    assert contenders.lacking(factory, "none", unpacked, sys.executable) == ""
    assert contenders.lacking(factory, "fp8", unpacked, sys.executable) == "it has no fp8 here"
    versions = contenders.versions_of(sys.executable, ("torch", "llamafactory"))
    assert versions["torch"] and versions["llamafactory"] is None


def test_script_runs_in_a_peers_python_with_yeonma_on_its_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import harness  # type: ignore[import-not-found]

    monkeypatch.setenv("PYTHONPATH", "elsewhere")
    script, log = tmp_path / "script.py", tmp_path / "seen"
    script.write_text(
        "import os, pathlib, sys\n"
        f"pathlib.Path({str(log)!r}).write_text(sys.executable + chr(10) + os.environ['PYTHONPATH'])\n"
        f"pathlib.Path({str(tmp_path / 'measured.json')!r}).write_text('[1]')\n"
    )
    peer_python = tmp_path / "python"
    peer_python.symlink_to(sys.executable)
    assert harness.run_script(str(script), {"folder": str(tmp_path)}, python=str(peer_python)) == [1]
    assert log.read_text() == f"{peer_python}\n{ROOT}{os.pathsep}elsewhere"


def test_measurement_imports_no_trainer_before_the_contender_is_known() -> None:
    """Unsloth must be imported before the other libraries, and a peer's own environment lacks some of Yeonma's."""
    heavy = ("torch", "transformers", "trl", "peft", "datasets", "yeonma")
    code = f"import sys, gpu_measure, gpu_peers_apart; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT / "benchmarks", capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def test_missing_python_executable_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    import gpu  # type: ignore[import-not-found]

    with pytest.raises(SystemExit):
        gpu.options(["--tiny", "true", "--factory-python", "/nowhere/python"])
    assert "/nowhere/python is not a Python that can be run" in capsys.readouterr().err
    options = gpu.options(["--factory-python", sys.executable])
    assert gpu.own_pythons(options) == {"LLaMA-Factory": sys.executable}


def test_table_lists_the_versions_of_a_peers_own_environment(tables: Any) -> None:
    results = result(run("yeonma", 1, 1.0))
    results["own_versions"] = {"Theirs": {"torch": "2", "trl": None}}
    assert "torch 1; Theirs in an environment of its own: torch 2.\n" in tables.gpu_section(results)
