"""Who is measured, and one measurement: as a script, with a job file, in a process of its own.

All contenders train the same LoRA start on the same token ids, labels and order, with the same optimizer settings, in
float32. A step's time is that of its forward, backward and update; reading the log, saving and evaluating are outside.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from harness import answer_job, yeonma_steps
from machine import cores, frozen_rate, matrix_rate, own_bytes
from peers import train_rows, trainer_arguments
from workloads import BATCH_SIZE, CUTOFF_LEN, IGNORED, LEARNING_RATE, LORA_R, SEED, TARGETS

YEONMA, TRANSFORMERS, TRL = "Yeonma", "transformers Trainer", "TRL SFTTrainer"


@dataclass(frozen=True)
class Contender:
    library: str
    micro_batch: int
    micro_batch_tokens: int | None = None  # Yeonma: the most tokens at once
    padding_free: bool = False  # TRL: a micro-batch laid flat
    packed: bool = False  # TRL: rows packed into sequences of a quarter step, one at a time

    @property
    def label(self) -> str:
        if self.packed:
            return f"{self.library}, packing"
        if self.micro_batch_tokens:
            return f"{self.library}, {self.micro_batch_tokens} tokens at once"
        return (
            f"{self.library}, micro-batch {self.micro_batch}{', padding-free' if self.padding_free else ''}"
        )


CONTENDERS = {
    "yeonma-512-tokens": Contender(YEONMA, 8, micro_batch_tokens=512),
    "yeonma-8": Contender(YEONMA, 8),
    "yeonma-4": Contender(YEONMA, 4),
    "yeonma-1": Contender(YEONMA, 1),
    "transformers-1": Contender(TRANSFORMERS, 1),
    "transformers-4": Contender(TRANSFORMERS, 4),
    "trl-1": Contender(TRL, 1),
    "trl-4": Contender(TRL, 4),
    "trl-padding-free-4": Contender(TRL, 4, padding_free=True),
    "trl-packed": Contender(TRL, 1, packed=True),
}
OURS = "yeonma-4"
ONLY_FULL = ("yeonma-8", "yeonma-1")
PACKED_ROWS_A_STEP = 4


@dataclass(frozen=True)
class Measured:
    """One contender's epoch; lists have a number a step. `tokens` are the examples' own: no padding, nothing shared."""

    seconds: list[float]
    tokens: list[int]
    trained_tokens: list[int]
    losses: list[float]
    peak_memory_bytes: int
    matrix_rates: tuple[float, float] = (0.0, 0.0)  # before and after, operations a second
    frozen_rate: float = 0.0  # the same by the routine that Yeonma uses for frozen weights


def measure(
    contender: Contender, folder: Path, workload: str, model: str, steps: list[dict[str, int]]
) -> Measured:
    import torch

    torch.set_num_threads(cores())
    before = matrix_rate()
    if contender.library == YEONMA:
        measured = ours(contender, folder, workload, model)
    else:
        measured = peer(contender, folder, workload, model)
    same_rows = [step["tokens"] for step in steps] == measured.tokens
    if not same_rows and not contender.packed:
        raise SystemExit(f"{contender.label} trained on other rows: {measured.tokens} tokens a step")
    return replace(measured, matrix_rates=(before, matrix_rate()), frozen_rate=frozen_rate())


def ours(contender: Contender, folder: Path, workload: str, model: str) -> Measured:
    """`yeonma sft` itself, from its command line to its adapter folder; the numbers of its metrics.jsonl."""
    settings = {
        "base_model": model,
        "data_path": folder / f"{workload}.jsonl",
        "template": folder / f"{workload}.txt",
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
        "micro_batch_tokens": contender.micro_batch_tokens,
        "num_epochs": 1,
        "learning_rate": LEARNING_RATE,
        "seed": SEED,
    }
    steps = yeonma_steps("sft", settings)
    return Measured(
        seconds=[step["seconds"] for step in steps],
        tokens=[step["tokens"] for step in steps],
        trained_tokens=[step["trained_tokens"] for step in steps],
        losses=[step["loss"] for step in steps],
        peak_memory_bytes=own_bytes("VmHWM"),
    )


def peer(contender: Contender, folder: Path, workload: str, model: str) -> Measured:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    peft_model = PeftModel.from_pretrained(base, folder / "start", is_trainable=True)
    examples = json.loads((folder / f"{workload}.json").read_text("utf-8"))
    build = transformers_trainer if contender.library == TRANSFORMERS else trl_trainer
    trained = train_rows(build(contender, peft_model, tokenizer, examples, folder / "output"))
    return Measured(**trained, peak_memory_bytes=own_bytes("VmHWM"))


def arguments(contender: Contender, output: Path) -> dict[str, Any]:
    updates = PACKED_ROWS_A_STEP if contender.packed else BATCH_SIZE // contender.micro_batch
    return {**trainer_arguments(output, contender.micro_batch, updates, LEARNING_RATE), "seed": SEED}


def transformers_trainer(
    contender: Contender, model: Any, tokenizer: Any, examples: list[dict[str, list[int]]], output: Path
) -> Any:
    from datasets import Dataset
    from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return Trainer(
        model=model,
        args=TrainingArguments(**arguments(contender, output)),
        train_dataset=Dataset.from_list(examples),
        data_collator=DataCollatorForSeq2Seq(tokenizer, padding=True, label_pad_token_id=IGNORED),
    )


def trl_trainer(
    contender: Contender, model: Any, tokenizer: Any, examples: list[dict[str, list[int]]], output: Path
) -> Any:
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    own: dict[str, Any] = {"max_length": None, "padding_free": contender.padding_free}
    if contender.packed:
        lengths = [len(example["input_ids"]) for example in examples]
        sequences = len(lengths) * PACKED_ROWS_A_STEP / BATCH_SIZE
        own = {"max_length": max(max(lengths), round(sum(lengths) / sequences)), "packing": True}
    return SFTTrainer(
        model=model,
        args=SFTConfig(**arguments(contender, output), **own),
        train_dataset=Dataset.from_list(examples),
        processing_class=tokenizer,
    )


def main(job: dict[str, Any]) -> dict[str, Any]:
    folder = Path(job["folder"])
    return asdict(measure(CONTENDERS[job["contender"]], folder, job["workload"], job["model"], job["steps"]))


if __name__ == "__main__":
    answer_job(main)
