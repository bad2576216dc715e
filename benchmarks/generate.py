"""How fast `yeonma compare` asks a model, beside transformers' generate one by one and in padded batches.

Every contender answers the same 64 prompts greedily, each time in a process of its own, and the contenders take turns.
Writes results/generate.json; --write-docs puts its table into docs/benchmarks.md. A machine with nothing else to do,
please.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from harness import HERE, benchmark_parser, model_to_use, new_result, publish, run_script, save
from tables import generate_section
from workloads import SAMPLE

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
    parser = benchmark_parser(__doc__, RESULT, compares=False)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args(given)
    result = new_result("generate.py", given, PACKAGES)
    model = model_to_use(options.model)
    runs: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="yeonma-benchmark-") as folder:
        for number in range(1, options.rounds + 1):
            for name, about in CONTENDERS.items():
                job = {"folder": folder, "model": model, "samples": str(SAMPLE.parent), **about}
                job |= {"rows": options.rows, "new_tokens": options.new_tokens}
                measured = run_script("one_generation.py", job)
                runs.append({"contender": name, "round": number, **measured})
                print(f"round {number}  {about['label']:45} {measured['seconds']:.1f} s", flush=True)
    reference = next(run for run in runs if run["contender"] == ONE_BY_ONE)["answers"]
    equal = {
        name: equal_answers([run for run in runs if run["contender"] == name], reference)
        for name in CONTENDERS
    }
    for run in runs:
        del run["answers"]
    result |= {
        "model": Path(model).name,
        "rows": options.rows,
        "new_tokens": options.new_tokens,
        "ours": "yeonma",
        "one_by_one": ONE_BY_ONE,
        "contenders": CONTENDERS,
        "equal": equal,
        "runs": runs,
    }
    save(options.output, result)
    publish("generate", result, generate_section(result), write_docs=options.write_docs)
    return 0


if __name__ == "__main__":
    sys.exit(main())
