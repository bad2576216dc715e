"""What goes through the model at once, in this process, turn by turn; and the idle passes that sharding needs.

Where frozen weights are sharded, every forward pass gathers them from all processes, so all must make equally many.
Shares are balanced by tokens, not by counts: a process with fewer micro-batches than another, or with none, makes up
for it by passes over a few tokens, which change nothing. Every process works this out for all; nothing is communicated.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any

import numpy as np
import torch

from yeonma.batch.plan import MicroBatchBounds, micro_batches, shares
from yeonma.errors import UserError
from yeonma.model.forest_support import in_eval_mode
from yeonma.model.logprobs import ForestSupport, example_logprobs
from yeonma.run_folder.progress import EvaluationRecord
from yeonma.tokenization.store import TokenStore
from yeonma.train.distributed import Processes, gather_bytes, sum_gradients, sum_over
from yeonma.train.interrupt import REASONS, Stop
from yeonma.train.losses import Objective, Sums
from yeonma.train.oom_retry import MicroBatchLimit

IDLE_TOKENS = 2


@dataclass(frozen=True)
class MicroBatchPass:
    """The examples of one micro-batch, none where this process only keeps the others company; then idle passes."""

    examples: np.ndarray
    idle: int = 0


@dataclass(frozen=True)
class RankInfo:
    """The processes that share a step, and what they must do alike."""

    rank: int
    count: int
    sharded: bool
    """Whether all must make the same number of forward passes, in every turn."""


def micro_batch_passes(
    store: TokenStore,
    units: np.ndarray,
    examples_of: Callable[[np.ndarray], np.ndarray],
    micro: MicroBatchBounds,
    company: RankInfo,
    by_forest: bool,
) -> list[MicroBatchPass]:
    """This process's share of the units, as the examples that go through the model at once; empty where it has none.

    `by_forest`: a micro-batch is one pass; otherwise each of its examples is.
    """
    split = shares(store.unit_lengths[units].tolist(), company.count)

    def of(rank: int) -> list[np.ndarray]:
        mine = units[split[rank]]
        batches = micro_batches(store.unit_lengths[mine].tolist(), micro.most_examples, micro.most_tokens)
        return [found for members in batches if len(found := examples_of(mine[members]))]

    if not company.sharded:
        return [MicroBatchPass(examples) for examples in of(company.rank)]
    mine, *others = (of(rank) for rank in (company.rank, *range(company.count)))
    passes = [[1 if by_forest else len(examples) for examples in each] for each in others]
    idle = idle_passes(passes, company.rank)
    mine += [np.zeros(0, dtype=np.int64)] * (len(idle) - len(mine))
    return [MicroBatchPass(examples, more) for examples, more in zip(mine, idle, strict=True)]


def idle_passes(passes: Sequence[Sequence[int]], rank: int) -> list[int]:
    """Passes that process `rank` lacks in each turn; `passes` are those of every process in its own turns."""
    most = [max(column) for column in zip_longest(*passes, fillvalue=0)]
    own = [*passes[rank], *[0] * (len(most) - len(passes[rank]))]
    return [wanted - there for wanted, there in zip(most, own, strict=True)]


def pass_logprobs(
    model: torch.nn.Module,
    how: ForestSupport,
    store: TokenStore,
    turn: MicroBatchPass,
    spare: int,
    share_prefix: bool,
) -> torch.Tensor:
    """logprob_N of the turn's examples, as `example_logprobs` gives them; empty, and with a gradient that is 0, where
    the turn is idle alone. `spare`: an example of the step, whose first tokens serve for idle passes where the turn has
    none of its own.
    """
    examples = [store.example(int(position)) for position in turn.examples]
    passes = []
    if examples:
        passes.append(
            example_logprobs(
                model,
                how,
                [each.token_ids for each in examples],
                [each.trained for each in examples],
                share_prefix=share_prefix,
                units=store.units[turn.examples],
            )
        )
    few = (examples[0] if examples else store.example(spare)).token_ids[:IDLE_TOKENS]
    for _ in range(turn.idle):
        idle = example_logprobs(model, how, [few], [np.arange(len(few)) > 0], share_prefix=False)
        passes.append(idle[:0])
    return torch.cat(passes) if len(passes) > 1 else passes[0]


@contextmanager
def unless_idle(turn: MicroBatchPass, parameters: Iterable[torch.nn.Parameter]) -> Iterator[None]:
    """A backward pass inside gives no parameter a gradient in a turn that is idle alone: one that has none stays so,
    and the optimizer leaves it alone, as it would without the turn."""
    without = [] if len(turn.examples) else [each for each in parameters if each.grad is None]
    yield
    for each in without:
        each.grad = None


@dataclass(frozen=True)
class TrainState:
    """What a step acts on: the model, the way through it, and what is trained how."""

    model: Any  # the transformers model, its LoRA layers in place
    how: ForestSupport
    parameters: Mapping[str, torch.nn.Parameter]
    optimizer: torch.optim.Optimizer
    scheduler: Any
    by_metric: bool  # the schedule follows a loss instead of the step count
    max_grad_norm: float
    room: MicroBatchLimit
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


def train_step(tuning: TrainState, store: TokenStore, units: np.ndarray) -> StepResult:
    """One update over some units of the store. Raises UserError, before the update, if the loss or the gradient is
    not finite."""
    objective, examples = tuning.objective, store.trained_of(units)
    trained_tokens = int(store.trained_counts[examples].sum())
    count = trained_tokens if objective.per_token else len(units)

    point = _measured(tuning, store, units)

    def gradients() -> torch.Tensor:
        totals = torch.zeros(1 + len(objective.metrics), device=tuning.model.device)
        for turn in _my_passes(tuning, store, units, store.trained_of):
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


def micro_batch_limits(tuning: TrainState) -> tuple[list[int], list[int]]:
    """What each process takes through the model at once, at most, by rank: units, and tokens where those are its own
    choice."""
    micro = tuning.room.micro
    mine = torch.tensor([micro.most_examples, micro.most_tokens or 0]).view(torch.uint8)
    found = [each.view(torch.int64).tolist() for each in gather_bytes(tuning.group, mine)]
    return [each[0] for each in found], [each[1] for each in found] if tuning.room.by_tokens else []


def _measured(
    tuning: TrainState, store: TokenStore, units: np.ndarray, leave: Callable[[], bool] = lambda: False
) -> torch.Tensor | None:
    """The mean that the objective wants of all the step's units before any is trained, dropout off; None for none.

    Not to be used where `leave` said to go.
    """
    measure = tuning.objective.measure
    if measure is None:
        return None

    def mine() -> torch.Tensor:
        total = torch.zeros(1, dtype=torch.float64, device=tuning.model.device)
        for turn in _my_passes(tuning, store, units, store.measured_of):
            if leave():
                break
            logprobs = _logprobs(tuning, store, turn, units)
            if len(turn.examples):
                total += measure(logprobs.double(), store, turn.examples)
        return total

    with torch.no_grad(), in_eval_mode(tuning.model):
        total = tuning.room.fit(mine, store, units)
    return sum_over(tuning.group, total)[0] / max(1, len(store.measured_of(units)))


def _my_passes(
    tuning: TrainState, store: TokenStore, units: np.ndarray, examples_of: Callable[[np.ndarray], np.ndarray]
) -> list[MicroBatchPass]:
    company = RankInfo(tuning.group.rank, tuning.group.count, tuning.sharded)
    return micro_batch_passes(store, units, examples_of, tuning.room.micro, company, tuning.how.forest)


def _logprobs(tuning: TrainState, store: TokenStore, turn: MicroBatchPass, units: np.ndarray) -> torch.Tensor:
    spare = int(store.trained_of(units[:1])[0])
    return pass_logprobs(tuning.model, tuning.how, store, turn, spare, tuning.room.micro.share_prefix)


def _sums(
    tuning: TrainState,
    store: TokenStore,
    turn: MicroBatchPass,
    logprob_N: torch.Tensor,
    point: torch.Tensor | None,
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
    tuning: TrainState, store: TokenStore, units: np.ndarray, step: int, epoch: float
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
        for turn in _my_passes(tuning, store, units, store.trained_of):
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
    loss, *means = (each / count for each in sums[: -1 - len(REASONS)])
    perplexity = (math.exp(loss) if loss < 700 else math.inf) if objective.per_token else None
    metrics = objective.report(dict(zip(objective.metrics, means, strict=True)))
    seconds = time.perf_counter() - started
    return EvaluationRecord(step, epoch, loss, perplexity, len(units), trained_tokens, seconds, metrics)
