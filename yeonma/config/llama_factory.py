"""LLaMA-Factory's YAML files as settings of a run. Names and defaults are those of its argument classes (August 2026),
its batch size, epochs and learning rate those of transformers' TrainingArguments."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from yeonma.config.conversion import (
    TRAININGS,
    Conversion,
    Remark,
    columns_to_map,
    take_best,
    take_dtype,
    take_optimizer,
    take_schedule,
    take_warmup,
    with_packing,
)
from yeonma.errors import UserError, system_reason
from yeonma.files import user_path
from yeonma.messages import tr

TOOL = "LLaMA-Factory"
SAME = (
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "cutoff_len",
    "group_by_length",
    "learning_rate",
    "logging_steps",
    "lora_alpha",
    "lora_dropout",
    "max_grad_norm",
    "max_steps",
    "model_revision",
    "output_dir",
    "run_name",
    "save_steps",
    "save_total_limit",
    "seed",
    "simpo_gamma",
    "trust_remote_code",
    "use_dora",
    "use_rslora",
    "warmup_ratio",
    "weight_decay",
)
DEFAULTS: Mapping[str, object] = {"learning_rate": 5e-5, "lora_r": 8, "num_epochs": 3, "cutoff_len": 2048}
STAGES = {"pt": "sft", "sft": "sft", "dpo": "dpo", "kto": "dpo"}
LOSSES = ("sigmoid", "hinge", "ipo", "orpo", "simpo")
BITS = {4: "nf4", 8: "int8"}
ROLES = {
    "role_tag": ("role", "from"),
    "content_tag": ("content", "value"),
    "user_tag": ("user", "human"),
    "assistant_tag": ("assistant", "gpt"),
    "observation_tag": ("observation", "tool"),
    "function_tag": ("function_call", "function"),
    "system_tag": ("system",),
}
"""The words for turns that rows may use without saying so."""
WITH_ROWS = ("images", "videos", "audios")


def is_llama_factory(given: Mapping[str, Any]) -> bool:
    return "model_name_or_path" in given and bool({"stage", "finetuning_type"} & set(given))


def convert(run: Conversion, dataset_dir: str | None, processes: int) -> None:
    """Fills in the conversion. Raises UserError for a stage or method that is none of ours, and for a damaged
    dataset_info.json."""
    stage = run.take("stage", "sft")
    if stage not in STAGES:
        raise run.refuse("stage", tr("{stage} is not among the trainings here", stage=stage), TRAININGS)
    method = run.take("finetuning_type", "lora")
    if method not in ("lora", "full"):
        raise run.refuse(
            "finetuning_type",
            tr("{method} is not among the methods here", method=method),
            tr("write lora or full"),
        )
    if method == "full":
        run.put("train", "full")
    run.verb = STAGES[stage]
    run.take("do_train")
    _take_model(run)
    batch = run.take("per_device_train_batch_size", 8), run.take("gradient_accumulation_steps", 1)
    run.take_batch(*batch, processes)
    if run.take("lora_alpha") is None:
        run.put(
            "lora_alpha", 2 * run.given.get("lora_rank", 8), tr("twice the rank, as in {tool}", tool=TOOL)
        )
    else:
        run.put("lora_alpha", run.take("lora_alpha"))
    target = run.take("lora_target", "all")
    run.put("lora_target_modules", "all-linear" if target == "all" else _names(target))
    for theirs, ours in (("additional_target", "modules_to_save"), ("add_tokens", "new_tokens")):
        if run.take(theirs):
            run.put(ours, _names(run.take(theirs)))
    run.remark("add_special_tokens", tr("name them in new_tokens, whose rows alone are trained"))
    take_optimizer(run, "optim")
    take_schedule(run, "lr_scheduler_type")
    take_warmup(run)
    take_dtype(run)
    if not run.take("disable_gradient_checkpointing", False):
        run.put("gradient_checkpointing", "auto", tr("on in {tool}; changes no number", tool=TOOL))
    if run.verb == "dpo":
        _take_preferences(run, stage)
    _take_data(run, stage, dataset_dir)
    with_packing(run, ("packing", "neat_packing"), run.given.get("cutoff_len", 2048))
    if stage == "pt" and run.given.get("packing") is None:
        why = tr("{tool} packs whole texts by default: a step has packs, and here texts", tool=TOOL)
        run.different.append(Remark("packing", tr("not given"), why))
    _take_trackers(run)
    _take_intervals(run)
    take_best(run, has_validation=bool(run.given.get("val_size") or run.given.get("eval_dataset")))
    run.remark(
        "cutoff_len",
        tr(
            "longer rows lose text of prompt and answer there; here a prompt field is shortened, never the answer"
        ),
    )
    run.used.discard("cutoff_len")
    if run.take("use_dft_loss") is True:
        run.put("token_loss", "dft")
    run.finish(SAME, DEFAULTS)


def _take_model(run: Conversion) -> None:
    bits = run.take("quantization_bit")
    if bits in BITS and run.take("quantization_method", "bnb") in ("bnb", "bitsandbytes"):
        run.put("quantization", BITS[bits])
        if run.take("quantization_type", "nf4") != "nf4":
            run.remark("quantization_type", tr("4 bits are nf4 here"))
        if run.take("double_quantization", True) is not True:
            run.remark("double_quantization", tr("nf4 always has double quantisation"))
    else:
        for key in ("quantization_bit", "quantization_method"):
            run.remark(key, tr("quantization is none, int8, nf4 or fp8"))
    adapter = run.take("adapter_name_or_path")
    if adapter:
        run.put("adapter", adapter)
    for key in ("freeze_vision_tower", "freeze_multi_modal_projector"):
        if run.take(key, True) is True:
            run.no_use(key, tr("vision towers are not adapted unless lora_target_modules names them"))
        else:
            run.remark(key, tr("name the layers in lora_target_modules"))


def _names(given: object) -> list[str]:
    """The names in a list, or in a text with commas between them."""
    return [str(name).strip() for name in (given if isinstance(given, list) else str(given).split(","))]


def _take_preferences(run: Conversion, stage: str) -> None:
    loss = "kto" if stage == "kto" else run.take("pref_loss", "sigmoid")
    run.take("pref_loss")
    if loss != "kto" and loss not in LOSSES:
        raise run.refuse(
            "pref_loss",
            tr("{loss} is not among the losses here", loss=loss),
            tr("yeonma dpo --help lists them"),
        )
    run.put("loss", loss)
    for theirs, ours in (
        ("pref_ftx", "sft_weight"),
        ("dpo_label_smoothing", "label_smoothing"),
        ("kto_chosen_weight", "kto_desirable_weight"),
        ("kto_rejected_weight", "kto_undesirable_weight"),
    ):
        value = run.take(theirs)
        if value:
            run.put(ours, value)
    if loss != "simpo":
        run.no_use("simpo_gamma", tr("of simpo alone"))


def _take_trackers(run: Conversion) -> None:
    names = run.take("report_to", "none")
    known = ("tensorboard", "wandb", "trackio", "mlflow")
    names = [name for name in (names if isinstance(names, list) else [names]) if name not in ("none", "all")]
    run.put("report_to", [name for name in names if name in known] or "none")
    if set(names) - set(known):
        run.remark("report_to", tr("trackers are {known}", known=", ".join(known)))


def _take_intervals(run: Conversion) -> None:
    for key, why in (
        ("eval_strategy", tr("without steps of its own, a run is evaluated after every epoch")),
        ("save_strategy", tr("without steps of its own, a run is saved after every epoch")),
        ("logging_strategy", tr("without steps of its own, a run is logged after every epoch")),
    ):
        if run.take(key) in ("epoch", "no", "steps", None):
            run.no_use(key, why)
    if isinstance(run.given.get("eval_steps"), int):
        run.put("eval_steps", run.take("eval_steps"))


# -------------------------------------------------------------------------------- data


def _take_data(run: Conversion, stage: str, dataset_dir: str | None) -> None:
    """data_path and what belongs to it; without a dataset_info.json, the names stay to be written."""
    folder = dataset_dir or run.take("dataset_dir", "data")
    run.take("dataset_dir")
    info = _dataset_info(folder)
    sets = _data_sets(run, "dataset", stage, folder, info)
    validation = _data_sets(run, "eval_dataset", stage, folder, info)
    if sets is not None:
        _put_data(run, sets)
    if validation is not None and len(validation) == 1 and sets is not None and len(sets) == 1:
        run.put("val_data_path", validation[0]["path"])
    elif "eval_dataset" in run.given:
        run.remark("eval_dataset", tr("write val_data_path, or val_path in an entry of data_path"))
    if run.take("val_size"):
        run.put("val_set_size", run.take("val_size"))
    if run.take("mask_history") is True:
        run.put("train_on", "last")
    if run.take("enable_thinking") is False:
        run.put("chat_template_kwargs", {"enable_thinking": False})
    run.remark("template", tr("the chat template of the model itself is used: compare with yeonma inspect"))
    run.remark("default_system", tr("write a system turn into the rows, or a template file"))
    run.remark("tool_format", tr("tools are written by the chat template of the model itself"))
    for key in WITH_ROWS:
        for ending in ("max_pixels", "min_pixels", "maxlen", "fps"):
            run.no_use(f"{key[:-1]}_{ending}", tr("only text is trained"))


def _put_data(run: Conversion, sets: Sequence[dict[str, Any]]) -> None:
    probabilities = run.take("interleave_probs")
    strategy = run.take("mix_strategy", "concat")
    if probabilities is not None and strategy != "concat":
        parts = map(float, _names(probabilities))
        sets = [{**entry, "weight": part} for entry, part in zip(sets, parts, strict=False)]
        run.remark(
            "mix_strategy",
            tr("every step has these shares; an epoch has as many rows as all sets together"),
        )
    run.put_data(sets)


def _dataset_info(folder: str) -> Mapping[str, Any] | None:
    """The content of the folder's dataset_info.json, or None without one."""
    path = user_path(folder) / "dataset_info.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(tr("cannot be read: {error}", error=system_reason(error)), place=str(path)) from None
    if not isinstance(content, dict):
        raise UserError(tr("not an object with the names of data sets"), place=str(path))
    return content


def _data_sets(
    run: Conversion, key: str, stage: str, folder: str, info: Mapping[str, Any] | None
) -> list[dict[str, Any]] | None:
    """The entries of data_path for the names in `key`; None if some are not known."""
    given = run.given.get(key)
    if given is None:
        return None
    names = _names(given)
    if info is None:
        run.remark(
            key,
            tr(
                "names of {folder}/dataset_info.json, which is not there: give --dataset_dir, or write "
                "data_path",
                folder=folder,
            ),
        )
        return None
    unknown = [name for name in names if not isinstance(info.get(name), dict)]
    if unknown:
        run.remark(
            key, tr("{unknown}: not in {folder}/dataset_info.json", unknown=", ".join(unknown), folder=folder)
        )
        return None
    run.take(key)
    entries = [_entry(run, key, info[name], name, stage, user_path(folder)) for name in names]
    return None if None in entries else [entry for entry in entries if entry is not None]


def _entry(
    run: Conversion, key: str, about: Mapping[str, Any], name: str, stage: str, folder: Path
) -> dict[str, Any] | None:
    path = about.get("hf_hub_url") or (about.get("file_name") and str(folder / str(about["file_name"])))
    if not path:
        run.remark(
            key, tr("{name} is neither a file nor on the hub of Hugging Face: write data_path", name=name)
        )
        return None
    entry: dict[str, Any] = {"path": f"{path}:{about['subset']}" if about.get("subset") else path}
    if about.get("split", "train") != "train":
        entry["split"] = about["split"]
    columns = {**about["columns"]} if isinstance(about.get("columns"), dict) else {}
    if any(columns.get(kind) for kind in WITH_ROWS):
        run.remark(key, tr("{name} has images, videos or sound: only text is trained", name=name))
    if about.get("num_samples"):
        run.remark(
            key,
            tr(
                "{name}: {num_samples} rows drawn at random there; here limit takes the first rows",
                name=name,
                num_samples=about["num_samples"],
            ),
        )
    for tag, word in (about.get("tags") or {}).items():
        if word not in ROLES.get(tag, (word,)):
            run.remark(
                key,
                tr(
                    "{name} calls turns {word} ({tag}): rename them in the rows, or write a template file",
                    name=name,
                    word=word,
                    tag=tag,
                ),
            )
    if stage == "pt":
        mapping = {"text": columns.get("prompt", "instruction")}
        entry["template"] = "text"
    elif about.get("formatting", "alpaca") == "alpaca":
        theirs = columns or {"prompt": "instruction", "query": "input", "response": "output"}
        ours = {"prompt": "instruction", "query": "input", "response": "output", "history": "history"}
        mapping = {field: theirs[key] for key, field in ours.items() if theirs.get(key)}
        entry["template"] = "alpaca-turns"
    else:
        mapping = {"messages": columns.get("messages", "conversations")}
        if mapping["messages"] in ("messages", "conversations"):
            mapping = {}
        entry["template"] = "chat"
    for theirs_name, ours_name in (
        ("system", "system"),
        ("tools", "tools"),
        ("chosen", "chosen"),
        ("rejected", "rejected"),
        ("kto_tag", "label"),
    ):
        if columns.get(theirs_name):
            mapping[ours_name] = columns[theirs_name]
    return {**entry, **columns_to_map(mapping)}
