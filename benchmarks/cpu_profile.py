"""What one training step on the CPU spends its time on: an SFT and a DPO step under PyTorch's profiler.

The workloads are those of sft.py and dpo.py. Writes results/cpu_profile.json; --write-docs puts its table into
docs/benchmarks.md. A machine with nothing else to do, please.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dpo import SAMPLE as PAIRS
from harness import (
    HERE,
    TRAINERS,
    benchmark_parser,
    describe_data,
    model_to_use,
    new_result,
    publish_both,
    run_script,
    save,
)
from tables import cpu_profile_section
from workloads import BATCH_SIZE, SAMPLE

RESULT = HERE / "results" / "cpu_profile.json"
CONTENDER = "yeonma-4"
PROFILED = 2
"""Which step: the first one warms up."""
RUNS = {"sft/alpaca": ("alpaca", False), "dpo/short": ("short", True)}
"""Name -> its workload, and whether it is of pairs."""


def options(given: Sequence[str] | None) -> argparse.Namespace:
    parser = benchmark_parser(__doc__, RESULT, compares=False)
    parser.add_argument("--data", type=Path, help="a json list with instruction, input, output")
    parser.add_argument("--pairs", type=Path, default=PAIRS, help="pairs, as .json or .jsonl")
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args(given)


def run(options: argparse.Namespace, result: dict[str, Any], model: str, folder: Path) -> None:
    data = str(options.data.resolve()) if options.data else None
    rows = BATCH_SIZE * PROFILED
    for name, (workload, pairs) in RUNS.items():
        own = folder / workload
        own.mkdir()
        job = {"folder": str(own), "model": model, "workloads": [workload]}
        if pairs:
            job |= {"data": str(options.pairs.resolve()), "pairs": rows // 2}
        else:
            job |= {"data": data, "rows": rows}
        script = "dpo_workloads.py" if pairs else "workloads.py"
        result["model"] = run_script(script, job, output="prepared.json")["model"]
        job = {
            "folder": str(own),
            "model": model,
            "workload": workload,
            "pairs": pairs,
            "contender": CONTENDER,
            "number": PROFILED,
            "threads": options.threads,
        }
        result["runs"][name] = run_script("one_cpu_profile.py", job)
        print(f"{name}: {result['runs'][name]['step_seconds']:.1f} s", flush=True)


def main(given: Sequence[str] | None = None) -> int:
    arguments = options(given)
    result = {
        **new_result("cpu_profile.py", given, TRAINERS),
        "data": {"sft": describe_data(arguments.data or SAMPLE), "dpo": describe_data(arguments.pairs)},
        "threads": arguments.threads,
        "runs": {},
    }
    with tempfile.TemporaryDirectory(prefix="yeonma-benchmark-") as folder:
        run(arguments, result, model_to_use(arguments.model), Path(folder))
    save(arguments.output, result)
    print(cpu_profile_section(result))
    if arguments.write_docs:
        publish_both("cpu_profile", lambda language: cpu_profile_section(result, language))
    return 0


if __name__ == "__main__":
    sys.exit(main())
