"""Who is measured in preference tuning, and one measurement: as a script, with a job file, in a process of its own.

All contenders train the same LoRA start with DPO on the same token ids, pairs and order, with the same optimizer
settings, in float32. What is timed is the pass that finds the reference's log-probabilities, where there is one, and
every step's forward, backward and update; reading the log, saving and evaluating are outside.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from contenders import YEONMA
from dpo_workloads import BATCH_SIZE, BETA, CUTOFF_LEN, LEARNING_RATE, LORA_R, SEED, TARGETS, WORKLOADS
from harness import answer_job, timed_reference, yeonma_steps
from machine import cores, frozen_rate, matrix_rate, own_bytes
from peers import dpo_trainer, logged, train, trainer_arguments

TRL = "TRL DPOTrainer"


@dataclass(frozen=True)
class Contender:
    library: str
    micro_batch: int  # pairs
    precomputed: bool = False  # TRL: reference log-probabilities before training, not in every step

    @property
    def label(self) -> str:
        precomputed = ", precomputed reference" if self.precomputed else ""
        return f"{self.library}, micro-batch {self.micro_batch}{precomputed}"


CONTENDERS = {
    **{f"yeonma-{size}": Contender(YEONMA, size) for size in (1, 2, 4, 8)},
    **{f"trl-{size}": Contender(TRL, size) for size in (1, 2, 4)},
    **{f"trl-precomputed-{size}": Contender(TRL, size, precomputed=True) for size in (1, 2, 4)},
}
OURS = "yeonma-4"


@dataclass(frozen=True)
class Measured:
    """One contender's epochs; lists have a number a step."""

    reference_seconds: float  # 0 where every step has its own
    seconds: list[float]
    losses: list[float]
    accuracies: list[float]
    peak_memory_bytes: int
    matrix_rates: tuple[float, float] = (0.0, 0.0)  # before and after, operations a second
    frozen_rate: float = 0.0  # the same by the routine that Yeonma uses for frozen weights


def measure(contender: Contender, folder: Path, workload: str, model: str) -> Measured:
    import torch

    torch.set_num_threads(cores())
    before = matrix_rate()
    run = ours if contender.library == YEONMA else trl
    pairs, epochs = WORKLOADS[workload].pairs, WORKLOADS[workload].epochs
    measured = run(contender, folder, pairs, model, epochs)
    return replace(measured, matrix_rates=(before, matrix_rate()), frozen_rate=frozen_rate())


def ours(contender: Contender, folder: Path, pairs: str, model: str, epochs: int) -> Measured:
    """`yeonma dpo` itself, from its command line to its adapter folder; the numbers of its metrics.jsonl.

    The token ids are taken from the cache; the reference's log-probabilities of earlier runs are not.
    """
    settings = {
        "base_model": model,
        "data_path": folder / f"{pairs}.jsonl",
        "cache_dir": folder / "cache",
        "output_dir": folder / "output",
        "device": "cpu",
        "dtype": "float32",
        "cutoff_len": CUTOFF_LEN,
        "lora_r": LORA_R,
        "lora_alpha": LORA_R,
        "lora_target_modules": f"[{', '.join(TARGETS)}]",
        "batch_size": BATCH_SIZE,
        "micro_batch_size": contender.micro_batch,
        "num_epochs": epochs,
        "learning_rate": LEARNING_RATE,
        "loss": "sigmoid",
        "beta": BETA,
        "seed": SEED,
    }
    with timed_reference(folder / "cache") as reference_seconds:
        steps = yeonma_steps("dpo", settings)
    return Measured(
        reference_seconds=sum(reference_seconds),
        seconds=[step["seconds"] for step in steps],
        losses=[step["loss"] for step in steps],
        accuracies=[step["reward_accuracy"] for step in steps],
        peak_memory_bytes=own_bytes("VmHWM"),
    )


def trl(contender: Contender, folder: Path, pairs: str, model: str, epochs: int) -> Measured:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    prepared = json.loads((folder / f"{pairs}.json").read_text("utf-8"))
    settings = trl_settings(contender, folder / "output", epochs)
    trainer = dpo_trainer(base, tokenizer, prepared["pairs"], prepared["orders"], folder / "start", settings)
    seconds = train(trainer)
    return Measured(
        reference_seconds=trainer.reference_seconds,
        seconds=seconds,
        losses=logged(trainer, "loss"),
        accuracies=logged(trainer, "rewards/accuracies"),
        peak_memory_bytes=own_bytes("VmHWM"),
    )


def trl_settings(contender: Contender, output: Path, epochs: int) -> Any:
    """All else is TRL's own default. `yeonma dpo` has these values too."""
    from trl import DPOConfig

    updates = BATCH_SIZE // contender.micro_batch
    given = trainer_arguments(output, contender.micro_batch, updates, LEARNING_RATE)
    del given["train_sampling_strategy"]  # the trainer gets the order of every epoch
    given |= {"num_train_epochs": epochs, "seed": SEED}
    return DPOConfig(
        **given,
        loss_type=["sigmoid"],
        beta=BETA,
        max_length=None,
        precompute_ref_log_probs=contender.precomputed,
    )


def main(job: dict[str, Any]) -> dict[str, Any]:
    return asdict(measure(CONTENDERS[job["contender"]], Path(job["folder"]), job["workload"], job["model"]))


if __name__ == "__main__":
    answer_job(main)
