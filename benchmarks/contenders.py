"""Who is measured, and one measurement: as a script, with a job file, in a process of its own.

All contenders train the same LoRA start on the same token ids, labels and order, with the same optimizer settings, in
float32. A step's time is that of its forward, backward and update; reading the log, saving and evaluating are outside.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from machine import cores, frozen_rate, matrix_rate, own_bytes
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
    same_rows = [each["tokens"] for each in steps] == measured.tokens
    if not same_rows and not contender.packed:
        raise SystemExit(f"{contender.label} trained on other rows: {measured.tokens} tokens a step")
    return replace(measured, matrix_rates=(before, matrix_rate()), frozen_rate=frozen_rate())


def ours(contender: Contender, folder: Path, workload: str, model: str) -> Measured:
    """`yeonma sft` itself, from its command line to its adapter folder; the numbers of its metrics.jsonl."""
    from yeonma.cli import main

    output = folder / "output"
    settings = {
        "base_model": model,
        "data_path": folder / f"{workload}.jsonl",
        "template": folder / f"{workload}.txt",
        "cache_dir": folder / "cache",
        "output_dir": output,
        "overwrite": "true",
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
        "card_rows": 0,
    }
    if main(["sft", *(f"--{name}={value}" for name, value in settings.items() if value is not None)]) != 0:
        raise SystemExit("yeonma sft failed")
    lines = (output / "metrics.jsonl").read_text("utf-8").splitlines()
    steps = [each for each in map(json.loads, lines) if not each.get("evaluation")]
    return Measured(
        seconds=[each["seconds"] for each in steps],
        tokens=[each["tokens"] for each in steps],
        trained_tokens=[each["trained_tokens"] for each in steps],
        losses=[each["loss"] for each in steps],
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
    trainer = build(contender, peft_model, tokenizer, examples, folder / "output")
    clock = step_clock()
    trainer.add_callback(clock)
    trainer.train()
    rows = [trainer.train_dataset[i] for i in range(len(trainer.train_dataset))]
    at_once = trainer.args.per_device_train_batch_size * trainer.args.gradient_accumulation_steps
    starts = range(0, len(rows), at_once)
    tokens, trained = [len(row["input_ids"]) for row in rows], [trained_tokens(row["labels"]) for row in rows]
    return Measured(
        seconds=clock.seconds,
        tokens=[sum(tokens[start : start + at_once]) for start in starts],
        trained_tokens=[sum(trained[start : start + at_once]) for start in starts],
        losses=[each["loss"] for each in trainer.state.log_history if "loss" in each],
        peak_memory_bytes=own_bytes("VmHWM"),
    )


def trained_tokens(labels: list[int]) -> int:
    return sum(label != IGNORED for label in labels[1:])


def arguments(contender: Contender, output: Path) -> dict[str, Any]:
    """What both peers are told; all else is their own default. `yeonma sft` has these values too."""
    return {
        "output_dir": str(output),
        "per_device_train_batch_size": contender.micro_batch,
        "gradient_accumulation_steps": BATCH_SIZE // contender.micro_batch,
        "num_train_epochs": 1,
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "linear",
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "train_sampling_strategy": "sequential",
        "seed": SEED,
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "dataloader_pin_memory": False,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }


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
        lengths = [len(each["input_ids"]) for each in examples]
        sequences = len(lengths) * PACKED_ROWS_A_STEP / BATCH_SIZE
        own = {"max_length": max(max(lengths), round(sum(lengths) / sequences)), "packing": True}
    told = arguments(contender, output)
    if contender.packed:
        told["gradient_accumulation_steps"] = PACKED_ROWS_A_STEP
    return SFTTrainer(
        model=model,
        args=SFTConfig(**told, **own),
        train_dataset=Dataset.from_list(examples),
        processing_class=tokenizer,
    )


def step_clock() -> Any:
    """A transformers callback whose `seconds` has the time of every step, a GPU's work done."""
    import torch
    from transformers import TrainerCallback

    def now() -> float:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter()

    class Clock(TrainerCallback):
        def __init__(self) -> None:
            self.seconds: list[float] = []
            self._started = 0.0

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self._started = now()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.seconds.append(now() - self._started)

    return Clock()


if __name__ == "__main__":
    job = json.loads(Path(sys.argv[1]).read_text("utf-8"))
    place = Path(job["folder"])
    found = measure(CONTENDERS[job["contender"]], place, job["workload"], job["model"], job["steps"])
    (place / "measured.json").write_text(json.dumps(asdict(found)), "utf-8")
