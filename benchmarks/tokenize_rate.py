"""Has tokenising become slower since another commit? Rows of the same forms by both programs, in turn.

`--before` is a folder with that commit checked out:

    git worktree add /tmp/before COMMIT
    python benchmarks/tokenize_rate.py --before /tmp/before

Each measurement is a process of its own, and the two programs take turns within a round. Ratios are of the CPU seconds
of a round, because other work on the machine changes those less than the time on the clock. Both must give the same
number of tokens. Writes results/tokenize_rate.json; --write-docs puts its table into docs/benchmarks.md.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from harness import HERE, benchmark_parser, model_to_use, new_result, publish, run_script, save
from tables import tokenize_rate_section
from workloads import SAMPLE

PACKAGES = ("yeonma", "tokenizers", "transformers", "numpy")
RESULT = HERE / "results" / "tokenize_rate.json"
TITLES = "### Article:\n{document}\n\n### Title:\n{title}"

Words = Callable[[int, int], str]
"""(least, most) -> so many words."""


def plain(words: Words) -> dict[str, Any]:
    return {"document": words(8, 30), "title": words(3, 8)}


def instructions(words: Words) -> dict[str, Any]:
    return {"instruction": words(5, 20), "input": words(0, 12), "output": words(5, 60)}


def turns(words: Words) -> dict[str, Any]:
    roles = ("user", "assistant") * 2
    return {"messages": [{"role": role, "content": words(5, 25)} for role in roles]}


FORMS: dict[str, tuple[Callable[[Words], dict[str, Any]], str]] = {
    "plain rows": (plain, TITLES),
    "alpaca": (instructions, "alpaca"),
    "turn lists": (turns, "chat"),
}


def words_source(seed: int) -> Words:
    """Words of the bundled sample in random order, the same every time."""
    known = sorted(set(SAMPLE.read_text("utf-8").replace('"', " ").split()))
    draw = random.Random(seed)
    return lambda least, most: " ".join(draw.choices(known, k=draw.randint(least, most)))


def write_form(path: Path, make: Callable[[Words], dict[str, Any]], count: int) -> None:
    words = words_source(1)
    with open(path, "w", encoding="utf-8") as file:
        for _ in range(count):
            file.write(json.dumps(make(words), ensure_ascii=False) + "\n")


def commit_of(folder: Path) -> str:
    command = ["git", "-C", str(folder), "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def main(given: Sequence[str] | None = None) -> int:
    parser = benchmark_parser(__doc__, RESULT, compares=False)
    parser.add_argument(
        "--before", type=Path, required=True, help="a folder with the other commit checked out"
    )
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args(given)
    checkouts = {"before": options.before.resolve(), "now": HERE.parent}
    result = new_result("tokenize_rate.py", given, PACKAGES)
    model = model_to_use(options.model)
    result |= {
        "model": Path(model).name,
        "rows": options.rows,
        "commits": {name: commit_of(folder) for name, folder in checkouts.items()},
        "rounds": [],
    }
    with tempfile.TemporaryDirectory(prefix="yeonma-benchmark-") as place:
        forms = {}
        for number, (name, (make, template)) in enumerate(FORMS.items()):
            path = Path(place) / f"{number}.jsonl"
            write_form(path, make, options.rows)
            forms[name] = (str(path), template)
        job = {"folder": place, "model": model, "forms": forms}
        for number in range(options.rounds):
            measured = {}
            for name in ("before", "now") if number % 2 == 0 else ("now", "before"):
                run = run_script("one_rate.py", job, checkout=checkouts[name])
                if run.pop("checkout") != str(checkouts[name]):
                    raise SystemExit(f"{name}: another checkout of Yeonma was measured")
                measured[name] = run["forms"]
            for form in FORMS:
                tokens = {name: measured[name][form].pop("tokens") for name in measured}
                if len(set(tokens.values())) > 1:
                    raise SystemExit(f"{form}: numbers of tokens differ: {tokens}")
                result.setdefault("tokens", {})[form] = tokens["now"]
                ratio = measured["before"][form]["cpu_seconds"] / measured["now"][form]["cpu_seconds"]
                print(f"round {number + 1}  {form:12} {ratio:.3f} of the rate before", flush=True)
            result["rounds"].append(measured)
    save(options.output, result)
    publish("tokenize_rate", result, tokenize_rate_section(result), write_docs=options.write_docs)
    return 0


if __name__ == "__main__":
    sys.exit(main())
