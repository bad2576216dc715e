"""What the benchmarks share: options, measurements in processes of their own, results on disk and in the docs.

At the top it imports only what every environment has: some peers run in a Python without Yeonma's packages.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from datetime import datetime, timezone
from hashlib import sha256
from pathlib import Path
from typing import Any

from machine import cores, machine, versions
from process_group import run_group
from tables import LEAST_STEPS, lease_section, page_of, put, shown_command, too_few_steps

HERE = Path(__file__).resolve().parent
PAGE = HERE.parent / "docs" / "benchmarks.md"
TRAINERS = ("yeonma", "torch", "transformers", "peft", "trl", "accelerate", "tokenizers", "datasets", "numpy")
"""The packages whose versions a comparison of trainers records."""
CLEARLY_SLOWER = 0.9
"""A peer's setting below this share of its fastest speed is measured in the first round alone."""


def benchmark_parser(
    description: str | None, result: Path, *, compares: bool = True, random_weights: bool = False
) -> argparse.ArgumentParser:
    """The options of every benchmark.

    One that compares trainers also has rounds, and tables without measuring. One with random weights has neither a
    model nor a place in the docs.
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=result)
    if not random_weights:
        parser.add_argument(
            "--model", type=Path, help="a model folder; else the one that `yeonma demo` prepares"
        )
        parser.add_argument("--write-docs", action="store_true", help="put the table into docs/benchmarks.md")
    if compares and not random_weights:
        parser.add_argument(
            "--all-rounds", action="store_true", help="measure slow settings of TRL in every round too"
        )
    if compares:
        parser.add_argument("--rounds", type=int, default=3)
        parser.add_argument(
            "--table-only", action="store_true", help="measure nothing; the table of --output as it is"
        )
    return parser


def model_to_use(folder: Path | None) -> str:
    """The folder given, or the name or folder of the demo's model, downloaded if it is not there yet."""
    if folder is not None:
        return str(folder.resolve())
    from yeonma.model.smollm2 import fetch

    return fetch(print)


def new_result(script: str, given: Sequence[str] | None, packages: Sequence[str]) -> dict[str, Any]:
    """When, how and on what a benchmark ran: the beginning of its result."""
    return {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "command": shown_command(script, sys.argv[1:] if given is None else given),
        "machine": machine(),
        "versions": versions(packages),
    }


def describe_contenders(contenders: Mapping[str, Any], names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """What a result says of its contenders, which are dataclasses with a label."""
    return {name: {"label": contenders[name].label, **asdict(contenders[name])} for name in names}


def describe_data(path: Path) -> dict[str, str]:
    return {"name": path.name, "sha256": sha256(path.read_bytes()).hexdigest()}


def run_script(
    script: str,
    job: dict[str, Any],
    output: str = "measured.json",
    python: str | None = None,
    checkout: Path | None = None,
    packages: Path | None = None,
    log: Path | None = None,
    limit_seconds: float | None = None,
) -> Any:
    """Run a script of this folder with a job, in a process of its own; returns what it wrote into `job["folder"]`.

    `python` is the path of another environment's Python: it finds Yeonma's modules, and its own packages. `checkout` is
    a folder with another Yeonma, whose modules the script then imports; `packages` one with packages that go before the
    installed ones. `log` is the file for what it prints, a file in the job's folder by default.
    Raises OverLimit if it takes longer than `limit_seconds`, after ending it and all that it started; RuntimeError with
    the last line that the script printed, if it fails.
    """
    folder = Path(job["folder"])
    job_file, written, log = folder / "job.json", folder / output, log or folder / "log"
    written.unlink(missing_ok=True)
    job_file.write_text(json.dumps(job), "utf-8")
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": str(cores()),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "true",
    }
    if python is not None or checkout is not None or packages is not None:
        first = [str(path) for path in (checkout or HERE.parent, packages) if path is not None]
        own = os.environ.get("PYTHONPATH")
        environment["PYTHONPATH"] = os.pathsep.join([*first, *([own] if own else [])])
    command = [python or sys.executable, str(HERE / script), str(job_file)]
    status = run_group(command, log, environment, limit_seconds)
    if status != 0:
        printed = log.read_text("utf-8", errors="replace").strip().splitlines()
        raise RuntimeError(printed[-1] if printed else f"exit status {status}")
    return json.loads(written.read_text("utf-8"))


def answer_job(work: Callable[[dict[str, Any]], Any], output: str = "measured.json") -> None:
    """The other end of `run_script`: read the job file named on the command line, and write the result of `work`."""
    job = json.loads(Path(sys.argv[1]).read_text("utf-8"))
    (Path(job["folder"]) / output).write_text(json.dumps(work(job)), "utf-8")


def measure_contender(
    result: dict[str, Any], key: dict[str, Any], script: str, job: dict[str, Any], python: str | None = None
) -> dict[str, Any] | None:
    """Measure a contender, and put what comes out among the runs or the failures, instead of an earlier entry of `key`.

    Prints a failure. Returns the run, or None for a failure.
    """
    for kind in ("runs", "failures"):
        result[kind] = [entry for entry in result[kind] if {name: entry[name] for name in key} != key]
    try:
        run = {**key, **run_script(script, {**key, **job}, python=python)}
    except RuntimeError as error:
        print(f"{shown_key(key)} failed: {error}", flush=True)
        result["failures"].append({**key, "error": str(error).replace(str(job["folder"]), "FOLDER")[:300]})
        return None
    result["runs"].append(run)
    return run


def print_run(run: Mapping[str, Any], key: Mapping[str, Any], numbers: str) -> None:
    """A measured run on one line, with the machine's matrix rate beside its numbers."""
    rate = sum(run["matrix_rates"]) / 2e9
    print(f"{shown_key(key)} {numbers}  matrix rate {rate:.0f} GFLOP/s", flush=True)


def shown_key(key: Mapping[str, Any]) -> str:
    """A measurement's name in a printed line."""
    names = [name for name in ("shape", "workload", "quantization") if name in key]
    return f"round {key['round']}  {' '.join(f'{key[name]:9}' for name in names)} {key['contender']:19}"


def measure_rounds(
    result: dict[str, Any],
    options: argparse.Namespace,
    names: Sequence[str],
    peer: str,
    speed: Callable[[Mapping[str, Any]], float],
    measure: Callable[[dict[str, Any]], None],
    first_round: int = 1,
) -> None:
    """Contenders take turns within a round. The result is saved after every measurement.

    Without --all-rounds, settings of the library `peer` are measured as `worth_measuring` says.
    """
    peers = [name for name, about in result["contenders"].items() if about["library"] == peer]
    for number in range(first_round, first_round + options.rounds):
        for workload in options.workloads:
            chosen = names if options.all_rounds else worth_measuring(result, workload, names, peers, speed)
            for name in chosen:
                measure({"round": number, "workload": workload, "contender": name})
                save(options.output, result)


def worth_measuring(
    result: Mapping[str, Any],
    workload: str,
    names: Sequence[str],
    peers: Sequence[str],
    speed: Callable[[Mapping[str, Any]], float],
) -> list[str]:
    """All in the first round. Later without those of `peers` that failed, or were clearly slower than its fastest."""
    first = {
        run["contender"]: speed(run)
        for run in result["runs"]
        if run["workload"] == workload and run["round"] == 1
    }
    failed = {entry["contender"] for entry in result["failures"] if entry["workload"] == workload}
    fastest = max((rate for name, rate in first.items() if name in peers), default=0.0)

    def worth(name: str) -> bool:
        if name not in peers:
            return True
        return name not in failed and first.get(name, fastest) >= CLEARLY_SLOWER * fastest

    return [name for name in names if worth(name)]


def save(path: Path, result: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".tmp")
    beside.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", "utf-8")
    beside.replace(path)


def publish(
    name: str, result: Mapping[str, Any], section: str, *, write_docs: bool, steps: bool = False
) -> None:
    """Print a section of docs/benchmarks.md, and write it there if asked to.

    `steps`: raises SystemExit instead of writing, if the result has too few steps.
    """
    print(f"\n{section}")
    if not write_docs:
        return
    if steps:
        check_steps(result)
    PAGE.write_text(page_of(PAGE.read_text("utf-8"), {name: result}), "utf-8")


def publish_lease(result: Mapping[str, Any] | None) -> None:
    """Write what was measured on a GPU into the pages of both languages."""
    publish_both("lease", lambda language: lease_section(result, language))


def publish_both(name: str, section_of: Callable[[str], str]) -> None:
    """Write a section into the pages of both languages, `en` and `ko`."""
    for language, page in (("en", PAGE), ("ko", PAGE.with_suffix(".ko.md"))):
        page.write_text(put(page.read_text("utf-8"), name, section_of(language)), "utf-8")


def check_steps(result: Mapping[str, Any]) -> None:
    """Raises SystemExit for a result of too few steps to be published."""
    if short := too_few_steps(result):
        raise SystemExit(f"{', '.join(short)}: fewer than {LEAST_STEPS} steps; not written into the docs")


def yeonma_steps(verb: str, settings: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Run a training verb in this process, from its command line to its adapter folder; the steps of its metrics.jsonl.

    A setting of None is left out. Raises SystemExit if the run fails.
    """
    from yeonma.cli import main

    given = {**settings, "overwrite": "true", "card_rows": 0}
    if main([verb, *(f"--{name}={value}" for name, value in given.items() if value is not None)]) != 0:
        raise SystemExit(f"yeonma {verb} failed")
    return steps_of(Path(settings["output_dir"]))


def steps_of(output: Path) -> list[dict[str, Any]]:
    """The training steps that a run's metrics.jsonl holds."""
    lines = map(json.loads, (output / "metrics.jsonl").read_text("utf-8").splitlines())
    return [line for line in lines if not line.get("evaluation")]


@contextmanager
def timed_reference(cache: Path) -> Iterator[list[float]]:
    """The seconds of the reference pass of the runs inside. What earlier runs left in the cache is removed first."""
    from yeonma.train import build

    for file in cache.glob("*.reference"):
        file.unlink()
    seconds: list[float] = []
    compute = build.reference_logprobs

    def timed(*arguments: Any, **keywords: Any) -> Any:
        started = time.perf_counter()
        try:
            return compute(*arguments, **keywords)
        finally:
            seconds.append(time.perf_counter() - started)

    build.reference_logprobs = timed
    try:
        yield seconds
    finally:
        build.reference_logprobs = compute
