"""Training on one GPU beside transformers' Trainer, TRL and, where they are installed, Unsloth and LLaMA-Factory.

Shapes of known models with random weights, so that nothing is downloaded. Every contender trains the same LoRA start on
the same token ids, each time in a process of its own. Unsloth and LLaMA-Factory pin other versions than Yeonma's:
--unsloth-python and --factory-python name the Python of an environment of theirs (requirements-*.txt). Writes
results/gpu.json after every measurement, and prints one table. `--tiny true` proves the harness on the CPU with a tiny
shape. A machine with nothing else to do, please.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gpu_contenders import DPO, FACTORY, OURS, SFT, UNSLOTH, contenders, lacking, versions_of
from gpu_shapes import LORA_R, REAL, SEED
from gpu_tables import gpu_section, tokens_per_second
from gpu_workloads import USUAL, WORKLOADS
from harness import (
    HERE,
    TRAINERS,
    benchmark_parser,
    measure_contender,
    new_result,
    run_script,
    save,
    shown_key,
)
from machine import gpu

RESULT = HERE / "results" / "gpu.json"
MORE_PACKAGES = ("bitsandbytes", "liger-kernel", "flash-attn", "unsloth", "llamafactory")
QUANTIZATIONS = ("none", "fp8", "nf4")


def options(given: Sequence[str] | None) -> argparse.Namespace:
    parser = benchmark_parser(__doc__, RESULT, random_weights=True)
    parser.add_argument("--tiny", choices=["true", "false"], default="false", help="a tiny shape, on the CPU")
    parser.add_argument("--shapes", nargs="+", choices=REAL, default=list(REAL))
    parser.add_argument("--workloads", nargs="+", choices=list(WORKLOADS), default=list(USUAL))
    parser.add_argument("--quantizations", nargs="+", choices=QUANTIZATIONS, default=list(QUANTIZATIONS))
    names = list(dict.fromkeys([*SFT, *DPO]))
    parser.add_argument("--contenders", nargs="+", choices=names, default=names)
    parser.add_argument("--unsloth-python", help="of an environment with benchmarks/requirements-unsloth.txt")
    parser.add_argument("--factory-python", help="of an environment with benchmarks/requirements-factory.txt")
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], help="bfloat16; tiny: float32")
    parser.add_argument("--steps", type=int, default=6, help="of each measurement; the first is not timed")
    parser.set_defaults(rounds=2)
    arguments = parser.parse_args(given)
    arguments.tiny = arguments.tiny == "true"
    for python in own_pythons(arguments).values():
        if shutil.which(python) is None:
            parser.error(f"{python} is not a Python that can be run")
    if arguments.steps < 2:
        parser.error("--steps: at least 2, since the first is not timed")
    return arguments


def own_pythons(arguments: argparse.Namespace) -> dict[str, str]:
    """The Pythons of peers that have environments of their own, by the peer."""
    named = {UNSLOTH: arguments.unsloth_python, FACTORY: arguments.factory_python}
    return {library: python for library, python in named.items() if python}


def run(arguments: argparse.Namespace, given: Sequence[str] | None) -> dict[str, Any]:
    device = "cpu" if arguments.tiny else "cuda"
    dtype = arguments.dtype or ("float32" if arguments.tiny else "bfloat16")
    result: dict[str, Any] = {
        **new_result("gpu.py", given, (*TRAINERS, *MORE_PACKAGES)),
        "gpu": None if arguments.tiny else gpu(),
        "own_versions": {
            library: versions_of(python, (*TRAINERS[1:], *MORE_PACKAGES))
            for library, python in own_pythons(arguments).items()
        },
        "settings": {"dtype": dtype, "lora_r": LORA_R, "seed": SEED, "steps": arguments.steps},
        "ours": OURS,
        "contenders": {
            f"{workload}/{name}": contender.label
            for workload in arguments.workloads
            for name, contender in contenders(WORKLOADS[workload].pairs).items()
        },
        "shapes": {},
        "runs": [],
        "failures": [],
        "left_out": [],
    }
    for shape in ["tiny"] if arguments.tiny else arguments.shapes:
        with tempfile.TemporaryDirectory(prefix="yeonma-benchmark-") as folder:
            job = {
                "folder": folder,
                "shape": shape,
                "dtype": dtype,
                "steps": arguments.steps,
                "workloads": arguments.workloads,
            }
            result["shapes"][shape] = run_script("gpu_shapes.py", job, output="prepared.json")
            for number in range(1, arguments.rounds + 1):
                measure_all(
                    arguments, result, shape, number, Path(folder), {"device": device, "dtype": dtype}
                )
    return result


def measure_all(
    arguments: argparse.Namespace,
    result: dict[str, Any],
    shape: str,
    number: int,
    folder: Path,
    where: dict[str, str],
) -> None:
    pythons = own_pythons(arguments)
    for workload, about in result["shapes"][shape]["workloads"].items():
        known = contenders(about["pairs"])
        for quantization in arguments.quantizations:
            for name in [name for name in arguments.contenders if name in known]:
                key = {"shape": shape, "workload": workload, "quantization": quantization, "contender": name}
                python = pythons.get(known[name].library)
                if why := lacking(known[name], quantization, about, python):
                    if number == 1:
                        result["left_out"].append({**key, "why": why})
                    continue
                measure(result, {**key, "round": number}, folder, {**where, "about": about}, python)
                save(arguments.output, result)


def measure(
    result: dict[str, Any], key: dict[str, Any], folder: Path, job: dict[str, Any], python: str | None = None
) -> None:
    """Add one contender's steps to the runs, or to the failures."""
    shutil.rmtree(folder / "output", ignore_errors=True)
    measured = measure_contender(result, key, "gpu_measure.py", {"folder": str(folder), **job}, python)
    if measured is None:
        return
    rate = sum(measured["matrix_rates"]) / 2e12
    print(
        f"{shown_key(key)} {tokens_per_second(measured):9.1f} tokens/s  {measured['peak_memory_bytes'] / 1e9:.2f} GB  "
        f"losses {', '.join(f'{loss:.5f}' for loss in measured['losses'])}  matrix rate {rate:.2f} TFLOP/s",
        flush=True,
    )


def main(given: Sequence[str] | None = None) -> int:
    arguments = options(given)
    if arguments.table_only:
        result = json.loads(arguments.output.read_text("utf-8"))
    else:
        if not arguments.tiny and gpu() is None:
            print("no CUDA device; --tiny true proves the harness on the CPU", file=sys.stderr)
            return 2
        result = run(arguments, given)
        save(arguments.output, result)
    if any(measured["contender"] == result["ours"] for measured in result["runs"]):
        print(f"\n{gpu_section(result)}")
    return 1 if result["failures"] else 0


if __name__ == "__main__":
    sys.exit(main())
