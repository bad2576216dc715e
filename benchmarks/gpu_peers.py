"""transformers' Trainer and TRL in gpu.py, on the token ids as they are."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

from contenders import step_clock, trained_tokens
from dpo_contenders import trl_trainer as dpo_trainer
from gpu_contenders import BETA, LEARNING_RATE, TRANSFORMERS, Contender, Job, Measured, peak_memory
from gpu_shapes import SEED
from workloads import IGNORED


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


def trainer_of_rows(contender: Contender, job: Job) -> Measured:
    """transformers' Trainer or TRL's SFTTrainer."""
    from datasets import Dataset
    from peft import PeftModel, prepare_model_for_kbit_training
    from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

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

        told |= lengths(contender, job)
        trainer = SFTTrainer(
            model=model, args=SFTConfig(**told), train_dataset=rows, processing_class=tokenizer
        )
    return measured_rows(trainer, job)


def lengths(contender: Contender, job: Job) -> dict[str, Any]:
    """TRL's settings of how long rows are: nothing is cut off, except that packs have the workload's length."""
    if contender.packed:
        return {"max_length": job.about["packed"], "packing": True}
    return {"max_length": None}


def measured_rows(trainer: Any, job: Job) -> Measured:
    """Train; the tokens are counted in the rows that the trainer has made of its data set."""
    clock = step_clock()
    trainer.add_callback(clock)
    trainer.train()
    made = [trainer.train_dataset[i] for i in range(len(trainer.train_dataset))]
    at_once = trainer.args.per_device_train_batch_size * trainer.args.gradient_accumulation_steps
    steps = [made[start : start + at_once] for start in range(0, len(made), at_once)]
    return Measured(
        seconds=clock.seconds,
        tokens=[sum(len(row["input_ids"]) for row in step) for step in steps],
        losses=[each["loss"] for each in trainer.state.log_history if "loss" in each],
        trained_tokens=[sum(trained_tokens(row["labels"]) for row in step) for step in steps],
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
