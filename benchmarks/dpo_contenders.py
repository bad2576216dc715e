"""Who is measured in preference tuning, and one measurement: as a script, with a job file, in a process of its own.

All contenders train the same LoRA start with DPO on the same token ids, pairs and order, with the same optimizer
settings, in float32. What is timed is the pass that finds the reference's log-probabilities, where there is one, and
every step's forward, backward and update; reading the log, saving and evaluating are outside.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from contenders import YEONMA, step_clock
from dpo_workloads import BATCH_SIZE, BETA, CUTOFF_LEN, LEARNING_RATE, LORA_R, SEED, TARGETS, WORKLOADS
from machine import cores, frozen_rate, matrix_rate, own_bytes

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
    from yeonma.cli import main
    from yeonma.train import build as setup

    for kept in (folder / "cache").glob("*.reference"):
        kept.unlink()
    reference_seconds = 0.0

    def timed(function: Any) -> Any:
        def call(*arguments: Any, **more: Any) -> Any:
            nonlocal reference_seconds
            started = time.perf_counter()
            found = function(*arguments, **more)
            reference_seconds += time.perf_counter() - started
            return found

        return call

    setup.reference_logprobs = timed(setup.reference_logprobs)
    output = folder / "output"
    settings = {
        "base_model": model,
        "data_path": folder / f"{pairs}.jsonl",
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
        "num_epochs": epochs,
        "learning_rate": LEARNING_RATE,
        "loss": "sigmoid",
        "beta": BETA,
        "seed": SEED,
        "card_rows": 0,
    }
    if main(["dpo", *(f"--{name}={value}" for name, value in settings.items())]) != 0:
        raise SystemExit("yeonma dpo failed")
    lines = (output / "metrics.jsonl").read_text("utf-8").splitlines()
    steps = [each for each in map(json.loads, lines) if not each.get("evaluation")]
    return Measured(
        reference_seconds=reference_seconds,
        seconds=[each["seconds"] for each in steps],
        losses=[each["loss"] for each in steps],
        accuracies=[each["reward_accuracy"] for each in steps],
        peak_memory_bytes=own_bytes("VmHWM"),
    )


def trl(contender: Contender, folder: Path, pairs: str, model: str, epochs: int) -> Measured:
    import torch
    from datasets import Dataset
    from peft import PeftConfig, set_peft_model_state_dict
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    prepared = json.loads((folder / f"{pairs}.json").read_text("utf-8"))
    lora = PeftConfig.from_pretrained(folder / "start")
    lora.inference_mode = False
    # LoRA is put on by TRL itself, so that its reference is the base with the adapter off: its fastest way.
    trainer = trl_trainer(
        model=base,
        args=trl_settings(contender, folder / "output", epochs),
        train_dataset=Dataset.from_list(prepared["pairs"]),
        processing_class=tokenizer,
        peft_config=lora,
    )
    trainer.orders = iter(prepared["orders"])
    set_peft_model_state_dict(trainer.model, load_file(folder / "start" / "adapter_model.safetensors"))
    clock = step_clock()
    trainer.add_callback(clock)
    trainer.train()
    logged = [each for each in trainer.state.log_history if "loss" in each]
    return Measured(
        reference_seconds=trainer.reference_seconds,
        seconds=clock.seconds,
        losses=[each["loss"] for each in logged],
        accuracies=[each["rewards/accuracies"] for each in logged],
        peak_memory_bytes=own_bytes("VmHWM"),
    )


def trl_settings(contender: Contender, output: Path, epochs: int) -> Any:
    """All else is TRL's own default. `yeonma dpo` has these values too."""
    from trl import DPOConfig

    return DPOConfig(
        output_dir=str(output),
        per_device_train_batch_size=contender.micro_batch,
        gradient_accumulation_steps=BATCH_SIZE // contender.micro_batch,
        precompute_ref_log_probs=contender.precomputed,
        num_train_epochs=epochs,
        loss_type=["sigmoid"],
        beta=BETA,
        max_length=None,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="linear",
        weight_decay=0.0,
        max_grad_norm=1.0,
        seed=SEED,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        dataloader_pin_memory=False,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )


def trl_trainer(**keywords: Any) -> Any:
    """A DPOTrainer that takes token ids as they are, goes through them in the orders given, one an epoch, and knows
    how long its pass over the reference took."""
    from torch.utils.data import Sampler
    from trl import DPOTrainer

    class Given(DPOTrainer):  # type: ignore[misc]
        reference_seconds = 0.0
        orders: Iterator[list[int]] = iter(())

        def _prepare_dataset(self, dataset: Any, *_: Any, **__: Any) -> Any:
            return dataset

        def _precompute_ref_logps(self, *arguments: Any, **more: Any) -> Any:
            started = time.perf_counter()
            found = super()._precompute_ref_logps(*arguments, **more)
            self.reference_seconds = time.perf_counter() - started
            return found

        def _get_train_sampler(self, train_dataset: Any = None) -> Any:
            trainer, count = self, len(self.train_dataset)

            class InOrder(Sampler[int]):
                def __iter__(self) -> Iterator[int]:
                    return iter(next(trainer.orders))

                def __len__(self) -> int:
                    return count

            return InOrder()

    return Given(**keywords)


if __name__ == "__main__":
    job = json.loads(Path(sys.argv[1]).read_text("utf-8"))
    place = Path(job["folder"])
    found = measure(CONTENDERS[job["contender"]], place, job["workload"], job["model"])
    (place / "measured.json").write_text(json.dumps(asdict(found)), "utf-8")
