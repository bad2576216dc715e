"""One reading of the generated rows, as a script with a job file, in a process of its own."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from harness import answer_job
from machine import own_bytes

TEMPLATE = "### Article:\n{document}\n\n### Title:\n{title}"


def measure(job: dict[str, Any]) -> dict[str, Any]:
    """Open and tokenise the rows, looking at the memory at every quarter of them."""
    from yeonma.config.settings import TokenSettings
    from yeonma.data.rows import open_rows
    from yeonma.data.template import load_template
    from yeonma.model.load import load_tokenizer
    from yeonma.model.source import find_base
    from yeonma.tokenization.cache import build_store
    from yeonma.tokenization.dataset import token_rules

    tokenizer = load_tokenizer(find_base(job["model"]))
    folder = Path(job["folder"])
    samples: list[dict[str, int]] = []
    tokenised = 0

    def look(rows: int) -> None:
        memory = {"anonymous_bytes": own_bytes("RssAnon"), "resident_bytes": own_bytes("VmRSS")}
        samples.append({"rows": rows, **memory})

    def progress(rows: int) -> None:
        nonlocal tokenised
        tokenised = rows
        if rows >= len(samples) * job["rows"] / 4:
            look(rows)

    look(0)
    started = time.perf_counter()
    rows = open_rows(str(folder / "rows.jsonl"))
    rules = token_rules(TokenSettings(cache_dir=str(folder)))
    store = build_store(rows, load_template(TEMPLATE), None, tokenizer, rules, folder / "cache", progress)
    seconds = time.perf_counter() - started
    return {
        "seconds": seconds,
        "rows_tokenised": tokenised,
        "samples": samples,
        "counts": asdict(store.counts),
    }


if __name__ == "__main__":
    answer_job(measure)
