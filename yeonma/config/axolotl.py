"""Axolotl's YAML files as settings of a run. Names and defaults are those of its schemas (July 2026)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from yeonma.config.conversion import (
    TRAININGS,
    Conversion,
    columns_to_map,
    take_best,
    take_dtype,
    take_optimizer,
    take_schedule,
    take_warmup,
    with_packing,
)
from yeonma.messages import tr

TOOL = "Axolotl"
SAME = (
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "base_model",
    "chat_template_kwargs",
    "early_stopping_patience",
    "group_by_length",
    "kto_desirable_weight",
    "kto_undesirable_weight",
    "learning_rate",
    "logging_steps",
    "lora_alpha",
    "lora_dropout",
    "lora_r",
    "max_grad_norm",
    "max_steps",
    "num_epochs",
    "output_dir",
    "save_total_limit",
    "seed",
    "simpo_gamma",
    "train_on_inputs",
    "trust_remote_code",
    "val_set_size",
    "warmup_ratio",
    "weight_decay",
)
DEFAULTS: Mapping[str, object] = {"num_epochs": 1, "cutoff_len": 512, "lr_scheduler": "cosine"}
LOSSES = {"dpo": "sigmoid", "ipo": "ipo", "kto": "kto", "orpo": "orpo", "simpo": "simpo"}
PARTS = ("path", "type", "split", "name", "revision")
MESSAGES = {
    "field_messages": "messages",
    "field_chosen": "chosen",
    "field_rejected": "rejected",
    "field_tools": "tools",
    "field_system": "system",
}
"""Key of a data set -> field of ours that is a column there."""
PROMPT_COLUMNS = {
    "dpo": {"default": "prompt", "icr": "input", "intel": "question", "prompt_pairs": "prompt"},
    "kto": {"argilla": "instruction", "intel": "question", "prompt_pairs": "prompt", "ultra": "prompt"},
}
"""Of preference rows, for types such as `llama3.intel`: the column with the text of the prompt. Rows of other types are
dialogues."""
FASTER = frozenset({"cut_cross_entropy", "kernels", "liger"})
"""Plugins that change no result."""
USUAL_COLUMNS = ("messages", "conversations")


def is_axolotl(given: Mapping[str, Any]) -> bool:
    own = {"datasets", "pretraining_dataset", "sequence_len", "micro_batch_size"}
    return "base_model" in given and bool(own & set(given))


def convert(run: Conversion, processes: int) -> None:
    """Fills in the conversion. Raises UserError for a training or an adapter that is none of ours."""
    _take_method(run)
    _take_plugins(run)
    processes = run.take("ray_num_workers", processes)
    batch = run.take("micro_batch_size", 1), run.take("gradient_accumulation_steps", 1)
    run.take("batch_size")
    run.take_batch(*batch, processes)
    target = run.take("lora_target_modules")
    if run.take("lora_target_linear") is True or target in ("all-linear", None):
        run.put("lora_target_modules", "all-linear")
    else:
        run.put("lora_target_modules", target)
    for theirs, ours in (("lora_modules_to_save", "modules_to_save"), ("tokens", "new_tokens")):
        if run.take(theirs):
            run.put(ours, run.take(theirs))
    if run.take("peft_layers_to_transform"):
        run.put("lora_layers", ",".join(map(str, run.take("peft_layers_to_transform"))))
    take_optimizer(run, "optimizer")
    take_schedule(run, "lr_scheduler")
    take_warmup(run)
    if "warmup_steps" not in run.given and "warmup_ratio" not in run.given:
        run.put("warmup_ratio", 0.03, tr("the default of {tool}, which takes at most 100 steps", tool=TOOL))
    take_dtype(run)
    checkpointing = run.take("gradient_checkpointing")
    if checkpointing:
        run.put("gradient_checkpointing", True)
        if checkpointing is not True:
            run.no_use(
                "gradient_checkpointing", tr("activations are recomputed, not moved to the CPU or the disk")
            )
    _take_data(run)
    with_packing(run, ("sample_packing",), run.given.get("sequence_len", 512))
    if run.given.get("excess_length_strategy", "drop") == "drop":
        run.remark(
            "sequence_len",
            tr("longer rows are left out there; here a prompt field is shortened, never the answer"),
        )
        run.used.discard("sequence_len")
    _take_intervals(run)
    take_best(
        run,
        has_validation=bool(run.given.get("val_set_size") or run.given.get("test_datasets")),
        stops_early=bool(run.given.get("early_stopping_patience")),
    )
    if any(run.take(key) for key in ("wandb_project", "use_wandb")):
        run.put("report_to", "wandb")
    for key in ("wandb_entity", "wandb_project", "wandb_mode"):
        run.no_use(key, tr("set WANDB_PROJECT, WANDB_ENTITY and WANDB_MODE in the environment"))
    run.finish(SAME, DEFAULTS)


def _take_method(run: Conversion) -> None:
    rl = run.take("rl")
    if rl is not None:
        if rl not in LOSSES:
            raise run.refuse("rl", tr("{rl} is not among the trainings here", rl=rl), TRAININGS)
        run.verb = "dpo"
        run.put("loss", LOSSES[rl])
        for key in ("orpo_alpha", "rl_beta"):  # the second wins
            if key in run.given:
                run.put("beta", run.take(key))
    if run.given.get("reward_model") or run.given.get("process_reward_model"):
        raise run.refuse("reward_model", tr("reward models are not trained here"), TRAININGS)
    adapter = run.take("adapter")
    if adapter is None:
        run.put("train", "full")
    elif adapter not in ("lora", "qlora"):
        raise run.refuse(
            "adapter",
            tr("{adapter} is not among the methods here", adapter=adapter),
            tr("write adapter: lora, or none"),
        )
    if run.take("load_in_4bit") is True:
        run.put("quantization", "nf4")
    elif run.take("load_in_8bit") is True:
        run.put("quantization", "int8")
    for key in ("load_in_4bit", "load_in_8bit"):
        run.take(key)
    tokens = run.take("special_tokens")
    if isinstance(tokens, dict) and set(tokens) <= {"pad_token"}:
        run.no_use("special_tokens", tr("there is no padding"))
    elif tokens:
        run.remark(
            "special_tokens", tr("the tokenizer keeps its own: an answer ends with its end of sequence")
        )


def _take_plugins(run: Conversion) -> None:
    plugins = run.given.get("plugins") or []
    names = {str(plugin).removeprefix("axolotl.integrations.").split(".")[0] for plugin in plugins}
    if "diffusion" in names or "diffusion" in run.given:
        key = "diffusion" if "diffusion" in run.given else "plugins"
        raise run.refuse(key, tr("diffusion models are not trained here"), TRAININGS)
    if names <= FASTER:
        run.no_use("plugins", tr("chosen when the model is loaded"))


def _take_intervals(run: Conversion) -> None:
    for key in ("evals_per_epoch", "saves_per_epoch"):
        if run.given.get(key) == 1:
            run.no_use(key, tr("the default here"))
        else:
            name = "eval_steps" if key.startswith("eval") else "save_steps"
            run.no_use(key, tr("write {name}, a number of steps; without it, once an epoch", name=name))
    for key in ("eval_steps", "save_steps"):
        if isinstance(run.given.get(key), int):
            run.put(key, run.take(key))
        else:
            run.no_use(key, tr("write a whole number of steps; without it, once an epoch"))


def _take_data(run: Conversion) -> None:
    entries: list[dict[str, Any]] = []
    for key in ("datasets", "pretraining_dataset"):
        given = run.take(key, [])
        if key == "pretraining_dataset" and isinstance(given, str):
            given = [{"path": given}]
        if not isinstance(given, list) or not all(isinstance(one, dict) and one.get("path") for one in given):
            raise run.refuse(
                key, tr("not a list of data sets with a path each"), tr("see Axolotl's own examples")
            )
        entries += [_entry(run, one, key) for one in given]
    if entries:
        run.put_data(entries)
    _take_validation(run)
    if run.take("dataset_exact_deduplication") is True:
        run.remark("dataset_exact_deduplication", tr("equal rows are counted by yeonma inspect, and trained"))
    run.remark(
        "chat_template", tr("the chat template of the model itself is used: compare with yeonma inspect")
    )
    run.remark(
        "chat_template_jinja",
        tr("the model's own chat template is used: put this one into its folder"),
    )


def _take_validation(run: Conversion) -> None:
    """`test_datasets`, if it has one set of the form of the training rows."""
    held_out, trained = (run.given.get(key) for key in ("test_datasets", "datasets"))
    sets = [*held_out, *trained] if isinstance(held_out, list) and isinstance(trained, list) else []
    one = sets[0] if len(sets) == 2 and len(held_out or ()) == 1 else {}
    if not one.get("path") or one.get("name") or one.get("type") != sets[1].get("type"):
        run.remark("test_datasets", tr("write val_data_path, or val_path in an entry of data_path"))
        return
    run.take("test_datasets")
    run.put("val_data_path", one["path"])
    if one.get("split") not in (None, "train"):
        run.put("val_split", one["split"])


def _entry(run: Conversion, given: Mapping[str, Any], key: str) -> dict[str, Any]:
    """One of the data sets of a key as an entry of data_path."""
    entry: dict[str, Any] = {
        "path": f"{given['path']}:{given['name']}" if given.get("name") else given["path"]
    }
    for part in ("split", "revision"):
        if given.get(part) not in (None, "train", "main"):
            entry[part] = given[part]
    template, columns = _template_of(run, given, key)
    entry |= {"template": template} if template else {}
    if not template:
        run.remark(key, tr("{path}: write a template file for its type", path=given["path"]))
    entry |= columns_to_map(columns)
    usual = {"roles", "message_property_mappings", "field", "text_column", *PARTS, *MESSAGES}
    others = sorted(part for part, value in given.items() if part not in usual and value is not None)
    if others:
        run.remark(
            key,
            tr("{path}: no counterpart for {keys}", path=given["path"], keys=", ".join(map(str, others))),
        )
    return entry


def _template_of(run: Conversion, given: Mapping[str, Any], key: str) -> tuple[str, dict[str, str]]:
    """The template for the type of a data set, empty for a type without one here; and field -> column."""
    kind = given.get("type")
    word, _, strategy = kind.partition(".") if isinstance(kind, str) else ("", "", "")
    columns: dict[str, str] = {
        ours: given[theirs] for theirs, ours in MESSAGES.items() if isinstance(given.get(theirs), str)
    }
    if word == "completion" or key == "pretraining_dataset":
        return "text", columns | {"text": given.get("text_column") or given.get("field") or "text"}
    if word == "alpaca":
        return "alpaca", columns
    if word not in ("chat_template", "sharegpt", "chatml", "llama3"):
        return "", columns
    if run.verb == "dpo" and word in ("chatml", "llama3"):
        is_kto = run.settings["loss"] == "kto"
        prompt = PROMPT_COLUMNS["kto" if is_kto else "dpo"].get(strategy or "default")
        if prompt is not None:
            turns = f"[user]\n{{{prompt}}}\n[assistant]\n{{{'completion' if is_kto else 'answer'}}}\n"
            return f"[system]\n{{system}}\n{turns}---\n{turns}", columns
        if is_kto:
            return (
                ("chat", columns | {"messages": "completion"})
                if strategy == "argilla_chat"
                else ("", columns)
            )
    if columns.get("messages") in USUAL_COLUMNS:
        del columns["messages"]
    return "chat", columns
