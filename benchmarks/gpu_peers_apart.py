"""Unsloth and LLaMA-Factory in gpu.py: each pins other versions than Yeonma, so each may have a Python of its own.

Unsloth 2026.10.9 asks for transformers <= 5.17.0 and datasets < 5; LLaMA-Factory 0.9.5 for transformers <= 5.6.0,
datasets <= 4.0.0 and peft <= 0.18.1. requirements-unsloth.txt and requirements-factory.txt are such environments.
Both gave the same losses as Yeonma with a tiny shape on the CPU, where Unsloth trains with TRL's and PEFT's plain code:
its kernels and its packing have not been tried.
"""

from __future__ import annotations

import json
from typing import Any

from gpu_contenders import Contender, Job, Measured, peak_memory
from gpu_peers import arguments, lengths, measured_pairs, measured_rows
from gpu_shapes import LORA_R, SEED
from gpu_workloads import CUTOFF_LEN
from peers import step_clock, tokens_of
from workloads import IGNORED

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def unsloth(contender: Contender, job: Job) -> Measured:
    """Unsloth's model under TRL's SFTTrainer or DPOTrainer, as it has patched them; gpu_measure.py imported unsloth
    before all else."""
    model, tokenizer = unsloth_model(contender, job)
    given = arguments(contender, job)
    for name in ("gradient_checkpointing", "gradient_checkpointing_kwargs"):  # its model has it already
        del given[name]
    if job.about["pairs"]:
        return measured_pairs(model, tokenizer, None, given, job)
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    # With a column of labels it would take a collator that cannot lay rows flat, and packed rows would see each other.
    rows = [
        {"input_ids": row["input_ids"], "completion_mask": [int(label != IGNORED) for label in row["labels"]]}
        for row in job.examples
    ]
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(**given, **lengths(contender, job), completion_only_loss=True),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    if contender.packed and not trainer.args.packing:
        raise SystemExit("Unsloth turned packing off")
    return measured_rows(trainer, job)


def unsloth_model(contender: Contender, job: Job) -> tuple[Any, Any]:
    """Unsloth's model with the LoRA weights of the start, and the tokenizer."""
    import torch
    from peft import set_peft_model_state_dict
    from safetensors.torch import load_file
    from unsloth import FastLanguageModel

    base, tokenizer = FastLanguageModel.from_pretrained(
        job.model,
        max_seq_length=CUTOFF_LEN,
        dtype=getattr(torch, job.dtype),
        load_in_4bit=job.quantization == "nf4",
    )
    checkpointing = "unsloth" if contender.checkpointing else False
    model = FastLanguageModel.get_peft_model(
        base,
        r=LORA_R,
        lora_alpha=job.about["lora_alpha"],
        lora_dropout=job.about["lora_dropout"],
        target_modules=LINEAR,
        use_gradient_checkpointing=checkpointing,
        random_state=SEED,
    )
    start = load_file(job.start / "adapter_model.safetensors")
    if unknown := set_peft_model_state_dict(model, start).unexpected_keys:
        raise SystemExit(f"Unsloth's adapter has not the start's weights: {unknown[:3]}")
    return model, tokenizer


def factory(contender: Contender, job: Job) -> Measured:
    """LLaMA-Factory's own run, on token ids that it finds as if it had saved them itself."""
    from datasets import Dataset, DatasetDict
    from llamafactory.train.tuner import run_exp

    rows, tokenized = job.examples, str(job.folder / "factory")
    masked = [{**row, "attention_mask": [1] * len(row["input_ids"])} for row in rows]
    DatasetDict({"train": Dataset.from_list(masked)}).save_to_disk(tokenized)
    clock, given = step_clock(), arguments(contender, job)
    for name in [name for name in given if name.startswith("gradient_checkpointing")]:
        del given[name]
    del given["train_sampling_strategy"], given["use_liger_kernel"]
    if job.quantization == "nf4":
        given |= {"quantization_bit": 4, "quantization_type": "nf4", "double_quantization": True}
    run_exp(
        {
            **given,
            "model_name_or_path": job.model,
            "adapter_name_or_path": str(job.start),
            "stage": "sft",
            "do_train": True,
            "finetuning_type": "lora",
            "dataset": "rows",  # a name is asked for; the ids are those of tokenized_path
            "tokenized_path": tokenized,
            "template": "empty",
            "cutoff_len": CUTOFF_LEN,
            "disable_shuffling": True,
            "disable_gradient_checkpointing": not contender.checkpointing,
            "enable_liger_kernel": contender.fused,
            "overwrite_output_dir": True,
        },
        callbacks=[clock],
    )
    state = json.loads((job.folder / "output" / "trainer_state.json").read_text("utf-8"))
    batch = job.about["batch"]
    steps = [rows[start : start + batch] for start in range(0, len(rows), batch)]
    return Measured(
        seconds=clock.seconds,
        losses=[entry["loss"] for entry in state["log_history"] if "loss" in entry],
        **tokens_of(steps),
        reference_seconds=0.0,
        peak_memory_bytes=peak_memory(job),
    )
