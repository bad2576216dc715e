"""The same short training run three times: twice to its end, and once killed and gone on. Are the bytes the same?

As a script with a job file. The three run side by side, each in a process of its own: nothing is timed.
"""

from __future__ import annotations

import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path
from typing import Any

from gpu_contenders import run_settings
from harness import answer_job, steps_of

STEPS = 12
KILLED_AFTER = 2
"""Steps between checkpoints: the run is killed once the first one is written."""
COMPARED = ("loss", "grad_norm")
SECONDS_BETWEEN_LOOKS = 0.005


def command(job: dict[str, Any], output: Path) -> list[str]:
    prepared, pairs = Path(job["prepared"]), job["preference"]
    where = {"device": job["device"], "dtype": job["dtype"]}
    settings = {
        **run_settings(prepared, job["workload"], output, pairs=pairs, **where),
        "cache_dir": output.with_name(f"{output.name}-cache"),  # each computes its reference anew
        "lora_dropout": 0.1,
        "batch_size": job["batch"],
        "max_steps": STEPS,
        "save_steps": KILLED_AFTER,
        "card_rows": 0,
        **job["settings"],
    }
    words = [f"--{name}={value}" for name, value in settings.items()]
    return [sys.executable, "-m", "yeonma", "dpo" if pairs else "sft", *words]


def to_the_end(job: dict[str, Any], output: Path) -> None:
    """Raises SystemExit if the run fails."""
    with open(output.parent / f"{output.name}.log", "ab") as log:
        status = subprocess.run(command(job, output), stdout=log, stderr=subprocess.STDOUT).returncode
    if status != 0:
        lines = (output.parent / f"{output.name}.log").read_text("utf-8", errors="replace").splitlines()
        raise SystemExit("\n".join([*lines[-12:], f"{output.name}: exit status {status}"]))


def killed_and_gone_on(job: dict[str, Any], output: Path) -> int:
    """Kill the run at its first checkpoint, then run the same command to its end; returns the steps done by then."""
    with open(output.parent / f"{output.name}.log", "wb") as log:
        process = subprocess.Popen(command(job, output), stdout=log, stderr=subprocess.STDOUT)
        while process.poll() is None and not (output / f"checkpoint-{KILLED_AFTER}").exists():
            time.sleep(SECONDS_BETWEEN_LOOKS)
        process.kill()
        process.wait()
    done = len(steps_of(output)) if (output / "metrics.jsonl").exists() else 0
    to_the_end(job, output)
    if done >= STEPS:
        raise SystemExit("the run came to its end before it was killed")
    return done


def left_behind(output: Path) -> dict[str, Any]:
    """What two equal runs have in common: the bytes of the adapter, and the numbers of every step."""
    weights = (output / "adapter_model.safetensors").read_bytes()
    steps = [[step[name] for name in COMPARED] for step in steps_of(output)]
    return {"sha256": sha256(weights).hexdigest(), "steps": steps}


def difference(first: dict[str, Any], second: dict[str, Any]) -> str:
    """What differs between two runs; empty if nothing does."""
    if len(first["steps"]) != len(second["steps"]):
        return f"in the number of steps: {len(first['steps'])} and {len(second['steps'])}"
    for number, (one, other) in enumerate(zip(first["steps"], second["steps"], strict=True), 1):
        if one != other:
            return f"from step {number} on: {', '.join(COMPARED)} {one} and {other}"
    return "" if first["sha256"] == second["sha256"] else "in the adapter's bytes, and in no step's numbers"


def measure(job: dict[str, Any]) -> dict[str, Any]:
    folder = Path(job["folder"])
    outputs = [folder / name for name in ("first", "again", "killed")]
    with ThreadPoolExecutor(len(outputs)) as threads:
        whole = [threads.submit(to_the_end, job, output) for output in outputs[:2]]
        killed = threads.submit(killed_and_gone_on, job, outputs[2])
        for one in whole:
            one.result()
        done = killed.result()
    left = [left_behind(output) for output in outputs]
    again, gone_on = difference(left[0], left[1]), difference(left[0], left[2])
    problems = [*(["the same command again differs " + again] if again else [])]
    problems += ["the run that was killed differs " + gone_on] if gone_on else []
    return {
        "steps": STEPS,
        "killed_after": done,
        "losses": [loss for loss, *_ in left[0]["steps"]],
        "problem": "; ".join(problems),
    }


if __name__ == "__main__":
    answer_job(measure)
