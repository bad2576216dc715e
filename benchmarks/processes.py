"""A step in one process, in two, and in two that share the frozen weights out, beside what docs/scale.md's model says.

    python benchmarks/processes.py --base_model FOLDER --data_path rows.json [--steps 12] [--batch_size 16]

On CPUs, with one thread for each process, over gloo. Two processes share the machine's memory bandwidth and caches, so
run it on a machine that does nothing else and has two cores or more. The rates of gloo's sums and gatherings are
measured first, by themselves; the prediction is the step of one process halved, with the sum of the gradients added.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

from harness import HERE, steps_of
from machine import machine, versions

ROOT = HERE.parent
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]

RATES = """
import json, time, torch
import torch.distributed as dist
dist.init_process_group("gloo")
numbers, rates = torch.ones(2**24), {}
parts = list(torch.empty(2, 2**24))
for name, call in (
    ("all_reduce", lambda: dist.all_reduce(numbers)),
    ("all_gather", lambda: dist.all_gather(parts, numbers)),
):
    seconds = []
    for _ in range(6):
        dist.barrier()
        started = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - started)
    rates[name] = numbers.nbytes / min(seconds[1:])
if dist.get_rank() == 0:
    print(json.dumps(rates))
dist.barrier()
dist.destroy_process_group()
"""


def rates(folder: Path) -> dict[str, float]:
    """Bytes a second of gloo: summed, and received from the other process."""
    script = folder / "rates.py"
    script.write_text(RATES)
    done = subprocess.run([*TORCHRUN, str(script)], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def steps(folder: Path, name: str, words: list[str]) -> list[dict[str, float]]:
    """The steps of a run of `yeonma sft`, but for the first."""
    output = folder / name
    command = [sys.executable, "-m", "yeonma", "sft", "--output_dir", str(output), "--card_rows", "0", *words]
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    return steps_of(output)[1:]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--base_model", required=True)
    parser.add_argument("--data_path", required=True)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--micro_batch_size", type=int, default=4)
    given = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        words = [
            "--base_model",
            given.base_model,
            "--data_path",
            given.data_path,
            "--max_steps",
            str(given.steps),
        ]
        words += ["--batch_size", str(given.batch_size), "--micro_batch_size", str(given.micro_batch_size)]
        rate = rates(folder)
        runs = {
            "one": steps(folder, "one", words),
            "two": steps(folder, "two", [*words, "--nproc", "2"]),
            "two, sharded": steps(folder, "sharded", [*words, "--nproc", "2", "--shard", "true"]),
        }
        adapter = (folder / "one" / "adapter_model.safetensors").stat().st_size
    seconds_of = {name: [line["seconds"] for line in lines] for name, lines in runs.items()}
    halved = [seconds / 2 for seconds in seconds_of["one"]]
    reduce = adapter / rate["all_reduce"]
    predicted = median(seconds + reduce for seconds in halved)
    print(json.dumps({"machine": machine(), **versions(["torch", "transformers", "peft"])}))
    print(f"gloo: {rate['all_reduce'] / 1e9:.2f} GB/s summed, {rate['all_gather'] / 1e9:.2f} GB/s gathered")
    for name, seconds in seconds_of.items():
        ratios = [one / mine for one, mine in zip(seconds_of["one"], seconds, strict=True)]
        print(f"{name}: {median(seconds):.3f} s a step, {median(ratios):.2f} times as fast as one")
    print(
        f"two, by the model: {predicted:.3f} s a step, {reduce:.3f} s of it the sum of {adapter / 1e6:.1f} MB"
    )


if __name__ == "__main__":
    main()
