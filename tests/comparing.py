"""`yeonma compare` in the process, on a few rows."""

from __future__ import annotations

from pathlib import Path

from tests.runs import Done, arguments, command

TEMPLATE = "Write a title for the article.\n\n{document}\n\nTitle: {title}"
ROWS = [
    {"document": "The ferry will run every half hour from June.", "title": "Second boat doubles ferries"},
    {"document": "Nine beekeepers have moved 40 hives. " * 4, "title": "Bees settle on bus depot roof"},
    {"document": "A", "title": "B"},
    {"document": "도서관이 다시 문을 열었다. The library.", "title": "도서관 다시 열어"},
    {"document": "The old lighthouse will open in May.", "title": "Lighthouse opens library"},
]


def compare(output: Path, *models: Path | str, **settings: object) -> Done:
    words = arguments({"max_new_tokens": 12, **settings})
    return command(output, "compare", "--models", *map(str, models), "--output_dir", str(output), *words)
