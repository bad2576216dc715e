"""New tokens a second at several numbers of rows, as a script with a job file, beside what the device's memory allows.

The rows have prompts of their own, and nothing in common. The rate is of decoding alone: the time for many new tokens
less the time for the first, which comes with the prompts. Each is measured as Yeonma decodes, and with steps of fixed
shapes, on a GPU captured as CUDA graphs.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
from gpu_contenders import peak_memory
from gpu_shapes import SEED
from harness import answer_job

COPIED_BYTES = {"cuda": 4 << 30, "cpu": 64 << 20}
COPIES = 5


def bandwidth(device: Any) -> float:
    """Bytes read and written a second by a copy within the device, the best of several."""
    import torch

    source = torch.empty(COPIED_BYTES[device.type], dtype=torch.uint8, device=device).random_()
    target, seconds = torch.empty_like(source), []
    for _ in range(COPIES + 1):  # the first is warm-up
        started = time.perf_counter()
        target.copy_(source)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - started)
    return 2 * source.nbytes / min(seconds[1:])


def most_tokens_per_second(
    bytes_per_second: float, weight_bytes: int, cache_bytes_a_row: float, rows: int
) -> float:
    """What memory allows: each new token of all rows reads the weights once, and each row its own keys and values."""
    return rows * bytes_per_second / (weight_bytes + rows * cache_bytes_a_row)


def measure(job: dict[str, Any]) -> dict[str, Any]:
    from types import SimpleNamespace

    from yeonma.generation.fixed_shapes import fixed_shapes
    from yeonma.generation.sampling import SamplingParams
    from yeonma.model.load import load_tokenizer, pick_device, pick_dtype
    from yeonma.model.source import find_base
    from yeonma.policy import build_policy

    source, device = find_base(str(Path(job["prepared"]) / "model")), pick_device(job["device"])
    copied = bandwidth(device)
    policy = build_policy(source, device=device, dtype=pick_dtype(job["dtype"], device))
    tokenizer, config = load_tokenizer(source), policy.transformers_model.config
    embedding = policy.transformers_model.get_input_embeddings().weight
    head = policy.transformers_model.get_output_embeddings().weight
    weights = {id(weight): weight.nbytes for weight in policy.transformers_model.parameters()}
    read = sum(weights.values()) - (0 if head is embedding else embedding.nbytes)
    a_token = (
        2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * embedding.element_size()
    )
    draw = np.random.default_rng(SEED)
    many = max(job["rows"])
    prompts = draw.integers(1, embedding.shape[0] - 1, (many, job["prompt_tokens"])).tolist()

    def timed(rows: int, new_tokens: int) -> SimpleNamespace:
        sampling = SamplingParams((tokenizer.eos_token_id,), new_tokens)
        started = time.perf_counter()
        answers = policy.generate_from_ids(prompts[:rows], tokenizer, sampling, batch_size=rows)
        seconds = time.perf_counter() - started
        ids = [list(answer.token_ids) for answer in answers]
        return SimpleNamespace(seconds=seconds, ids=ids, tokens=sum(map(len, ids)))

    def rate_of(first: SimpleNamespace, whole: SimpleNamespace) -> float:
        return float((whole.tokens - first.tokens) / max(1e-9, whole.seconds - first.seconds))

    timed(1, 2)  # warm-up
    found = []
    for rows in job["rows"]:
        first, whole = timed(rows, 1), timed(rows, job["new_tokens"])
        with fixed_shapes(capture=device.type == "cuda") as mode:
            fixed = timed(rows, job["new_tokens"])
        held = a_token * (job["prompt_tokens"] + job["new_tokens"] / 2)
        most = most_tokens_per_second(copied, read, held, rows)
        found.append(
            {
                "rows": rows,
                "new_tokens": whole.tokens,
                "prompt_seconds": first.seconds,
                "seconds": whole.seconds,
                "tokens_per_second": rate_of(first, whole),
                "fixed_tokens_per_second": rate_of(first, fixed),
                "fixed_steps": mode.steps,
                "replayed_steps": mode.replayed,
                "capture_failures": mode.failures,
                "equal_answers": sum(one == other for one, other in zip(whole.ids, fixed.ids, strict=True)),
                "most_tokens_per_second": most,
            }
        )
    return {
        "prompt_tokens": job["prompt_tokens"],
        "bytes_per_second": copied,
        "weight_bytes": read,
        "rows": found,
        "peak_memory_bytes": peak_memory(SimpleNamespace(device=job["device"])),  # type: ignore[arg-type]
    }


if __name__ == "__main__":
    answer_job(measure)
