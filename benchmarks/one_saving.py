"""One run of `yeonma sft` in this process, its saves timed. Run by saving.py with a job file."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from harness import answer_job, yeonma_steps

from yeonma.train import loop


def timed(seconds: list[float]) -> None:
    """Note how long each save takes, from its first call to the end of the rotation after it: loop.py's `save`."""
    first, last = loop.random_tensors, loop.rotate
    begun: list[float] = []

    def begin(*arguments: Any) -> Any:
        begun.append(time.perf_counter())
        return first(*arguments)

    def end(*arguments: Any) -> None:
        last(*arguments)
        seconds.append(time.perf_counter() - begun[-1])

    loop.random_tensors, loop.rotate = begin, end


def measure(job: dict[str, Any]) -> dict[str, Any]:
    saves: list[float] = []
    timed(saves)
    steps = yeonma_steps("sft", job["settings"])
    checkpoints = Path(job["settings"]["output_dir"]).glob("checkpoint-*")
    newest = max(checkpoints, key=lambda path: int(path.name.rpartition("-")[2]))
    return {
        "save_seconds": saves,
        "step_seconds": [step["seconds"] for step in steps],
        "tokens": [step["tokens"] for step in steps],
        "checkpoint_bytes": sum(path.stat().st_size for path in newest.iterdir()),
    }


if __name__ == "__main__":
    answer_job(measure)
