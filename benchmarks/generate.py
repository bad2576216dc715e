"""How fast `yeonma compare` asks a model, beside transformers' generate one by one and in padded batches.

Every contender answers the same 64 prompts greedily, each time in a process of its own, and the contenders take turns.
Writes results/generate.json; --write-docs puts its table into docs/benchmarks.md. A machine with nothing else to do,
please.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from machine import machine, versions
from sft import child, model_to_use, save, write_page
from tables import generate_section, shown_command
from workloads import HERE, SAMPLE

PACKAGES = ("yeonma", "torch", "transformers", "tokenizers", "numpy")
RESULT = HERE / "results" / "generate.json"
ONE_BY_ONE = "transformers-1"
CONTENDERS: dict[str, dict[str, Any]] = {
    "yeonma": {"label": "Yeonma, up to 32 at once", "ours": True, "batch": 32},
    ONE_BY_ONE: {"label": "transformers generate, one by one", "ours": False, "batch": 1},
    "transformers-32": {"label": "transformers generate, padded batches of 32", "ours": False, "batch": 32},
}


def equal_answers(runs: Sequence[dict[str, Any]], reference: Sequence[Sequence[int]]) -> int:
    """How many answers are the reference's token by token, the fewest of any run."""
    return min(
        sum(list(a) == list(b) for a, b in zip(run["answers"], reference, strict=True)) for run in runs
    )


def main(given: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, help="a model folder; else the one that `yeonma demo` prepares")
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=RESULT)
    parser.add_argument("--write-docs", action="store_true", help="put the table into docs/benchmarks.md")
    asked = parser.parse_args(given)
    model = model_to_use(asked.model)
    runs: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="yeonma-benchmark-") as folder:
        for number in range(1, asked.rounds + 1):
            for name, about in CONTENDERS.items():
                job = {"folder": folder, "model": model, "samples": str(SAMPLE.parent), **about}
                job |= {"rows": asked.rows, "new_tokens": asked.new_tokens}
                child("one_generation.py", job, Path(folder) / "log")
                measured = json.loads((Path(folder) / "measured.json").read_text("utf-8"))
                runs.append({"contender": name, "round": number, **measured})
                print(f"round {number}  {about['label']:45} {measured['seconds']:.1f} s", flush=True)
    reference = next(run for run in runs if run["contender"] == ONE_BY_ONE)["answers"]
    equal = {
        name: equal_answers([run for run in runs if run["contender"] == name], reference)
        for name in CONTENDERS
    }
    for run in runs:
        del run["answers"]
    result = {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "command": shown_command("generate.py", sys.argv[1:] if given is None else given),
        "machine": machine(),
        "versions": versions(PACKAGES),
        "model": Path(model).name,
        "rows": asked.rows,
        "new_tokens": asked.new_tokens,
        "ours": "yeonma",
        "one_by_one": ONE_BY_ONE,
        "contenders": CONTENDERS,
        "equal": equal,
        "runs": runs,
    }
    save(asked.output, result)
    print(f"\n{generate_section(result)}")
    if asked.write_docs:
        write_page("generate", result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
