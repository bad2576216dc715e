"""Do many short rows tokenise in constant memory, and not at all the second time? How long does `inspect` take?

Makes the rows in a temporary folder and reads them twice, each time in a process of its own; then inspects a quarter
of them and all of them, each with an empty cache and again. Writes results/tokenize_rows.json; --write-docs puts its
tables into docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from machine import machine, versions
from sft import child, model_to_use, save, write_page
from tables import shown_command, tokenize_section
from workloads import HERE, SAMPLE

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
    child("one_inspection.py", job, folder / "log")
    seconds = time.perf_counter() - started
    return {"cold": cold, "seconds": seconds, **json.loads((folder / "measured.json").read_text("utf-8"))}


def main(given: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--model", type=Path, help="a folder with a tokenizer; else the demo's model")
    parser.add_argument("--output", type=Path, default=RESULT)
    parser.add_argument("--write-docs", action="store_true", help="put the table into docs/benchmarks.md")
    asked = parser.parse_args(given)
    model = model_to_use(asked.model)
    with tempfile.TemporaryDirectory(prefix="yeonma-benchmark-") as place:
        folder = Path(place)
        rows_file = folder / "rows.jsonl"
        write_rows(rows_file, asked.rows)
        runs = []
        for _ in range(2):
            child("one_reading.py", {"folder": place, "model": model, "rows": asked.rows}, folder / "log")
            runs.append(json.loads((folder / "measured.json").read_text("utf-8")))
        inspections = [
            inspection(folder, model, count, cold=cold)
            for count in (asked.rows // 4, asked.rows)
            for cold in (True, False)
        ]
        result = {
            "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
            "command": shown_command("tokenize_rows.py", sys.argv[1:] if given is None else given),
            "machine": machine(),
            "versions": versions(PACKAGES),
            "model": Path(model).name,
            "data_bytes": rows_file.stat().st_size,
            "first": runs[0],
            "second": runs[1],
            "inspections": inspections,
        }
    save(asked.output, result)
    print(tokenize_section(result))
    if asked.write_docs:
        write_page("tokenize_rows", result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
