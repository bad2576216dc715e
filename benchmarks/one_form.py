"""One tokenising of rows of a form, in a process of its own that watches its memory."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from harness import answer_job
from machine import own_bytes

CHAT_TEMPLATE = (
    "{%- for tool in tools or [] %}{{ tool | tojson }}{{ '\n' }}{%- endfor %}"
    "{%- for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{%- if m.reasoning_content %}{{ '<think>\n' + m.reasoning_content + '\n</think>\n\n' }}{%- endif %}"
    "{{ m.content or '' }}"
    "{%- for call in m.tool_calls or [] %}{{ '<tool_call>' + (call.function | tojson) + '</tool_call>' }}"
    "{%- endfor %}{{ '<|im_end|>\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{%- endif %}"
)
"""Writes reasoning and tool calls; that of the demo's model does not."""
SECONDS_BETWEEN = 0.05


def measure(job: dict[str, Any]) -> dict[str, Any]:
    """Tokenise the rows. Memory is what the process holds for itself, without pages of files."""
    from yeonma.config.settings import DataSettings, TokenSettings
    from yeonma.data.python_rows import given
    from yeonma.data.task import TASKS
    from yeonma.model.load import load_tokenizer
    from yeonma.model.source import find_base
    from yeonma.tokenization.dataset import prepare_dataset

    tokenizer = load_tokenizer(find_base(job["model"]))
    tokenizer.chat_template = CHAT_TEMPLATE
    data: Any = job["data_path"]
    if job["in_python"]:
        with open(data, encoding="utf-8") as file:
            data = [json.loads(line) for line in file]
    start = own_bytes("RssAnon")
    tokens = TokenSettings(cache_dir=job["folder"])
    started = time.perf_counter()
    with watched() as peak, given({"data_path": data}) as keywords:
        settings = DataSettings(data_path=keywords["data_path"])
        dataset = prepare_dataset(
            settings, tokens, tokenizer, 42, lambda _: None, lambda _: None, TASKS[job["task"]]
        )
    return {
        "seconds": time.perf_counter() - started,
        "start_bytes": start,
        "peak_bytes": max(peak),
        "counted_rows": dataset.train.store.counts.rows,
        "tokens": dataset.train.store.counts.tokens,
    }


@contextmanager
def watched() -> Iterator[list[int]]:
    """The process's own memory, looked at many times a second, until the end."""
    seen = [own_bytes("RssAnon")]
    ended = threading.Event()

    def look() -> None:
        while not ended.wait(SECONDS_BETWEEN):
            seen.append(own_bytes("RssAnon"))

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield seen
    finally:
        ended.set()
        thread.join()
        seen.append(own_bytes("RssAnon"))


if __name__ == "__main__":
    answer_job(measure)
