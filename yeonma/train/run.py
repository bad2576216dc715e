"""A run from settings to the adapter folder: everything that can be wrong is found first, then weights are loaded."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from yeonma.configure import group_of, to_yaml
from yeonma.disk import told
from yeonma.model import adapter as adapters
from yeonma.model import load
from yeonma.model.check import check_forward
from yeonma.model.forward import Forward
from yeonma.model.lora import speed_up
from yeonma.model.samples import Samples, take_samples
from yeonma.paths import user_path
from yeonma.settings import (
    EvaluationSettings,
    LoraSettings,
    ModelSettings,
    RunSettings,
    StepSettings,
    TokenSettings,
)
from yeonma.tokens.dataset import Dataset, cache_folder, describe
from yeonma.tokens.plan import MicroBatching, Plan
from yeonma.tokens.store import TokenStore
from yeonma.train import folder
from yeonma.train.card import write_card
from yeonma.train.checkpoint import (
    AdapterWriter,
    RunState,
    checkpoint_path,
    read_tensors,
    recover,
    restore_optimizer,
)
from yeonma.train.distributed import Processes, processes, wait
from yeonma.train.lock import hold
from yeonma.train.loop import Rhythm, Tuning, Watch, restore_random, run_steps
from yeonma.train.objectives import SFT, Objective, label_objective, pair_objective
from yeonma.train.opening import Opening, is_reference, look_again, with_opening
from yeonma.train.preference import REFERENCE_FREE
from yeonma.train.preflight import check_folders
from yeonma.train.prepare import (
    BY_METRIC,
    Prepared,
    lora_shape,
    make_schedule,
    preference_of,
    preference_options,
    prepare,
)
from yeonma.train.progress import EvaluationRecord, Progress, StepRecord
from yeonma.train.reference import reference_identity, reference_logprobs, reference_path
from yeonma.train.space import Saves, adapter_bytes, check_room
from yeonma.train.tracking import check_trackers, open_metrics, open_trackers, plot_loss, tracked

UNITS_WITHOUT_GRADIENT = 4
"""Pairs that the reference takes at once for each that training does: without gradients, memory holds one layer's."""


def run_training(settings: Mapping[type, object]) -> Path:
    """Supervised fine-tuning or, where there are PreferenceSettings, learning from pairs. Returns the output folder.

    Raises UserError for what the user can mend.
    """
    model_settings, run = group_of(settings, ModelSettings), group_of(settings, RunSettings)
    output = user_path(run.output_dir)
    check_trackers(run.report_to)
    source, continued = check_folders(model_settings, run)
    device = load.pick_device(model_settings.device)
    with processes(device) as group, ExitStack() as held:
        console = Console(stderr=False, quiet=not group.first, soft_wrap=True)
        say = partial(console.out, highlight=False)
        prepared = prepare(settings, source, continued, say)
        describe(prepared.dataset, say)
        if group.first:
            held.enter_context(told(output, "the run's files"))
            held.enter_context(hold(output, say))
            recover(output)
        wait(group)  # nobody looks into a folder that another run may be writing
        start = folder.find_start(output, prepared.identity, run.resume_from_checkpoint, run.overwrite, say)
        if start.finished:
            say(f"{output} holds this run, finished; --overwrite true would do it anew")
            return output
        if group.first and prepared.trained_parameters is not None:
            saves = saves_of(settings, prepared)
            check_room(output, start, saves, prepared.trained_parameters, prepared.tokenizer)
        loaded = load_model(settings, source, device, prepared, say)
        looked_at = _all_looked_at(prepared)
        first = _looked_at_first(prepared)
        objective = make_objective(settings, loaded, prepared, looked_at, group, say, first)
        tuning = make_tuning(settings, loaded, prepared.plan, objective, group)
        if start.state is not None:
            look_again(tuning, prepared.plan, prepared.dataset.train.store, _held_out(prepared))
        wait(group)  # nobody writes before everybody has looked, and nothing can be refused any more
        if group.first:
            folder.begin(output, prepared.identity, to_yaml(*settings.values()), start)
        _train(settings, loaded, tuning, console, prepared, start, output)
        wait(group)
    return output


def saves_of(settings: Mapping[type, object], prepared: Prepared) -> Saves:
    run, plan = group_of(settings, RunSettings), prepared.plan
    best = prepared.dataset.validation is not None
    return Saves(plan.total_steps, run.save_steps or plan.steps_per_epoch, run.save_total_limit, best)


References = Mapping[str, tuple[TokenStore, np.ndarray]]
"""The units of each token store, by its key, that a reference is asked about."""


@dataclass(frozen=True)
class Loaded:
    """The base with its adapter on top, ready to train; where it is from; how to get log-probabilities; and
    yeonma.json's contents."""

    peft_model: Any
    source: load.BaseSource
    base: adapters.BaseIdentity
    how: Forward
    details: dict[str, Any]


def load_model(
    settings: Mapping[type, object],
    source: load.BaseSource,
    device: torch.device,
    prepared: Prepared,
    say: Callable[[str], None],
) -> Loaded:
    model_settings, lora = group_of(settings, ModelSettings), group_of(settings, LoraSettings)
    base = load.load_base(source, device, load.pick_dtype(model_settings.dtype, device))
    identity = adapters.base_identity(base, source)
    if prepared.adapter is not None:
        adapters.check_continued(prepared.adapter, identity)
        peft_model = load.load_adapter(base, prepared.adapter, trainable=True, dropout=lora.lora_dropout)
    else:
        peft_model = load.add_lora(base, lora_shape(lora), group_of(settings, StepSettings).seed)
    how = check_forward(base)  # with the adapter in place: it may sit on the head
    if how.why_not:
        say(f"one sequence at a time, because {how.why_not}")
    if model_settings.gradient_checkpointing:
        load.checkpoint_activations(base)
    speed_up(base)
    trained = sum(parameter.numel() for parameter in peft_model.parameters() if parameter.requires_grad)
    say(
        f"{source.name}: {trained:,} parameters trained, {identity.parameters:,} frozen, {base.dtype} on {device}"
    )
    dataset = prepared.dataset
    details = adapters.describe(
        identity,
        dataset.template,
        dataset.columns,
        dataset.rules,
        tokenizer=prepared.tokenizer,
        trust_remote_code=source.trust_remote_code,
        trained_on={
            "data": dataset.train.rows.name,
            "data_sha256": dataset.train.rows.identity,
            "examples": len(dataset.train.units),
            "trained_tokens": dataset.train.trained_tokens,
            "left_out": dataset.train.store.counts.left_out,
            "shortened": dataset.train.store.counts.shortened,
        },
    )
    return Loaded(peft_model, source, identity, how, details)


def _all_looked_at(prepared: Prepared) -> References:
    """All units that the run trains on or measures by."""
    dataset = prepared.dataset
    needed = {dataset.train.store.key: (dataset.train.store, prepared.plan.used())}
    if dataset.validation is not None:
        store, held_out = dataset.validation.store, dataset.validation.units
        _, others = needed.get(store.key, (store, held_out[:0]))
        needed[store.key] = store, np.union1d(others, held_out)
    return needed


def _looked_at_first(prepared: Prepared) -> References:
    """The units that the run looks at before its first update."""
    store, held_out = prepared.dataset.train.store, _held_out(prepared)
    first = {store.key: (store, next(prepared.plan.steps()))}
    if held_out is not None:
        key = held_out[0].key
        first[key] = held_out[0], np.union1d(held_out[1], first[key][1] if key in first else held_out[1])
    return first


def _held_out(prepared: Prepared) -> tuple[TokenStore, np.ndarray] | None:
    held_out = prepared.dataset.validation
    return None if held_out is None else (held_out.store, held_out.units)


def make_objective(
    settings: Mapping[type, object],
    loaded: Loaded,
    prepared: Prepared,
    needed: References,
    group: Processes,
    say: Callable[[str], None],
    first: References | None = None,
) -> Objective:
    """What is trained; for a loss that compares with a reference, with the reference's log-probabilities of `needed`.

    Those of `first` are left to the run's own look at them, where it gives the same: of pairs, with no dropout that
    changes anything.
    The adapter must be as it was at the start: the first step is still to come, or the checkpoint to be read.
    """
    preference, step = preference_of(settings), group_of(settings, StepSettings)
    if preference is None:
        return SFT
    references: dict[str, np.ndarray] = {}
    openings: dict[str, Opening] = {}
    base = loaded.peft_model.get_base_model()
    if preference.loss not in REFERENCE_FREE:
        identity = ""
        if group.first:
            identity = reference_identity(
                loaded.source, loaded.base, prepared.adapter, base.dtype, base.device
            )
        as_reference = loaded.peft_model.disable_adapter if prepared.adapter is None else nullcontext
        cache_dir = cache_folder(group_of(settings, TokenSettings))
        if (
            first is None
            or preference.loss == "kto"  # its mean over the step is needed before
            or group_of(settings, LoraSettings).use_dora  # the base to rounding only
            or not is_reference(base, loaded.how, as_reference, group)
        ):
            first = {}
        with as_reference():
            for key, (store, units) in needed.items():
                references[key] = reference_logprobs(
                    base,
                    loaded.how,
                    store,
                    units,
                    later=first[key][1] if key in first else None,
                    identity=identity,
                    cache_dir=cache_dir,
                    most_units=UNITS_WITHOUT_GRADIENT * step.micro_batch_size,
                    most_tokens=step.micro_batch_tokens,
                    share_prefix=step.share_prefix,
                    group=group,
                    say=say,
                )
        for key, (store, units) in first.items():
            wanted = np.isnan(references[key])
            wanted[~np.isin(store.units, units)] = False
            openings[key] = Opening(reference_path(cache_dir, identity, store), references[key], wanted)
    if preference.loss == "kto":
        return label_objective(preference_options(preference), references)
    objective = pair_objective(preference.loss, preference_options(preference), references)
    return with_opening(objective, openings, group, base.device) if openings else objective


def make_tuning(
    settings: Mapping[type, object], loaded: Loaded, plan: Plan, objective: Objective, group: Processes
) -> Tuning:
    step = group_of(settings, StepSettings)
    parameters = {name: each for name, each in loaded.peft_model.named_parameters() if each.requires_grad}
    optimizer = torch.optim.AdamW(
        parameters.values(),
        lr=step.learning_rate,
        betas=(step.adam_beta1, step.adam_beta2),
        eps=step.adam_epsilon,
        weight_decay=step.weight_decay,
        fused=True,
    )
    return Tuning(
        model=loaded.peft_model.get_base_model(),
        how=loaded.how,
        parameters=parameters,
        optimizer=optimizer,
        scheduler=make_schedule(step, optimizer, plan.total_steps),
        by_metric=step.lr_scheduler in BY_METRIC,
        max_grad_norm=step.max_grad_norm,
        micro=MicroBatching(step.micro_batch_size, step.micro_batch_tokens, step.share_prefix),
        objective=objective,
        group=group,
    )


def _train(
    settings: Mapping[type, object],
    loaded: Loaded,
    tuning: Tuning,
    console: Console,
    prepared: Prepared,
    start: folder.Start,
    output: Path,
) -> None:
    run, evaluation = group_of(settings, RunSettings), group_of(settings, EvaluationSettings)
    say, group, plan = partial(console.out, highlight=False), tuning.group, prepared.plan
    dataset, peft_model = prepared.dataset, loaded.peft_model

    samples = _samples(dataset, evaluation.card_rows) if group.first else None

    def write_adapter(place: Path) -> None:
        tokenizer, template = prepared.tokenizer, dataset.template
        adapters.write_adapter(place, peft_model, tokenizer, template, loaded.details, samples)

    trained = sum(each.numel() for each in tuning.parameters.values())
    adapter = AdapterWriter(write_adapter, adapter_bytes(trained, prepared.tokenizer) if group.first else 0)
    # dropout: its own numbers in every process
    torch.manual_seed(group_of(settings, StepSettings).seed + 1000 * (group.rank + 1))
    state = start.state or RunState(0, tuning.scheduler.state_dict(), None, None, 0, prepared.identity)
    if start.checkpoint is not None and start.state is not None:
        _restore(tuning, peft_model, start.checkpoint, start.state)
        say(f"continuing after step {state.step} of {plan.total_steps}, from {start.checkpoint}")
    rhythm = Rhythm(
        eval_steps=evaluation.eval_steps or plan.steps_per_epoch,
        save_steps=run.save_steps or plan.steps_per_epoch,
        save_total_limit=run.save_total_limit,
        patience=evaluation.early_stopping_patience,
        threshold=evaluation.early_stopping_threshold,
    )
    held_out = _held_out(prepared)
    steps = partial(run_steps, tuning, plan, dataset.train.store, held_out, rhythm, state, output, adapter)
    if not group.first:
        steps(Watch(lambda _: None, lambda _: None, lambda: None, lambda _: None))
        return
    state = _watched(settings, steps, console, plan.total_steps, state.step, output)
    kept = state.step if state.best_step is None or not evaluation.keep_best else state.best_step
    if kept != state.step:
        say(f"the adapter of step {kept} had the lowest validation loss ({state.best_loss:.4f}) and is kept")
        load_weights(peft_model, checkpoint_path(output, kept))
    folder.install(output, adapter)
    per = "trained token" if tuning.objective.per_token else dataset.kind.units.removesuffix("s")
    plot_loss(output / "metrics.jsonl", output / "loss.png", per)
    asked = dataset.validation or dataset.train
    command = f"yeonma {tuning.objective.name} --config settings.yaml   # the settings below\n\n"
    command += to_yaml(*settings.values())
    write_card(
        output,
        peft_model,
        loaded.how,
        prepared.tokenizer,
        dataset,
        asked,
        command,
        kept,
        evaluation.card_rows,
    )
    folder.seal(output)
    folder.mark(output, prepared.identity, finished=True)
    say(f"the adapter is in {output}")


def _samples(dataset: Dataset, count: int) -> Samples:
    """The rows of the card, as the adapter folder keeps them."""
    part = dataset.validation or dataset.train
    return take_samples(part, dataset.kind, dataset.template, dataset.columns, count)


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
    steps: Callable[[Watch], RunState],
    console: Console,
    total_steps: int,
    start_step: int,
    output: Path,
) -> RunState:
    """The steps, with progress, metrics.jsonl and trackers."""
    run = group_of(settings, RunSettings)
    flat = {name: value for group in settings.values() for name, value in vars(group).items()}
    with (
        open_metrics(output / "metrics.jsonl", start_step or None) as metrics,
        open_trackers(run.report_to, run.run_name, output, flat, start_step) as trackers,
        Progress(total_steps, start_step, run.logging_steps, console) as progress,
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

        return steps(Watch(step, evaluation, metrics.sync, progress.say))
