"""A training run, from its settings to the adapter folder."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from yeonma.adapter.sample_answers import SAMPLE_ANSWERS, as_json
from yeonma.adapter.samples import Samples, take_samples
from yeonma.batch.batch import Batch
from yeonma.bounded.user_functions import UserFunctions
from yeonma.config.data_sets import data_sets
from yeonma.config.metric_names import best_metric, keeps_best, key_of
from yeonma.config.parse import settings_dict, to_yaml
from yeonma.config.settings import (
    RunConfig,
)
from yeonma.data.python_rows import is_label
from yeonma.errors import Log
from yeonma.files import disk_errors_as_user_errors, user_path
from yeonma.forgetting.kept import Kept
from yeonma.messages import tr
from yeonma.model import load
from yeonma.model.base_content import reading_content
from yeonma.model.sharding import broadcast_trained
from yeonma.rewards.rewards import rewards_of
from yeonma.run_folder import output_folder as folder
from yeonma.run_folder.checkpoint import RunProgress, checkpoint_path, recover, write_text_atomically
from yeonma.run_folder.entries import FORMER_PLOT, PRINTED
from yeonma.run_folder.environment import environment, environment_change, versions
from yeonma.run_folder.lock import hold
from yeonma.run_folder.phases import PhaseClock
from yeonma.run_folder.printed_log import PrintedLog
from yeonma.run_folder.progress import (
    AnswerProgress,
    EvaluationRecord,
    Progress,
    StepRecord,
    StepsBetween,
    log_of,
    run_console,
)
from yeonma.run_folder.run_log import (
    ANSWERS,
    METRICS,
    ROLLOUTS,
    THEN_CONTINUE,
    TRAINED_ROWS,
    LogSums,
    open_answers,
    open_metrics,
    open_trained_rows,
)
from yeonma.run_folder.trackers import check_trackers, open_trackers, plot_loss, tracked
from yeonma.run_folder.units import ONE
from yeonma.tokenization.chat_template_export import ExportedChatTemplate, export_chat_template
from yeonma.tokenization.dataset import Dataset, cache_folder, describe
from yeonma.tokenization.store import TokenStore
from yeonma.train.answer_metrics import AnsweredRows, answer_and_measure
from yeonma.train.answer_rows import no_label_rows, try_metrics
from yeonma.train.build import (
    LoadedModel,
    StoreExtras,
    build_objective,
    build_train_state,
    load_model,
    reference_extras,
    units_to_reference,
)
from yeonma.train.card_general import ask_base, kept_by, kept_sentences, question_count
from yeonma.train.card_time import answer_work, card_work
from yeonma.train.distributed import Processes, check_same_content, process_group, rendezvous, wait
from yeonma.train.interrupt import REASONS, Stop, Stopped
from yeonma.train.label_accuracy import label_trials
from yeonma.train.label_balance import label_balance
from yeonma.train.loop import EvalSaveSchedule, RunCallbacks, StepBatches, run_steps
from yeonma.train.memory_budget import one_sequence_at_a_time, resolve_auto, try_heaviest
from yeonma.train.model_card import answers_before, sample_answers, write_card
from yeonma.train.model_remarks import model_remarks
from yeonma.train.preflight import check_folders, with_adapters_lora
from yeonma.train.prepare import Prepared, mixture_lines, prepare
from yeonma.train.restore import restore
from yeonma.train.rollouts import Rollouts, drawn_batches, try_rewards
from yeonma.train.run_warnings import run_warnings
from yeonma.train.sample_scores import sample_answers_of
from yeonma.train.saved_weights import FolderParts, saved_adapter, saved_model
from yeonma.train.step import TrainState


def run_with_callbacks(
    config: RunConfig,
    steps: Callable[[RunCallbacks], RunProgress],
    console: Console,
    total_steps: int,
    start: RunProgress,
    output: Path,
    clock: PhaseClock,
    keep: Log,
    between: StepsBetween,
    rows_by_set: Callable[[Sequence[int]], dict[str, list[int]]] | None = None,
    *,
    answer_logs: Sequence[str] = (),
) -> tuple[RunProgress, float]:
    """Run `steps` from `start` with the callbacks of rank 0: logs, progress display and trackers. `clock` counts
    evaluations and saves, and `keep` gets what is printed. `rows_by_set`: what trained_rows.jsonl has of a step's rows,
    in a mixture of data sets. `answer_logs`: which of ANSWERS and ROLLOUTS the run writes. Returns about how many
    seconds the answers of the card will take, too."""
    run = config.run
    lines = {name: recorded["lines"] for name, recorded in start.logs.items()}
    with (
        open_metrics(
            output / METRICS, start.step or None, not start.evaluation_due, lines.get(METRICS)
        ) as metrics,
        open_trained_rows(output / TRAINED_ROWS, start.step, lines.get(TRAINED_ROWS)) as trained_rows,
        open_trackers(run.report_to, run.run_name, output, settings_dict(config), start.step) as trackers,
        Progress(total_steps, start.step, run.logging_steps, console, between=between, keep=keep) as progress,
        ExitStack() as files,
    ):
        answers = {
            name: files.enter_context(open_answers(output / name, lines.get(name, 0))) for name in answer_logs
        }

        def step(record: StepRecord, rows: list[int]) -> None:
            metrics.write(record)
            trained_rows.write(record.step, rows if rows_by_set is None else rows_by_set(rows))
            progress.step(record)
            if run.logging_steps == "auto" or record.step % run.logging_steps == 0:
                trackers.log(record.step, tracked(record))

        def evaluation(record: EvaluationRecord) -> None:
            metrics.write(record)
            progress.evaluation(record)
            clock.move("validation", record.seconds)
            trackers.log(record.step, tracked(record))

        def before_save() -> LogSums:
            logs = {METRICS: metrics, TRAINED_ROWS: trained_rows, **answers}
            for log in logs.values():
                log.sync()
            return {name: log.sum.as_record() for name, log in logs.items()}

        def answered(step: int, rows: AnsweredRows) -> None:
            answers[ANSWERS].write(step, rows.lines)

        def drawn(step: int, rollouts: Sequence[Mapping[str, Any]]) -> None:
            if rollouts:
                answers[ROLLOUTS].write(step, rollouts)

        def saved(seconds: float) -> None:
            progress.saved(seconds)
            clock.move("saving", seconds)

        callbacks = RunCallbacks(step, evaluation, before_save, saved, progress.print_line, answered, drawn)
        done = steps(callbacks)
        return done, progress.card_seconds()


SAVE_SECONDS_PER_WEIGHT = 12 / 50e6
"""An estimate for the time limit until the first save: a weight and its two averages at 50 MB/s."""


@dataclass(frozen=True)
class RunStart:
    """What is known of a run before its weights are loaded."""

    config: RunConfig
    """With numbers in place of `auto`."""
    source: load.BaseSource
    prepared: Prepared
    processes: int
    steps_done: int
    """By earlier calls that this one continues."""
    log: Log


def run_training(
    config: RunConfig, stop: Stop, before_loading: Callable[[RunStart], None] = lambda start: None
) -> Path:
    """Preference training if the config has PreferenceSettings, else supervised fine-tuning. Returns the output folder.

    `before_loading` is called in the first process before weights are loaded.
    Raises UserError for mistakes of the user, and Stopped if `stop` ended the run before it was finished.
    """
    model_settings, run = config.model, config.run
    output = user_path(run.output_dir)
    check_trackers(run.report_to)
    source, continued = check_folders(model_settings, run)
    config = with_adapters_lora(config)
    device = load.pick_device(model_settings.device)
    clock = PhaseClock()
    with rendezvous() as processes, PrintedLog() as printed, ExitStack() as contexts:
        stop.several_processes = processes.count > 1
        console = run_console(quiet=processes.rank != 0)
        log = printed.also(log_of(console))
        cache_dir = cache_folder(config.tokens)
        base_content = contexts.enter_context(reading_content(source, cache_dir=cache_dir))
        prepared = prepare(config, source, continued, log)
        describe(prepared.dataset, log)
        for line in mixture_lines(prepared.dataset, prepared.plan):
            log(line)
        for remark in model_remarks(prepared.config, prepared.dataset):
            log(remark)
        if (balance := label_balance(prepared.dataset.train, config.preference)) is not None:
            log(str(balance))
        for line in run_warnings(config.step, prepared.dataset, prepared.plan):
            log(tr("warning: {text}", text=line))
        prepared = prepared.with_base(base_content(log), source)
        group = contexts.enter_context(process_group(processes, device))
        check_same_content(group, _shared_content(config, prepared))
        if group.first:
            contexts.enter_context(
                disk_errors_as_user_errors(output, tr("the run's files"), then=THEN_CONTINUE)
            )
            contexts.enter_context(hold(output, log))
            recover(output)
        wait(group)  # no rank reads the folder before rank 0 has locked it
        start = folder.find_start(output, prepared.identity, run.resume_from_checkpoint, run.overwrite, log)
        if start.finished:
            log(
                tr(
                    "{output} holds this run, which is finished; use --overwrite true to run it again",
                    output=output,
                )
            )
            return output
        if group.first and prepared.trained_parameters is not None:
            folder.check_disk_space(
                output,
                start,
                _checkpoint_schedule(config, prepared),
                prepared.trained_parameters,
                prepared.tokenizer,
                state_bytes=folder.state_bytes(config.step.optimizer),
                noun="model" if model_settings.train == "full" else "adapter",
            )
        if prepared.answers is not None:
            try_metrics(prepared.answers, config.evaluation.keep_best)
        if config.reward is not None:
            try_rewards(config.reward, prepared)
        stop.check()
        by_tokens = config.step.micro_batch_tokens == "auto"
        earlier_tokens = _tokens_of(start.progress, group) if by_tokens else None
        resolved = resolve_auto(config, source, prepared, group, log, earlier_tokens=earlier_tokens)
        if group.first:
            steps_done = start.progress.step if start.progress is not None else 0
            before_loading(RunStart(resolved, source, prepared, group.count, steps_done, log))
        loaded = load_model(resolved, source, device, prepared, log, group)
        if by_tokens and not loaded.policy.support.forest:
            resolved = one_sequence_at_a_time(resolved)
        stop.check()
        by_tokens = by_tokens and loaded.policy.support.forest
        plan, objective = prepared.plan, build_objective(resolved)
        name_rows = prepared.dataset.name_rows
        state = build_train_state(
            resolved,
            loaded,
            plan,
            objective,
            group,
            stop,
            by_tokens=by_tokens,
            continued=prepared.adapter is not None,
            name_rows=name_rows,
        )
        if prepared.dataset.validation:
            support, share_prefix = loaded.policy.support, resolved.step.share_prefix
            trials = label_trials(
                prepared.dataset, prepared.tokenizer, shares_prompts=support.forest and share_prefix
            )
            if not trials and prepared.answers is not None and prepared.answers.names.of_labels:
                raise no_label_rows(prepared.answers.names)
            state = replace(state, label_trials=trials)
        if by_tokens and earlier_tokens is None:  # before the reference, which may take hours
            try_heaviest(state, plan, prepared.dataset.train.store, config.step.optimizer)
        clock.enter("reference")
        extras = reference_extras(resolved, loaded, prepared, units_to_reference(prepared), group, log)
        stop.check()
        clock.enter("loading")
        reporting = _Reporting(console, printed, clock)
        stopped = _train(config, loaded, state, extras, reporting, prepared, start, output)
        wait(group)  # torchrun ends all processes when one ends, so all wait until rank 0 has saved
        if stopped is not None:
            raise Stopped(*stopped, printed=True)
    return output


def _shared_content(config: RunConfig, prepared: Prepared) -> str:
    """What must be the same in all processes. Paths may differ between machines; the content of the files may not."""
    path_settings = {
        "base_model",
        "adapter",
        "data_path",
        "val_data_path",
        "template",
        "output_dir",
        "cache_dir",
    }
    settings = {name: value for name, value in settings_dict(config).items() if name not in path_settings}
    identity = {name: value for name, value in prepared.identity.items() if name != "base_model"}
    return json.dumps([identity, settings, versions()], sort_keys=True, default=str)


def _checkpoint_schedule(config: RunConfig, prepared: Prepared) -> folder.CheckpointSchedule:
    run, plan = config.run, prepared.plan
    save_steps, keeps_best = run.save_steps or plan.steps_per_epoch, bool(prepared.dataset.validation)
    return folder.CheckpointSchedule(plan.total_steps, save_steps, run.save_total_limit, keeps_best)


@dataclass(frozen=True)
class _Reporting:
    """Where a run says what it does, and how long it takes."""

    console: Console
    printed: PrintedLog
    clock: PhaseClock

    def log(self, line: str) -> None:
        """A Log."""
        self.printed.also(log_of(self.console))(line)

    def answers(self, whose: str, seconds: float = 0.0) -> AnswerProgress:
        """The display of the held-out answers, whose time it counts. `seconds`: as expected; 0 if that is not known."""
        self.clock.enter("answers")
        return AnswerProgress(whose, self.console, self.printed.keep, seconds=seconds)


def _train(
    config: RunConfig,
    loaded: LoadedModel,
    state: TrainState,
    extras: StoreExtras,
    reporting: _Reporting,
    prepared: Prepared,
    start: folder.Start,
    output: Path,
) -> tuple[str, int] | None:
    """Returns None if the run is finished, else the message that was printed and the exit status."""
    run, evaluation = config.run, config.evaluation
    log, clock, group, plan = reporting.log, reporting.clock, state.group, prepared.plan
    dataset, policy = prepared.dataset, loaded.policy

    samples = _samples(dataset, evaluation.card_rows) if group.first else None
    exported = (
        export_chat_template(dataset.template, prepared.tokenizer, dataset.rules)
        if group.first
        else ExportedChatTemplate(None)
    )

    trained = sum(weight.numel() for weight in state.parameters.values())
    parts = FolderParts(prepared.tokenizer, dataset.template, loaded.details, exported, samples)
    base_answers, base_asked, questions = None, None, question_count(evaluation)
    kept_in = None if state.sharded else cache_folder(config.tokens)
    quantization = config.model.quantization
    if config.model.train == "full":
        if (group.first or state.sharded) and questions:
            clock.enter("answers")
            base_asked = ask_base(policy, prepared.tokenizer, questions, quantization, kept_in)
            clock.enter("loading")
        if (group.first or state.sharded) and evaluation.card_rows:  # before the base's weights are replaced
            with reporting.answers(tr("the base")) as on_answer:
                base_answers = answers_before(
                    policy, prepared.tokenizer, dataset, evaluation.card_rows, on_answer
                )
            clock.enter("loading")
        saved = saved_model(state, policy.source, dataset.rules, parts)
    else:
        saved = saved_adapter(policy.model, parts, trained)
    # every process draws its own dropout masks
    torch.manual_seed(config.step.seed + 1000 * (group.rank + 1))
    current_environment = {
        **environment(group.count, state.model.device),
        "kernels": "compiled" if policy.kernels.is_compiled else "plain",
    }
    progress = start.progress or RunProgress(
        0, state.scheduler.state_dict(), None, None, 0, prepared.identity
    )
    if start.checkpoint is not None and start.progress is not None:
        restore(state, saved, start.checkpoint, start.progress)
        log(
            tr(
                "continuing after step {step} of {total_steps}, from {checkpoint}",
                step=progress.step,
                total_steps=plan.total_steps,
                checkpoint=start.checkpoint,
            )
        )
        if size := _size_in_checkpoint(progress, state):
            state.limit.restore(size)
        has_dropout = config.lora.lora_dropout > 0
        if change := environment_change(progress.environment, current_environment, has_dropout):
            log(change)
    progress = replace(progress, environment=current_environment)
    best = best_metric(evaluation.keep_best)
    schedule = EvalSaveSchedule(
        eval_steps=evaluation.eval_steps or plan.steps_per_epoch,
        save_steps=run.save_steps or plan.steps_per_epoch,
        save_total_limit=run.save_total_limit,
        patience=evaluation.early_stopping_patience,
        threshold=evaluation.early_stopping_threshold,
        best_metric=None if best is None else key_of(best),
    )

    # rank 0 writes after all ranks have loaded what they continue from; from here on no check refuses the run
    wait(group)
    if group.first:
        folder.begin(output, prepared.identity, to_yaml(config), start, run.save_total_limit)
        reporting.printed.open(output / PRINTED)

    def kept() -> Kept:
        base = base_asked
        if base is None:
            alone = replace(policy, adapter_weights=False)
            base = ask_base(alone, prepared.tokenizer, questions, quantization, kept_in)
        return kept_by(policy, base)

    def batch_of(units: np.ndarray, store: TokenStore = dataset.train.store) -> Batch:
        return Batch.from_store(store, units, extras.get(store.key))

    validation = {name: batch_of(part.units, part.store) for name, part in dataset.validation.items()}
    functions = UserFunctions()
    batches = StepBatches(lambda units, step: batch_of(units))
    if config.reward is not None:
        batches = drawn_batches(
            Rollouts(
                policy,
                prepared.tokenizer,
                dataset,
                config.reward,
                rewards_of(config.reward, functions),
                config.step.seed,
                group,
            )
        )
    rows_by_set = dataset.rows_by_set if len(dataset.sets) > 1 else None
    answers, answer = prepared.answers, None
    if answers is not None and answers.rows:
        answer = partial(answer_and_measure, state, answers, prepared.tokenizer, functions)
    steps = partial(
        run_steps,
        state,
        plan,
        batches,
        validation,
        schedule,
        progress,
        output,
        saved.checkpoint,
        answer=answer,
    )
    stop = state.stop
    stop.record_seconds(save=trained * SAVE_SECONDS_PER_WEIGHT)
    work = card_work(
        dataset,
        prepared.config,
        evaluation.card_rows,
        state.model.device.type,
        base_is_left=base_answers is None,
    )
    between = StepsBetween(
        schedule.eval_steps if validation else None,
        schedule.save_steps,
        sum(int(part.store.unit_lengths[part.units].sum()) for part in dataset.validation.values()),
        work,
        answer_work(answers, dataset, prepared.config, state.model.device.type),
    )
    card_seconds = 0.0
    clock.enter("training")
    with stop.between_steps(), functions:
        if group.first:
            progress, card_seconds = run_with_callbacks(
                config,
                steps,
                reporting.console,
                plan.total_steps,
                progress,
                output,
                clock,
                reporting.printed.keep,
                between,
                rows_by_set,
                answer_logs=[
                    *([] if answer is None else [ANSWERS]),
                    *([] if config.reward is None else [ROLLOUTS]),
                ],
            )
        else:
            progress = steps(
                RunCallbacks(lambda *_: None, lambda _: None, dict, lambda _: None, lambda _: None)
            )
    clock.enter("saving")
    if stop.agreed:
        message = _stopped_after(stop.agreed, progress.step, plan.total_steps, output)
        log(clock.summary())
        log(message)
        sys.stdout.flush()
        return message, stop.agreed
    stop.check()
    best_step = (
        progress.best_step
        if progress.best_step is not None and keeps_best(evaluation.keep_best)
        else progress.step
    )
    if not group.first:
        if state.sharded and config.model.train == "full":  # whose weights are in all processes
            if best_step != progress.step:
                saved.load(checkpoint_path(output, best_step))
            saved.result.gather()
        if state.sharded and (evaluation.card_rows or questions):  # every forward pass needs all processes
            broadcast_trained(state.model)
        if state.sharded and questions:
            kept()
        if state.sharded and evaluation.card_rows:
            answered = sample_answers(policy, prepared.tokenizer, dataset, evaluation.card_rows, base_answers)
            sample_answers_of(policy, dataset, answered, with_base=base_answers is None)
        return None
    if best_step != progress.step:
        log(_best_of(progress, best, tr(saved.result.noun)))
        saved.load(checkpoint_path(output, best_step))
    saved.result.gather()
    folder.install(output, saved.result)
    stop.check()
    if evaluation.card_rows or questions:
        broadcast_trained(state.model)
    clock.enter("answers")
    was_kept = kept() if questions else None
    loss_unit = tr("trained token") if state.objective.per_token else ONE[dataset.task.units]
    plot_loss(output / METRICS, output / "loss.svg", loss_unit)
    repeat_command = _repeat_command(config, state.objective.name)
    noun = tr(saved.result.noun)
    whose = tr("base and {noun}", noun=noun) if base_answers is None else tr("the {noun}", noun=noun)
    with reporting.answers(whose, card_seconds) as on_answer:
        answered = write_card(
            output,
            policy,
            prepared.tokenizer,
            dataset,
            config,
            repeat_command,
            best_step,
            evaluation.card_rows,
            model_remarks(prepared.config, dataset),
            base_answers,
            on_answer,
            was_kept,
        )
    for line in kept_sentences(was_kept) if was_kept is not None else ():
        log(line)
    if answered:
        scored = sample_answers_of(policy, dataset, answered, with_base=base_answers is None)
        write_text_atomically(output / SAMPLE_ANSWERS, as_json(scored))
    clock.enter("saving")
    (output / FORMER_PLOT).unlink(missing_ok=True)  # of the former run that this one continues
    folder.seal(output)
    folder.write_run_json(output, prepared.identity, finished=True)
    log(clock.summary())
    log(tr("{noun} saved to {output}", noun=noun.capitalize(), output=output))
    if exported.text is None:
        log(tr("chat_template.jinja does not contain the training template: {why}", why=exported.why))
    return None


def _best_of(progress: RunProgress, metric: str | None, noun: str) -> str:
    """Which step's weights are the result."""
    if metric is None:
        return tr(
            "using the {noun} of step {best_step}, which had the lowest validation loss ({best_loss:.4f})",
            noun=noun,
            best_step=progress.best_step,
            best_loss=progress.best_loss,
        )
    return tr(
        "using the {noun} of step {best_step}, which had the highest {metric} ({score:.4g})",
        noun=noun,
        best_step=progress.best_step,
        metric=metric,
        score=progress.best_score,
    )


def _repeat_command(config: RunConfig, verb: str) -> str:
    """How to repeat a run from its settings.yaml."""
    sets = data_sets(config.data)
    data = {"data_path": [one.path for one in sets], "val_data_path": [one.val_path or "" for one in sets]}
    given = [f"{setting}=..." for setting, paths in data.items() if any(map(is_label, paths))]
    if given:
        call = f'yeonma.{verb}(config="settings.yaml", {", ".join(given)})'
        return f"{call}   # {tr('in Python, with the same data')}"
    return f"yeonma {verb} --config settings.yaml"


def _size_in_checkpoint(progress: RunProgress, state: TrainState) -> int | None:
    """The micro-batch size that fitted into this process's memory; None if the setting or the number of processes has
    changed."""
    requested, *sizes = progress.micro_batches or [0]
    if requested != state.limit.requested.most_examples or len(sizes) != state.group.count:
        return None
    return sizes[state.group.rank]


def _tokens_of(progress: RunProgress | None, group: Processes) -> int | None:
    """This process's token budget in the checkpoint; None if it has none, or if the number of processes has changed."""
    tokens = progress.micro_batch_tokens if progress is not None else []
    return tokens[group.rank] if len(tokens) == group.count else None


def _stopped_after(status: int, step: int, total_steps: int, output: Path) -> str:
    if not step:
        return tr(
            "stopped by {reasons} before the first step; run the same command to start again",
            reasons=REASONS[status],
        )
    return tr(
        "stopped by {reasons} after step {step} of {total_steps}; {checkpoint} is saved: run the same command to "
        "continue",
        reasons=REASONS[status],
        step=step,
        total_steps=total_steps,
        checkpoint=checkpoint_path(output, step),
    )


def _samples(dataset: Dataset, count: int) -> Samples:
    """The rows of the model card, for samples.json: those of the first data set, whose template the adapter has."""
    first = dataset.sets[0]
    part = first.validation or first.train
    return take_samples(part, dataset.task, first.template, first.columns, count)
