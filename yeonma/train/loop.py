"""The training step, visible on one screen, and the run around it.

One loop for every objective: what differs is the function from log-probabilities to sums. A step is made of units:
examples, or the pairs of preference data.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from yeonma.batch.plan import Plan
from yeonma.errors import Log
from yeonma.run_folder.checkpoint import AdapterWriter, RunState, rotate, write_checkpoint
from yeonma.run_folder.progress import EvaluationRecord, StepRecord, peak_memory_bytes
from yeonma.tokenization.store import TokenStore
from yeonma.train.distributed import Processes, gather_bytes
from yeonma.train.optimizers import optimizer_tensors
from yeonma.train.step import TrainState, evaluate, micro_batch_limits, train_step


@dataclass(frozen=True)
class EvalSaveSchedule:
    """When to evaluate and save, in steps, and when to stop early."""

    eval_steps: int
    save_steps: int
    save_total_limit: int | None
    patience: int | None
    threshold: float


@dataclass(frozen=True)
class RunCallbacks:
    """Who is told of the run's progress. Every process calls these; those of rank 0 do something."""

    step: Callable[[StepRecord, list[int]], None]  # with the rows that it was trained on
    evaluation: Callable[[EvaluationRecord], None]
    before_save: Callable[[], None]
    say: Log


def run_steps(
    tuning: TrainState,
    plan: Plan,
    store: TokenStore,
    validation: tuple[TokenStore, np.ndarray] | None,
    rhythm: EvalSaveSchedule,
    state: RunState,
    output: Path,
    adapter: AdapterWriter,
    watch: RunCallbacks,
) -> RunState:
    """From `state` to the end of the plan, to early stopping, or to where `tuning.stop` is agreed on. Returns the last
    state; all but one before the first step is saved by then."""
    stop = tuning.stop

    def save(state: RunState) -> None:
        started = time.perf_counter()
        random = random_tensors(tuning.group, tuning.model.device)
        counts, tokens = micro_batch_limits(tuning)
        state = replace(
            state, micro_batches=[tuning.room.asked.most_examples, *counts], micro_batch_tokens=tokens
        )
        if tuning.group.first:
            watch.before_save()
            names: dict[torch.Tensor, str] = {each: name for name, each in tuning.parameters.items()}
            write_checkpoint(output, state, adapter, optimizer_tensors(tuning.optimizer, names), random)
            rotate(output, rhythm.save_total_limit, state.best_step)
        stop.took(save=time.perf_counter() - started)

    def look(state: RunState) -> RunState:
        if validation is None:
            return state
        record = evaluate(tuning, *validation, state.step, plan.epoch_at(state.step))
        state = replace(state, evaluation_due=record is None)
        if record is None:
            return state
        watch.evaluation(record)
        if state.step == 0:  # to compare with; the adapter has learnt nothing that one might keep
            return state
        if tuning.by_metric:
            tuning.scheduler.step(record.loss)
            state = replace(state, schedule=tuning.scheduler.state_dict())
        best = math.inf if state.best_loss is None else state.best_loss
        gained = record.loss < best - rhythm.threshold  # false where it is NaN, as below
        state = replace(state, evaluations_without_gain=0 if gained else state.evaluations_without_gain + 1)
        return replace(state, best_loss=record.loss, best_step=state.step) if record.loss < best else state

    tuning.model.train()
    if state.step == 0 or state.evaluation_due:
        state = look(state)
        if state.step and not state.evaluation_due:
            save(state)
        if stop.settle():
            return state
    for units in plan.steps(state.step):
        if rhythm.patience is not None and state.evaluations_without_gain >= rhythm.patience:
            watch.say(f"stopping early: {rhythm.patience} evaluations brought no lower loss")
            break
        started = time.perf_counter()
        result = train_step(tuning, store, units)
        seconds = time.perf_counter() - started
        stop.took(step=seconds)
        state = replace(state, step=state.step + 1, schedule=tuning.scheduler.state_dict())
        watch.step(
            StepRecord(
                step=state.step,
                epoch=plan.epoch_at(state.step),
                loss=result.loss,
                learning_rate=result.learning_rate,
                grad_norm=result.grad_norm,
                examples=result.examples,
                tokens=result.tokens,
                trained_tokens=result.trained_tokens,
                seconds=seconds,
                peak_memory_bytes=peak_memory_bytes(tuning.model.device.type),
                metrics=result.metrics,
            ),
            store.rows_of(units),
        )
        last = state.step == plan.total_steps
        if state.step % rhythm.eval_steps == 0 or last:
            state = look(state)
        stopping = stop.settle()
        if state.step % rhythm.save_steps == 0 or last or state.best_step == state.step or stopping:
            save(state)
        if stopping:
            break
    return state


def random_tensors(group: Processes, device: torch.device) -> dict[str, torch.Tensor]:
    """torch's random state of every process, by rank."""
    states = {f"cpu/{rank}": each for rank, each in enumerate(gather_bytes(group, torch.get_rng_state()))}
    if device.type == "cuda":
        on_gpu = gather_bytes(group, torch.cuda.get_rng_state(device))
        states.update({f"cuda/{rank}": each for rank, each in enumerate(on_gpu)})
    return states


def restore_random(tensors: Mapping[str, torch.Tensor], group: Processes, device: torch.device) -> None:
    """This process's random state; a process that was not there before keeps its own."""
    if f"cpu/{group.rank}" in tensors:
        torch.set_rng_state(tensors[f"cpu/{group.rank}"])
    if device.type == "cuda" and f"cuda/{group.rank}" in tensors:
        torch.cuda.set_rng_state(tensors[f"cuda/{group.rank}"], device)
