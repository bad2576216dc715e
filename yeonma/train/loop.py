"""The training step, visible on one screen, and the run around it.

One loop for every objective: what differs is the function from log-probabilities to sums. A step is made of units:
examples, or the pairs of preference data.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from yeonma.errors import UserError
from yeonma.model.check import in_eval_mode
from yeonma.model.forward import Forward
from yeonma.tokens.cache import TokenStore
from yeonma.tokens.plan import Plan
from yeonma.train.checkpoint import AdapterWriter, RunState, rotate, write_checkpoint
from yeonma.train.distributed import Processes, gather_bytes, sum_gradients, sum_over
from yeonma.train.objectives import Objective, Sums
from yeonma.train.optimizers import optimizer_tensors
from yeonma.train.progress import EvaluationRecord, StepRecord, peak_memory_bytes
from yeonma.train.room import Room
from yeonma.train.stop import REASONS, Stop
from yeonma.train.turns import Company, Turn, turn_logprobs, turns, unless_idle


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
    room: Room
    objective: Objective
    group: Processes
    stop: Stop = field(default_factory=Stop)
    sharded: bool = False
    """Frozen weights are shared out: every process makes the same passes through the model, or all stop."""


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

    def gradients() -> torch.Tensor:
        totals = torch.zeros(1 + len(objective.metrics), device=tuning.model.device)
        for turn in _my_turns(tuning, store, units, store.trained_of):
            loss_sum, metric_sums = _sums(tuning, store, turn, _logprobs(tuning, store, turn, units), point)
            with unless_idle(turn, tuning.parameters.values()):
                (loss_sum / count).backward()
            totals += torch.cat([loss_sum.detach().reshape(1), metric_sums]) / count
            del loss_sum  # and the graph with it, whose many small nodes would lie between the next tensors
        return totals

    totals = tuning.room.fit(gradients, store, units, undo=tuning.optimizer.zero_grad)
    totals = torch.cat([totals, totals.new_tensor(tuning.stop.wishes())])
    totals = sum_gradients(tuning.group, tuning.parameters.values(), totals)
    grad_norm = torch.nn.utils.clip_grad_norm_(tuning.parameters.values(), tuning.max_grad_norm or math.inf)
    _check_finite(totals[0], grad_norm, store, examples)
    objective.settle()
    learning_rate = tuning.optimizer.param_groups[0]["lr"]
    tuning.optimizer.step()
    if not tuning.by_metric:
        tuning.scheduler.step()
    tuning.optimizer.zero_grad(set_to_none=True)

    sums: list[float] = totals.tolist()  # at once: on a GPU each reading waits for it
    loss, *means = sums[: -len(REASONS)]
    tuning.stop.agree(sums[-len(REASONS) :])
    tokens = int(store.unit_lengths[units].sum())
    metrics = objective.report(dict(zip(objective.metrics, means, strict=True)))
    return StepResult(loss, float(grad_norm), learning_rate, len(units), tokens, trained_tokens, metrics)


def at_step(tuning: Tuning, step: int) -> Tuning:
    """With the objective of what comes after so many updates."""
    first = tuning.objective.at_start
    return tuning if step or first is None else replace(tuning, objective=first)


def rooms(tuning: Tuning) -> tuple[list[int], list[int]]:
    """What each process takes through the model at once, at most, by rank: units, and tokens where those are its own
    choice."""
    micro = tuning.room.micro
    mine = torch.tensor([micro.most_examples, micro.most_tokens or 0]).view(torch.uint8)
    found = [each.view(torch.int64).tolist() for each in gather_bytes(tuning.group, mine)]
    return [each[0] for each in found], [each[1] for each in found] if tuning.room.by_tokens else []


def forward_alone(tuning: Tuning, store: TokenStore, units: np.ndarray) -> None:
    """A step's forward passes as training makes them, told to the objective; no weight and no gradient changes."""

    def forward() -> None:
        for turn in _my_turns(tuning, store, units, store.trained_of):
            _sums(tuning, store, turn, _logprobs(tuning, store, turn, units), None)

    tuning.room.fit(forward, store, units)
    tuning.objective.settle()


def _measured(
    tuning: Tuning, store: TokenStore, units: np.ndarray, leave: Callable[[], bool] = lambda: False
) -> torch.Tensor | None:
    """The mean that the objective wants of all the step's units before any is trained, dropout off; None for none.

    Not to be used where `leave` said to go.
    """
    measure = tuning.objective.measure
    if measure is None:
        return None

    def mine() -> torch.Tensor:
        total = torch.zeros(1, dtype=torch.float64, device=tuning.model.device)
        for turn in _my_turns(tuning, store, units, store.measured_of):
            if leave():
                break
            logprobs = _logprobs(tuning, store, turn, units)
            if len(turn.examples):
                total += measure(logprobs.double(), store, turn.examples)
        return total

    with torch.no_grad(), in_eval_mode(tuning.model):
        total = tuning.room.fit(mine, store, units)
    return sum_over(tuning.group, total)[0] / max(1, len(store.measured_of(units)))


def _my_turns(
    tuning: Tuning, store: TokenStore, units: np.ndarray, examples_of: Callable[[np.ndarray], np.ndarray]
) -> list[Turn]:
    company = Company(tuning.group.rank, tuning.group.count, tuning.sharded)
    return turns(store, units, examples_of, tuning.room.micro, company, tuning.how.forest)


def _logprobs(tuning: Tuning, store: TokenStore, turn: Turn, units: np.ndarray) -> torch.Tensor:
    spare = int(store.trained_of(units[:1])[0])
    return turn_logprobs(tuning.model, tuning.how, store, turn, spare, tuning.room.micro.share_prefix)


def _sums(
    tuning: Tuning, store: TokenStore, turn: Turn, logprob_N: torch.Tensor, point: torch.Tensor | None
) -> Sums:
    if len(turn.examples):
        return tuning.objective.sums(logprob_N, store, turn.examples, point)
    return logprob_N.sum(), logprob_N.new_zeros(len(tuning.objective.metrics))


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
) -> EvaluationRecord | None:
    """Mean loss over some units' trained tokens, or over the units, dropout off; every process looks at its share.

    None where a process has left it unfinished, because the run is to stop.
    """
    started = time.perf_counter()
    objective = tuning.objective

    def hurry() -> bool:
        return not tuning.sharded and tuning.stop.hurry()  # sharded, no process can leave the others alone

    point = _measured(tuning, store, units, hurry)

    def mine() -> tuple[torch.Tensor, bool]:
        totals = torch.zeros(1 + len(objective.metrics), dtype=torch.float64)
        for turn in _my_turns(tuning, store, units, store.trained_of):
            if hurry():
                return totals, True
            logprobs = _logprobs(tuning, store, turn, units).double()
            loss_sum, metric_sums = _sums(tuning, store, turn, logprobs, point)
            totals += torch.cat([loss_sum.reshape(1), metric_sums]).cpu()
        return totals, False

    tuning.model.eval()
    with torch.no_grad():
        totals, left = tuning.room.fit(mine, store, units)
    tuning.model.train()
    trained_tokens = int(store.trained_counts[store.trained_of(units)].sum())
    count = trained_tokens if objective.per_token else len(units)
    totals = torch.cat([totals, totals.new_tensor([float(left), *tuning.stop.wishes()])])
    sums: list[float] = sum_over(tuning.group, totals.to(tuning.model.device)).tolist()
    tuning.stop.agree(sums[-len(REASONS) :])
    if sums[-1 - len(REASONS)]:
        return None
    objective.settle()
    loss, *means = (each / count for each in sums[: -1 - len(REASONS)])
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

    step: Callable[[StepRecord, list[int]], None]  # with the rows that it was trained on
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
    """From `state` to the end of the plan, to early stopping, or to where `tuning.stop` is agreed on. Returns the last
    state; all but one before the first step is saved by then."""
    stop = tuning.stop

    def save(state: RunState) -> None:
        started = time.perf_counter()
        random = random_tensors(tuning.group, tuning.model.device)
        counts, tokens = rooms(tuning)
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
        record = evaluate(at_step(tuning, state.step), *validation, state.step, plan.epoch_at(state.step))
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
        result = train_step(at_step(tuning, state.step), store, units)
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
