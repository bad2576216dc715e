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
from collections.abc import Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from dpo_contenders import CONTENDERS, OURS, TRL
from dpo_workloads import BATCH_SIZE, BETA, LEARNING_RATE, LORA_R, SEED, TARGETS, WORKLOADS
from machine import machine, versions
from sft import CLEARLY_SLOWER, PACKAGES, check_steps, child, describe_data, model_to_use, save, write_page
from tables import dpo_section, pairs_per_second, shown_command
from workloads import HERE

RESULT = HERE / "results" / "dpo.json"
SAMPLE = HERE.parent / "yeonma" / "samples" / "pairs_en.jsonl"


def options(given: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, default=SAMPLE, help="pairs, as .json or .jsonl")
    parser.add_argument("--model", type=Path, help="a model folder; else the one that `yeonma demo` prepares")
    parser.add_argument("--pairs", type=int, default=48, help="pairs of each workload; 48 make 12 steps")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--first-round", type=int, default=1, help="its number, to add rounds to others")
    parser.add_argument("--workloads", nargs="+", choices=list(WORKLOADS), default=list(WORKLOADS))
    parser.add_argument("--contenders", nargs="+", choices=list(CONTENDERS), default=list(CONTENDERS))
    ours = [name for name in CONTENDERS if name.startswith("yeonma")]
    parser.add_argument("--ours", choices=ours, default=OURS, help="the setting that TRL is set against")
    parser.add_argument(
        "--all-rounds", action="store_true", help="measure slow settings of TRL in every round too"
    )
    parser.add_argument("--add", action="store_true", help="keep the measurements that --output holds")
    parser.add_argument("--output", type=Path, default=RESULT)
    parser.add_argument("--write-docs", action="store_true", help="put the table into docs/benchmarks.md")
    parser.add_argument(
        "--table-only", action="store_true", help="measure nothing; the table of --output as it is"
    )
    return parser.parse_args(given)


def run(asked: argparse.Namespace, model: str, command: str, folder: Path) -> dict[str, Any]:
    job = {
        "folder": str(folder),
        "model": model,
        "data": str(asked.data.resolve()),
        "pairs": asked.pairs,
        "workloads": asked.workloads,
    }
    child("dpo_workloads.py", job, folder / "log")
    prepared = json.loads((folder / "prepared.json").read_text("utf-8"))
    result: dict[str, Any] = {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "command": command,
        "machine": machine(),
        "versions": versions(PACKAGES),
        "model": prepared["model"],
        "data": describe_data(asked.data),
        "settings": {
            "batch_size": BATCH_SIZE,
            "beta": BETA,
            "lora_r": LORA_R,
            "targets": TARGETS,
            "learning_rate": LEARNING_RATE,
            "seed": SEED,
        },
        "workloads": prepared["workloads"],
        "ours": asked.ours,
        "contenders": {name: {"label": each.label, **asdict(each)} for name, each in CONTENDERS.items()},
        "runs": [],
        "failures": [],
    }
    if asked.add and asked.output.exists():
        result = joined(json.loads(asked.output.read_text("utf-8")), json.loads(json.dumps(result)))
    for number in range(asked.first_round, asked.first_round + asked.rounds):
        for workload in asked.workloads:
            names = asked.contenders
            for name in names if asked.all_rounds else worth_measuring(result, workload, names):
                key = {"round": number, "workload": workload, "contender": name}
                measure(result, key, folder, model)
                save(asked.output, result)
    return result


def joined(before: dict[str, Any], now: dict[str, Any]) -> dict[str, Any]:
    """The earlier measurements with what is new about this run. Raises SystemExit where they cannot stand together."""
    for name in ("machine", "versions", "model", "data", "settings"):
        if before[name] != now[name]:
            raise SystemExit(f"--add: the earlier measurements have another {name}: {before[name]}")
    for workload, about in now["workloads"].items():
        if before["workloads"].get(workload, about) != about:
            raise SystemExit(f"--add: the earlier measurements of {workload} are of other pairs")
    found = {**before["workloads"], **now["workloads"]}
    workloads = {name: found[name] for name in WORKLOADS if name in found}
    command = before["command"]
    if now["command"] not in command.split(" ; "):
        command = f"{command} ; {now['command']}"
    kept = {"runs": before["runs"], "failures": before["failures"]}
    return {**now, **kept, "workloads": workloads, "command": command}


def worth_measuring(result: dict[str, Any], workload: str, names: Sequence[str]) -> list[str]:
    """All in the first round. Later without TRL's settings that were clearly slower than its fastest, or failed."""
    work = result["workloads"][workload]
    before = [run for run in result["runs"] if run["workload"] == workload]
    measured = {run["contender"]: pairs_per_second(run, work) for run in before if run["round"] == 1}
    failed = {each["contender"] for each in result["failures"] if each["workload"] == workload}
    trl = [speed for name, speed in measured.items() if CONTENDERS[name].library == TRL]

    def worth(name: str) -> bool:
        if CONTENDERS[name].library != TRL:
            return True
        return name not in failed and (name not in measured or measured[name] >= CLEARLY_SLOWER * max(trl))

    return [name for name in names if worth(name)]


def measure(result: dict[str, Any], key: dict[str, Any], folder: Path, model: str) -> None:
    """Put one contender's epochs among the runs, in place of an earlier one of this round, or among the failures."""
    measured = folder / "measured.json"
    measured.unlink(missing_ok=True)
    shown = f"round {key['round']}  {key['workload']:7} {key['contender']:17}"
    for kind in ("runs", "failures"):
        result[kind] = [each for each in result[kind] if {name: each[name] for name in key} != key]
    try:
        child("dpo_contenders.py", {"folder": str(folder), "model": model, **key}, folder / "log")
    except RuntimeError as error:
        print(f"{shown} failed: {error}", flush=True)
        result["failures"].append({**key, "error": str(error).replace(str(folder), "FOLDER")})
        return
    found = {**key, **json.loads(measured.read_text("utf-8"))}
    result["runs"].append(found)
    speed = pairs_per_second(found, result["workloads"][key["workload"]])
    rate = sum(found["matrix_rates"]) / 2e9
    numbers = f"{speed:.3f} pairs/s  reference {found['reference_seconds']:.1f} s"
    numbers += f"  {found['peak_memory_bytes'] / 1e9:.2f} GB  losses {', '.join(f'{x:.5f}' for x in found['losses'])}"
    print(f"{shown} {numbers}  matrix rate {rate:.0f} GFLOP/s", flush=True)


def main(given: Sequence[str] | None = None) -> int:
    asked = options(given)
    if asked.table_only:
        result = json.loads(asked.output.read_text("utf-8"))
    else:
        command = shown_command("dpo.py", sys.argv[1:] if given is None else given)
        model = model_to_use(asked.model)
        with tempfile.TemporaryDirectory(prefix="yeonma-benchmark-") as folder:
            result = run(asked, model, command, Path(folder))
    if any(each["contender"] == result["ours"] for each in result["runs"]):
        print(f"\n{dpo_section(result)}")
        if asked.write_docs:
            check_steps(result)
            write_page("dpo", result)
    return 1 if result["failures"] else 0


if __name__ == "__main__":
    sys.exit(main())
