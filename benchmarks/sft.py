"""Training speed, memory and loss beside transformers' Trainer and TRL's SFTTrainer, all in one run.

Every contender trains the same LoRA start on the same token ids in the same order, each time in a process of its own,
and the contenders take turns. Writes results/sft.json after every measurement; --write-docs puts its table into
docs/benchmarks.md. Needs benchmarks/requirements.txt. A machine with nothing else to do, please.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from contenders import CONTENDERS, ONLY_FULL, OURS, TRL
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
from tables import epoch_loss, sft_section, tokens_per_second
from workloads import BATCH_SIZE, LEARNING_RATE, LORA_R, SAMPLE, SEED, TARGETS

WORKLOADS = ("alpaca", "reversed", "system")
RESULT = HERE / "results" / "sft.json"


def options(given: Sequence[str] | None) -> argparse.Namespace:
    parser = benchmark_parser(__doc__, RESULT)
    parser.add_argument(
        "--data", type=Path, help="a json list with instruction, input, output; else the bundled sample"
    )
    parser.add_argument("--rows", type=int, default=96, help="rows of each workload; 96 make 12 steps")
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument("--contenders", nargs="+", choices=list(CONTENDERS))
    parser.add_argument(
        "--ours", choices=[name for name in CONTENDERS if name.startswith("yeonma")], default=OURS
    )
    parser.add_argument("--full", action="store_true", help="Yeonma at other micro-batch sizes too")
    return parser.parse_args(given)


def chosen(options: argparse.Namespace) -> list[str]:
    """The contenders in order, ours first."""
    names = options.contenders or [name for name in CONTENDERS if options.full or name not in ONLY_FULL]
    return list(dict.fromkeys([options.ours, *names]))


def run(options: argparse.Namespace, result: dict[str, Any], model: str, folder: str) -> None:
    """Measure everything; `result` grows with every measurement."""
    data = str(options.data.resolve()) if options.data else None
    job = {
        "folder": folder,
        "model": model,
        "data": data,
        "rows": options.rows,
        "workloads": options.workloads,
    }
    prepared = run_script("workloads.py", job, output="prepared.json")
    names = chosen(options)
    result |= {
        "model": prepared["model"],
        "data": describe_data(options.data or SAMPLE),
        "settings": {
            "rows": options.rows,
            "batch_size": BATCH_SIZE,
            "lora_r": LORA_R,
            "targets": TARGETS,
            "learning_rate": LEARNING_RATE,
            "seed": SEED,
        },
        "workloads": prepared["workloads"],
        "ours": options.ours,
        "contenders": describe_contenders(CONTENDERS, names),
        "runs": [],
        "failures": [],
    }

    def measure(key: dict[str, Any]) -> None:
        steps = prepared["workloads"][key["workload"]]["steps"]
        measured = measure_contender(
            result, key, "contenders.py", {"folder": folder, "model": model, "steps": steps}
        )
        if measured is not None:
            numbers = (
                f"{tokens_per_second(measured):6.1f} tokens/s  {measured['peak_memory_bytes'] / 1e9:.2f} GB"
            )
            print_run(measured, key, f"{numbers}  loss {epoch_loss(measured):.5f}")

    measure_rounds(result, options, names, TRL, tokens_per_second, measure)


def main(given: Sequence[str] | None = None) -> int:
    arguments = options(given)
    if arguments.table_only:
        result = json.loads(arguments.output.read_text("utf-8"))
    else:
        result = new_result("sft.py", given, TRAINERS)
        model = model_to_use(arguments.model)
        with tempfile.TemporaryDirectory(prefix="yeonma-benchmark-") as folder:
            run(arguments, result, model, folder)
    if result["runs"]:
        publish("sft", result, sft_section(result), write_docs=arguments.write_docs, steps=True)
    return 1 if result["failures"] else 0


if __name__ == "__main__":
    sys.exit(main())
