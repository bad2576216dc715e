"""Who is measured by gpu.py, and one measurement: as a script, with a job file, in a process of its own.

All train the same LoRA start on the same token ids and in the same order. A step's time is that of its forward,
backward and update, with the device's work done. Unsloth and LLaMA-Factory run only where they are installed; their
parts below have not been tried, and may not fit their present interfaces.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from contenders import TRL, YEONMA, step_clock, trained_tokens
from dpo_contenders import trl_trainer as dpo_trainer
from gpu_shapes import LORA_R, SEED
from gpu_workloads import CUTOFF_LEN
from workloads import IGNORED

TRANSFORMERS, TRL_DPO = "transformers Trainer", "TRL DPOTrainer"
UNSLOTH, FACTORY = "Unsloth", "LLaMA-Factory"
LEARNING_RATE = {False: 2e-4, True: 1e-5}  # by whether a workload has pairs
BETA = 0.1
NEEDS = {TRL: "trl", TRL_DPO: "trl", UNSLOTH: "unsloth", FACTORY: "llamafactory"}


@dataclass(frozen=True)
class Contender:
    """`micro_batch`: rows or pairs at once; None for as many as fit, which Yeonma finds out, or for packing."""

    library: str
    micro_batch: int | None
    checkpointing: bool | None = False  # None: as the library decides
    packed: bool = False  # rows packed into sequences as long as the workload says
    fused: bool = False  # TRL: liger-kernel's layers and its loss without logits

    @property
    def label(self) -> str:
        parts = [self.library]
        if self.micro_batch:
            parts.append(f"micro-batch {self.micro_batch}")
        parts += [word for word, on in (("packing", self.packed), ("liger", self.fused)) if on]
        return ", ".join([*parts, *(["checkpointing"] if self.checkpointing else [])])


OURS = "yeonma"
SFT: dict[str, Contender] = {
    OURS: Contender(YEONMA, None, checkpointing=None),
    "yeonma-4": Contender(YEONMA, 4),
    "transformers-4": Contender(TRANSFORMERS, 4, checkpointing=True),
    "transformers-1": Contender(TRANSFORMERS, 1),
    "trl-4": Contender(TRL, 4, checkpointing=True),
    "trl-1": Contender(TRL, 1),
    "trl-packing": Contender(TRL, None, checkpointing=True, packed=True),
    "trl-packing-liger": Contender(TRL, None, checkpointing=True, packed=True, fused=True),
    "trl-packing-liger-kept": Contender(TRL, None, packed=True, fused=True),
    "unsloth-4": Contender(UNSLOTH, 4, checkpointing=True),
    "factory-4": Contender(FACTORY, 4, checkpointing=True),
}
DPO: dict[str, Contender] = {
    OURS: Contender(YEONMA, None, checkpointing=None),
    "yeonma-2": Contender(YEONMA, 2),
    "trl-1": Contender(TRL_DPO, 1),
    "trl-2": Contender(TRL_DPO, 2, checkpointing=True),
    "trl-4": Contender(TRL_DPO, 4, checkpointing=True),
    "trl-4-liger": Contender(TRL_DPO, 4, checkpointing=True, fused=True),
}


def contenders(pairs: bool) -> dict[str, Contender]:
    return DPO if pairs else SFT


def lacking(contender: Contender, quantization: str, workload: dict[str, Any]) -> str:
    """Why a contender is not measured here; empty where it is."""
    needed = [NEEDS.get(contender.library), "liger_kernel" if contender.fused else None]
    for package in needed:
        if package and find_spec(package) is None:
            return f"{package} is not installed"
    if contender.packed and not workload["packed"]:
        return "packing is measured on the packed workload alone"
    if quantization == "nf4" and find_spec("bitsandbytes") is None:
        return "bitsandbytes is not installed"
    if quantization == "none" or contender.library == YEONMA:
        return ""
    return "" if quantization == "nf4" and contender.library != FACTORY else f"it has no {quantization} here"


@dataclass(frozen=True)
class Job:
    folder: Path
    workload: str
    about: dict[str, Any]  # of the workload, as prepared.json has it
    quantization: str
    device: str
    dtype: str

    @property
    def model(self) -> str:
        return str(self.folder / "model")

    @property
    def examples(self) -> Any:
        return json.loads((self.folder / f"{self.workload}.json").read_text("utf-8"))


@dataclass(frozen=True)
class Measured:
    """Lists have a number a step. `tokens` are the examples' own, an answer's and its prompt's each time."""

    seconds: list[float]
    tokens: list[int]
    losses: list[float]
    trained_tokens: list[int]
    reference_seconds: float
    peak_memory_bytes: int
    matrix_rates: tuple[float, float] = (0.0, 0.0)  # before and after, operations a second


def measure(contender: Contender, job: Job) -> Measured:
    import torch

    from yeonma.before.rate import measure_rate

    device, dtype = torch.device(job.device), getattr(torch, job.dtype)
    before = measure_rate(device, dtype).flops_per_second
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    run: Callable[[Contender, Job], Measured] = {
        YEONMA: ours,
        TRL_DPO: trl_dpo,
        FACTORY: factory,
    }.get(contender.library, trainer_of_rows)
    measured = run(contender, job)
    return replace(measured, matrix_rates=(before, measure_rate(device, dtype).flops_per_second))


def peak_memory(job: Job) -> int:
    from yeonma.train.progress import peak_memory_bytes

    return peak_memory_bytes(job.device)


def ours(contender: Contender, job: Job) -> Measured:
    """`yeonma sft` or `dpo` itself, from its command line to its adapter folder; the numbers of its metrics.jsonl."""
    from yeonma.cli import main
    from yeonma.train import setup

    for kept in (job.folder / "cache").glob("*.reference"):
        kept.unlink()
    spent: list[float] = []

    def timed(function: Any) -> Any:
        def call(*arguments: Any, **more: Any) -> Any:
            started = time.perf_counter()
            found = function(*arguments, **more)
            spent.append(time.perf_counter() - started)
            return found

        return call

    setup.reference_logprobs, setup.is_reference = timed(setup.reference_logprobs), timed(setup.is_reference)
    output, pairs = job.folder / "output", job.about["pairs"]
    settings: dict[str, Any] = {
        "base_model": job.model,
        "data_path": job.folder / f"{job.workload}.jsonl",
        "cache_dir": job.folder / "cache",
        "output_dir": output,
        "overwrite": "true",
        "device": job.device,
        "dtype": job.dtype,
        "cutoff_len": CUTOFF_LEN,
        "lora_r": LORA_R,
        "lora_alpha": LORA_R,
        "batch_size": job.about["batch"],
        "num_epochs": 1,
        "learning_rate": LEARNING_RATE[pairs],
        "seed": SEED,
        "card_rows": 0,
        **({"loss": "sigmoid", "beta": BETA} if pairs else {}),
        **({"quantization": job.quantization} if job.quantization != "none" else {}),
        **at_once(contender, job),
    }
    verb = "dpo" if pairs else "sft"
    if main([verb, *(f"--{name}={value}" for name, value in settings.items())]) != 0:
        raise SystemExit(f"yeonma {verb} failed")
    lines = (output / "metrics.jsonl").read_text("utf-8").splitlines()
    steps = [each for each in map(json.loads, lines) if not each.get("evaluation")]
    return Measured(
        seconds=[each["seconds"] for each in steps],
        tokens=[each["tokens"] for each in job.about["steps"]],
        losses=[each["loss"] for each in steps],
        trained_tokens=[each["trained_tokens"] for each in job.about["steps"]],
        reference_seconds=sum(spent),
        peak_memory_bytes=peak_memory(job),
    )


def at_once(contender: Contender, job: Job) -> dict[str, Any]:
    """Yeonma's settings of memory and speed: its own choice, or the contender's."""
    if contender.micro_batch:
        return {"micro_batch_size": contender.micro_batch}
    if job.about["packed"]:
        own = {"micro_batch_size": job.about["batch"], "micro_batch_tokens": job.about["packed"]}
        return {**own, "gradient_checkpointing": "auto"}
    return {"micro_batch_tokens": "auto", "gradient_checkpointing": "auto"}


def loaded(job: Job) -> tuple[Any, Any]:
    """The base as transformers loads it, and its tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

    how: dict[str, Any] = {"dtype": getattr(torch, job.dtype)}
    if job.device == "cuda":
        how |= {"device_map": {"": 0}}
        if find_spec("flash_attn"):
            how |= {"attn_implementation": "flash_attention_2"}
    if job.quantization == "nf4":
        how["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=getattr(torch, job.dtype),
        )
    model = AutoModelForCausalLM.from_pretrained(job.model, **how)
    return model, AutoTokenizer.from_pretrained(job.model)


def arguments(contender: Contender, job: Job) -> dict[str, Any]:
    """What all peers are told; all else is their own default. Yeonma has these values too."""
    micro = contender.micro_batch or 1
    updates = job.about["batch"] // micro
    if contender.packed:
        tokens = job.about["steps"][0]["tokens"]
        updates = max(1, round(tokens / job.about["packed"]))
    return {
        "output_dir": str(job.folder / "output"),
        "per_device_train_batch_size": micro,
        "gradient_accumulation_steps": updates,
        "num_train_epochs": 1,
        "learning_rate": LEARNING_RATE[job.about["pairs"]],
        "lr_scheduler_type": "linear",
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "train_sampling_strategy": "sequential",
        "seed": SEED,
        "use_cpu": job.device == "cpu",
        "bf16": job.dtype == "bfloat16",
        "gradient_checkpointing": bool(contender.checkpointing),
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
        "optim": "adamw_torch_fused",
        "use_liger_kernel": contender.fused,
        "dataloader_pin_memory": job.device == "cuda",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }


def trainer_of_rows(contender: Contender, job: Job) -> Measured:
    """transformers' Trainer, TRL's SFTTrainer, or Unsloth's model under the latter."""
    from datasets import Dataset
    from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

    model, tokenizer = unsloth_model(job) if contender.library == UNSLOTH else (None, None)
    if model is None:
        from peft import PeftModel, prepare_model_for_kbit_training

        base, tokenizer = loaded(job)
        if job.quantization != "none":
            base = prepare_model_for_kbit_training(base, bool(contender.checkpointing))
        model = PeftModel.from_pretrained(base, job.folder / "start", is_trainable=True)
        if contender.checkpointing:
            base.enable_input_require_grads()
    told, rows = arguments(contender, job), Dataset.from_list(job.examples)
    if contender.library == TRANSFORMERS:
        collator = DataCollatorForSeq2Seq(tokenizer, padding=True, label_pad_token_id=IGNORED)
        trainer: Any = Trainer(
            model=model, args=TrainingArguments(**told), train_dataset=rows, data_collator=collator
        )
    else:
        from trl import SFTConfig, SFTTrainer

        own: dict[str, Any] = {"max_length": None}
        if contender.packed:
            own = {"max_length": job.about["packed"], "packing": True}
        trainer = SFTTrainer(
            model=model, args=SFTConfig(**told, **own), train_dataset=rows, processing_class=tokenizer
        )
    clock = step_clock()
    trainer.add_callback(clock)
    trainer.train()
    made = [trainer.train_dataset[i] for i in range(len(trainer.train_dataset))]
    at_once = told["per_device_train_batch_size"] * told["gradient_accumulation_steps"]
    steps = [made[start : start + at_once] for start in range(0, len(made), at_once)]
    return Measured(
        seconds=clock.seconds,
        tokens=[sum(len(row["input_ids"]) for row in step) for step in steps],
        losses=[each["loss"] for each in trainer.state.log_history if "loss" in each],
        trained_tokens=[sum(trained_tokens(row["labels"]) for row in step) for step in steps],
        reference_seconds=0.0,
        peak_memory_bytes=peak_memory(job),
    )


def unsloth_model(job: Job) -> tuple[Any, Any]:
    from peft import set_peft_model_state_dict
    from safetensors.torch import load_file
    from unsloth import FastLanguageModel

    base, tokenizer = FastLanguageModel.from_pretrained(
        job.model, max_seq_length=CUTOFF_LEN, load_in_4bit=job.quantization == "nf4"
    )
    model = FastLanguageModel.get_peft_model(
        base,
        r=LORA_R,
        lora_alpha=LORA_R,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        use_gradient_checkpointing="unsloth",
        random_state=SEED,
    )
    set_peft_model_state_dict(model, load_file(job.folder / "start" / "adapter_model.safetensors"))
    return model, tokenizer


def factory(contender: Contender, job: Job) -> Measured:
    """From its own reading of the rows, in its own order: its loss is of other updates."""
    from llamafactory.train.tuner import run_exp

    rows = [
        json.loads(line) for line in (job.folder / f"{job.workload}.jsonl").read_text("utf-8").splitlines()
    ]
    given = [{"instruction": row["prompt"], "output": row["completion"]} for row in rows]
    (job.folder / "factory.json").write_text(json.dumps(given), "utf-8")
    described = {"rows": {"file_name": "factory.json"}}
    (job.folder / "dataset_info.json").write_text(json.dumps(described), "utf-8")
    clock = step_clock()
    told = arguments(contender, job)
    left = (
        "train_sampling_strategy",
        "use_cpu",
        "use_liger_kernel",
        "gradient_checkpointing_kwargs",
        "disable_tqdm",
    )
    run_exp(
        {
            **{name: value for name, value in told.items() if name not in left},
            "model_name_or_path": job.model,
            "stage": "sft",
            "do_train": True,
            "finetuning_type": "lora",
            "lora_rank": LORA_R,
            "lora_alpha": LORA_R,
            "lora_target": "all",
            "dataset": "rows",
            "dataset_dir": str(job.folder),
            "template": "empty",
            "cutoff_len": CUTOFF_LEN,
            "overwrite_output_dir": True,
        },
        callbacks=[clock],
    )
    state = json.loads((job.folder / "output" / "trainer_state.json").read_text("utf-8"))
    mean = sum(each["tokens"] for each in job.about["steps"]) // len(job.about["steps"])
    return Measured(
        seconds=clock.seconds,
        tokens=[mean] * len(clock.seconds),
        losses=[each["loss"] for each in state["log_history"] if "loss" in each],
        trained_tokens=[1] * len(clock.seconds),
        reference_seconds=0.0,
        peak_memory_bytes=peak_memory(job),
    )


def trl_dpo(contender: Contender, job: Job) -> Measured:
    """LoRA is put on by TRL itself, so that its reference is the base with the adapter off: its fastest way."""
    from datasets import Dataset
    from peft import PeftConfig, set_peft_model_state_dict
    from safetensors.torch import load_file
    from trl import DPOConfig

    base, tokenizer = loaded(job)
    lora = PeftConfig.from_pretrained(job.folder / "start")
    lora.inference_mode = False
    told = arguments(contender, job)
    del told["train_sampling_strategy"]
    trainer = dpo_trainer(
        model=base,
        args=DPOConfig(
            **told, loss_type=["sigmoid"], beta=BETA, max_length=None, precompute_ref_log_probs=False
        ),
        train_dataset=Dataset.from_list(job.examples),
        processing_class=tokenizer,
        peft_config=lora,
    )
    trainer.orders = iter([list(range(len(job.examples)))])
    set_peft_model_state_dict(trainer.model, load_file(job.folder / "start" / "adapter_model.safetensors"))
    clock = step_clock()
    trainer.add_callback(clock)
    trainer.train()
    return Measured(
        seconds=clock.seconds,
        tokens=[each["tokens"] for each in job.about["steps"]],
        losses=[each["loss"] for each in trainer.state.log_history if "loss" in each],
        trained_tokens=[each["trained_tokens"] for each in job.about["steps"]],
        reference_seconds=0.0,
        peak_memory_bytes=peak_memory(job),
    )


def main(given: dict[str, Any]) -> None:
    names = [field.name for field in fields(Job) if field.name != "folder"]
    job = Job(Path(given["folder"]), **{name: given[name] for name in names})
    contender = contenders(job.about["pairs"])[given["contender"]]
    found = measure(contender, job)
    counts = {len(each) for each in (found.seconds, found.tokens, found.losses)}
    if counts != {len(found.seconds)}:
        raise SystemExit(f"{contender.label}: steps, tokens and losses do not match: {sorted(counts)}")
    if len(found.seconds) < 2:
        raise SystemExit(f"{contender.label}: one step, and the first is not timed")
    if any(math.isnan(loss) for loss in found.losses):
        raise SystemExit(f"{contender.label}: a loss is not a number")
    (job.folder / "measured.json").write_text(json.dumps(asdict(found)), "utf-8")


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text("utf-8")))
