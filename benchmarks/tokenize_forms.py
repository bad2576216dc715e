"""Do rows of every form tokenise in constant memory?

Makes rows of each form, few and many of them, in a temporary folder, and tokenises each file in a process of its own
that watches its memory. Writes results/tokenize_forms.json; --write-docs puts its table into docs/benchmarks.md.
"""

from __future__ import annotations

import gzip
import json
import random
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness import HERE, benchmark_parser, model_to_use, new_result, publish, run_script, save
from tables import tokenize_forms_section
from workloads import SAMPLE

PACKAGES = ("yeonma", "tokenizers", "transformers", "numpy", "openpyxl")
RESULT = HERE / "results" / "tokenize_forms.json"
TOOL = {
    "type": "function",
    "function": {
        "name": "archive",
        "parameters": {"type": "object", "properties": {"year": {"type": "string"}}},
    },
}

Words = Callable[[int], str]
Row = dict[str, Any]


def user(words: Words) -> Row:
    return {"role": "user", "content": words(8)}


def assistant(words: Words) -> Row:
    return {"role": "assistant", "content": words(8)}


def with_reasoning_and_tools(words: Words) -> Row:
    call = {"function": {"name": "archive", "arguments": {"year": words(1)}}}
    answer = {**assistant(words), "reasoning_content": words(12), "tool_calls": [call]}
    return {"messages": [user(words), answer], "tools": [TOOL]}


def prompt_and_completion(words: Words) -> Row:
    return {"prompt": [user(words)], "completion": [assistant(words)]}


def whole_text(words: Words) -> Row:
    return {"text": words(40)}


def pair_of_turns(words: Words) -> Row:
    return {"prompt": [user(words)], "chosen": [assistant(words)], "rejected": [assistant(words)]}


def labelled_turns(words: Words) -> Row:
    return {"prompt": [user(words)], "completion": [assistant(words)], "label": len(words(3)) % 2 == 0}


def plain(words: Words) -> Row:
    return {"document": words(20), "title": words(5)}


def lines_of(rows: Iterator[Row]) -> Iterator[str]:
    return (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def write_lines(path: Path, rows: Iterator[Row]) -> None:
    with open(path, "w", encoding="utf-8") as file:
        file.writelines(lines_of(rows))


def write_compressed(path: Path, rows: Iterator[Row]) -> None:
    with gzip.open(path, "wt", encoding="utf-8", compresslevel=1) as file:
        file.writelines(lines_of(rows))


def write_workbook(path: Path, rows: Iterator[Row]) -> None:
    from openpyxl import Workbook

    book = Workbook(write_only=True)
    sheet = book.create_sheet()
    sheet.append(["document", "title"])
    for row in rows:
        sheet.append(list(row.values()))
    book.save(path)


@dataclass(frozen=True)
class Form:
    """Rows of a kind in a file of a kind. `in_python`: the rows of the file are given to a Python call."""

    make: Callable[[Words], Row]
    ending: str = ".jsonl"
    write: Callable[[Path, Iterator[Row]], None] = write_lines
    task: str = "answers"
    in_python: bool = False


FORMS = {
    "plain rows (.jsonl)": Form(plain),
    "turns with reasoning and tool calls": Form(with_reasoning_and_tools),
    "prompt and completion as turns": Form(prompt_and_completion),
    "whole texts": Form(whole_text),
    "pairs of turns": Form(pair_of_turns, task="pairs"),
    "labelled turns": Form(labelled_turns, task="labelled answers"),
    "plain rows (.jsonl.gz)": Form(plain, ".jsonl.gz", write_compressed),
    "plain rows (.ndjson)": Form(plain, ".ndjson"),
    "plain rows (.xlsx)": Form(plain, ".xlsx", write_workbook),
    "plain rows (a list in Python)": Form(plain, in_python=True),
}


def rows_of(form: Form, count: int) -> Iterator[Row]:
    """Rows of the bundled sample's words in random order; the same rows every time."""
    known = sorted(set(SAMPLE.read_text("utf-8").replace('"', " ").split()))
    draw = random.Random(1)
    for _ in range(count):
        yield form.make(lambda least: " ".join(draw.choices(known, k=draw.randint(least, 2 * least))))


def main(given: Sequence[str] | None = None) -> int:
    parser = benchmark_parser(__doc__, RESULT, compares=False)
    parser.add_argument("--rows", type=int, nargs="+", default=[20_000, 200_000])
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=list(FORMS), metavar="FORM")
    options = parser.parse_args(given)
    result = new_result("tokenize_forms.py", given, PACKAGES)
    model = model_to_use(options.model)
    result |= {"model": Path(model).name, "runs": []}
    for name in options.forms:
        form = FORMS[name]
        for count in options.rows:
            with tempfile.TemporaryDirectory(prefix="yeonma-benchmark-") as place:
                path = Path(place) / f"rows{form.ending}"
                form.write(path, rows_of(form, count))
                about = {"form": name, "rows": count, "file_bytes": path.stat().st_size}
                job = {"folder": place, "model": model, "data_path": str(path)}
                job |= {"task": form.task, "in_python": form.in_python}
                run = {**about, **run_script("one_form.py", job)}
            result["runs"].append(run)
            print(
                f"{name:36} {count:7,} rows  {run['peak_bytes'] / 1e6:.0f} MB  {run['seconds']:.0f} s",
                flush=True,
            )
            save(options.output, result)
    publish("tokenize_forms", result, tokenize_forms_section(result), write_docs=options.write_docs)
    return 0


if __name__ == "__main__":
    sys.exit(main())
