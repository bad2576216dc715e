"""One contender answers the prompts of a job file, in a process of its own."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from harness import answer_job
from machine import matrix_rate, own_bytes

TEMPLATE = "title_en.txt"


def prompts_of(tokenizer: Any, samples: Path, count: int) -> list[list[int]]:
    """The demo's prompts of its training articles."""
    frame = (samples / TEMPLATE).read_text("utf-8").partition("{title}")[0]
    rows = [json.loads(line) for line in (samples / "news_en.jsonl").read_text("utf-8").splitlines()]
    return [tokenizer(frame.replace("{document}", row["document"]))["input_ids"] for row in rows[:count]]


def ours(job: dict[str, Any]) -> Callable[[list[list[int]]], list[list[int]]]:
    """As `yeonma generate` and `yeonma compare` answer: without padding, by a growing forest."""
    from yeonma.generation.sampling import SamplingParams
    from yeonma.model.load import load_tokenizer, pick_device, pick_dtype
    from yeonma.model.source import find_base
    from yeonma.policy import build_policy

    source, device = find_base(job["model"]), pick_device("cpu")
    policy = build_policy(source, device=device, dtype=pick_dtype("float32", device))
    assert policy.support.forest
    tokenizer = load_tokenizer(source)
    sampling = SamplingParams((tokenizer.eos_token_id,), job["new_tokens"])

    def answer(prompts: list[list[int]]) -> list[list[int]]:
        answers = policy.generate_from_ids(prompts, tokenizer, sampling, batch_size=job["batch"])
        return [list(answer.token_ids) for answer in answers]

    return answer


def theirs(job: dict[str, Any]) -> Callable[[list[list[int]]], list[list[int]]]:
    """transformers' generate over batches in the order of length, padded on the left; one by one with batches of 1."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32).eval()
    model.requires_grad_(False)
    tokenizer = AutoTokenizer.from_pretrained(job["model"], padding_side="left")

    def answer(prompts: list[list[int]]) -> list[list[int]]:
        order = sorted(range(len(prompts)), key=lambda at: -len(prompts[at]))
        answers: dict[int, list[int]] = {}
        for start in range(0, len(order), job["batch"]):
            part = order[start : start + job["batch"]]
            batch = tokenizer.pad({"input_ids": [prompts[at] for at in part]}, return_tensors="pt")
            with torch.no_grad():
                out = model.generate(
                    **batch,
                    max_new_tokens=job["new_tokens"],
                    do_sample=False,
                    eos_token_id=tokenizer.eos_token_id,
                    pad_token_id=tokenizer.pad_token_id,
                )
            for at, ids in zip(part, out[:, batch["input_ids"].shape[1] :].tolist(), strict=True):
                end = ids.index(tokenizer.eos_token_id) if tokenizer.eos_token_id in ids else len(ids)
                answers[at] = ids[:end]
        return [answers[at] for at in range(len(prompts))]

    return answer


def measure(job: dict[str, Any]) -> dict[str, Any]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(job["model"])
    prompts = prompts_of(tokenizer, Path(job["samples"]), job["rows"])
    answer = (ours if job["ours"] else theirs)(job)
    answer(prompts[:2])  # warm-up
    before = matrix_rate()
    started, worked = time.perf_counter(), time.process_time()
    answers = answer(prompts)
    return {
        "seconds": time.perf_counter() - started,
        "cpu_seconds": time.process_time() - worked,
        "prompt_tokens": sum(map(len, prompts)),
        "new_tokens": sum(map(len, answers)),
        "answers": answers,
        "peak_memory_bytes": own_bytes("VmHWM"),
        "matrix_rates": [before, matrix_rate()],
    }


if __name__ == "__main__":
    answer_job(measure)
