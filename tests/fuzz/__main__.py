"""`python -m tests.fuzz`: many cases of every target, each target in a process of its own, and a summary."""

from __future__ import annotations

import argparse
import json
import os
import secrets
import subprocess
import sys
import tempfile
from pathlib import Path
from time import perf_counter

import hypothesis

from tests.fuzz.harness import Tally, run_target
from tests.fuzz.targets import CASES, target_of

# As tests/conftest.py has it: one thread, no network. torch and huggingface_hub read these once, when imported.
ALONE = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
QUIET = {"TRANSFORMERS_VERBOSITY": "error"}  # its report of the weights that are lacking


SLOW_SECONDS = 1
MOST_SHOWN = 20_000  # characters of a case


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--cases", type=int, default=10_000, help="over all targets together")
    parser.add_argument("--seed", type=int, default=None, help="drawn, and printed, where it is not given")
    parser.add_argument("--targets", nargs="*", choices=CASES, default=list(CASES))
    parser.add_argument("--one", choices=CASES, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    seed = secrets.randbelow(2**31) if asked.seed is None else asked.seed
    if asked.one:
        with tempfile.TemporaryDirectory() as folder:
            return _one(asked.one, asked.cases, seed, Path(folder))
    print(f"seed {seed}", flush=True)
    began, lines = perf_counter(), {}
    for name, count in shared(asked.cases, asked.targets).items():
        lines[name] = _in_process(name, count, seed)
        print(_table_line(name, lines[name]), flush=True)
    total = {
        key: round(sum(line[key] for line in lines.values()), 1) for key in ("cases", "accepted", "refused")
    }
    total |= {"failures": sum(line["failures"] for line in lines.values())}
    total |= {"seconds": round(perf_counter() - began, 1)}
    total |= {"slowest_seconds": max(line["slowest_seconds"] for line in lines.values())}
    print(_table_line("all", total))
    summary = {"seed": seed, "hypothesis": hypothesis.__version__, **total, "targets": lines}
    print(f"fuzz: {json.dumps(summary)}")
    return 1 if total["failures"] else 0


def shared(cases: int, names: list[str]) -> dict[str, int]:
    """Cases of each target, in the sum `cases`."""
    whole = sum(CASES[name] for name in names)
    counts = {name: cases * CASES[name] // whole for name in names}
    counts[names[0]] += cases - sum(counts.values())
    return {name: count for name, count in counts.items() if count}


def _one(name: str, cases: int, seed: int, folder: Path) -> int:
    """This process: one target. Its line comes last on standard output."""
    tally = run_target(target_of(name), cases, folder, seed)
    for failure in tally.failures:
        print(failure, file=sys.stderr)
    if tally.slowest_seconds > SLOW_SECONDS:
        print(f"{name}: the slowest case: {tally.slowest_case[:MOST_SHOWN]}", file=sys.stderr)
    print(json.dumps(tally.line()))
    return 0


def _in_process(name: str, count: int, seed: int) -> dict[str, float]:
    """The target's line. A process that ends before it has given one is one failure; its last case is shown."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable,
            "-m",
            "tests.fuzz",
            "--one",
            name,
            "--cases",
            str(count),
            "--seed",
            str(seed),
        ]
        environment = {**os.environ, **ALONE, **QUIET, "TMPDIR": folder}
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True)
        if done.returncode == 0:
            line: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
            return line
        print(f"{name}: the process ended with status {done.returncode}", file=sys.stderr)
        for path in Path(folder).glob("*/last-case.txt"):
            print(path.read_text(encoding="utf-8")[:MOST_SHOWN], file=sys.stderr)
    return Tally(failures=["the process ended"]).line()


def _table_line(name: str, line: dict[str, float]) -> str:
    return f"{name:<10}" + "".join(f"{value:>8} {key}" for key, value in line.items())


if __name__ == "__main__":
    sys.exit(main())
