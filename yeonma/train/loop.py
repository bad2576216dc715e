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
from typing import Any

import numpy as np
import torch

from yeonma.errors import UserError
from yeonma.model.check import in_eval_mode
from yeonma.model.forward import Forward, example_logprobs
from yeonma.tokens.cache import TokenStore
from yeonma.tokens.plan import MicroBatching, Plan, micro_batches, shares
from yeonma.train.checkpoint import AdapterWriter, RunState, optimizer_tensors, rotate, write_checkpoint
from yeonma.train.distributed import Processes, gather_bytes, sum_gradients, sum_over
from yeonma.train.objectives import Objective
from yeonma.train.progress import EvaluationRecord, StepRecord, peak_memory_bytes


@dataclass(frozen=True)
class Tuning:
    """What a step acts on: the model, the way through it, and what is trained how."""

    model: Any  # the transformers model, its LoRA layers in place
    how: Forward
    parameters: Mapping[str, torch.nn.Parameter]
    optimizer: torch.optim.Optimizer
    scheduler: Any
    by_metric: bool  # the schedule follows a loss instead of the step count
    max_grad_norm: float
    micro: MicroBatching
    objective: Objective
    group: Processes


@dataclass(frozen=True)
class StepResult:
    loss: float
    grad_norm: float
    learning_rate: float
    examples: int
    tokens: int
    trained_tokens: int
    metrics: dict[str, float]


def train_step(tuning: Tuning, store: TokenStore, units: np.ndarray) -> StepResult:
    """One update over some units of the store. Raises UserError, before the update, if the loss or the gradient is
    not finite."""
    objective, examples = tuning.objective, store.trained_of(units)
    trained_tokens = int(store.trained_counts[examples].sum())
    count = trained_tokens if objective.per_token else len(units)

    point = _measured(tuning, store, units)
    totals = torch.zeros(1 + len(objective.metrics), device=tuning.model.device)
    for members in _my_micro_batches(tuning, store, units, store.trained_of):
        loss_sum, metric_sums = objective.sums(_logprobs(tuning, store, members), store, members, point)
        (loss_sum / count).backward()
        totals += torch.cat([loss_sum.detach().reshape(1), metric_sums]) / count
        del loss_sum  # and the graph with it, whose many small nodes would lie between the next tensors

    totals = sum_gradients(tuning.group, tuning.parameters.values(), totals)
    grad_norm = torch.nn.utils.clip_grad_norm_(tuning.parameters.values(), tuning.max_grad_norm or math.inf)
    _check_finite(totals[0], grad_norm, store, examples)
    objective.settle()
    learning_rate = tuning.optimizer.param_groups[0]["lr"]
    tuning.optimizer.step()
    if not tuning.by_metric:
        tuning.scheduler.step()
    tuning.optimizer.zero_grad(set_to_none=True)

    loss, *means = totals.tolist()
    tokens = int(store.unit_lengths[units].sum())
    metrics = objective.report(dict(zip(objective.metrics, means, strict=True)))
    return StepResult(loss, float(grad_norm), learning_rate, len(units), tokens, trained_tokens, metrics)


def at_step(tuning: Tuning, step: int) -> Tuning:
    """With the objective of what comes after so many updates."""
    first = tuning.objective.at_start
    return tuning if step or first is None else replace(tuning, objective=first)


def forward_alone(tuning: Tuning, store: TokenStore, units: np.ndarray) -> None:
    """A step's forward passes as training makes them, told to the objective; no weight and no gradient changes."""
    for members in _my_micro_batches(tuning, store, units, store.trained_of):
        tuning.objective.sums(_logprobs(tuning, store, members), store, members, None)
    tuning.objective.settle()


def _measured(tuning: Tuning, store: TokenStore, units: np.ndarray) -> torch.Tensor | None:
    """The mean that the objective wants of all the step's units before any is trained, dropout off; None for none."""
    measure = tuning.objective.measure
    if measure is None:
        return None
    total = torch.zeros(1, dtype=torch.float64, device=tuning.model.device)
    with torch.no_grad(), in_eval_mode(tuning.model):
        for members in _my_micro_batches(tuning, store, units, store.measured_of):
            total += measure(_logprobs(tuning, store, members).double(), store, members)
    return sum_over(tuning.group, total)[0] / max(1, len(store.measured_of(units)))


def _my_micro_batches(
    tuning: Tuning, store: TokenStore, units: np.ndarray, members_of: Callable[[np.ndarray], np.ndarray]
) -> list[np.ndarray]:
    """This process's share of the units, as the examples that go through the model at once; empty where it has none."""
    mine = units[shares(store.unit_lengths[units].tolist(), tuning.group.count)[tuning.group.rank]]
    micro = tuning.micro
    batches = micro_batches(store.unit_lengths[mine].tolist(), micro.most_examples, micro.most_tokens)
    return [found for members in batches if len(found := members_of(mine[members]))]


def _logprobs(tuning: Tuning, store: TokenStore, positions: np.ndarray) -> torch.Tensor:
    examples = [store.example(int(position)) for position in positions]
    token_ids, trained = [each.token_ids for each in examples], [each.trained for each in examples]
    return example_logprobs(
        tuning.model,
        tuning.how,
        token_ids,
        trained,
        share_prefix=tuning.micro.share_prefix,
        units=store.units[positions],
    )


def _check_finite(
    loss: torch.Tensor, grad_norm: torch.Tensor, store: TokenStore, positions: np.ndarray
) -> None:
    if bool(torch.isfinite(loss).all()) and bool(torch.isfinite(grad_norm)):
        return
    rows = ", ".join(str(row) for row in sorted({int(row) for row in store.row_numbers[positions]}))
    raise UserError(
        f"the loss is {float(loss)} and the gradient's norm {float(grad_norm)}; the weights are as before this step",
        place=f"rows {rows}",
        cure="look at these rows, lower learning_rate, or use --dtype float32",
    )


def evaluate(
    tuning: Tuning, store: TokenStore, units: np.ndarray, at_step: int, epoch: float
) -> EvaluationRecord:
    """Mean loss over some units' trained tokens, or over the units, dropout off; every process looks at its share."""
    started = time.perf_counter()
    objective = tuning.objective
    point = _measured(tuning, store, units)
    totals = torch.zeros(1 + len(objective.metrics), dtype=torch.float64)
    tuning.model.eval()
    with torch.no_grad():
        for members in _my_micro_batches(tuning, store, units, store.trained_of):
            logprobs = _logprobs(tuning, store, members).double()
            loss_sum, metric_sums = objective.sums(logprobs, store, members, point)
            totals += torch.cat([loss_sum.reshape(1), metric_sums]).cpu()
    tuning.model.train()
    trained_tokens = int(store.trained_counts[store.trained_of(units)].sum())
    count = trained_tokens if objective.per_token else len(units)
    sums: list[float] = sum_over(tuning.group, totals.to(tuning.model.device)).tolist()
    objective.settle()
    loss, *means = (each / count for each in sums)
    perplexity = (math.exp(loss) if loss < 700 else math.inf) if objective.per_token else None
    metrics = objective.report(dict(zip(objective.metrics, means, strict=True)))
    seconds = time.perf_counter() - started
    return EvaluationRecord(at_step, epoch, loss, perplexity, len(units), trained_tokens, seconds, metrics)


@dataclass(frozen=True)
class Rhythm:
    """When to evaluate and save, in steps, and when to stop early."""

    eval_steps: int
    save_steps: int
    save_total_limit: int | None
    patience: int | None
    threshold: float


@dataclass(frozen=True)
class Watch:
    """Who is told of the run's progress. Every process calls these; those of rank 0 do something."""

    step: Callable[[StepRecord], None]
    evaluation: Callable[[EvaluationRecord], None]
    before_save: Callable[[], None]
    say: Callable[[str], None]


def run_steps(
    tuning: Tuning,
    plan: Plan,
    store: TokenStore,
    validation: tuple[TokenStore, np.ndarray] | None,
    rhythm: Rhythm,
    state: RunState,
    output: Path,
    adapter: AdapterWriter,
    watch: Watch,
) -> RunState:
    """From `state` to the end of the plan, or to early stopping. Returns the last state."""

    def save(state: RunState) -> None:
        random = random_tensors(tuning.group, tuning.model.device)
        if tuning.group.first:
            watch.before_save()
            names: dict[torch.Tensor, str] = {each: name for name, each in tuning.parameters.items()}
            write_checkpoint(output, state, adapter, optimizer_tensors(tuning.optimizer, names), random)
            rotate(output, rhythm.save_total_limit, state.best_step)

    def look(state: RunState) -> RunState:
        if validation is None:
            return state
        record = evaluate(at_step(tuning, state.step), *validation, state.step, plan.epoch_at(state.step))
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
    if state.step == 0:
        state = look(state)
    for units in plan.steps(state.step):
        if rhythm.patience is not None and state.evaluations_without_gain >= rhythm.patience:
            watch.say(f"stopping early: {rhythm.patience} evaluations brought no lower loss")
            break
        started = time.perf_counter()
        result = train_step(at_step(tuning, state.step), store, units)
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
                seconds=time.perf_counter() - started,
                peak_memory_bytes=peak_memory_bytes(tuning.model.device.type),
                metrics=result.metrics,
            )
        )
        last = state.step == plan.total_steps
        if state.step % rhythm.eval_steps == 0 or last:
            state = look(state)
        if state.step % rhythm.save_steps == 0 or last or state.best_step == state.step:
            save(state)
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
