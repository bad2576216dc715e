"""The loop over the steps of a run: train, evaluate and save, until the plan ends or the run stops early."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from yeonma.batch.batch import Batch
from yeonma.batch.plan import Plan
from yeonma.errors import Log, UserError
from yeonma.messages import counted, tr
from yeonma.model.train_mode import train_adapter
from yeonma.run_folder.checkpoint import AdapterWriter, RunProgress, rotate, write_checkpoint
from yeonma.run_folder.progress import EvaluationRecord, StepRecord, peak_memory_bytes
from yeonma.run_folder.run_log import LogSums
from yeonma.train.answer_metrics import AnsweredRows
from yeonma.train.distributed import Processes, gather_bytes
from yeonma.train.losses import untrained
from yeonma.train.optimizers import optimizer_tensors
from yeonma.train.step import (
    NextStep,
    TrainState,
    evaluate,
    micro_batch_limits,
    prepare_step,
    train_step,
)


@dataclass(frozen=True)
class EvalSaveSchedule:
    """When to evaluate and save, in steps, and when to stop early."""

    eval_steps: int
    save_steps: int
    save_total_limit: int | None
    patience: int | None
    """Consecutive evaluations without a lower loss after which the run stops; None: no early stopping."""
    threshold: float
    """The smallest improvement that counts as a lower loss."""
    best_metric: str | None = None
    """The key of the metric whose highest value makes the best step; None: the lowest loss does."""


Drawn = tuple[Mapping[str, float], Sequence[Mapping[str, Any]]]
"""Metrics of the answers that a step drew, to log beside those of the loss, and the answers."""


@dataclass(frozen=True)
class StepBatches:
    """How the batches of a run are made."""

    of: Callable[[np.ndarray, int], Batch]
    """(a step's units, the number of the step) -> its batch."""
    ahead: bool = True
    """Whether a batch is known before the update of the step before. Answers that the model draws are not."""
    updates: int = 1
    """The updates that a step makes with its batch."""
    drawn: Callable[[int], Drawn] = lambda step: ({}, [])
    """(a step whose batch is made) -> what the model drew for it."""


@dataclass(frozen=True)
class RunCallbacks:
    """What the loop reports to. On ranks other than 0 these do nothing."""

    step: Callable[[StepRecord, list[int]], None]
    """Called after each step with its record and row numbers."""
    evaluation: Callable[[EvaluationRecord], None]
    before_save: Callable[[], LogSums]
    """Flushes the logs, and returns their sums for the checkpoint."""
    saved: Callable[[float], None]
    """Called after each save with its seconds."""
    log: Log
    answers: Callable[[int, AnsweredRows], None] = lambda step, answered: None
    """Called before `evaluation` with what the model answered, if answers are measured."""
    drawn: Callable[[int, Sequence[Mapping[str, Any]]], None] = lambda step, answers: None
    """Called before `step` with the answers that it drew."""


def run_steps(
    state: TrainState,
    plan: Plan,
    batches: StepBatches,
    validation: Mapping[str, Batch],
    schedule: EvalSaveSchedule,
    progress: RunProgress,
    output: Path,
    adapter: AdapterWriter,
    callbacks: RunCallbacks,
    answer: Callable[[], AnsweredRows | None] | None = None,
) -> RunProgress:
    """Train from `progress` until the end of the plan, early stopping, or a step after which the ranks agreed to stop.

    `validation` has the validation rows of each data set. `answer` has the model answer rows at each evaluation; it
    returns None where a rank abandoned them. Returns the progress, which the last checkpoint contains. If `answer` or
    `batches` raises UserError, a checkpoint is left from which the same is tried again.
    """
    stop = state.stop

    def save(progress: RunProgress) -> None:
        started = time.perf_counter()
        random = random_tensors(state.group, state.model.device)
        units, tokens = micro_batch_limits(state)
        requested = state.limit.requested.most_examples
        progress = replace(progress, micro_batches=[requested, *units], micro_batch_tokens=tokens)
        names: dict[torch.Tensor, str] = {weight: name for name, weight in state.parameters.items()}
        adapter.gather()
        optimizer = optimizer_tensors(state.optimizer, names, keep=state.group.first)
        if state.group.first:
            progress = replace(progress, logs=callbacks.before_save())
            write_checkpoint(output, progress, adapter, optimizer, random)
            rotate(output, schedule.save_total_limit, progress.best_step)
        seconds = time.perf_counter() - started
        stop.record_seconds(save=seconds)
        callbacks.saved(seconds)

    def run_evaluation(progress: RunProgress) -> RunProgress:
        if not validation:
            return progress
        batches = validation
        if progress.step == 0:
            batches = {name: untrained(batch) for name, batch in validation.items()}
        record = evaluate(state, batches, progress.step, plan.epoch_at(progress.step))
        answered: AnsweredRows | None = None
        if record is not None and answer is not None:
            try:
                answered = answer()
            except UserError:
                if progress.step:
                    save(replace(progress, evaluation_due=True))
                raise
            record = None if answered is None else answered.added_to(record)
        progress = replace(progress, evaluation_due=record is None)
        if record is None:
            return progress
        if answered is not None:
            callbacks.answers(record.step, answered)
        callbacks.evaluation(record)
        if progress.step == 0:  # for comparison only: nothing is trained yet
            return progress
        if state.by_metric:
            state.scheduler.step(record.loss)
            progress = replace(progress, schedule=state.scheduler.state_dict())
        best = math.inf if progress.best_loss is None else progress.best_loss
        improved = record.loss < best - schedule.threshold  # false for NaN, as below
        without_gain = 0 if improved else progress.evaluations_without_gain + 1
        progress = replace(progress, evaluations_without_gain=without_gain)
        if record.loss < best:
            progress = replace(progress, best_loss=record.loss)
        is_best = record.loss < best
        if schedule.best_metric is not None:
            score = record.metrics[schedule.best_metric]
            is_best = progress.best_score is None or score > progress.best_score
            progress = replace(progress, best_score=score) if is_best else progress
        return replace(progress, best_step=progress.step) if is_best else progress

    train_adapter(state.model)
    if progress.step == 0 or progress.evaluation_due:
        progress = run_evaluation(progress)
        if progress.step and not progress.evaluation_due:
            save(progress)
        if stop.is_due():
            return progress
    ahead = enumerate(plan.steps(progress.step), progress.step + 1)
    prepared: list[NextStep] = []
    """The step to come, if there is one."""

    def prepare_next() -> None:
        for step, units in islice(ahead, 1):
            prepared.append(prepare_step(state, batches.of(units, step)))

    if batches.ahead:
        prepare_next()
    while progress.step < plan.total_steps:
        if schedule.patience is not None and progress.evaluations_without_gain >= schedule.patience:
            callbacks.log(
                tr(
                    "stopping early: no lower loss in {evaluations}",
                    evaluations=counted(schedule.patience, "evaluation"),
                )
            )
            break
        started = time.perf_counter()
        if not prepared:
            try:
                prepare_next()
            except UserError:
                if progress.step:
                    save(progress)
                raise
        now = prepared.pop()
        batch = untrained(now.batch) if progress.step == 0 and state.starts_exactly else now.batch
        # the next one while a GPU computes this one
        result = train_step(state, batch, now, prepare_next if batches.ahead else lambda: None)
        drawn_metrics, drawn = batches.drawn(progress.step + 1)
        for _ in range(batches.updates - 1):
            train_step(state, batch)
        seconds = time.perf_counter() - started
        stop.record_seconds(step=seconds)
        progress = replace(progress, step=progress.step + 1, schedule=state.scheduler.state_dict())
        progress = replace(progress, carried=dict(state.carried))
        callbacks.drawn(progress.step, drawn)
        callbacks.step(
            StepRecord(
                step=progress.step,
                epoch=plan.epoch_at(progress.step),
                loss=result.loss,
                learning_rate=result.learning_rate,
                grad_norm=result.grad_norm,
                examples=result.units,
                tokens=result.tokens,
                trained_tokens=result.trained_tokens,
                seconds=seconds,
                peak_memory_bytes=peak_memory_bytes(state.model.device.type),
                metrics={**drawn_metrics, **result.metrics},
            ),
            batch.unit_rows_U.tolist(),
        )
        last = progress.step == plan.total_steps
        if progress.step % schedule.eval_steps == 0 or last:
            progress = run_evaluation(progress)
        stopping = stop.is_due()
        is_best = progress.best_step == progress.step
        if progress.step % schedule.save_steps == 0 or last or is_best or stopping:
            save(progress)
        if stopping:
            break
    return progress


def random_tensors(group: Processes, device: torch.device) -> dict[str, torch.Tensor]:
    """PyTorch's random state of every process, as `cpu/RANK` and `cuda/RANK`."""
    states_by_rank = enumerate(gather_bytes(group, torch.get_rng_state()))
    states = {f"cpu/{rank}": state for rank, state in states_by_rank}
    if device.type == "cuda":
        states_by_rank = enumerate(gather_bytes(group, torch.cuda.get_rng_state(device)))
        states.update({f"cuda/{rank}": state for rank, state in states_by_rank})
    return states


def restore_random(tensors: Mapping[str, torch.Tensor], group: Processes, device: torch.device) -> None:
    """Set this process's random state. A rank that the checkpoint does not contain keeps its current state."""
    if f"cpu/{group.rank}" in tensors:
        torch.set_rng_state(tensors[f"cpu/{group.rank}"])
    if device.type == "cuda" and f"cuda/{group.rank}" in tensors:
        torch.cuda.set_rng_state(tensors[f"cuda/{group.rank}"], device)
