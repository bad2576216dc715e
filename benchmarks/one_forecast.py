"""Forecasts of memory and time beside real runs of a few steps, as a script with a job file.

On a GPU one process makes all pairs of forecast and run, and what its tensors held at most is counted anew for each. On
the CPU the peak is that of a process, so each pair has one of its own. What is measured is written after every pair.
"""

from __future__ import annotations

import gc
import json
from pathlib import Path
from statistics import median
from typing import Any

from gpu_contenders import run_settings
from harness import answer_job, run_script, save, yeonma_steps

STEPS = 4


def settings_of(job: dict[str, Any], pair: dict[str, Any]) -> dict[str, Any]:
    where = {"device": job["device"], "dtype": job["dtype"]}
    prepared, output, workload = Path(job["prepared"]), Path(job["folder"]) / "output", pair["workload"]
    return {
        **run_settings(prepared, workload, output, pairs=workload == "dpo", **where),
        "max_steps": STEPS,
        **pair["settings"],
    }


def beside(job: dict[str, Any], pair: dict[str, Any]) -> dict[str, Any]:
    """One forecast, and the run that it is of."""
    import torch

    from yeonma.config.parse import read_config
    from yeonma.config.settings import TRAINING, RunConfig
    from yeonma.inspect.estimate import estimate
    from yeonma.inspect.forecast import timed_by_rate
    from yeonma.inspect.probe import measure_rate
    from yeonma.model import load
    from yeonma.train.prepare import prepare

    verb, settings = "dpo" if pair["workload"] == "dpo" else "sft", settings_of(job, pair)
    device, dtype = torch.device(job["device"]), getattr(torch, job["dtype"])
    rate = measure_rate(device, dtype, 0.25).flops_per_second
    words = [f"--{name}={value}" for name, value in settings.items()]
    config = read_config(RunConfig, words, verb=verb, groups=TRAINING).config
    source = load.find_base(config.model.base_model)
    prepared = prepare(config, source, None, lambda _: None)
    forecast = timed_by_rate(estimate(config, source, prepared, with_alternatives=False), rate)
    before = 0
    if device.type == "cuda":
        torch.compiler.reset()  # what was compiled for another model counts against a limit
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    steps = yeonma_steps(verb, settings)
    seconds = sum(step["seconds"] for step in steps[1:])
    assert forecast.time is not None
    return {
        **pair,
        "forecast_bytes": forecast.memory.peak,
        "peak_bytes": max(step["peak_memory_bytes"] for step in steps) - before,
        "forecast_tokens_per_second": forecast.time.tokens_per_second,
        "tokens_per_second": sum(step["tokens"] for step in steps[1:]) / seconds,
        "step_seconds": median(step["seconds"] for step in steps[1:]),
        "matrix_rate": rate,
    }


def measure(job: dict[str, Any]) -> dict[str, Any]:
    folder, found = Path(job["folder"]), []
    for pair in job["pairs"]:
        try:
            if job["device"] == "cpu" and len(job["pairs"]) > 1:
                apart = folder / "pair"
                apart.mkdir(exist_ok=True)
                (measured,) = run_script("one_forecast.py", {**job, "folder": str(apart), "pairs": [pair]})[
                    "pairs"
                ]
            else:
                measured = beside(job, pair)
        except (RuntimeError, SystemExit) as error:
            measured = {**pair, "error": str(error)[:300]}
        found.append(measured)
        save(folder / "measured.json", {"pairs": found})
        print(json.dumps(measured), flush=True)
    return {"pairs": found}


if __name__ == "__main__":
    answer_job(measure)
