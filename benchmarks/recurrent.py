"""Rows through a model with recurrent layers: as a forest, and one sequence at a time.

    python benchmarks/recurrent.py [--steps 12] [--threads 2]

The model has the shape of Qwen3.5's text models, random weights and about 100M parameters. Both ways train the same
LoRA from the same weights, in turn, step by step; the forest's gradient makes the update. The table has the medians of
the seconds per step, their ratio, and the largest differences of loss and gradient between the two.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from yeonma.model.forest_support import attention, check_forest_support
from yeonma.model.kernels.patch import patch_kernels
from yeonma.model.load import LoraShape, add_lora
from yeonma.model.logprobs import ForestSupport, example_logprobs
from yeonma.model.train_mode import train_adapter

VOCABULARY = 32000
SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 640,
    "intermediate_size": 2240,
    "num_hidden_layers": 12,
    "layer_types": (["linear_attention"] * 3 + ["full_attention"]) * 3,
    "num_attention_heads": 5,
    "num_key_value_heads": 1,
    "head_dim": 128,
    "linear_num_key_heads": 5,
    "linear_num_value_heads": 5,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
}


@dataclass(frozen=True)
class Workload:
    """The rows of a step: `shared` tokens that all begin with, then `prompt` tokens per row, then its answers."""

    name: str
    rows: int
    shared: int
    prompt: tuple[int, int]  # from, to
    answer: tuple[int, int]
    answers: int  # per row
    goal: float


WORKLOADS = (
    Workload("short rows", 16, 0, (15, 40), (15, 40), 1, 2.5),
    Workload("400-token system prompt", 16, 400, (15, 40), (15, 40), 1, 4.0),
    Workload("pairs", 8, 0, (100, 200), (50, 100), 2, 1.8),
)
Batch = tuple[list[np.ndarray], list[np.ndarray], list[int]]


def batch_of(work: Workload, seed: int) -> Batch:
    """Token ids, trained masks and units."""
    draw = np.random.default_rng(seed)
    shared = np.random.default_rng(0).integers(3, VOCABULARY, work.shared)
    ids: list[np.ndarray] = []
    trained: list[np.ndarray] = []
    units: list[int] = []
    for row in range(work.rows):
        prompt = np.concatenate([shared, draw.integers(3, VOCABULARY, draw.integers(*work.prompt))])
        for _ in range(work.answers):
            answer = draw.integers(3, VOCABULARY, draw.integers(*work.answer))
            ids.append(np.concatenate([prompt, answer]).astype(np.int32))
            trained.append(np.arange(len(ids[-1])) >= len(prompt))
            units.append(row)
    return ids, trained, units


def gradients(model: Any, support: ForestSupport, batch: Batch) -> tuple[float, list[torch.Tensor]]:
    """The loss of a batch and the gradients of the adapter."""
    ids, trained, units = batch
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    logprob = example_logprobs(model, support, ids, trained, share_prefix=True, units=units)
    loss = -logprob.mean()
    return float(loss), list(torch.autograd.grad(loss, parameters))


def timed(run: Callable[[], tuple[float, list[torch.Tensor]]]) -> tuple[float, float, list[torch.Tensor]]:
    start = time.perf_counter()
    loss, found = run()
    return time.perf_counter() - start, loss, found


def compare(model: Any, support: ForestSupport, work: Workload, steps: int) -> str:
    """A line of the table."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4)
    alone = replace(support, forest=False)
    seconds: list[tuple[float, float]] = []
    loss_error = gradient_error = 0.0
    for step in range(-1, steps):  # the first one is not counted
        batch = batch_of(work, step + 1)
        forest_seconds, loss, found = timed(lambda batch=batch: gradients(model, support, batch))
        with attention(model, support.plain_attention):
            one_seconds, expected_loss, expected = timed(lambda batch=batch: gradients(model, alone, batch))
        for parameter, gradient in zip(parameters, found, strict=True):
            parameter.grad = gradient
        optimizer.step()
        if step >= 0:
            seconds.append((forest_seconds, one_seconds))
        loss_error = max(loss_error, abs(loss - expected_loss))
        largest = max(float(gradient.abs().max()) for gradient in expected)
        pairs = zip(found, expected, strict=True)
        gradient_error = max(gradient_error, *(float((a - b).abs().max()) / largest for a, b in pairs))
    forest, one = (statistics.median(column) for column in zip(*seconds, strict=True))
    ratio = statistics.median(pair[1] / pair[0] for pair in seconds)
    return (
        f"| {work.name} | {one:.2f} | {forest:.2f} | {ratio:.2f}x | {work.goal}x | {loss_error:.0e}"
        f" | {gradient_error:.0e} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", help="a part of a workload's name", default="")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    config = AutoConfig.for_model("qwen3_5_text", **SHAPE)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).requires_grad_(False).eval()
    count = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    add_lora(model, LoraShape(8, 16, 0.0, "all-linear"), 0)
    support = check_forest_support(model)
    if not support.forest:
        raise SystemExit(support.why_not)
    report = patch_kernels(model, support=support, trim_last=True)
    train_adapter(model)
    print(f"{count:.0f}M parameters, {arguments.threads} threads; {report}\n")
    print("| rows | one at a time, s | forest, s | ratio | goal | loss differs | gradient differs |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for work in WORKLOADS:
        if arguments.only in work.name:
            print(compare(model, support, work, arguments.steps), flush=True)


if __name__ == "__main__":
    main()
