"""One run of `yeonma sft` in this process, its saves timed. Run by saving.py with a job file."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

from yeonma.cli import main
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
    if main(job["command"]) != 0:
        raise RuntimeError("the run failed")
    output = Path(job["output"])
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text("utf-8").splitlines()]
    newest = max(output.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    return {
        "save_seconds": saves,
        "step_seconds": [line["seconds"] for line in lines],
        "tokens": [line["tokens"] for line in lines],
        "checkpoint_bytes": sum(path.stat().st_size for path in newest.iterdir()),
    }


if __name__ == "__main__":
    given = json.loads(Path(sys.argv[1]).read_text("utf-8"))
    (Path(given["folder"]) / "measured.json").write_text(json.dumps(measure(given)), "utf-8")
