"""A run from settings to the adapter folder: everything that can be wrong is found first, then weights are loaded."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from transformers import get_scheduler

from yeonma.configure import group_of, to_yaml
from yeonma.errors import UserError
from yeonma.model import adapter as adapters
from yeonma.model import load
from yeonma.model.check import check_forward
from yeonma.model.forward import Forward
from yeonma.model.lora import speed_up
from yeonma.settings import (
    DataSettings,
    EvaluationSettings,
    LoraSettings,
    ModelSettings,
    RunSettings,
    StepSettings,
    TokenSettings,
)
from yeonma.tokens.dataset import Dataset, prepare_dataset
from yeonma.tokens.plan import Plan, make_plan
from yeonma.train import folder
from yeonma.train.card import write_card
from yeonma.train.checkpoint import RunState, checkpoint_path, read_tensors, restore_optimizer
from yeonma.train.distributed import Processes, processes, wait
from yeonma.train.loop import MicroBatching, Rhythm, Tuning, Watch, restore_random, run_steps
from yeonma.train.objectives import sft_loss
from yeonma.train.progress import EvaluationRecord, Progress, StepRecord
from yeonma.train.tracking import check_trackers, open_metrics, open_trackers, plot_loss, tracked

BY_METRIC = ("reduce_lr_on_plateau", "greedy")  # schedules that follow the validation loss


def run_sft(settings: Mapping[type, object]) -> Path:
    """Supervised fine-tuning. Returns the output folder. Raises UserError for what the user can mend."""
    model_settings, run = group_of(settings, ModelSettings), group_of(settings, RunSettings)
    output = Path(run.output_dir).expanduser()
    check_trackers(run.report_to)
    source = load.find_base(
        model_settings.base_model, model_settings.model_revision, model_settings.trust_remote_code
    )
    folder.check_writable(output, source.name)
    device = load.pick_device(model_settings.device)
    with processes(device) as group:
        console = Console(stderr=False, quiet=not group.first, soft_wrap=True)
        say = partial(console.out, highlight=False)
        prepared = _prepare(settings, source, say)
        start = folder.find_start(output, prepared.identity, run.resume_from_checkpoint, run.overwrite, say)
        if start.finished:
            say(f"{output} holds this run, finished; --overwrite true would do it anew")
            return output
        wait(group)  # nobody writes before everybody has looked
        if group.first:
            settings_yaml = to_yaml(*settings.values())
            folder.begin(output, prepared.identity, settings_yaml, fresh=start.checkpoint is None)
        _train(settings, source, device, group, console, prepared, start, output)
        wait(group)
    return output


@dataclass(frozen=True)
class Prepared:
    tokenizer: Any
    dataset: Dataset
    plan: Plan
    adapter: str | None  # an adapter folder to continue
    identity: dict[str, Any]


def _prepare(settings: Mapping[type, object], source: load.BaseSource, say: Callable[[str], None]) -> Prepared:
    """Tokenizer, data and plan; everything the user may have to mend comes up here, before weights are loaded."""
    model, step = group_of(settings, ModelSettings), group_of(settings, StepSettings)
    evaluation = group_of(settings, EvaluationSettings)
    load.pick_dtype(model.dtype, load.pick_device(model.device))
    config, tokenizer = load.load_config(source), load.load_tokenizer(source)
    load.check_vocabulary(tokenizer, config.get_text_config().vocab_size, source.name)
    continued = model.adapter or source.adapter
    if continued is not None:
        adapters.read_adapter_folder(continued)

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
            raise UserError("it follows the validation loss", place=name, cure="give val_set_size or val_data_path")
    lengths = dataset.train.store.lengths[dataset.train.positions]
    plan = make_plan(
        dataset.train.positions,
        lengths,
        batch_size=step.batch_size,
        seed=step.seed,
        num_epochs=step.num_epochs,
        max_steps=step.max_steps,
        group_by_length=step.group_by_length,
    )
    return Prepared(tokenizer, dataset, plan, continued, _identity(settings, source, dataset, plan, continued))


def _identity(
    settings: Mapping[type, object],
    source: load.BaseSource,
    dataset: Dataset,
    plan: Plan,
    continued: str | None,
) -> dict[str, Any]:
    """What the result depends on: the rows, their tokens, the base, and the settings that are mathematics."""
    model, step = group_of(settings, ModelSettings), group_of(settings, StepSettings)
    evaluation = group_of(settings, EvaluationSettings)
    speed = ("micro_batch_size", "micro_batch_tokens", "share_prefix", "num_epochs", "max_steps")
    validation = dataset.validation
    return {
        "objective": "sft",
        "base_model": source.name,
        "model_revision": source.revision,
        "adapter": continued,
        "dtype": model.dtype,
        "train_tokens": dataset.train.store.key,
        "train_rows": hashlib.sha256(np.ascontiguousarray(dataset.train.positions)).hexdigest(),
        "validation_tokens": validation.store.key if validation else None,
        "steps": plan.total_steps,
        **asdict(group_of(settings, LoraSettings)),
        **{name: value for name, value in asdict(step).items() if name not in speed},
        **{name: value for name, value in asdict(evaluation).items() if name != "card_rows"},
    }


def _train(
    settings: Mapping[type, object],
    source: load.BaseSource,
    device: torch.device,
    group: Processes,
    console: Console,
    prepared: Prepared,
    start: folder.Start,
    output: Path,
) -> None:
    step, run = group_of(settings, StepSettings), group_of(settings, RunSettings)
    evaluation = group_of(settings, EvaluationSettings)
    say = partial(console.out, highlight=False)
    peft_model, how, details = _load_model(settings, source, device, prepared, say)
    tuning = _tuning(settings, peft_model, how, prepared.plan, group)

    def write_adapter(place: Path) -> None:
        adapters.write_adapter(place, peft_model, prepared.tokenizer, prepared.dataset.template, details)

    state = start.state or RunState(0, tuning.scheduler.state_dict(), None, None, 0, prepared.identity)
    if start.checkpoint is not None and start.state is not None:
        _restore(tuning, peft_model, start.checkpoint, start.state)
        say(f"continuing after step {state.step} of {prepared.plan.total_steps}, from {start.checkpoint}")
    else:
        torch.manual_seed(step.seed + 1000 * (group.rank + 1))  # dropout: its own numbers in every process
    rhythm = Rhythm(
        eval_steps=evaluation.eval_steps or prepared.plan.steps_per_epoch,
        save_steps=run.save_steps or prepared.plan.steps_per_epoch,
        save_total_limit=run.save_total_limit,
        patience=evaluation.early_stopping_patience,
        threshold=evaluation.early_stopping_threshold,
    )
    validation = prepared.dataset.validation
    held_out = (validation.store, validation.positions) if validation else None
    arguments = (tuning, prepared.plan, prepared.dataset.train.store, held_out, rhythm, state, output, write_adapter)
    if not group.first:
        silent = Watch(lambda _: None, lambda _: None, lambda: None, lambda _: None)
        state = run_steps(*arguments, silent)
    else:
        state = _watched(settings, arguments, console, prepared.plan, state, output)
    if evaluation.keep_best and state.best_step is not None and state.best_step != state.step:
        say(f"the adapter of step {state.best_step} had the lowest validation loss ({state.best_loss:.4f}) and is kept")
        load_weights(peft_model, checkpoint_path(output, state.best_step))
    if group.first:
        folder.install(output, write_adapter)
        plot_loss(output / "metrics.jsonl", output / "loss.png")
        asked = validation or prepared.dataset.train
        command = f"yeonma sft --config settings.yaml   # the settings below\n\n{to_yaml(*settings.values())}"
        write_card(
            output, peft_model, how, prepared.tokenizer, prepared.dataset, asked, command, evaluation.card_rows
        )
        folder.mark(output, prepared.identity, finished=True)
        say(f"the adapter is in {output}")


def _load_model(
    settings: Mapping[type, object],
    source: load.BaseSource,
    device: torch.device,
    prepared: Prepared,
    say: Callable[[str], None],
) -> tuple[Any, Forward, dict[str, Any]]:
    """The base with its adapter on top, ready to train; how to get log-probabilities; and yeonma.json's contents."""
    model_settings, lora = group_of(settings, ModelSettings), group_of(settings, LoraSettings)
    base = load.load_base(source, device, load.pick_dtype(model_settings.dtype, device))
    identity = adapters.base_identity(base, source)
    how = check_forward(base)
    if how.why_not:
        say(f"one sequence at a time, because {how.why_not}")
    if prepared.adapter is not None:
        adapters.check_base(adapters.read_adapter_folder(prepared.adapter), identity)
        peft_model = load.load_adapter(base, prepared.adapter, trainable=True)
    else:
        shape = load.LoraShape(
            lora.lora_r,
            lora.lora_alpha,
            lora.lora_dropout,
            lora.lora_target_modules,
            lora.use_rslora,
            lora.use_dora,
        )
        peft_model = load.add_lora(base, shape, group_of(settings, StepSettings).seed)
    if model_settings.gradient_checkpointing:
        base.gradient_checkpointing_enable({"use_reentrant": False})
    speed_up(base)
    trained = sum(parameter.numel() for parameter in peft_model.parameters() if parameter.requires_grad)
    say(f"{source.name}: {trained:,} parameters trained, {identity.parameters:,} frozen, {base.dtype} on {device}")
    dataset = prepared.dataset
    details = adapters.describe(
        identity,
        dataset.template,
        dataset.columns,
        dataset.rules,
        trust_remote_code=source.trust_remote_code,
        trained_on={
            "data": dataset.train.rows.name,
            "data_sha256": dataset.train.rows.identity,
            "examples": len(dataset.train.positions),
            "trained_tokens": dataset.train.trained_tokens,
            "left_out": dataset.train.store.counts.left_out,
            "shortened": dataset.train.store.counts.shortened,
        },
    )
    return peft_model, how, details


def _tuning(
    settings: Mapping[type, object], peft_model: Any, how: Forward, plan: Plan, group: Processes
) -> Tuning:
    step = group_of(settings, StepSettings)
    parameters = {name: each for name, each in peft_model.named_parameters() if each.requires_grad}
    optimizer = torch.optim.AdamW(
        parameters.values(),
        lr=step.learning_rate,
        betas=(step.adam_beta1, step.adam_beta2),
        eps=step.adam_epsilon,
        weight_decay=step.weight_decay,
        fused=True,
    )
    warmup = step.warmup_steps or math.ceil(step.warmup_ratio * plan.total_steps)
    try:
        scheduler = get_scheduler(step.lr_scheduler, optimizer, warmup, plan.total_steps, step.lr_scheduler_kwargs)
    except (TypeError, ValueError) as error:
        raise UserError(f"{step.lr_scheduler} does not take them ({error})", place="lr_scheduler_kwargs") from error
    return Tuning(
        model=peft_model.get_base_model(),
        how=how,
        parameters=parameters,
        optimizer=optimizer,
        scheduler=scheduler,
        by_metric=step.lr_scheduler in BY_METRIC,
        max_grad_norm=step.max_grad_norm,
        micro=MicroBatching(step.micro_batch_size, step.micro_batch_tokens, step.share_prefix),
        objective=sft_loss,
        group=group,
    )


def _restore(tuning: Tuning, peft_model: Any, checkpoint: Path, state: RunState) -> None:
    load_weights(peft_model, checkpoint)
    optimizer, random = read_tensors(checkpoint)
    restore_optimizer(tuning.optimizer, {each: name for name, each in tuning.parameters.items()}, optimizer)
    tuning.scheduler.load_state_dict(state.schedule)
    for group, rate in zip(tuning.optimizer.param_groups, tuning.scheduler.get_last_lr(), strict=True):
        group["lr"] = rate
    restore_random(random, tuning.group, tuning.model.device)


def load_weights(peft_model: Any, checkpoint: Path) -> None:
    """The adapter's weights of a checkpoint, into the adapter that is there."""
    from peft import load_peft_weights, set_peft_model_state_dict

    weights = load_peft_weights(str(checkpoint), device=str(peft_model.device))
    set_peft_model_state_dict(peft_model, weights)


def _watched(
    settings: Mapping[type, object],
    arguments: tuple[Any, ...],
    console: Console,
    plan: Plan,
    state: RunState,
    output: Path,
) -> RunState:
    """`run_steps` with progress, metrics.jsonl and trackers."""
    run = group_of(settings, RunSettings)
    flat = {name: value for group in settings.values() for name, value in vars(group).items()}
    with (
        open_metrics(output / "metrics.jsonl", state.step or None) as metrics,
        open_trackers(run.report_to, run.run_name, output, flat, state.step) as trackers,
        Progress(plan.total_steps, state.step, run.logging_steps, console) as progress,
    ):

        def step(record: StepRecord) -> None:
            metrics.write(record)
            progress.step(record)
            if record.step % run.logging_steps == 0:
                trackers.log(record.step, tracked(record))

        def evaluation(record: EvaluationRecord) -> None:
            metrics.write(record)
            progress.evaluation(record)
            trackers.log(record.step, tracked(record))

        return run_steps(*arguments, Watch(step, evaluation, metrics.sync, progress.say))
