"""A run whose memory ends: does it go on with smaller micro-batches, and to the same losses? A script with a job file.

Three short runs in one process: one row at a time, all rows of a step at once, and all at once again after most of the
device's free memory has been taken away, so that they do not fit. The CPU has nothing taken away: there only the
harness is tried.
"""

from __future__ import annotations

import gc
from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path
from typing import Any

from gpu_contenders import run_settings
from harness import answer_job, yeonma_steps

STEPS = 3
SAME = 1e-2
"""The largest difference of a loss that counts as rounding: losses of several, in bfloat16."""
OUT_OF_MEMORY = "out of memory with"


def run(job: dict[str, Any], micro_batch: int) -> tuple[list[float], str]:
    """The losses of a run, and what it printed on standard error."""
    where = {"device": job["device"], "dtype": job["dtype"]}
    prepared, output = Path(job["prepared"]), Path(job["folder"]) / "output"
    settings = {
        **run_settings(prepared, job["workload"], output, pairs=False, **where),
        "batch_size": job["batch"],
        "micro_batch_size": micro_batch,
        "max_steps": STEPS,
    }
    printed = StringIO()
    with redirect_stderr(printed):
        steps = yeonma_steps("sft", settings)
    print(printed.getvalue(), flush=True)
    return [step["loss"] for step in steps], printed.getvalue()


def measure(job: dict[str, Any]) -> dict[str, Any]:
    import torch

    cuda = job["device"] == "cuda"

    def peak_of(micro_batch: int) -> tuple[list[float], int]:
        gc.collect()
        if cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        losses, _ = run(job, micro_batch)
        return losses, torch.cuda.max_memory_reserved() if cuda else 0

    losses, least = peak_of(1)
    _, most = peak_of(job["batch"])
    gc.collect()
    ballast, between = None, (least + most) // 2
    if cuda:
        torch.cuda.empty_cache()
        free, _ = torch.cuda.mem_get_info()
        ballast = torch.empty(max(0, free - between), dtype=torch.uint8, device="cuda")
    short, printed = run(job, job["batch"])
    halved = [line for line in printed.splitlines() if OUT_OF_MEMORY in line]
    gap = max(abs(a - b) for a, b in zip(losses, short, strict=True))
    problem = ""
    if cuda and not halved:
        problem = "memory did not end"
    elif gap > SAME:
        problem = f"the losses differ by {gap:.1e}"
    return {
        "one_row_bytes": least,
        "all_rows_bytes": most,
        "left_bytes": between if ballast is not None else 0,
        "said": halved,
        "loss_gap": gap,
        "problem": problem,
    }


if __name__ == "__main__":
    answer_job(measure)
