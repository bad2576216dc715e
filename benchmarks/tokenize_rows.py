"""Do many short rows tokenise in constant memory, and not at all the second time? How long does `inspect` take?

Makes the rows in a temporary folder and reads them twice, each time in a process of its own; then inspects a quarter
of them and all of them, each with an empty cache and again. Writes results/tokenize_rows.json; --write-docs puts its
tables into docs/benchmarks.md.
"""

from __future__ import annotations

import json
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from harness import HERE, benchmark_parser, model_to_use, new_result, publish, run_script, save
from tables import tokenize_section
from workloads import SAMPLE

PACKAGES = ("yeonma", "tokenizers", "transformers", "datasets", "numpy")
RESULT = HERE / "results" / "tokenize_rows.json"


def write_rows(path: Path, count: int) -> None:
    """Short rows of the bundled sample's words in random order; the same rows every time, no two alike."""
    words = sorted(set(SAMPLE.read_text("utf-8").replace('"', " ").split()))
    draw = random.Random(1)
    with open(path, "w", encoding="utf-8") as file:
        for number in range(count):
            document = " ".join(draw.choices(words, k=draw.randint(8, 30)))
            title = " ".join(draw.choices(words, k=draw.randint(3, 8)))
            file.write(
                json.dumps({"document": f"{number} {document}", "title": title}, ensure_ascii=False) + "\n"
            )


def inspection(folder: Path, model: str, count: int, *, cold: bool) -> dict[str, Any]:
    """One `yeonma inspect` of `count` rows; its seconds are the whole process's, its start and imports counted."""
    rows_file = folder / f"{count}.jsonl"
    if cold:
        write_rows(rows_file, count)
    job = {"folder": str(folder), "model": model, "rows_file": str(rows_file)}
    started = time.perf_counter()
    measured = run_script("one_inspection.py", job)
    return {"cold": cold, "seconds": time.perf_counter() - started, **measured}


def main(given: Sequence[str] | None = None) -> int:
    parser = benchmark_parser(__doc__, RESULT, compares=False)
    parser.add_argument("--rows", type=int, default=200_000)
    options = parser.parse_args(given)
    result = new_result("tokenize_rows.py", given, PACKAGES)
    model = model_to_use(options.model)
    with tempfile.TemporaryDirectory(prefix="yeonma-benchmark-") as place:
        folder = Path(place)
        rows_file = folder / "rows.jsonl"
        write_rows(rows_file, options.rows)
        job = {"folder": place, "model": model, "rows": options.rows}
        first, second = (run_script("one_reading.py", job) for _ in range(2))
        result |= {
            "model": Path(model).name,
            "data_bytes": rows_file.stat().st_size,
            "first": first,
            "second": second,
            "inspections": [
                inspection(folder, model, count, cold=cold)
                for count in (options.rows // 4, options.rows)
                for cold in (True, False)
            ],
        }
    save(options.output, result)
    publish("tokenize_rows", result, tokenize_section(result), write_docs=options.write_docs)
    return 0


if __name__ == "__main__":
    sys.exit(main())
