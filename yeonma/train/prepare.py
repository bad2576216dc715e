"""What a run needs before weights are loaded: everything that the user may have to mend comes up here."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import get_scheduler

from yeonma.configure import group_of
from yeonma.errors import UserError
from yeonma.model import adapter as adapters
from yeonma.model import load
from yeonma.paths import user_path
from yeonma.settings import (
    DataSettings,
    EvaluationSettings,
    LoraSettings,
    ModelSettings,
    StepSettings,
    TokenSettings,
)
from yeonma.tokens.cache import tokenizer_identity
from yeonma.tokens.dataset import Dataset, prepare_dataset
from yeonma.tokens.plan import Plan, make_plan

TRIED_STEPS = 40
BY_METRIC = ("reduce_lr_on_plateau", "greedy")  # schedules that follow the validation loss


@dataclass(frozen=True)
class Prepared:
    """All that a run needs but the weights."""

    tokenizer: Any
    dataset: Dataset
    plan: Plan
    adapter: str | None  # an adapter folder to continue
    identity: dict[str, Any]


def continued_adapter(model: ModelSettings, source: load.BaseSource) -> str | None:
    """The adapter folder to continue, if any. Raises UserError where two are named."""
    if model.adapter is not None and source.adapter is not None:
        what = f"base_model {source.adapter} is an adapter too"
        raise UserError(what, place=f"adapter {model.adapter}", cure=f"give --base_model {source.name}")
    return str(user_path(model.adapter)) if model.adapter is not None else source.adapter


def prepare(
    settings: Mapping[type, object],
    source: load.BaseSource,
    continued: str | None,
    say: Callable[[str], None],
) -> Prepared:
    """Tokenizer, data and plan; everything the user may have to mend comes up here, before weights are loaded."""
    model, step = group_of(settings, ModelSettings), group_of(settings, StepSettings)
    evaluation = group_of(settings, EvaluationSettings)
    load.pick_dtype(model.dtype, load.pick_device(model.device))
    config, tokenizer = load.load_config(source), load.load_tokenizer(source)
    load.check_vocabulary(tokenizer, config.get_text_config().vocab_size, source.name)
    if continued is not None:
        adapters.read_adapter_folder(continued)
    _check_schedule(step, say)

    def progress(rows: int) -> None:
        say(f"tokenised {rows:,} rows")

    data, tokens = group_of(settings, DataSettings), group_of(settings, TokenSettings)
    dataset = prepare_dataset(data, tokens, tokenizer, step.seed, say, progress)
    needs_validation = {
        "lr_scheduler": step.lr_scheduler in BY_METRIC,
        "early_stopping_patience": evaluation.early_stopping_patience is not None,
    }
    for name, needed in needs_validation.items():
        if needed and dataset.validation is None:
            raise UserError(
                "it follows the validation loss", place=name, cure="give val_set_size or val_data_path"
            )
    plan = make_plan(
        dataset.train.positions,
        dataset.train.store.lengths[dataset.train.positions],
        batch_size=step.batch_size,
        seed=step.seed,
        num_epochs=step.num_epochs,
        max_steps=step.max_steps,
        group_by_length=step.group_by_length,
    )
    _check_positions(config, dataset)
    identity = _identity(settings, source, tokenizer, dataset, plan, continued)
    return Prepared(tokenizer, dataset, plan, continued, identity)


def _check_positions(config: Any, dataset: Dataset) -> None:
    """Raises UserError for examples that are longer than what the model has positions for."""
    most = getattr(config.get_text_config(), "max_position_embeddings", None)
    parts = [part for part in (dataset.train, dataset.validation) if part is not None]
    longest = max(int(part.store.lengths.max()) for part in parts)
    if most is not None and longest > most:
        what = f"the longest example has {longest} tokens, and the model only {most} positions"
        raise UserError(what, place="cutoff_len", cure=f"use --cutoff_len {most}")


def _check_schedule(step: StepSettings, say: Callable[[str], None]) -> None:
    """Try the schedule on nothing. Raises UserError for arguments that it does not take; says what plays no part."""
    if step.lr_scheduler_kwargs and step.lr_scheduler in ("constant", "constant_with_warmup"):
        raise UserError(f"{step.lr_scheduler} takes none", place="lr_scheduler_kwargs")
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
    if (step.warmup_steps or step.warmup_ratio) and step.lr_scheduler in ("constant", *BY_METRIC):
        say(f"{step.lr_scheduler} has no warm-up: warmup_steps and warmup_ratio play no part")


def make_schedule(step: StepSettings, optimizer: torch.optim.Optimizer, total_steps: int) -> Any:
    warmup = step.warmup_steps or math.ceil(step.warmup_ratio * total_steps)
    return get_scheduler(step.lr_scheduler, optimizer, warmup, total_steps, step.lr_scheduler_kwargs)


def _identity(
    settings: Mapping[type, object],
    source: load.BaseSource,
    tokenizer: Any,
    dataset: Dataset,
    plan: Plan,
    continued: str | None,
) -> dict[str, Any]:
    """What the result depends on: the rows, their tokens, the base, and the settings that are mathematics."""
    model, step = group_of(settings, ModelSettings), group_of(settings, StepSettings)
    tokens, evaluation = group_of(settings, TokenSettings), group_of(settings, EvaluationSettings)
    speed = ("micro_batch_size", "micro_batch_tokens", "share_prefix", "num_epochs", "max_steps")
    held_out = dataset.validation.rows if dataset.validation else None
    weights = Path(continued) / adapters.WEIGHTS if continued else None
    return {
        "objective": "sft",
        "base_model": source.name,
        "model_revision": source.revision,
        "dtype": model.dtype,
        "content of data_path": dataset.train.rows.identity,
        "content of the validation rows": held_out.identity if held_out else None,
        "content of the template": hashlib.sha256(dataset.template.text.encode()).hexdigest(),
        "content of the tokenizer": tokenizer_identity(tokenizer),
        "content of the adapter continued": hashlib.sha256(weights.read_bytes()).hexdigest()
        if weights
        else None,
        "columns": dataset.columns,
        "val_set_size": group_of(settings, DataSettings).val_set_size,
        "steps": plan.total_steps,
        **{name: value for name, value in asdict(tokens).items() if name != "cache_dir"},
        **asdict(group_of(settings, LoraSettings)),
        **{name: value for name, value in asdict(step).items() if name not in speed},
        **{name: value for name, value in asdict(evaluation).items() if name != "card_rows"},
    }
