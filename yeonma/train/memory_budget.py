"""Resolves `auto` for `micro_batch_tokens` and `gradient_checkpointing` against free memory.

The run's heaviest micro-batch is traced without weights, for one token budget after another, until it fits. The chosen
budget is tried on that micro-batch before the first step, and every checkpoint records it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch

from yeonma.batch.batch import Batch
from yeonma.batch.micro_batches import survey_micro_batches
from yeonma.batch.plan import MicroBatchBounds, Plan
from yeonma.config.settings import Checkpointing, ModelSettings, Optimizer, RunConfig, StepSettings
from yeonma.errors import Log, Problem, UserError
from yeonma.messages import tr
from yeonma.model import load
from yeonma.platforms import free_host_memory
from yeonma.tokenization.store import TokenStore
from yeonma.train.distributed import Processes, gather_bytes
from yeonma.train.memory_parts import MemorySetup, memory_of, memory_setup, optimizer_bytes
from yeonma.train.prepare import Prepared
from yeonma.train.target_device import TargetDevice, target_device

if TYPE_CHECKING:
    from yeonma.model.memory_trace import Blueprint
    from yeonma.train.step import TrainState

MAX_TOKENS = {"cpu": 2048, "cuda": 32768}
"""Larger micro-batches are no faster."""
FULL_SPEED_TOKENS = 2048
"""Matrix products reach their full speed at this size. Activations are recomputed only to get there."""
MEMORY_SHARE = {"cpu": 0.5, "cuda": 0.9}
"""The share of free memory to use. The CPU's heap is fragmented, so it gets less."""
CHECKPOINTING_LEVELS: tuple[Checkpointing, ...] = (False, "selective", True)
"""From the fastest to the one with the smallest memory use."""

CURE = tr("give micro_batch_tokens a number and gradient_checkpointing true or false")


def micro_batching(step: StepSettings) -> MicroBatchBounds:
    """The bounds from the settings, in which `resolve_auto` must have replaced `auto`."""
    assert step.micro_batch_tokens != "auto"
    return MicroBatchBounds(step.micro_batch_size, step.micro_batch_tokens, step.share_prefix)


def checkpointing(model: ModelSettings) -> Checkpointing:
    """The setting, in which `resolve_auto` must have replaced `auto`."""
    assert model.gradient_checkpointing != "auto"
    return model.gradient_checkpointing


def resolve_auto(
    config: RunConfig,
    source: load.BaseSource,
    prepared: Prepared,
    group: Processes,
    log: Log,
    *,
    target: TargetDevice | None = None,
    processes: int | None = None,
    earlier_tokens: int | None = None,
    free: int | None = None,
) -> RunConfig:
    """The settings with values in place of `auto`. All processes get the values of the one with the least free memory.

    `target`: the device of the run, by default the one of the settings. `processes`: the size of the run, if it is not
    that of `group`. `earlier_tokens`: this process's token budget in the checkpoint that the run resumes from; it is
    kept, so that sums are formed in the same order. `free`: free memory in bytes, by default what is measured, or all
    of a GPU that is not here. Raises UserError if free memory is unknown, or if the model cannot be traced.
    """
    model, step = config.model, config.step
    if "auto" not in (step.micro_batch_tokens, model.gradient_checkpointing):
        return config
    target = target or target_device(model.device)
    if free is None:
        free = free_memory(target.device) if target.gpu is None else target.gpu.memory_bytes
    if free is None:
        raise UserError(tr("how much memory is free is not known on this system"), place="auto", cure=CURE)
    processes = processes or group.count
    kind = target.device.type
    bounds = MicroBatchBounds(step.batch_size, None, step.share_prefix)
    inputs = _BudgetInputs(
        plan=prepared.plan,
        store=prepared.dataset.train.store,
        setup=memory_setup(config, source, prepared, target, processes, False, bounds),
        available_bytes=int(MEMORY_SHARE[kind] * free),
        max_tokens=MAX_TOKENS[kind],
    )
    requested = model.gradient_checkpointing
    levels = CHECKPOINTING_LEVELS if requested == "auto" else (requested,)
    try:
        if step.micro_batch_tokens != "auto":
            level, tokens = _choose_level(inputs, levels, micro_batching(step)), 0
        else:
            level, tokens = _choose_level_and_tokens(inputs, levels, step, earlier_tokens)
    except UserError as error:
        problems = [Problem(problem.what, problem.place, problem.cure or CURE) for problem in error.problems]
        raise UserError(problems) from error
    level, common_tokens = _agree(group, level, tokens)
    tokens = earlier_tokens or common_tokens
    log(_summary(level, tokens, free))
    if tokens:
        step = replace(step, micro_batch_size=step.batch_size, micro_batch_tokens=tokens)
    return replace(config, model=replace(model, gradient_checkpointing=level), step=step)


def one_sequence_at_a_time(config: RunConfig) -> RunConfig:
    """The settings without a token budget, for a model that cannot be trained on forests."""
    return replace(config, step=replace(config.step, micro_batch_size=1, micro_batch_tokens=None))


@dataclass(frozen=True)
class _BudgetInputs:
    """What decides how large a micro-batch may be."""

    plan: Plan
    store: TokenStore
    setup: MemorySetup
    """Its checkpointing level and its bounds are replaced by those that are tried."""
    available_bytes: int
    max_tokens: int


def _blueprint_or_none(inputs: _BudgetInputs, level: Checkpointing) -> Blueprint | None:
    """None for a model that does not support the checkpointing level."""
    try:
        return replace(inputs.setup, gradient_checkpointing=level).blueprint()
    except UserError:
        if not level:
            raise
        return None


def _fits(inputs: _BudgetInputs, model: Blueprint, level: Checkpointing, bounds: MicroBatchBounds) -> bool:
    """Whether training with these micro-batches fits beside what this process has in memory already."""
    from yeonma.model.memory_trace import trace  # imports transformers' models

    setup = replace(inputs.setup, gradient_checkpointing=level, micro=bounds)
    batches = survey_micro_batches(inputs.plan, inputs.store, bounds, setup.processes)
    traced = trace(model, batches.heaviest, has_gradients=batches.several)
    memory = memory_of(setup, model, batches, traced, process=0, steps=inputs.plan.total_steps)
    return memory.training <= inputs.available_bytes


def _choose_level(
    inputs: _BudgetInputs, levels: tuple[Checkpointing, ...], bounds: MicroBatchBounds
) -> Checkpointing:
    """The first level at which the micro-batches fit into memory, else the last one."""
    for level in levels[:-1]:
        model = _blueprint_or_none(inputs, level)
        if model is not None and _fits(inputs, model, level, bounds):
            return level
    return levels[-1]


def _choose_level_and_tokens(
    inputs: _BudgetInputs,
    levels: tuple[Checkpointing, ...],
    step: StepSettings,
    earlier_tokens: int | None,
) -> tuple[Checkpointing, int]:
    """The first level at which a micro-batch of full speed fits, with the largest budget that fits.

    If there is none, the last level with what fits there; if nothing does, the trial before the first step reports it.
    """
    longest, largest_step = int(inputs.plan.lengths.max()), _largest_step_tokens(inputs)
    sufficient = min(largest_step, max(longest, FULL_SPEED_TOKENS), inputs.max_tokens)
    tokens, level = longest, levels[-1]
    for level in levels:
        model = _blueprint_or_none(inputs, level)
        if model is None:
            continue
        candidates = token_budgets(min(largest_step, inputs.max_tokens), longest)
        for tokens in [earlier_tokens] if earlier_tokens else candidates:
            bounds = MicroBatchBounds(step.batch_size, tokens, step.share_prefix)
            if _fits(inputs, model, level, bounds):
                if earlier_tokens or tokens >= sufficient:
                    return level, tokens
                break
    return level, earlier_tokens or tokens


def _largest_step_tokens(inputs: _BudgetInputs) -> int:
    """The most tokens that one process may have in a step: those of the longest rows."""
    count = -(-inputs.plan.batch_size // inputs.setup.processes)
    return int(np.sort(inputs.plan.lengths)[::-1][:count].sum())


def token_budgets(largest: int, smallest: int) -> Iterator[int]:
    """Budgets to try, from `largest` down to `smallest`, each about 3/4 of the one before."""
    tokens, use_two_thirds = max(largest, smallest), False
    while tokens > smallest:
        yield tokens
        tokens = tokens * 2 // 3 if use_two_thirds else tokens * 3 // 4
        use_two_thirds = not use_two_thirds
    yield smallest


def _agree(group: Processes, level: Checkpointing, tokens: int) -> tuple[Checkpointing, int]:
    """The slowest level and the smallest budget that any process chose."""
    choice = torch.tensor([CHECKPOINTING_LEVELS.index(level), tokens]).view(torch.uint8)
    choices = [gathered.view(torch.int64).tolist() for gathered in gather_bytes(group, choice)]
    return CHECKPOINTING_LEVELS[max(index for index, _ in choices)], min(budget for _, budget in choices)


def _summary(level: Checkpointing, tokens: int, free: int) -> str:
    treatment = {
        False: tr("activations are kept"),
        "selective": tr("activations are recomputed in every other layer"),
        True: tr("activations are recomputed"),
    }[level]
    if not tokens:
        return tr("{free:.1f} GB free: {treatment}", free=free / 1e9, treatment=treatment)
    return tr(
        "{free:.1f} GB free: at most {tokens:,} tokens at once; {treatment}",
        free=free / 1e9,
        tokens=tokens,
        treatment=treatment,
    )


def try_heaviest(state: TrainState, plan: Plan, store: TokenStore, optimizer: Optimizer) -> None:
    """Runs the heaviest micro-batch forward and backward, with smaller bounds if memory runs out. Changes no weight,
    but advances the random state.

    Raises UserError if the longest row alone does not fit.
    """
    from yeonma.model.logprobs import trained_logprobs
    from yeonma.model.train_mode import train_adapter  # imports PEFT
    from yeonma.train.step import clear_gradients

    averages_bytes = optimizer_bytes(optimizer, (weight.numel() for weight in state.parameters.values()))
    device = state.model.device

    def forward_and_backward() -> None:
        averages = torch.empty(averages_bytes, dtype=torch.uint8, device=device)  # from the first step
        forest = survey_micro_batches(plan, store, state.limit.bounds, state.group.count).heaviest
        trained_logprobs(state.model, forest, state.support.head, state.support.capability).sum().backward()
        del averages

    train_adapter(state.model)
    undo = partial(clear_gradients, state)
    state.limit.fit(forward_and_backward, Batch.from_store(store, plan.positions), undo=undo)
    clear_gradients(state)


def free_memory(device: torch.device) -> int | None:
    """Bytes that this process can still allocate on a device; None if the system does not report it."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    return free_host_memory()
