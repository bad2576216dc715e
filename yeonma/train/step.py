"""The training step and the evaluation of a batch.

Every rank sends a share of the batch, balanced by tokens, through the model in micro-batches. If frozen weights are
sharded, each forward pass gathers them from all ranks, so all ranks must make the same number of passes. A rank with
fewer micro-batches makes idle passes over a few tokens, which change nothing. Every rank computes all of this by
itself, without communication.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice, zip_longest
from typing import Any

import numpy as np
import torch

from yeonma.batch.batch import Batch, Extras
from yeonma.batch.plan import MicroBatchBounds, micro_batches, shares
from yeonma.data.classification import as_confusion
from yeonma.errors import UserError
from yeonma.messages import tr
from yeonma.model.forest_support import in_eval_mode
from yeonma.model.logprobs import (
    ForestInputs,
    ForestSupport,
    batch_inputs,
    batch_logprobs,
    example_logprobs,
)
from yeonma.model.sharding import is_shard
from yeonma.model.transfer import to_device
from yeonma.run_folder.progress import EvaluationRecord
from yeonma.tokenization.dataset import numbered_rows
from yeonma.train.distributed import Processes, gather_bytes, sum_gradients, sum_over
from yeonma.train.full_weights import round_weights
from yeonma.train.interrupt import REASONS, Stop
from yeonma.train.label_accuracy import LabelTrial, label_scores
from yeonma.train.losses import (
    LOG_SQUARE,
    REFERENCE_LOGPROB,
    UNTRAINED,
    Carried,
    Objective,
    StepMeasure,
    Sums,
    answer_logprobs,
)
from yeonma.train.oom_retry import MicroBatchLimit

IDLE_TOKENS = 2


@dataclass(frozen=True)
class TrainState:
    """Everything that a training step reads and changes, apart from the batch."""

    model: Any
    """The transformers model with its LoRA layers."""
    support: ForestSupport
    parameters: Mapping[str, torch.nn.Parameter]
    """The trained parameters, by name: what the optimizer updates."""
    optimizer: torch.optim.Optimizer
    scheduler: Any
    by_metric: bool
    """Whether the schedule follows the validation loss instead of the step count."""
    max_grad_norm: float
    limit: MicroBatchLimit
    objective: Objective
    group: Processes
    stop: Stop = field(default_factory=Stop)
    sharded: bool = False
    """Whether frozen weights are sharded over the ranks."""
    name_rows: Callable[[Sequence[int]], str] = numbered_rows
    """Row numbers of a batch, for a message."""
    start: Mapping[str, torch.Tensor] = field(default_factory=dict)
    """The trained weights of the model as they were at the start, by name: the reference, for objectives that measure
    it. Empty for others."""
    starts_exactly: bool = True
    """Whether the model equals its reference in the first step: a new adapter does, and a continued one without
    dropout."""
    carried: dict[str, float] = field(default_factory=dict)
    """The numbers that the objective carries from step to step."""
    rounded: Mapping[str, torch.nn.Parameter] = field(default_factory=dict)
    """The model's weights, if `parameters` are float32 copies of them (`full_weights.py`); else empty."""
    evaluated_by: Objective | None = None
    """The objective of evaluations, if it is another: rows have no rewards of their own, but answers."""
    label_trials: Mapping[str, LabelTrial] = field(default_factory=dict)
    """What evaluations measure of the data sets whose answers are the labels of a classification."""

    @property
    def weights(self) -> Mapping[str, torch.nn.Parameter]:
        """The model's own trained weights, by name."""
        return self.rounded or self.parameters


@dataclass(frozen=True)
class StepResult:
    loss: float
    grad_norm: float
    learning_rate: float
    units: int
    tokens: int
    trained_tokens: int
    metrics: dict[str, float]


def train_step(
    state: TrainState,
    batch: Batch,
    prepared: NextStep | None = None,
    meanwhile: Callable[[], None] = lambda: None,
) -> StepResult:
    """One update. Every rank gets the whole batch and trains on its share.

    The host waits for the device once, when all is queued; just before it calls `meanwhile`. `prepared`: the result of
    `prepare_step` for a batch with the same examples.

    Raises UserError, before the update, if the loss or the gradient is not finite.
    """
    objective = state.objective
    count = objective.count(batch)
    batch = _with_step_extras(state, batch)

    def add_gradients() -> torch.Tensor:
        totals = torch.zeros(1 + len(objective.metrics), device=state.model.device)
        idle = [weight for weight in state.parameters.values() if not is_shard(weight)]
        for micro_pass in _passes(state, batch, prepared):
            loss_sum, metric_sums = _sums(state, objective.sums, micro_pass)
            with _no_gradient_from_idle(micro_pass, idle):
                (loss_sum / count).backward()
            totals += torch.cat([loss_sum.detach().reshape(1), metric_sums]) / count
            del loss_sum  # frees the graph, whose many small nodes would fragment memory
        return totals

    totals = state.limit.fit(add_gradients, batch, undo=partial(clear_gradients, state))
    totals = torch.cat([totals, to_device(state.stop.requests(), totals.device, totals.dtype)])
    totals = sum_gradients(state.group, state.parameters.values(), totals)
    grad_norm = torch.nn.utils.clip_grad_norm_(state.parameters.values(), state.max_grad_norm or math.inf)
    if is_shard(grad_norm):
        grad_norm = grad_norm.full_tensor()  # type: ignore[attr-defined]
    meanwhile()
    # in one transfer, because every read waits for the GPU
    numbers: list[float] = torch.cat([totals, grad_norm.detach().reshape(1).to(totals)]).tolist()
    *sums, norm = numbers
    loss, *means = sums[: -len(REASONS)]
    _check_finite(loss, norm, batch, state.name_rows)
    learning_rate = state.optimizer.param_groups[0]["lr"]
    state.optimizer.step()
    round_weights(state.parameters, state.rounded)
    if not state.by_metric:
        state.scheduler.step()
    clear_gradients(state)

    state.stop.agree(sums[-len(REASONS) :])
    means_by_name = dict(zip(objective.metrics, means, strict=True))
    if objective.carry is not None:
        state.carried.update(objective.carry(_carried(state), means_by_name, batch.unit_count))
    return StepResult(
        loss=loss,
        grad_norm=norm,
        learning_rate=learning_rate,
        units=batch.unit_count,
        tokens=int(batch.unit_lengths_U.sum()),
        trained_tokens=batch.trained_tokens,
        metrics=objective.report(means_by_name),
    )


def clear_gradients(state: TrainState) -> None:
    """Also those of a backward pass that ran out of memory before they were summed."""
    state.optimizer.zero_grad(set_to_none=True)
    for weight in state.rounded.values():
        weight.grad = None


def evaluate(
    state: TrainState, validation: Mapping[str, Batch], step: int, epoch: float
) -> EvaluationRecord | None:
    """The mean loss per trained token or per unit, without dropout, of each data set's validation rows and of all of
    them; where answers are labels, which of them are the most likely. Every rank evaluates its share.

    None if a rank abandoned the evaluation because the run is about to stop.
    """
    started = time.perf_counter()
    objective = state.evaluated_by or state.objective
    state = replace(state, objective=objective)
    sums_by_set: dict[str, list[float]] = {}
    confusions: dict[str, np.ndarray] = {}
    for name, batch in validation.items():
        trial = state.label_trials.get(name)
        measured = _sums_of_set(state, batch, trial)
        if measured is None:
            return None
        sums_by_set[name], logprob_E = measured
        if trial is not None:
            confusions[name] = trial.confusion(logprob_E)
    counts = [objective.count(batch) for batch in validation.values()]
    totals = [sum(column) for column in zip(*sums_by_set.values(), strict=True)]
    loss, *means = (total / sum(counts) for total in totals)
    losses = {name: sums[0] / count for (name, sums), count in zip(sums_by_set.items(), counts, strict=True)}
    perplexity = (math.exp(loss) if loss < 700 else math.inf) if objective.per_token else None
    return EvaluationRecord(
        step=step,
        epoch=epoch,
        loss=loss,
        perplexity=perplexity,
        examples=sum(batch.unit_count for batch in validation.values()),
        trained_tokens=sum(batch.trained_tokens for batch in validation.values()),
        seconds=time.perf_counter() - started,
        metrics={
            **objective.report(dict(zip(objective.metrics, means, strict=True))),
            **label_scores(confusions),
        },
        losses=losses if len(losses) > 1 else {},
        confusion={
            name: as_confusion(matrix, state.label_trials[name].labels) for name, matrix in confusions.items()
        },
    )


def _sums_of_set(
    state: TrainState, batch: Batch, trial: LabelTrial | None
) -> tuple[list[float], np.ndarray] | None:
    """The sums of loss and metrics over a batch and all ranks, and logprob_E of the trial's answers, which is empty
    without one; None if a rank abandoned the evaluation. The rows that are scored are read from the trial's batch."""
    objective, abandon = state.objective, _abandons(state)
    batch = _with_step_extras(state, batch, abandon)
    sums_of = objective.evaluation or objective.sums
    size = 1 + len(objective.metrics)

    def add_losses(batch: Batch, trial: LabelTrial | None) -> tuple[torch.Tensor, bool]:
        """The sums, followed by logprob_E."""
        totals = torch.zeros(size + (0 if trial is None else len(batch)), dtype=torch.float64)
        # read at the end, because every read waits for the GPU
        parts: list[torch.Tensor] = []
        labels: list[tuple[torch.Tensor, torch.Tensor]] = []

        def sums_and_labels(logprob_N: torch.Tensor, micro_batch: Batch) -> Sums:
            if trial is not None:
                logprob_E = trial.label_logprobs(logprob_N, micro_batch)
                labels.append((torch.from_numpy(micro_batch.index_E), logprob_E))
            return sums_of(logprob_N, micro_batch)

        for micro_pass in _passes(state, batch):
            if abandon():
                return totals, True
            loss_sum, metric_sums = _sums(state, sums_and_labels, micro_pass)
            parts.append(torch.cat([loss_sum.reshape(1), metric_sums]))
        for part in parts:
            totals[:size] += part.cpu()
        for index_E, logprob_E in labels:
            totals[size + index_E] = logprob_E.cpu()
        return totals, False

    with torch.no_grad(), in_eval_mode(state.model):
        if trial is None:
            totals, abandoned = state.limit.fit(partial(add_losses, batch, None), batch)
        else:
            totals, abandoned = state.limit.fit(partial(add_losses, trial.batch, trial), trial.batch)
            others = batch.select_units(trial.others)
            if not abandoned and others.unit_count:
                sums, abandoned = state.limit.fit(partial(add_losses, others, None), others)
                totals[:size] += sums
    totals = torch.cat([totals, totals.new_tensor([float(abandoned), *state.stop.requests()])])
    totals = sum_over(state.group, totals.to(state.model.device)).cpu()
    state.stop.agree(totals[-len(REASONS) :].tolist())
    if totals[-1 - len(REASONS)]:
        return None
    return totals[:size].tolist(), totals[size : -1 - len(REASONS)].numpy()


def _abandons(state: TrainState) -> Callable[[], bool]:
    """Whether this rank should abandon an evaluation now. With sharded weights, no rank can leave alone."""
    return lambda: not state.sharded and state.stop.is_urgent()


def _with_step_extras(state: TrainState, batch: Batch, abandon: Callable[[], bool] = lambda: False) -> Batch:
    """The batch with the extras that the objective carries or measures, so that every micro-batch has them. If
    `abandon` returns true on a rank, they must not be used."""
    extras = {name: np.full(len(batch), number) for name, number in _carried(state).items()}
    for measure in state.objective.measures:
        extras.update(_measured_extras(state, measure, batch, abandon))
    return batch.with_example_extras(extras) if extras else batch


def _carried(state: TrainState) -> Carried:
    """The numbers that go from step to step, as they are now."""
    return {**state.objective.start, **state.carried}


def _measured_extras(
    state: TrainState, measure: StepMeasure, batch: Batch, abandon: Callable[[], bool]
) -> Extras:
    """What follows from the answers that the step measures before its micro-batches. The model is its own reference if
    it is untrained."""
    answers = measure.examples(batch, state.objective.cutoff_len)
    logprob_E = _measured_logprobs(state, answers, abandon)
    if UNTRAINED in answers.example_extras:
        reference_E = logprob_E
    elif measure.with_reference:
        with _start_weights(state):
            reference_E = _measured_logprobs(state, answers, abandon)
    else:
        reference_E = answers.example_extras[REFERENCE_LOGPROB]
    return measure.extras(batch, logprob_E, reference_E)


def _measured_logprobs(state: TrainState, answers: Batch, abandon: Callable[[], bool]) -> np.ndarray:
    """logprob_E of the answers, without gradient and dropout, on every rank: float64. Every rank measures its share."""
    answers = replace(answers, index_E=np.arange(len(answers)))

    def measure_share() -> torch.Tensor:
        logprob_E = torch.zeros(len(answers), dtype=torch.float64, device=state.model.device)
        for micro_pass in _passes(state, answers):
            if abandon():
                break
            logprob_N = _logprobs(state, micro_pass)
            if len(micro_pass.batch):
                examples = to_device(micro_pass.batch.index_E, logprob_E.device)
                logprob_E[examples] = answer_logprobs(logprob_N, micro_pass.batch.trained_counts_E)
        return logprob_E

    with torch.no_grad(), in_eval_mode(state.model):
        share_E = state.limit.fit(measure_share, answers)
    return sum_over(state.group, share_E).cpu().numpy()


@contextmanager
def _start_weights(state: TrainState) -> Iterator[None]:
    """The trained parameters as they were at the start: the reference of the run."""
    now = {name: weight.data for name, weight in state.weights.items()}
    try:
        for name, weight in state.weights.items():
            weight.data = state.start[name]
        yield
    finally:
        for name, weight in state.weights.items():
            weight.data = now[name]


@dataclass(frozen=True)
class MicroBatchPass:
    """A micro-batch, empty if this rank has none left, and the number of idle passes to make after it."""

    batch: Batch
    idle_passes: int
    idle_token_ids: np.ndarray
    inputs: ForestInputs | None = None
    """Of the batch, if they are prepared already."""


@dataclass(frozen=True)
class RankInfo:
    """One of the ranks that share a batch."""

    rank: int
    count: int
    sharded: bool
    """Whether all ranks must make the same number of forward passes for each micro-batch."""


def micro_batch_passes(
    batch: Batch, bounds: MicroBatchBounds, ranks: RankInfo, by_forest: bool
) -> Iterator[MicroBatchPass]:
    """The micro-batches of one rank's share, which may be empty. Units are never split.

    `by_forest`: a micro-batch takes one forward pass, otherwise one for each example.
    """
    examples_U = np.bincount(batch.units_E, minlength=batch.unit_count)
    rank_units = shares(batch.unit_lengths_U.tolist(), ranks.count)

    def micro_batch_units(rank: int) -> list[np.ndarray]:
        units = np.array(rank_units[rank], dtype=np.int64)
        lengths = batch.unit_lengths_U[units].tolist()
        members = micro_batches(lengths, bounds.most_examples, bounds.most_tokens)
        return [units[indices] for indices in members if examples_U[units[indices]].any()]

    own = micro_batch_units(ranks.rank)
    idle = [0] * len(own)
    if ranks.sharded:
        passes = [
            [1 if by_forest else int(examples_U[units].sum()) for units in micro_batch_units(rank)]
            for rank in range(ranks.count)
        ]
        idle = idle_passes(passes, ranks.rank)
    idle_token_ids = batch.flat_token_ids[:0]
    if any(idle):
        start = int(batch.starts_E[0])
        idle_token_ids = batch.flat_token_ids[start : start + min(IDLE_TOKENS, int(batch.lengths_E[0]))]
    own += [np.zeros(0, dtype=np.int64)] * (len(idle) - len(own))
    for units, missing in zip(own, idle, strict=True):
        yield MicroBatchPass(batch.select_units(units), missing, idle_token_ids)


def idle_passes(passes: Sequence[Sequence[int]], rank: int) -> list[int]:
    """The number of idle passes that a rank makes after each micro-batch. `passes`: every rank's forward passes for
    each of its micro-batches."""
    needed = [max(column) for column in zip_longest(*passes, fillvalue=0)]
    own = [*passes[rank], *[0] * (len(needed) - len(passes[rank]))]
    return [total - count for total, count in zip(needed, own, strict=True)]


def pass_logprobs(
    model: Any,
    support: ForestSupport,
    micro_pass: MicroBatchPass,
    share_prefix: bool,
    squares: bool = False,
) -> torch.Tensor:
    """logprob_N of the micro-batch's trained tokens, example by example; `squares` as in `batch_logprobs`. For an empty
    micro-batch, an empty tensor that is connected to the idle passes' graph."""
    batch, parts = micro_pass.batch, []
    if len(batch):
        inputs = micro_pass.inputs
        parts.append(
            batch_logprobs(model, support, batch, share_prefix=share_prefix, squares=squares, inputs=inputs)
        )
    token_ids = micro_pass.idle_token_ids
    for _ in range(micro_pass.idle_passes):
        idle = example_logprobs(
            model,
            support,
            [token_ids],
            [np.arange(len(token_ids)) > 0],
            share_prefix=False,
            squares=squares,
        )
        parts.append(idle[..., :0])
    return torch.cat(parts, dim=-1) if len(parts) > 1 else parts[0]


@dataclass(frozen=True)
class NextStep:
    """A step's batch, and what its first micro-batch needs on the device, prepared before the step begins."""

    batch: Batch
    bounds: MicroBatchBounds
    inputs: ForestInputs | None
    """Of a micro-batch within these bounds; None if this rank has none."""


def prepare_step(state: TrainState, batch: Batch) -> NextStep:
    """All that a step can compute before the one before it has ended, without waiting for the device."""
    bounds, inputs = state.limit.bounds, None
    first = next(_passes(state, batch), None)
    if first is not None and len(first.batch):
        with suppress(torch.OutOfMemoryError):  # the step itself will halve its micro-batches
            inputs = batch_inputs(state.model, state.support, first.batch, share_prefix=bounds.share_prefix)
    return NextStep(batch, bounds, inputs)


def _passes(state: TrainState, batch: Batch, prepared: NextStep | None = None) -> Iterator[MicroBatchPass]:
    ranks = RankInfo(state.group.rank, state.group.count, state.sharded)
    passes = micro_batch_passes(batch, state.limit.bounds, ranks, state.support.forest)
    if prepared is not None and prepared.bounds == state.limit.bounds:
        yield from (replace(first, inputs=prepared.inputs) for first in islice(passes, 1))
    yield from passes


def _logprobs(state: TrainState, micro_pass: MicroBatchPass, *, squares: bool = False) -> torch.Tensor:
    return pass_logprobs(state.model, state.support, micro_pass, state.limit.bounds.share_prefix, squares)


def _sums(
    state: TrainState, sums_of: Callable[[torch.Tensor, Batch], Sums], micro_pass: MicroBatchPass
) -> Sums:
    """The sums of a micro-batch; in evaluations they are computed in float64."""
    batch, reads_squares = micro_pass.batch, state.objective.reads_squares
    logprob_N = _logprobs(state, micro_pass, squares=reads_squares)
    if not torch.is_grad_enabled():
        logprob_N = logprob_N.double()
    if reads_squares:
        logprob_N, log_square_N = logprob_N
        batch = batch.with_token_extras({LOG_SQUARE: log_square_N.detach().double().cpu().numpy()})
    if len(batch):
        return sums_of(logprob_N, batch)
    return logprob_N.sum(), logprob_N.new_zeros(len(state.objective.metrics))


@contextmanager
def _no_gradient_from_idle(
    micro_pass: MicroBatchPass, parameters: Iterable[torch.nn.Parameter]
) -> Iterator[None]:
    """Removes the zero gradients that idle passes alone would create: the optimizer would update parameters that have a
    gradient of zero, but not those without one."""
    no_gradient = [] if len(micro_pass.batch) else [weight for weight in parameters if weight.grad is None]
    yield
    for weight in no_gradient:
        weight.grad = None


def _check_finite(
    loss: float, grad_norm: float, batch: Batch, name_rows: Callable[[Sequence[int]], str]
) -> None:
    if math.isfinite(loss) and math.isfinite(grad_norm):
        return
    raise UserError(
        tr(
            "the loss is {loss} and the gradient norm {grad_norm}; the weights are as before this step",
            loss=loss,
            grad_norm=grad_norm,
        ),
        place=name_rows(sorted(set(batch.rows_E.tolist()))),
        cure=tr("check these rows, lower learning_rate, or use --dtype float32"),
    )


def micro_batch_limits(state: TrainState) -> tuple[list[int], list[int]]:
    """(units, tokens): the largest micro-batch of every rank, in order of rank. `tokens` is empty unless
    `micro_batch_tokens` is auto."""
    bounds = state.limit.bounds
    limits = torch.tensor([bounds.most_examples, bounds.most_tokens or 0]).view(torch.uint8)
    all_limits = [gathered.view(torch.int64).tolist() for gathered in gather_bytes(state.group, limits)]
    tokens = [max_tokens for _, max_tokens in all_limits] if state.limit.by_tokens else []
    return [max_units for max_units, _ in all_limits], tokens
