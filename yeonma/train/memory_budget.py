"""Resolves `auto` for `micro_batch_tokens` and `gradient_checkpointing` against free memory.

The run's heaviest micro-batch is traced without weights, for one token budget after another, until it fits. The chosen
budget is tried on that micro-batch before the first step, and every checkpoint records it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from yeonma.batch.batch import Batch
from yeonma.batch.micro_batches import survey_micro_batches
from yeonma.batch.plan import MicroBatchBounds, Plan
from yeonma.config.settings import Checkpointing, ModelSettings, RunConfig, StepSettings
from yeonma.errors import Log, Problem, UserError
from yeonma.model import load
from yeonma.model.quantized import multiplies_fp8
from yeonma.tokenization.store import TokenStore
from yeonma.train.distributed import Processes, gather_bytes
from yeonma.train.prepare import Prepared, lora_shape, train_dtype

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

CURE = "give micro_batch_tokens a number and gradient_checkpointing true or false"


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
    processes: int | None = None,
    earlier_tokens: int | None = None,
    free: int | None = None,
) -> RunConfig:
    """The settings with values in place of `auto`. All processes get the values of the one with the least free memory.

    `processes`: the size of the run, if it is not that of `group`. `earlier_tokens`: this process's token budget in the
    checkpoint that the run resumes from; it is kept, so that sums are formed in the same order. `free`: free memory in
    bytes, measured by default. Raises UserError if free memory is unknown, or if the model cannot be traced.
    """
    model, step = config.model, config.step
    if "auto" not in (step.micro_batch_tokens, model.gradient_checkpointing):
        return config
    device = load.pick_device(model.device)
    free = free_memory(device) if free is None else free
    if free is None:
        raise UserError("how much memory is free is not known on this system", place="auto", cure=CURE)
    processes = processes or group.count
    inputs = _BudgetInputs(
        plan=prepared.plan,
        store=prepared.dataset.train.store,
        blueprint_at=_blueprint_function(config, source, prepared, device),
        available_bytes=int(MEMORY_SHARE[device.type] * free),
        max_tokens=MAX_TOKENS[device.type],
        processes=processes,
        sharded=model.shard and processes > 1,
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
    blueprint_at: Callable[[Checkpointing], Blueprint]
    """The model without weights, at a checkpointing level. Raises UserError if the model does not support it."""
    available_bytes: int
    max_tokens: int
    processes: int
    sharded: bool


def _blueprint_function(
    config: RunConfig, source: load.BaseSource, prepared: Prepared, device: torch.device
) -> Callable[[Checkpointing], Blueprint]:
    model = config.model

    def blueprint_at(level: Checkpointing) -> Blueprint:
        from yeonma.policy import blueprint  # imports PEFT

        return blueprint(
            prepared.config,
            train_dtype(model, device),
            None
            if model.train == "full"
            else prepared.adapter or lora_shape(config.lora, prepared.new_token_ids),
            quantization=model.quantization,
            by_device=multiplies_fp8(device),
            trust_remote_code=source.trust_remote_code,
            gradient_checkpointing=level,
            device=device,
        )

    return blueprint_at


def _blueprint_or_none(inputs: _BudgetInputs, level: Checkpointing) -> Blueprint | None:
    """None for a model that does not support the checkpointing level."""
    try:
        return inputs.blueprint_at(level)
    except UserError:
        if not level:
            raise
        return None


def _bytes_for_activations(inputs: _BudgetInputs, model: Blueprint) -> int:
    """What weights, adapter (or float32 copies of the weights) and AdamW's two averages leave of the memory."""
    weights, trained = model.weight_bytes, 3 * model.trained_bytes
    if inputs.sharded:
        weights = weights // inputs.processes + model.gathered_bytes
        if not model.frozen:  # all weights are trained, and sharded
            trained = trained // inputs.processes
    return inputs.available_bytes - weights - trained


def _peak_bytes(inputs: _BudgetInputs, model: Blueprint, bounds: MicroBatchBounds) -> int:
    """The peak memory of the heaviest micro-batch, weights not included."""
    batches = survey_micro_batches(inputs.plan, inputs.store, bounds, inputs.processes)
    from yeonma.model.memory_trace import trace  # imports transformers' models

    return trace(model, batches.heaviest, has_gradients=batches.several).peak


def _choose_level(
    inputs: _BudgetInputs, levels: tuple[Checkpointing, ...], bounds: MicroBatchBounds
) -> Checkpointing:
    """The first level at which the micro-batches fit into memory, else the last one."""
    for level in levels[:-1]:
        model = _blueprint_or_none(inputs, level)
        if model is not None and _peak_bytes(inputs, model, bounds) <= _bytes_for_activations(inputs, model):
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
        available = _bytes_for_activations(inputs, model)
        candidates = token_budgets(min(largest_step, inputs.max_tokens), longest)
        for tokens in [earlier_tokens] if earlier_tokens else candidates:
            bounds = MicroBatchBounds(step.batch_size, tokens, step.share_prefix)
            if _peak_bytes(inputs, model, bounds) <= available:
                if earlier_tokens or tokens >= sufficient:
                    return level, tokens
                break
    return level, earlier_tokens or tokens


def _largest_step_tokens(inputs: _BudgetInputs) -> int:
    """The most tokens that one process may have in a step: those of the longest rows."""
    count = -(-inputs.plan.batch_size // inputs.processes)
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
    treatment = {False: "kept", "selective": "recomputed in every other layer", True: "recomputed"}[level]
    at_once = f"at most {tokens:,} tokens at once; " if tokens else ""
    return f"{free / 1e9:.1f} GB free: {at_once}activations are {treatment}"


def try_heaviest(state: TrainState, plan: Plan, store: TokenStore) -> None:
    """Runs the heaviest micro-batch forward and backward, with smaller bounds if memory runs out. Changes no weight,
    but advances the random state.

    Raises UserError if the longest row alone does not fit.
    """
    from yeonma.model.logprobs import trained_logprobs
    from yeonma.model.train_mode import train_adapter  # imports PEFT
    from yeonma.train.step import clear_gradients

    trained_bytes = sum(weight.nbytes for weight in state.parameters.values())
    device = state.model.device

    def forward_and_backward() -> None:
        averages = torch.empty(
            2 * trained_bytes, dtype=torch.uint8, device=device
        )  # AdamW's, from the first step
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
    try:
        lines = Path("/proc/meminfo").read_text("utf-8").splitlines()
        (available,) = (int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, ValueError):
        return None
    return min([available, *_cgroup_free_bytes()])


def _cgroup_free_bytes(folder: Path = Path("/sys/fs/cgroup")) -> list[int]:
    """What a container's memory limit (cgroup v2) leaves; empty without a limit."""
    try:
        limit, used = (int((folder / name).read_text()) for name in ("memory.max", "memory.current"))
    except (OSError, ValueError):  # no such file, or "max"
        return []
    return [limit - used]
