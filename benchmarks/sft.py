"""Training speed, memory and loss beside transformers' Trainer and TRL's SFTTrainer, all in one run.

Every contender trains the same LoRA start on the same token ids in the same order, each time in a process of its own,
and the contenders take turns. Writes results/sft.json after every measurement; --write-docs puts its table into
docs/benchmarks.md. Needs benchmarks/requirements.txt. A machine with nothing else to do, please.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from hashlib import sha256
from pathlib import Path
from typing import Any

from contenders import CONTENDERS, ONLY_FULL, OURS, TRL
from machine import cores, machine, versions
from tables import (
    LEAST_STEPS,
    epoch_loss,
    page_of,
    sft_section,
    shown_command,
    tokens_per_second,
    too_few_steps,
)
from workloads import BATCH_SIZE, HERE, LEARNING_RATE, LORA_R, SAMPLE, SEED, TARGETS

WORKLOADS = ("alpaca", "reversed", "system")
CLEARLY_SLOWER = 0.9
PACKAGES = ("yeonma", "torch", "transformers", "peft", "trl", "accelerate", "tokenizers", "datasets", "numpy")
RESULT = HERE / "results" / "sft.json"
PAGE = HERE.parent / "docs" / "benchmarks.md"


def options(given: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--data", type=Path, help="a json list with instruction, input, output; else the bundled sample"
    )
    parser.add_argument("--model", type=Path, help="a model folder; else the one that `yeonma demo` prepares")
    parser.add_argument("--rows", type=int, default=96, help="rows of each workload; 96 make 12 steps")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument("--contenders", nargs="+", choices=list(CONTENDERS))
    parser.add_argument(
        "--ours", choices=[name for name in CONTENDERS if name.startswith("yeonma")], default=OURS
    )
    parser.add_argument("--full", action="store_true", help="Yeonma at other micro-batch sizes too")
    parser.add_argument(
        "--all-rounds", action="store_true", help="measure slow settings of TRL in every round too"
    )
    parser.add_argument("--output", type=Path, default=RESULT)
    parser.add_argument("--write-docs", action="store_true", help="put the table into docs/benchmarks.md")
    parser.add_argument(
        "--table-only", action="store_true", help="measure nothing; the table of --output as it is"
    )
    return parser.parse_args(given)


def chosen(asked: argparse.Namespace) -> list[str]:
    """The contenders in order, ours first."""
    names = asked.contenders or [name for name in CONTENDERS if asked.full or name not in ONLY_FULL]
    return list(dict.fromkeys([asked.ours, *names]))


def child(script: str, job: dict[str, Any], log: Path, python: str | None = None) -> None:
    """Run a script of this folder with a job file, by this Python or the one at a path: it finds Yeonma's modules, and
    its own packages. Raises RuntimeError with the last line that it wrote.
    """
    job_file = Path(job["folder"]) / "job.json"
    job_file.write_text(json.dumps(job), "utf-8")
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": str(cores()),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "true",
    }
    if python is not None:
        own = os.environ.get("PYTHONPATH")
        environment["PYTHONPATH"] = os.pathsep.join([str(HERE.parent), *([own] if own else [])])
    with open(log, "wb") as output:
        command = [python or sys.executable, str(HERE / script), str(job_file)]
        status = subprocess.run(command, stdout=output, stderr=subprocess.STDOUT, env=environment).returncode
    if status != 0:
        written = log.read_text("utf-8", errors="replace").strip().splitlines()
        raise RuntimeError(written[-1] if written else f"exit status {status}")


def run(asked: argparse.Namespace, model: str, command: str, folder: Path) -> dict[str, Any]:
    data = str(asked.data.resolve()) if asked.data else None
    job = {
        "folder": str(folder),
        "model": model,
        "data": data,
        "rows": asked.rows,
        "workloads": asked.workloads,
    }
    child("workloads.py", job, folder / "log")
    prepared = json.loads((folder / "prepared.json").read_text("utf-8"))
    names = chosen(asked)
    result: dict[str, Any] = {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "command": command,
        "machine": machine(),
        "versions": versions(PACKAGES),
        "model": prepared["model"],
        "data": describe_data(asked.data or SAMPLE),
        "settings": {
            "rows": asked.rows,
            "batch_size": BATCH_SIZE,
            "lora_r": LORA_R,
            "targets": TARGETS,
            "learning_rate": LEARNING_RATE,
            "seed": SEED,
        },
        "workloads": prepared["workloads"],
        "ours": asked.ours,
        "contenders": {name: {"label": CONTENDERS[name].label, **asdict(CONTENDERS[name])} for name in names},
        "runs": [],
        "failures": [],
    }
    for number in range(1, asked.rounds + 1):
        for workload in asked.workloads:
            for name in names if asked.all_rounds else worth_measuring(result, workload, names):
                key = {"round": number, "workload": workload, "contender": name}
                measure(result, key, folder, model)
                save(asked.output, result)
    return result


def worth_measuring(result: dict[str, Any], workload: str, names: Sequence[str]) -> list[str]:
    """All in the first round. Later without TRL's settings that were clearly slower than its fastest, or failed."""
    before = [run for run in result["runs"] if run["workload"] == workload and run["round"] == 1]
    first = {run["contender"]: tokens_per_second(run) for run in before}
    if not first:
        return list(names)
    trl = [speed for name, speed in first.items() if CONTENDERS[name].library == TRL]
    return [
        name
        for name in names
        if CONTENDERS[name].library != TRL or (name in first and first[name] >= CLEARLY_SLOWER * max(trl))
    ]


def measure(result: dict[str, Any], key: dict[str, Any], folder: Path, model: str) -> None:
    """Add one contender's epoch to the runs, or to the failures."""
    measured = folder / "measured.json"
    measured.unlink(missing_ok=True)
    steps = result["workloads"][key["workload"]]["steps"]
    shown = f"round {key['round']}  {key['workload']:9} {key['contender']:19}"
    try:
        child("contenders.py", {"folder": str(folder), "model": model, "steps": steps, **key}, folder / "log")
    except RuntimeError as error:
        print(f"{shown} failed: {error}", flush=True)
        result["failures"].append({**key, "error": str(error).replace(str(folder), "FOLDER")})
        return
    found = {**key, **json.loads(measured.read_text("utf-8"))}
    result["runs"].append(found)
    rate = sum(found["matrix_rates"]) / 2e9
    numbers = f"{tokens_per_second(found):6.1f} tokens/s  {found['peak_memory_bytes'] / 1e9:.2f} GB"
    print(f"{shown} {numbers}  loss {epoch_loss(found):.5f}  matrix rate {rate:.0f} GFLOP/s", flush=True)


def describe_data(path: Path) -> dict[str, str]:
    return {"name": path.name, "sha256": sha256(path.read_bytes()).hexdigest()}


def save(path: Path, result: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".tmp")
    beside.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", "utf-8")
    beside.replace(path)


def check_steps(result: dict[str, Any]) -> None:
    """Raises SystemExit for a result of too few steps to be published."""
    if short := too_few_steps(result):
        raise SystemExit(f"{', '.join(short)}: fewer than {LEAST_STEPS} steps; not written into the docs")


def write_page(name: str, result: dict[str, Any]) -> None:
    PAGE.write_text(page_of(PAGE.read_text("utf-8"), {name: result}), "utf-8")


def model_to_use(asked: Path | None) -> str:
    """The folder asked for, or the name or folder of the demo's model, fetched now where it was not yet."""
    if asked is not None:
        return str(asked.resolve())
    from yeonma.model.smollm2 import fetch

    return fetch(print)


def main(given: Sequence[str] | None = None) -> int:
    asked = options(given)
    if asked.table_only:
        result = json.loads(asked.output.read_text("utf-8"))
    else:
        command = shown_command("sft.py", sys.argv[1:] if given is None else given)
        model = model_to_use(asked.model)
        with tempfile.TemporaryDirectory(prefix="yeonma-benchmark-") as folder:
            result = run(asked, model, command, Path(folder))
    if result["runs"]:
        print(f"\n{sft_section(result)}")
        if asked.write_docs:
            check_steps(result)
            write_page("sft", result)
    return 1 if result["failures"] else 0


if __name__ == "__main__":
    sys.exit(main())
