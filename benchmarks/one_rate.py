"""One tokenising of generated rows, by the checkout that comes first on PYTHONPATH, in a process of its own."""

from __future__ import annotations

import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from harness import answer_job


def measure(job: dict[str, Any]) -> dict[str, Any]:
    """Tokenise the rows of each form once; the first form before that as well, so that everything is warm."""
    import yeonma
    from yeonma.model.load import load_tokenizer
    from yeonma.model.source import find_base

    tokenizer = load_tokenizer(find_base(job["model"]))
    warm_up, *_ = job["forms"]
    tokenise(job, warm_up, tokenizer)
    return {
        "checkout": str(Path(yeonma.__file__).parent.parent),
        "forms": {form: tokenise(job, form, tokenizer) for form in job["forms"]},
    }


def tokenise(job: dict[str, Any], form: str, tokenizer: Any) -> dict[str, Any]:
    from yeonma.data.rows import open_rows
    from yeonma.data.template import load_template
    from yeonma.tokenization.cache import build_store
    from yeonma.tokenization.example import TokenRules

    rows_file, template = job["forms"][form]
    with TemporaryDirectory(dir=job["folder"]) as cache:
        started, cpu_started = time.perf_counter(), time.process_time()
        rows = open_rows(rows_file)
        store = build_store(rows, load_template(template), None, tokenizer, TokenRules(2048), Path(cache))
        seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - cpu_started
        return {"seconds": seconds, "cpu_seconds": cpu_seconds, "tokens": store.counts.tokens}


if __name__ == "__main__":
    answer_job(measure)
