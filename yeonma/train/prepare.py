"""What a run needs before weights are loaded: everything that the user may have to mend comes up here."""

from __future__ import annotations

import hashlib
import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from yeonma.adapter import adapter_folder as adapters
from yeonma.batch.plan import Plan, make_plan
from yeonma.config.settings import (
    LoraSettings,
    Optimizer,
    PreferenceSettings,
    Quantization,
    RunConfig,
    StepSettings,
    TokenSettings,
)
from yeonma.errors import Log, Problem, UserError
from yeonma.model import load
from yeonma.model.quantized import check_layers
from yeonma.tokenization.cache import tokenizer_identity
from yeonma.tokenization.dataset import Dataset, prepare_dataset
from yeonma.train.losses import LOSSES, PreferenceOptions
from yeonma.train.preflight import task_of

TRIED_STEPS = 40
SURE = ("linear", "cosine", "constant")  # schedules that cannot fail without arguments
BY_METRIC = ("reduce_lr_on_plateau", "greedy")  # schedules that follow the validation loss


@dataclass(frozen=True)
class Prepared:
    """All that a run needs but the weights."""

    config: Any  # the base model's
    tokenizer: Any
    dataset: Dataset
    plan: Plan
    adapter: str | None  # an adapter folder to continue
    identity: dict[str, Any]
    trained_parameters: int | None = None
    """None where it is not known before the weights are loaded."""


def prepare(
    config: RunConfig,
    source: load.BaseSource,
    continued: str | None,
    say: Log,
    *,
    try_adapter: bool = True,
) -> Prepared:
    """Tokenizer, data and plan; everything the user may have to mend comes up here, before weights are loaded.

    Without `try_adapter` the adapter's layers are left to `check_adapter`, which takes seconds.
    """
    model, step = config.model, config.step
    evaluation = config.evaluation
    device = load.pick_device(model.device)
    load.pick_dtype(model.dtype, device)
    _check_optimizer(step.optimizer, device)
    model_config, tokenizer = load.load_config(source), load.load_tokenizer(source)
    _check_not_quantised(model_config, model.quantization, source.name)
    load.check_vocabulary(tokenizer, model_config.get_text_config().vocab_size, source.name)
    trained = None
    if try_adapter:
        lora = config.lora
        trained = check_adapter(lora, model_config, source, continued, model.quantization)
    elif continued is not None:
        adapters.check_continued(continued, None)
    _check_schedule(step, say)
    preference = config.preference
    if preference is not None:
        _check_preference(preference, config.tokens)

    def progress(rows: int) -> None:
        say(f"tokenised {rows:,} rows")

    data, tokens = config.data, config.tokens
    dataset = prepare_dataset(data, tokens, tokenizer, step.seed, say, progress, task_of(config), continued)
    needs_validation = {
        "lr_scheduler": step.lr_scheduler in BY_METRIC,
        "early_stopping_patience": evaluation.early_stopping_patience is not None,
    }
    for name, needed in needs_validation.items():
        if needed and dataset.validation is None:
            raise UserError(
                "it follows the validation loss", place=name, cure="give val_set_size or val_data_path"
            )
    units = dataset.train.units
    plan = make_plan(
        units,
        dataset.train.store.unit_lengths[units],
        batch_size=step.batch_size,
        seed=step.seed,
        num_epochs=step.num_epochs,
        max_steps=step.max_steps,
        group_by_length=step.group_by_length,
    )
    _check_positions(model_config, dataset)
    identity = _identity(config, source, tokenizer, dataset, plan, continued)
    return Prepared(model_config, tokenizer, dataset, plan, continued, identity, trained)


def preference_options(preference: PreferenceSettings) -> PreferenceOptions:
    return PreferenceOptions(
        beta=preference.beta,
        label_smoothing=preference.label_smoothing,
        sft_weight=preference.sft_weight,
        simpo_gamma=preference.simpo_gamma,
        kto_desirable_weight=preference.kto_desirable_weight,
        kto_undesirable_weight=preference.kto_undesirable_weight,
    )


def _check_preference(preference: PreferenceSettings, tokens: TokenSettings) -> None:
    """Raises UserError for settings that have no part in learning from pairs, or none in the chosen loss."""
    given, unset = asdict(preference_options(preference)), asdict(PreferenceOptions())
    loss = preference.loss
    problems = [
        Problem(f"{loss} does not read it", name, f"leave it out, or choose another --loss than {loss}")
        for name, value in given.items()
        if value != unset[name] and name not in LOSSES[loss].options
    ]
    if tokens.train_on_inputs:
        what = "a prompt is the same for both answers: there is nothing to choose in it"
        problems.append(Problem(what, "train_on_inputs", "leave it out"))
    if problems:
        raise UserError(problems)


def lora_shape(lora: LoraSettings) -> load.LoraShape:
    """A fresh adapter's, from the settings."""
    return load.LoraShape(
        lora.lora_r,
        lora.lora_alpha,
        lora.lora_dropout,
        lora.lora_target_modules,
        lora.use_rslora,
        lora.use_dora,
    )


def check_adapter(
    lora: LoraSettings,
    config: Any,
    source: load.BaseSource,
    continued: str | None,
    quantization: Quantization,
) -> int | None:
    """Try the adapter on the model's outline: UserError for layers that it has not, and for another base's adapter.
    So for a model that has no layers to quantise.

    Returns how many parameters it trains; None where the model's code is its own, and there is no outline.
    """
    model = load.outline(config, source)
    if model is not None:
        check_layers(model, quantization, source.name)
    if continued is not None:
        adapters.check_continued(continued, model and adapters.base_identity(model, source))
        return adapters.stored_parameters(Path(continued))
    if model is None:
        return None
    adapted = load.add_lora(model, lora_shape(lora), seed=0)
    return sum(parameter.numel() for parameter in adapted.parameters() if parameter.requires_grad)


def _check_optimizer(optimizer: Optimizer, device: torch.device) -> None:
    if optimizer != "adamw" and device.type != "cuda":
        what = f"it runs on a CUDA device alone, and this is the {device.type.upper()}"
        raise UserError(what, place=f"optimizer {optimizer}", cure="use --optimizer adamw")


def _check_not_quantised(config: Any, quantization: Quantization, name: str) -> None:
    if quantization != "none" and getattr(config, "quantization_config", None) is not None:
        what = f"{name} is quantised already"
        raise UserError(
            what, place=f"quantization {quantization}", cure="leave it out, or give the whole model"
        )


def _check_positions(config: Any, dataset: Dataset) -> None:
    """Raises UserError for examples that are longer than what the model has positions for."""
    most = getattr(config.get_text_config(), "max_position_embeddings", None)
    parts = [part for part in (dataset.train, dataset.validation) if part is not None]
    longest = max(int(part.store.lengths.max()) for part in parts)
    if most is not None and longest > most:
        what = f"the longest example has {longest} tokens, and the model only {most} positions"
        raise UserError(what, place="cutoff_len", cure=f"use --cutoff_len {most}")


def _check_schedule(step: StepSettings, say: Log) -> None:
    """Try the schedule on nothing. Raises UserError for arguments that it does not take; says what plays no part."""
    if (step.warmup_steps or step.warmup_ratio) and step.lr_scheduler in ("constant", *BY_METRIC):
        say(f"{step.lr_scheduler} has no warm-up: warmup_steps and warmup_ratio have no effect")
    if step.lr_scheduler_kwargs and step.lr_scheduler in ("constant", "constant_with_warmup"):
        raise UserError(f"{step.lr_scheduler} takes none", place="lr_scheduler_kwargs")
    if step.lr_scheduler in SURE and not step.lr_scheduler_kwargs:
        return
    nothing = torch.optim.AdamW([torch.zeros(1, requires_grad=True)], lr=step.learning_rate)
    short = replace(step, warmup_steps=min(step.warmup_steps, 2), warmup_ratio=0.0)
    try:
        schedule = make_schedule(short, nothing, TRIED_STEPS)
        for number in range(TRIED_STEPS):  # some arguments are looked at late, or while the loss rises
            nothing.step()
            schedule.step(*([float(number)] if step.lr_scheduler in BY_METRIC else []))
            if not all(math.isfinite(rate) for rate in schedule.get_last_lr()):
                raise ValueError("the learning rate would be infinite")
    except (TypeError, ValueError, LookupError, ArithmeticError) as error:
        raise UserError(
            f"{step.lr_scheduler} does not take them ({error})", place="lr_scheduler_kwargs"
        ) from error


def make_schedule(step: StepSettings, optimizer: torch.optim.Optimizer, total_steps: int) -> Any:
    from transformers import get_scheduler  # brings PEFT and much else: seconds

    warmup = step.warmup_steps or math.ceil(step.warmup_ratio * total_steps)
    return get_scheduler(step.lr_scheduler, optimizer, warmup, total_steps, step.lr_scheduler_kwargs)


def _identity(
    config: RunConfig,
    source: load.BaseSource,
    tokenizer: Any,
    dataset: Dataset,
    plan: Plan,
    continued: str | None,
) -> dict[str, Any]:
    """What the result depends on: the rows, their tokens, the base, and the settings that are mathematics."""
    model, step = config.model, config.step
    tokens, evaluation = config.tokens, config.evaluation
    speed = ("micro_batch_size", "micro_batch_tokens", "share_prefix", "num_epochs", "max_steps")
    held_out = dataset.validation.rows if dataset.validation else None
    weights = Path(continued) / adapters.WEIGHTS if continued else None
    preference = config.preference
    return {
        "objective": "sft" if preference is None else "dpo",
        "base_model": source.name,
        "model_revision": source.revision,
        "dtype": model.dtype,
        "quantization": model.quantization,
        "content of data_path": dataset.train.rows.identity,
        "content of the validation rows": held_out.identity if held_out else None,
        "content of the template": hashlib.sha256(dataset.template.text.encode()).hexdigest(),
        "content of the tokenizer": tokenizer_identity(tokenizer),
        "content of the adapter continued": hashlib.sha256(weights.read_bytes()).hexdigest()
        if weights
        else None,
        "columns": dataset.columns,
        "val_set_size": config.data.val_set_size,
        "steps": plan.total_steps,
        **{name: value for name, value in asdict(tokens).items() if name != "cache_dir"},
        **asdict(config.lora),
        **(asdict(preference) if preference else {}),
        **{name: value for name, value in asdict(step).items() if name not in speed},
        **{name: value for name, value in asdict(evaluation).items() if name != "card_rows"},
    }
