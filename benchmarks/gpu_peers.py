"""transformers' Trainer and TRL in gpu.py, on the token ids as they are."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from gpu_contenders import BETA, LEARNING_RATE, TRANSFORMERS, Contender, Job, Measured, peak_memory
from gpu_shapes import SEED
from peers import dpo_trainer, logged, train, train_rows, trainer_arguments
from workloads import IGNORED


def arguments(contender: Contender, job: Job) -> dict[str, Any]:
    """TrainingArguments of all peers; all else is their own default. Yeonma has these values too."""
    micro = contender.micro_batch or 1
    updates = job.about["batch"] // micro
    if contender.packed:
        tokens = job.about["steps"][0]["tokens"]
        updates = max(1, round(tokens / job.about["packed"]))
    return {
        **trainer_arguments(job.folder / "output", micro, updates, LEARNING_RATE[job.about["pairs"]]),
        "seed": SEED,
        "max_grad_norm": job.about["max_grad_norm"],
        "use_cpu": job.device == "cpu",
        "bf16": job.dtype == "bfloat16",
        "gradient_checkpointing": bool(contender.checkpointing),
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
        "optim": "adamw_torch_fused",
        "use_liger_kernel": contender.fused,
        "dataloader_pin_memory": job.device == "cuda",
    }


def loaded(job: Job) -> tuple[Any, Any]:
    """The base as transformers loads it, and its tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

    options: dict[str, Any] = {"dtype": getattr(torch, job.dtype)}
    if job.device == "cuda":
        options |= {"device_map": {"": 0}}
        if find_spec("flash_attn"):
            options |= {"attn_implementation": "flash_attention_2"}
    if job.quantization == "nf4":
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=getattr(torch, job.dtype),
        )
    model = AutoModelForCausalLM.from_pretrained(job.model, **options)
    return model, AutoTokenizer.from_pretrained(job.model)


def trainer_of_rows(contender: Contender, job: Job) -> Measured:
    """transformers' Trainer or TRL's SFTTrainer."""
    from datasets import Dataset
    from peft import PeftModel, prepare_model_for_kbit_training
    from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

    base, tokenizer = loaded(job)
    if job.quantization != "none":
        base = prepare_model_for_kbit_training(base, bool(contender.checkpointing))
    model = PeftModel.from_pretrained(base, job.start, is_trainable=True)
    if contender.checkpointing:
        base.enable_input_require_grads()
    given, rows = arguments(contender, job), Dataset.from_list(job.examples)
    if contender.library == TRANSFORMERS:
        collator = DataCollatorForSeq2Seq(tokenizer, padding=True, label_pad_token_id=IGNORED)
        trainer: Any = Trainer(
            model=model, args=TrainingArguments(**given), train_dataset=rows, data_collator=collator
        )
    else:
        from trl import SFTConfig, SFTTrainer

        given |= lengths(contender, job)
        trainer = SFTTrainer(
            model=model, args=SFTConfig(**given), train_dataset=rows, processing_class=tokenizer
        )
    return measured_rows(trainer, job)


def lengths(contender: Contender, job: Job) -> dict[str, Any]:
    """TRL's settings of how long rows are: nothing is cut off, except that packs have the workload's length."""
    if contender.packed:
        return {"max_length": job.about["packed"], "packing": True}
    return {"max_length": None}


def measured_rows(trainer: Any, job: Job) -> Measured:
    return Measured(**train_rows(trainer), reference_seconds=0.0, peak_memory_bytes=peak_memory(job))


def trl_dpo(contender: Contender, job: Job) -> Measured:
    base, tokenizer = loaded(job)
    return measured_pairs(base, tokenizer, job.start, arguments(contender, job), job)


def measured_pairs(
    model: Any, tokenizer: Any, start: Path | None, given: dict[str, Any], job: Job
) -> Measured:
    """TRL's DPOTrainer with the arguments given; `start` as `dpo_trainer` has it."""
    from trl import DPOConfig

    given = {name: value for name, value in given.items() if name != "train_sampling_strategy"}
    settings = DPOConfig(
        **given, loss_type=["sigmoid"], beta=BETA, max_length=None, precompute_ref_log_probs=False
    )
    order = list(range(len(job.examples)))
    trainer = dpo_trainer(model, tokenizer, job.examples, [order], start, settings)
    return Measured(
        seconds=train(trainer),
        tokens=[step["tokens"] for step in job.about["steps"]],
        losses=logged(trainer, "loss"),
        trained_tokens=[step["trained_tokens"] for step in job.about["steps"]],
        reference_seconds=0.0,
        peak_memory_bytes=peak_memory(job),
    )
