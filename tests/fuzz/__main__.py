"""`python -m tests.fuzz`: runs many cases of every target, in one process per target, and prints a summary."""

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

# As in tests/conftest.py: one thread, no network. torch and huggingface_hub read these once, when they are imported.
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
QUIET = {"TRANSFORMERS_VERBOSITY": "error"}  # hides its report of missing weights


SLOW_SECONDS = 1
MAX_SHOWN = 20_000  # characters of a case


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--cases", type=int, default=10_000, help="number of cases over all targets")
    parser.add_argument("--seed", type=int, default=None, help="random by default, and printed")
    parser.add_argument("--targets", nargs="*", choices=CASES, default=list(CASES))
    parser.add_argument("--one", choices=CASES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    seed = secrets.randbelow(2**31) if arguments.seed is None else arguments.seed
    if arguments.one:
        with tempfile.TemporaryDirectory() as folder:
            return _one(arguments.one, arguments.cases, seed, Path(folder))
    print(f"seed {seed}", flush=True)
    started, lines = perf_counter(), {}
    for name, count in cases_per_target(arguments.cases, arguments.targets).items():
        lines[name] = _in_process(name, count, seed)
        print(_table_line(name, lines[name]), flush=True)
    total = {
        key: round(sum(line[key] for line in lines.values()), 1) for key in ("cases", "accepted", "refused")
    }
    total |= {"failures": sum(line["failures"] for line in lines.values())}
    total |= {"seconds": round(perf_counter() - started, 1)}
    total |= {"slowest_seconds": max(line["slowest_seconds"] for line in lines.values())}
    print(_table_line("all", total))
    summary = {"seed": seed, "hypothesis": hypothesis.__version__, **total, "targets": lines}
    print(f"fuzz: {json.dumps(summary)}")
    return 1 if total["failures"] else 0


def cases_per_target(cases: int, names: list[str]) -> dict[str, int]:
    """Number of cases of every target; they add up to `cases`."""
    total = sum(CASES[name] for name in names)
    counts = {name: cases * CASES[name] // total for name in names}
    counts[names[0]] += cases - sum(counts.values())
    return {name: count for name, count in counts.items() if count}


def _one(name: str, cases: int, seed: int, folder: Path) -> int:
    """Run one target in this process. Its line comes last on standard output."""
    tally = run_target(target_of(name), cases, folder, seed)
    for failure in tally.failures:
        print(failure, file=sys.stderr)
    if tally.slowest_seconds > SLOW_SECONDS:
        print(f"{name}: the slowest case: {tally.slowest_case[:MAX_SHOWN]}", file=sys.stderr)
    print(json.dumps(tally.line()))
    return 0


def _in_process(name: str, count: int, seed: int) -> dict[str, float]:
    """Run one target in its own process, and return its line. If the process crashes, its last case is shown."""
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
        environment = {**os.environ, **ENVIRONMENT, **QUIET, "TMPDIR": folder}
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True)
        if done.returncode == 0:
            line: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
            return line
        print(f"{name}: the process ended with status {done.returncode}", file=sys.stderr)
        for path in Path(folder).glob("*/last-case.txt"):
            print(path.read_text(encoding="utf-8")[:MAX_SHOWN], file=sys.stderr)
    return Tally(failures=["the process ended"]).line()


def _table_line(name: str, line: dict[str, float]) -> str:
    return f"{name:<10}" + "".join(f"{value:>8} {key}" for key, value in line.items())


if __name__ == "__main__":
    sys.exit(main())
