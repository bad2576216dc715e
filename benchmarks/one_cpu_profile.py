"""One training step on the CPU under PyTorch's profiler, of a workload of sft.py or dpo.py, as a script with a job
file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import contenders
import dpo_contenders
from harness import answer_job
from one_profile import profiled
from profile_kinds import Widths
from workloads import LORA_R


def measure(job: dict[str, Any]) -> dict[str, Any]:
    import torch
    from transformers import AutoConfig

    torch.set_num_threads(job["threads"])
    folder, model, workload = Path(job["folder"]), job["model"], job["workload"]
    # the shapes that tell LoRA's products and the head's from others
    widths = Widths(LORA_R, AutoConfig.from_pretrained(model).vocab_size)

    def train() -> Any:
        if job["pairs"]:
            contender = dpo_contenders.CONTENDERS[job["contender"]]
            return dpo_contenders.ours(contender, folder, workload, model, 1)
        return contenders.ours(contenders.CONTENDERS[job["contender"]], folder, workload, model)

    found, measured = profiled(train, job["number"], cuda=False, widths=widths)
    return {**found, "peak_memory_bytes": measured.peak_memory_bytes}


if __name__ == "__main__":
    answer_job(measure)
