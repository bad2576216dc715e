"""What other tools call our settings: transformers' Trainer, TRL, Unsloth, LLaMA-Factory and Axolotl.

For messages about unknown settings, and for `yeonma convert`. The names are those of LLaMA-Factory's and Axolotl's
argument classes of August 2026, TRL's configs and transformers' TrainingArguments.
"""

from __future__ import annotations

from collections.abc import Container, Mapping

from yeonma.messages import tr

RENAMED: Mapping[str, str] = {
    "adapter_name_or_path": "adapter",
    "add_tokens": "new_tokens",
    "adam_beta_1": "adam_beta1",
    "adam_beta_2": "adam_beta2",
    "adam_eps": "adam_epsilon",
    "alpha": "lora_alpha",
    "additional_target": "modules_to_save",
    "base_model_name_or_path": "base_model",
    "block_size": "cutoff_len",
    "data": "data_path",
    "dataset": "data_path",
    "dataset_name": "data_path",
    "datasets": "data_path",
    "desirable_weight": "kto_desirable_weight",
    "dpo_beta": "beta",
    "dpo_label_smoothing": "label_smoothing",
    "early_stopping_steps": "early_stopping_patience",
    "epochs": "num_epochs",
    "eval_dataset": "val_data_path",
    "eval_file": "val_data_path",
    "gradient_clipping": "max_grad_norm",
    "kto_chosen_weight": "kto_desirable_weight",
    "kto_rejected_weight": "kto_undesirable_weight",
    "lora_model_dir": "adapter",
    "lora_modules_to_save": "modules_to_save",
    "lora_rank": "lora_r",
    "lora_target": "lora_target_modules",
    "loraplus_lr_ratio": "loraplus_ratio",
    "loss_type": "loss",
    "lr": "learning_rate",
    "lr_scheduler_type": "lr_scheduler",
    "max_length": "cutoff_len",
    "max_samples": "max_rows",
    "max_seq_len": "cutoff_len",
    "max_seq_length": "cutoff_len",
    "model": "base_model",
    "model_name": "base_model",
    "model_name_or_path": "base_model",
    "num_train_epochs": "num_epochs",
    "optim": "optimizer",
    "out_dir": "output_dir",
    "output": "output_dir",
    "peft_use_dora": "use_dora",
    "peft_use_rslora": "use_rslora",
    "per_device_batch_size": "micro_batch_size",
    "pref_beta": "beta",
    "pref_ftx": "sft_weight",
    "pref_loss": "loss",
    "rank": "lora_r",
    "rl_beta": "beta",
    "rpo_alpha": "sft_weight",
    "sequence_len": "cutoff_len",
    "target_modules": "lora_target_modules",
    "test_datasets": "val_data_path",
    "train_data": "data_path",
    "train_file": "data_path",
    "train_on_prompt": "train_on_inputs",
    "undesirable_weight": "kto_undesirable_weight",
    "use_gradient_checkpointing": "gradient_checkpointing",
    "val_size": "val_set_size",
    "validation_file": "val_data_path",
    "wandb_name": "run_name",
}
"""Their name -> our setting of the same meaning."""

_SHARD = tr("write shard: true, with nproc, to divide the base model among processes")
IN_OTHER_WORDS: Mapping[str, str] = {
    "assistant_only_loss": tr("only answers are trained, unless train_on_inputs is true"),
    "bf16": tr("write dtype: bfloat16, or leave it to auto"),
    "completion_only_loss": tr("only answers are trained, unless train_on_inputs is true"),
    "deepspeed": _SHARD,
    "eval_strategy": tr("write eval_steps; without it, a run is evaluated after every epoch"),
    "evaluation_strategy": tr("write eval_steps; without it, a run is evaluated after every epoch"),
    "evals_per_epoch": tr("write eval_steps; without it, a run is evaluated after every epoch"),
    "finetuning_type": tr("write train: lora or train: full"),
    "fp16": tr("write dtype: float16"),
    "fsdp": _SHARD,
    "fsdp_config": _SHARD,
    "fsdp_version": _SHARD,
    "gradient_accumulation_steps": tr(
        "batch_size is all examples of a step: those of a pass x passes x processes"
    ),
    "load_in_4bit": tr("write quantization: nf4"),
    "load_in_8bit": tr("write quantization: int8"),
    "mask_history": tr("write train_on: last"),
    "num_gpus": tr("write nproc"),
    "nproc_per_node": tr("write nproc"),
    "per_device_train_batch_size": tr(
        "batch_size is all examples of a step; those of a pass are micro_batch_size"
    ),
    "quantization_bit": tr("write quantization: nf4 (4 bits) or int8 (8 bits)"),
    "rl": tr("yeonma dpo trains preferences; write loss: sigmoid, kto, orpo and so on"),
    "save_strategy": tr("write save_steps; without it, a checkpoint is saved after every epoch"),
    "saves_per_epoch": tr("write save_steps; without it, a checkpoint is saved after every epoch"),
    "stage": tr("yeonma sft trains answers and whole texts, yeonma dpo preferences"),
}
"""Names whose meaning is that of another setting with another value, and how to say it here."""

_PACKED = tr("examples share passes without padding and without seeing each other")
_RECOMPUTED = tr("activations are recomputed, not moved to the CPU or the disk")
_CHOSEN = tr("chosen when the model is loaded")
_READ = tr("rows are read as a stream and tokenised once")
SAME_COMMAND = tr("the same command continues a run; overwrite: true begins anew")
NOT_NEEDED: Mapping[str, str] = {
    "activation_offloading": _RECOMPUTED,
    "attn_implementation": _CHOSEN,
    "auto_resume_from_checkpoints": SAME_COMMAND,
    "batch_flattening": _PACKED,
    "buffer_size": _READ,
    "cut_cross_entropy": _CHOSEN,
    "dataloader_num_workers": _READ,
    "dataloader_pin_memory": _READ,
    "dataloader_prefetch_factor": _READ,
    "dataset_num_proc": _READ,
    "dataset_prepared_path": _READ,
    "dataset_processes": _READ,
    "dataset_shard_num": _READ,
    "ddp_find_unused_parameters": tr("processes add up their gradients themselves"),
    "ddp_timeout": tr("processes that wait are told from those that are lost"),
    "do_train": tr("yeonma sft and yeonma dpo train"),
    "enable_liger_kernel": _CHOSEN,
    "eval_batch_size": tr("validation takes micro_batch_size or micro_batch_tokens"),
    "eval_sample_packing": _PACKED,
    "flash_attention": _CHOSEN,
    "flash_attn": _CHOSEN,
    "flex_attn_compile_kwargs": _CHOSEN,
    "gradient_checkpointing_kwargs": tr("recomputing has one form"),
    "group_by_modality_length": _PACKED,
    "ignore_pad_token_for_loss": tr("there is no padding"),
    "include_num_input_tokens_seen": tr("metrics.jsonl counts tokens"),
    "include_tokens_per_second": tr("metrics.jsonl counts tokens"),
    "liger_cross_entropy": _CHOSEN,
    "liger_fused_linear_cross_entropy": _CHOSEN,
    "liger_glu_activation": _CHOSEN,
    "liger_layer_norm": _CHOSEN,
    "liger_rms_norm": _CHOSEN,
    "liger_rope": _CHOSEN,
    "lora_embedding_kernel": _CHOSEN,
    "lora_mlp_kernel": _CHOSEN,
    "lora_o_kernel": _CHOSEN,
    "lora_qkv_kernel": _CHOSEN,
    "low_cpu_mem_usage": _CHOSEN,
    "model_type": _CHOSEN,
    "neat_packing": _PACKED,
    "otel_metrics_host": tr("report_to names trackers"),
    "otel_metrics_port": tr("report_to names trackers"),
    "overwrite_cache": tr("a changed file, template or tokenizer is noticed"),
    "overwrite_output_dir": SAME_COMMAND,
    "packing_strategy": _PACKED,
    "pad_to_multiple_of": _PACKED,
    "pad_to_sequence_len": _PACKED,
    "padding_free": _PACKED,
    "per_device_eval_batch_size": tr("validation takes micro_batch_size or micro_batch_tokens"),
    "plot_loss": tr("the model card has the curve"),
    "preprocessing_batch_size": _READ,
    "preprocessing_num_workers": _READ,
    "ray_num_workers": tr("write nproc, or start the run with torchrun"),
    "remove_unused_columns": tr("columns that the template does not use are named"),
    "sample_packing_bin_size": _PACKED,
    "sample_packing_group_size": _PACKED,
    "save_only_model": tr("checkpoints hold all that a run needs to continue"),
    "save_safetensors": tr("weights are always safetensors"),
    "sdp_attention": _CHOSEN,
    "streaming": _READ,
    "strict": tr("unknown settings are always refused"),
    "tokenized_path": _READ,
    "tokenizer_type": _CHOSEN,
    "use_fast_tokenizer": _CHOSEN,
    "use_otel_metrics": tr("report_to names trackers"),
    "use_ray": tr("write nproc, or start the run with torchrun"),
    "use_unsloth": _CHOSEN,
    "wandb_log_model": tr("the output folder is the adapter; yeonma push uploads it"),
    "wandb_watch": tr("metrics.jsonl and report_to have the norms of the gradients"),
}
"""Names that need no setting here, and why. The result of a run does not depend on them."""

_TRAINED_WHOLE = tr("the products of trained weights have no 8 bits; frozen weights have: quantization: fp8")
WITHOUT_COUNTERPART: Mapping[str, str] = {
    "cosine_constant_lr_ratio": tr("the learning rate follows its schedule to the end"),
    "cosine_min_lr_ratio": tr(
        "write lr_scheduler: cosine_with_min_lr and lr_scheduler_kwargs: {{min_lr_rate: ...}}"
    ),
    "curriculum_sampling": tr("rows are drawn in random order, by the seed"),
    "fp8": _TRAINED_WHOLE,
    "fp8_enable_fsdp_float8_all_gather": _TRAINED_WHOLE,
    "llmcompressor": tr("trained weights are not kept at zero; with train: lora the base stays as it is"),
    "loss_watchdog_patience": tr("a run stops at a loss that is not a number, not at a high one"),
    "loss_watchdog_threshold": tr("a run stops at a loss that is not a number, not at a high one"),
    "moe_aux_loss_coef": tr("routers are frozen and have no loss of their own"),
    "neftune_noise_alpha": tr("no noise is added to embeddings"),
    "pissa_init": tr("adapters begin at zero, as PEFT's default"),
    "qat": tr("weights are not rounded while they are trained"),
    "rope_scaling": tr("put it into the config.json of the base model"),
    "sample_packing_sequentially": tr("rows are drawn in random order, by the seed"),
    "shuffle_merged_datasets": tr("rows are drawn in random order, by the seed"),
}
"""Names of what does not exist here, and what there is."""


def foreign_name_cure(name: str, settings: Container[str], form: str) -> str:
    """What to write instead of another tool's name: `here it is --learning_rate`. Empty for a name that none has.

    settings: names of the command's settings. form: how they are written, `--{}` or `{}`.
    """
    ours = RENAMED.get(name)
    if ours in settings:
        return tr("here it is {ours}", ours=form.format(ours))
    for table in (IN_OTHER_WORDS, WITHOUT_COUNTERPART):
        if name in table:
            return table[name]
    return tr("leave it out: {not_needed}", not_needed=NOT_NEEDED[name]) if name in NOT_NEEDED else ""
