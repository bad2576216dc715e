"""`benchmarks/gpu.py` from its command line to its table, with a tiny shape on the CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_gpu_benchmark_measures_and_compares_contenders_on_the_cpu(tmp_path: Path) -> None:
    output = tmp_path / "gpu.json"
    flags = "--tiny true --rounds 1 --steps 2 --workloads long dpo --contenders yeonma transformers-4 trl-2"
    flags += " --quantizations none fp8"
    done = subprocess.run(
        [sys.executable, "benchmarks/gpu.py", *flags.split(), "--output", str(output)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "YEONMA_CACHE": str(tmp_path / "cache"), "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(output.read_text())
    assert result["failures"] == [] and result["gpu"] is None
    assert {run["contender"] for run in result["runs"] if run["quantization"] == "fp8"} == {"yeonma"}
    measured = {
        (run["workload"], run["contender"]): run for run in result["runs"] if run["quantization"] == "none"
    }
    assert ("long", "yeonma") in measured and ("long", "transformers-4") in measured
    for (workload, contender), run in measured.items():
        ours = measured[workload, "yeonma"]
        assert run["tokens"] == ours["tokens"], contender
        assert run["losses"] == pytest.approx(ours["losses"], rel=1e-3, abs=1e-4), contender
        assert all(seconds > 0 for seconds in run["seconds"]) and min(run["matrix_rates"]) > 0
    assert "| tiny | long | float32 | transformers Trainer, micro-batch 4, checkpointing |" in done.stdout


def test_gpu_benchmark_without_a_gpu_exits_with_an_error() -> None:
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "benchmarks/gpu.py"], cwd=ROOT, capture_output=True, text=True, env=environment
    )
    assert done.returncode == 2
    assert "no CUDA device; --tiny true proves the harness on the CPU" in done.stderr
