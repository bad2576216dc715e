"""Speed, memory and loss of preference tuning beside TRL's DPOTrainer.

Every contender trains the same LoRA start with DPO on the same token ids in the same order, each time in a process of
its own, and the contenders take turns. Writes results/dpo.json after every measurement; --write-docs puts its table
into docs/benchmarks.md. Needs benchmarks/requirements.txt. A machine with nothing else to do, please.

In pieces: --add keeps what --output holds, and --workloads, --contenders and --first-round say which piece this is.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dpo_contenders import CONTENDERS, OURS, TRL
from dpo_workloads import BATCH_SIZE, BETA, LEARNING_RATE, LORA_R, SEED, TARGETS, WORKLOADS
from harness import (
    HERE,
    TRAINERS,
    benchmark_parser,
    describe_contenders,
    describe_data,
    measure_contender,
    measure_rounds,
    model_to_use,
    new_result,
    print_run,
    publish,
    run_script,
)
from tables import dpo_section, pairs_per_second

RESULT = HERE / "results" / "dpo.json"
SAMPLE = HERE.parent / "yeonma" / "samples" / "pairs_en.jsonl"


def options(given: Sequence[str] | None) -> argparse.Namespace:
    parser = benchmark_parser(__doc__, RESULT)
    parser.add_argument("--data", type=Path, default=SAMPLE, help="pairs, as .json or .jsonl")
    parser.add_argument("--pairs", type=int, default=48, help="pairs of each workload; 48 make 12 steps")
    parser.add_argument("--first-round", type=int, default=1, help="its number, to add rounds to others")
    parser.add_argument("--workloads", nargs="+", choices=list(WORKLOADS), default=list(WORKLOADS))
    parser.add_argument("--contenders", nargs="+", choices=list(CONTENDERS), default=list(CONTENDERS))
    ours = [name for name in CONTENDERS if name.startswith("yeonma")]
    parser.add_argument("--ours", choices=ours, default=OURS, help="the setting that TRL is set against")
    parser.add_argument("--add", action="store_true", help="keep the measurements that --output holds")
    return parser.parse_args(given)


def run(options: argparse.Namespace, result: dict[str, Any], model: str, folder: str) -> dict[str, Any]:
    """Measure everything; the result, with earlier measurements where --add is given."""
    job = {
        "folder": folder,
        "model": model,
        "data": str(options.data.resolve()),
        "pairs": options.pairs,
        "workloads": options.workloads,
    }
    prepared = run_script("dpo_workloads.py", job, output="prepared.json")
    result |= {
        "model": prepared["model"],
        "data": describe_data(options.data),
        "settings": {
            "batch_size": BATCH_SIZE,
            "beta": BETA,
            "lora_r": LORA_R,
            "targets": TARGETS,
            "learning_rate": LEARNING_RATE,
            "seed": SEED,
        },
        "workloads": prepared["workloads"],
        "ours": options.ours,
        "contenders": describe_contenders(CONTENDERS, CONTENDERS),
        "runs": [],
        "failures": [],
    }
    if options.add and options.output.exists():
        result = joined(json.loads(options.output.read_text("utf-8")), json.loads(json.dumps(result)))

    def speed(measured: Mapping[str, Any]) -> float:
        return pairs_per_second(measured, result["workloads"][measured["workload"]])

    def measure(key: dict[str, Any]) -> None:
        measured = measure_contender(result, key, "dpo_contenders.py", {"folder": folder, "model": model})
        if measured is not None:
            numbers = f"{speed(measured):.3f} pairs/s  reference {measured['reference_seconds']:.1f} s"
            numbers += f"  {measured['peak_memory_bytes'] / 1e9:.2f} GB"
            numbers += f"  losses {', '.join(f'{loss:.5f}' for loss in measured['losses'])}"
            print_run(measured, key, numbers)

    measure_rounds(result, options, options.contenders, TRL, speed, measure, options.first_round)
    return result


def joined(before: dict[str, Any], now: dict[str, Any]) -> dict[str, Any]:
    """The earlier measurements with what is new about this run. Raises SystemExit where they cannot stand together."""
    for name in ("machine", "versions", "model", "data", "settings"):
        if before[name] != now[name]:
            raise SystemExit(f"--add: the earlier measurements have another {name}: {before[name]}")
    for workload, about in now["workloads"].items():
        if before["workloads"].get(workload, about) != about:
            raise SystemExit(f"--add: the earlier measurements of {workload} are of other pairs")
    known = {**before["workloads"], **now["workloads"]}
    workloads = {name: known[name] for name in WORKLOADS if name in known}
    command = before["command"]
    if now["command"] not in command.split(" ; "):
        command = f"{command} ; {now['command']}"
    measured = {"runs": before["runs"], "failures": before["failures"]}
    return {**now, **measured, "workloads": workloads, "command": command}


def main(given: Sequence[str] | None = None) -> int:
    arguments = options(given)
    if arguments.table_only:
        result = json.loads(arguments.output.read_text("utf-8"))
    else:
        model = model_to_use(arguments.model)
        with tempfile.TemporaryDirectory(prefix="yeonma-benchmark-") as folder:
            result = run(arguments, new_result("dpo.py", given, TRAINERS), model, folder)
    if any(measured["contender"] == result["ours"] for measured in result["runs"]):
        publish("dpo", result, dpo_section(result), write_docs=arguments.write_docs, steps=True)
    return 1 if result["failures"] else 0


if __name__ == "__main__":
    sys.exit(main())
