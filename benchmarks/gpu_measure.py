"""One measurement of gpu.py: as a script, with a job file, in a process of its own.

All train the same LoRA start on the same token ids and in the same order. A step's time is that of its forward,
backward and update, with the device's work done. Unsloth and LLaMA-Factory may bring a Python of their own, in which
this runs without Yeonma's packages: at the top it imports only what every environment has.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

from contenders import YEONMA
from gpu_contenders import (
    FACTORY,
    TRL_DPO,
    UNSLOTH,
    Contender,
    Job,
    Measured,
    contenders,
    peak_memory,
    run_settings,
)
from harness import answer_job, timed_reference, yeonma_steps


def measure(contender: Contender, job: Job) -> Measured:
    if contender.library == UNSLOTH:
        import unsloth  # noqa: F401  It replaces parts of transformers, TRL and PEFT, so it goes before them.
    import torch

    from yeonma.inspect.probe import measure_rate

    device, dtype = torch.device(job.device), getattr(torch, job.dtype)
    before = measure_rate(device, dtype).flops_per_second
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    measured = trainer_of(contender)(contender, job)
    return replace(measured, matrix_rates=(before, measure_rate(device, dtype).flops_per_second))


def trainer_of(contender: Contender) -> Callable[[Contender, Job], Measured]:
    if contender.library == YEONMA:
        return ours
    if contender.library in (UNSLOTH, FACTORY):
        import gpu_peers_apart

        return gpu_peers_apart.unsloth if contender.library == UNSLOTH else gpu_peers_apart.factory
    import gpu_peers

    return gpu_peers.trl_dpo if contender.library == TRL_DPO else gpu_peers.trainer_of_rows


def ours(contender: Contender, job: Job, max_steps: int | None = None) -> Measured:
    """`yeonma sft` or `dpo` itself, from its command line to its adapter folder; the numbers of its metrics.jsonl.
    `max_steps`: to end before all rows are trained on."""
    pairs = job.about["pairs"]
    settings: dict[str, Any] = {
        **run_settings(
            job.folder,
            job.workload,
            job.folder / "output",
            pairs=pairs,
            device=job.device,
            dtype=job.dtype,
        ),
        "lora_alpha": job.about["lora_alpha"],
        "lora_dropout": job.about["lora_dropout"],
        "max_grad_norm": job.about["max_grad_norm"],
        "batch_size": job.about["batch"],
        "num_epochs": 1,
        **({} if max_steps is None else {"max_steps": max_steps}),
        **({"quantization": job.quantization} if job.quantization != "none" else {}),
        **at_once(contender, job),
    }
    with timed_reference(job.folder / "cache") as reference_seconds:
        steps = yeonma_steps("dpo" if pairs else "sft", settings)
    about_steps = job.about["steps"][:max_steps]
    return Measured(
        seconds=[step["seconds"] for step in steps],
        tokens=[step["tokens"] for step in about_steps],
        losses=[step["loss"] for step in steps],
        trained_tokens=[step["trained_tokens"] for step in about_steps],
        reference_seconds=sum(reference_seconds),
        peak_memory_bytes=peak_memory(job),
    )


def at_once(contender: Contender, job: Job) -> dict[str, Any]:
    """Yeonma's settings of memory and speed: its own choice, or the contender's."""
    if contender.micro_batch:
        return {
            "micro_batch_size": contender.micro_batch,
            "gradient_checkpointing": "true" if contender.checkpointing else "false",
        }
    if job.about["packed"]:
        own = {"micro_batch_size": job.about["batch"], "micro_batch_tokens": job.about["packed"]}
        return {**own, "gradient_checkpointing": "auto"}
    return {"micro_batch_tokens": "auto", "gradient_checkpointing": "auto"}


def main(given: dict[str, Any]) -> dict[str, Any]:
    names = [field.name for field in fields(Job) if field.name != "folder"]
    job = Job(Path(given["folder"]), **{name: given[name] for name in names})
    contender = contenders(job.about["pairs"])[given["contender"]]
    measured = measure(contender, job)
    counts = {len(numbers) for numbers in (measured.seconds, measured.tokens, measured.losses)}
    if counts != {len(measured.seconds)}:
        raise SystemExit(f"{contender.label}: steps, tokens and losses do not match: {sorted(counts)}")
    if len(measured.seconds) < 2:
        raise SystemExit(f"{contender.label}: one step, and the first is not timed")
    if any(math.isnan(loss) for loss in measured.losses):
        raise SystemExit(f"{contender.label}: a loss is not a number")
    return asdict(measured)


if __name__ == "__main__":
    answer_job(main)
