"""transformers' Trainer and TRL as they are measured: the settings all of them get, and the time of their steps."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from workloads import IGNORED


def trainer_arguments(
    output: Path, micro_batch: int, updates_every: int, learning_rate: float
) -> dict[str, Any]:
    """TrainingArguments of every peer; `yeonma sft` and `yeonma dpo` have these values too. All else is its default.

    `updates_every`: micro-batches a step.
    """
    return {
        "output_dir": str(output),
        "per_device_train_batch_size": micro_batch,
        "gradient_accumulation_steps": updates_every,
        "num_train_epochs": 1,
        "learning_rate": learning_rate,
        "lr_scheduler_type": "linear",
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "train_sampling_strategy": "sequential",
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "dataloader_pin_memory": False,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }


def trained_tokens(labels: Sequence[int]) -> int:
    return sum(label != IGNORED for label in labels[1:])


def train_rows(trainer: Any) -> dict[str, list[Any]]:
    """Train; seconds, tokens, trained tokens and loss of every step.

    Tokens are counted in the rows that the trainer has made of its data set: it may have packed them.
    """
    seconds = train(trainer)
    rows = [trainer.train_dataset[i] for i in range(len(trainer.train_dataset))]
    step = trainer.args.per_device_train_batch_size * trainer.args.gradient_accumulation_steps
    steps = [rows[start : start + step] for start in range(0, len(rows), step)]
    return {"seconds": seconds, "losses": logged(trainer, "loss"), **tokens_of(steps)}


def tokens_of(steps: Sequence[Sequence[dict[str, list[int]]]]) -> dict[str, list[int]]:
    """Tokens and trained tokens of every step's rows."""
    return {
        "tokens": [sum(len(row["input_ids"]) for row in step) for step in steps],
        "trained_tokens": [sum(trained_tokens(row["labels"]) for row in step) for step in steps],
    }


def train(trainer: Any) -> list[float]:
    """Train; the seconds of every step."""
    clock = step_clock()
    trainer.add_callback(clock)
    trainer.train()
    return list(clock.seconds)


def logged(trainer: Any, name: str) -> list[float]:
    """A number that the trainer logs in every step."""
    return [entry[name] for entry in trainer.state.log_history if "loss" in entry]


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


def dpo_trainer(
    base: Any,
    tokenizer: Any,
    pairs: list[dict[str, list[int]]],
    orders: list[list[int]],
    start: Path | None,
    settings: Any,
) -> Any:
    """TRL's DPOTrainer on token ids as they are, in the orders given, one an epoch, from the LoRA weights in `start`.

    TRL itself puts LoRA on, so that its reference is the base with the adapter off: its fastest way. Without `start`,
    `base` has its LoRA weights already. The trainer's `reference_seconds` is the time of its pass over the reference; 0
    without one.
    """
    from datasets import Dataset
    from peft import PeftConfig, set_peft_model_state_dict
    from safetensors.torch import load_file
    from torch.utils.data import Sampler
    from trl import DPOTrainer

    epochs = iter(orders)

    class InOrder(Sampler[int]):
        def __iter__(self) -> Iterator[int]:
            return iter(next(epochs))

        def __len__(self) -> int:
            return len(pairs)

    class GivenIds(DPOTrainer):  # type: ignore[misc]
        reference_seconds = 0.0

        def _prepare_dataset(self, dataset: Any, *_: Any, **__: Any) -> Any:
            return dataset

        def _precompute_ref_logps(self, *arguments: Any, **keywords: Any) -> Any:
            started = time.perf_counter()
            try:
                return super()._precompute_ref_logps(*arguments, **keywords)
            finally:
                self.reference_seconds = time.perf_counter() - started

        def _get_train_sampler(self, train_dataset: Any = None) -> Any:
            return InOrder()

    lora = None
    if start is not None:
        lora = PeftConfig.from_pretrained(start)
        lora.inference_mode = False
    trainer = GivenIds(
        model=base,
        args=settings,
        train_dataset=Dataset.from_list(pairs),
        processing_class=tokenizer,
        peft_config=lora,
    )
    if start is not None:
        set_peft_model_state_dict(trainer.model, load_file(start / "adapter_model.safetensors"))
    return trainer
