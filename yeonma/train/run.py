"""A training run from its settings to the adapter folder."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from yeonma.adapter import adapter_folder as adapters
from yeonma.adapter.samples import Samples, take_samples
from yeonma.batch.batch import Batch
from yeonma.config.parse import settings_dict, to_yaml
from yeonma.config.settings import (
    RunConfig,
)
from yeonma.files import disk_errors_as_user_errors, user_path
from yeonma.model import load
from yeonma.model.sharding import broadcast_trained
from yeonma.run_folder import output_folder as folder
from yeonma.run_folder.checkpoint import AdapterWriter, RunProgress, checkpoint_path, read_tensors, recover
from yeonma.run_folder.environment import environment, moved, versions
from yeonma.run_folder.lock import hold
from yeonma.run_folder.progress import EvaluationRecord, Progress, StepRecord
from yeonma.run_folder.run_log import TRAINED_ROWS, open_metrics, open_trained_rows
from yeonma.run_folder.trackers import check_trackers, open_trackers, plot_loss, tracked
from yeonma.tokenization.chat_template_export import ExportedChatTemplate, export_chat_template
from yeonma.tokenization.dataset import Dataset, describe
from yeonma.tokenization.store import TokenStore
from yeonma.train.build import (
    LoadedModel,
    StoreExtras,
    build_objective,
    build_train_state,
    load_model,
    reference_extras,
    units_to_reference,
)
from yeonma.train.distributed import Processes, check_alike, process_group, rendezvous, wait
from yeonma.train.interrupt import REASONS, Stop, Stopped
from yeonma.train.loop import EvalSaveSchedule, RunCallbacks, restore_random, run_steps
from yeonma.train.memory_budget import one_by_one, resolve_auto, try_heaviest
from yeonma.train.model_card import ask_rows, write_card
from yeonma.train.optimizers import restore_optimizer
from yeonma.train.preflight import check_folders
from yeonma.train.prepare import Prepared, prepare
from yeonma.train.step import TrainState


def run_with_callbacks(
    config: RunConfig,
    steps: Callable[[RunCallbacks], RunProgress],
    console: Console,
    total_steps: int,
    start: RunProgress,
    output: Path,
) -> RunProgress:
    """Run `steps` from `start` on with rank 0's callbacks: logs, progress line and trackers."""
    run = config.run
    with (
        open_metrics(output / "metrics.jsonl", start.step or None, not start.evaluation_due) as metrics,
        open_trained_rows(output / TRAINED_ROWS, start.step) as trained_rows,
        open_trackers(run.report_to, run.run_name, output, settings_dict(config), start.step) as trackers,
        Progress(total_steps, start.step, run.logging_steps, console) as progress,
    ):

        def step(record: StepRecord, rows: list[int]) -> None:
            metrics.write(record)
            trained_rows.write(record.step, rows)
            progress.step(record)
            if record.step % run.logging_steps == 0:
                trackers.log(record.step, tracked(record))

        def evaluation(record: EvaluationRecord) -> None:
            metrics.write(record)
            progress.evaluation(record)
            trackers.log(record.step, tracked(record))

        def before_save() -> None:
            metrics.sync()
            trained_rows.sync()

        return steps(RunCallbacks(step, evaluation, before_save, progress.say))


SAVE_SECONDS_A_WEIGHT = 12 / 50e6
"""A guess for the time limit, until a save was seen: a weight with its two moments, at 50 MB/s."""


def run_training(config: RunConfig, stop: Stop) -> Path:
    """Supervised fine-tuning or, where there are PreferenceSettings, learning from pairs. Returns the output folder.

    Raises UserError for what the user can mend, and Stopped where `stop` ended the run before it was finished.
    """
    model_settings, run = config.model, config.run
    output = user_path(run.output_dir)
    check_trackers(run.report_to)
    source, continued = check_folders(model_settings, run)
    device = load.pick_device(model_settings.device)
    with rendezvous() as met, ExitStack() as contexts:
        stop.others = met.count > 1
        console = Console(stderr=False, quiet=met.rank != 0, soft_wrap=True)
        say = partial(console.out, highlight=False)
        prepared = prepare(config, source, continued, say)
        describe(prepared.dataset, say)
        group = contexts.enter_context(process_group(met, device))
        check_alike(group, _alike(config, prepared))
        if group.first:
            contexts.enter_context(disk_errors_as_user_errors(output, "the run's files"))
            contexts.enter_context(hold(output, say))
            recover(output)
        wait(group)  # nobody looks into a folder that another run may be writing
        start = folder.find_start(output, prepared.identity, run.resume_from_checkpoint, run.overwrite, say)
        if start.finished:
            say(f"{output} holds this run, finished; use --overwrite true to run it again")
            return output
        if group.first and prepared.trained_parameters is not None:
            schedule = checkpoint_schedule(config, prepared)
            folder.check_disk_space(output, start, schedule, prepared.trained_parameters, prepared.tokenizer)
        stop.check()
        by_tokens = config.step.micro_batch_tokens == "auto"
        earlier_tokens = _tokens_of(start.progress, group) if by_tokens else None
        chosen = resolve_auto(config, source, prepared, group, say, earlier_tokens=earlier_tokens)
        loaded = load_model(chosen, source, device, prepared, say, group)
        if by_tokens and not loaded.policy.support.forest:
            chosen = one_by_one(chosen)
        stop.check()
        by_tokens = by_tokens and loaded.policy.support.forest
        plan, objective = prepared.plan, build_objective(chosen)
        state = build_train_state(chosen, loaded, plan, objective, group, stop, by_tokens=by_tokens)
        if by_tokens and earlier_tokens is None:  # before the reference is computed, which may take hours
            try_heaviest(state, plan, prepared.dataset.train.store)
        extras = reference_extras(chosen, loaded, prepared, units_to_reference(prepared), group, say)
        stop.check()
        wait(group)  # nobody writes before everybody has looked, and nothing can be refused any more
        if group.first:
            folder.begin(output, prepared.identity, to_yaml(config), start)
        stopped = _train(config, loaded, state, extras, console, prepared, start, output)
        wait(group)  # torchrun ends all when one ends: nobody leaves before the first has saved
        if stopped is not None:
            raise Stopped(*stopped, told=True)
    return output


def _alike(config: RunConfig, prepared: Prepared) -> str:
    """What must be the same in all processes. Files may lie elsewhere on another machine; their content counts."""
    places = {"base_model", "adapter", "data_path", "val_data_path", "template", "output_dir", "cache_dir"}
    settings = {name: value for name, value in settings_dict(config).items() if name not in places}
    return json.dumps([prepared.identity, settings, versions()], sort_keys=True, default=str)


def checkpoint_schedule(config: RunConfig, prepared: Prepared) -> folder.CheckpointSchedule:
    run, plan = config.run, prepared.plan
    save_steps, keeps_best = run.save_steps or plan.steps_per_epoch, prepared.dataset.validation is not None
    return folder.CheckpointSchedule(plan.total_steps, save_steps, run.save_total_limit, keeps_best)


def _train(
    config: RunConfig,
    loaded: LoadedModel,
    state: TrainState,
    extras: StoreExtras,
    console: Console,
    prepared: Prepared,
    start: folder.Start,
    output: Path,
) -> tuple[str, int] | None:
    """None where the run is finished; else the message printed about its end, and the exit status."""
    run, evaluation = config.run, config.evaluation
    say, group, plan = partial(console.out, highlight=False), state.group, prepared.plan
    dataset, policy = prepared.dataset, loaded.policy

    samples = _samples(dataset, evaluation.card_rows) if group.first else None
    exported = (
        export_chat_template(dataset.template, prepared.tokenizer)
        if group.first
        else ExportedChatTemplate(None)
    )

    def write_adapter(place: Path) -> None:
        tokenizer, template = prepared.tokenizer, dataset.template
        adapters.write_adapter(place, policy.model, tokenizer, template, loaded.details, exported, samples)

    trained = sum(weight.numel() for weight in state.parameters.values())
    adapter = AdapterWriter(
        write_adapter, folder.adapter_bytes(trained, prepared.tokenizer) if group.first else 0
    )
    # dropout: its own numbers in every process
    torch.manual_seed(config.step.seed + 1000 * (group.rank + 1))
    here = {
        **environment(group.count, state.model.device),
        "kernels": "compiled" if policy.kernels.is_compiled else "plain",
    }
    progress = start.progress or RunProgress(
        0, state.scheduler.state_dict(), None, None, 0, prepared.identity
    )
    if start.checkpoint is not None and start.progress is not None:
        _restore(state, policy.model, start.checkpoint, start.progress)
        say(f"continuing after step {progress.step} of {plan.total_steps}, from {start.checkpoint}")
        if size := _size_in_checkpoint(progress, state):
            state.limit.restore(size)
        if line := moved(progress.surroundings, here, config.lora.lora_dropout > 0):
            say(line)
    progress = replace(progress, surroundings=here)
    schedule = EvalSaveSchedule(
        eval_steps=evaluation.eval_steps or plan.steps_per_epoch,
        save_steps=run.save_steps or plan.steps_per_epoch,
        save_total_limit=run.save_total_limit,
        patience=evaluation.early_stopping_patience,
        threshold=evaluation.early_stopping_threshold,
    )

    def batch_of(units: np.ndarray, store: TokenStore = dataset.train.store) -> Batch:
        return Batch.from_store(store, units, extras.get(store.key))

    held_out = dataset.validation
    validation = None if held_out is None else batch_of(held_out.units, held_out.store)
    steps = partial(run_steps, state, plan, batch_of, validation, schedule, progress, output, adapter)
    stop = state.stop
    stop.took(save=trained * SAVE_SECONDS_A_WEIGHT)
    with stop.between_steps():
        if group.first:
            progress = run_with_callbacks(config, steps, console, plan.total_steps, progress, output)
        else:
            progress = steps(RunCallbacks(lambda *_: None, lambda _: None, lambda: None, lambda _: None))
    if stop.agreed:
        ending = _stopped_after(stop.agreed, progress.step, plan.total_steps, output)
        console.out(ending, highlight=False)
        sys.stdout.flush()
        return ending, stop.agreed
    stop.check()
    if not group.first:
        if state.sharded and evaluation.card_rows:  # no process can ask the model alone
            broadcast_trained(state.model)
            part = dataset.validation or dataset.train
            ask_rows(policy, prepared.tokenizer, dataset, part, evaluation.card_rows)
        return None
    best_step = (
        progress.step if progress.best_step is None or not evaluation.keep_best else progress.best_step
    )
    if best_step != progress.step:
        say(
            f"the adapter of step {best_step} had the lowest validation loss ({progress.best_loss:.4f}) and is kept"
        )
        load_weights(policy.model, checkpoint_path(output, best_step))
    folder.install(output, adapter)
    stop.check()
    if evaluation.card_rows:
        broadcast_trained(state.model)
    per = "trained token" if state.objective.per_token else dataset.task.units.removesuffix("s")
    plot_loss(output / "metrics.jsonl", output / "loss.svg", per)
    command = f"yeonma {state.objective.name} --config settings.yaml   # the settings below\n\n"
    command += to_yaml(config)
    write_card(
        output,
        policy,
        prepared.tokenizer,
        dataset,
        dataset.validation or dataset.train,
        command,
        best_step,
        evaluation.card_rows,
    )
    (output / folder.FORMER_PLOT).unlink(missing_ok=True)  # of the former run that this one continues
    folder.seal(output)
    folder.mark(output, prepared.identity, finished=True)
    say(f"Adapter saved to {output}")
    if exported.text is None:
        say(f"its chat template does not carry the training template: {exported.why}")
    return None


def _size_in_checkpoint(progress: RunProgress, state: TrainState) -> int | None:
    """What this process had room for; None where something else is asked for now, or by as many processes."""
    requested, *sizes = progress.micro_batches or [0]
    if requested != state.limit.requested.most_examples or len(sizes) != state.group.count:
        return None
    return sizes[state.group.rank]


def _tokens_of(progress: RunProgress | None, group: Processes) -> int | None:
    """The tokens that this process had room for when the checkpoint was written; None where there are none, or another
    number of processes."""
    tokens = progress.micro_batch_tokens if progress is not None else []
    return tokens[group.rank] if len(tokens) == group.count else None


def _stopped_after(status: int, step: int, total_steps: int, output: Path) -> str:
    if not step:
        return f"stopped by {REASONS[status]} before the first step; run the same command to start again"
    where = f"stopped by {REASONS[status]} after step {step} of {total_steps}"
    return f"{where}; {checkpoint_path(output, step)} is saved: run the same command to continue"


def _samples(dataset: Dataset, count: int) -> Samples:
    """The rows of the card, as the adapter folder keeps them."""
    part = dataset.validation or dataset.train
    return take_samples(part, dataset.task, dataset.template, dataset.columns, count)


def _restore(state: TrainState, peft_model: Any, checkpoint: Path, progress: RunProgress) -> None:
    load_weights(peft_model, checkpoint)
    optimizer, random = read_tensors(checkpoint)
    restore_optimizer(state.optimizer, {weight: name for name, weight in state.parameters.items()}, optimizer)
    state.scheduler.load_state_dict(progress.schedule)
    for group, rate in zip(state.optimizer.param_groups, state.scheduler.get_last_lr(), strict=True):
        group["lr"] = rate
    restore_random(random, state.group, state.model.device)


def load_weights(peft_model: Any, checkpoint: Path) -> None:
    """The adapter's weights of a checkpoint, into the adapter that is there."""
    from peft import load_peft_weights, set_peft_model_state_dict

    weights = load_peft_weights(str(checkpoint), device=str(peft_model.device))
    set_peft_model_state_dict(peft_model, weights)
