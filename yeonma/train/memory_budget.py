"""How much goes through the model at once where the settings say `auto`: from free memory and the forecast.

The forecast is the trace of the run's heaviest micro-batch, for one budget of tokens after the other. What is chosen is
tried on that micro-batch before the first step, and kept in every checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from yeonma.batch.batch import Batch
from yeonma.batch.micro_batches import survey_micro_batches
from yeonma.batch.plan import MicroBatchBounds, Plan
from yeonma.config.settings import Checkpointing, ModelSettings, RunConfig, StepSettings
from yeonma.errors import Log, Problem, UserError
from yeonma.model import load
from yeonma.model.logprobs import trained_logprobs
from yeonma.model.memory_trace import Blueprint, trace
from yeonma.model.quantized import multiplies_fp8
from yeonma.policy import blueprint
from yeonma.tokenization.store import TokenStore
from yeonma.train.distributed import Processes, gather_bytes
from yeonma.train.prepare import Prepared, lora_shape
from yeonma.train.step import TrainState

MOST_TOKENS = {"cpu": 2048, "cuda": 32768}  # more at once is no faster
ENOUGH_TOKENS = 2048  # at once, for products to run at their speed: before more, activations are kept
SHARE = {"cpu": 0.5, "cuda": 0.9}  # of free memory that is given out; the CPU's heap has holes
WAYS: tuple[Checkpointing, ...] = (False, "selective", True)
"""From the fastest to that which needs least."""

CURE = "give micro_batch_tokens a number and gradient_checkpointing true or false"


def micro_batching(step: StepSettings) -> MicroBatchBounds:
    """As the settings say; not for `auto`, in whose place `resolve_auto` puts numbers."""
    assert step.micro_batch_tokens != "auto"
    return MicroBatchBounds(step.micro_batch_size, step.micro_batch_tokens, step.share_prefix)


def checkpointing(model: ModelSettings) -> Checkpointing:
    assert model.gradient_checkpointing != "auto"
    return model.gradient_checkpointing


def resolve_auto(
    config: RunConfig,
    source: load.BaseSource,
    prepared: Prepared,
    group: Processes,
    say: Log,
    *,
    processes: int | None = None,
    earlier_tokens: int | None = None,
    free: int | None = None,
) -> RunConfig:
    """The settings with numbers in the place of `auto`; the same in all processes, those of the one with least room.

    `processes`: that the run will have, where this is not one of them. `earlier_tokens`: those of a checkpoint that is
    continued. `free`: bytes, in place of what is free. Raises UserError where free memory is not known, and for a model
    that cannot be traced.
    """
    model, step = config.model, config.step
    if "auto" not in (step.micro_batch_tokens, model.gradient_checkpointing):
        return config
    device = load.pick_device(model.device)
    free = free_memory(device) if free is None else free
    if free is None:
        raise UserError("how much memory is free is not known on this system", place="auto", cure=CURE)
    case = _Case(
        plan=prepared.plan,
        store=prepared.dataset.train.store,
        draw=_drawing(config, source, prepared, device),
        room=int(SHARE[device.type] * free),
        most_tokens=MOST_TOKENS[device.type],
        processes=processes or group.count,
        sharded=model.shard and (processes or group.count) > 1,
    )
    requested = model.gradient_checkpointing
    ways = WAYS if requested == "auto" else (requested,)
    try:
        if step.micro_batch_tokens != "auto":
            way, tokens = _way_for(case, ways, micro_batching(step)), 0
        else:
            way, tokens = _tokens_for(case, ways, step, earlier_tokens)
    except UserError as error:
        problems = [Problem(problem.what, problem.place, problem.cure or CURE) for problem in error.problems]
        raise UserError(problems) from error
    way, least = _agreed(group, way, tokens)
    tokens = earlier_tokens or least  # each process continues with its own: the same sums in the same order
    say(_summary(way, tokens, free))
    if tokens:
        step = replace(step, micro_batch_size=step.batch_size, micro_batch_tokens=tokens)
    return replace(config, model=replace(model, gradient_checkpointing=way), step=step)


def one_by_one(config: RunConfig) -> RunConfig:
    """Without a budget of tokens: for a model that no forest can be trained on, whose sequences go alone."""
    step = config.step
    return replace(config, step=replace(step, micro_batch_size=1, micro_batch_tokens=None))


@dataclass(frozen=True)
class _Case:
    plan: Plan
    store: TokenStore
    draw: Callable[[Checkpointing], Blueprint]
    room: int  # bytes
    most_tokens: int
    processes: int
    sharded: bool


def _drawing(
    config: RunConfig, source: load.BaseSource, prepared: Prepared, device: torch.device
) -> Callable[[Checkpointing], Blueprint]:
    model = config.model

    def draw(way: Checkpointing) -> Blueprint:
        return blueprint(
            prepared.config,
            load.pick_dtype(model.dtype, device),
            prepared.adapter or lora_shape(config.lora),
            quantization=model.quantization,
            by_device=multiplies_fp8(device),
            trust_remote_code=source.trust_remote_code,
            gradient_checkpointing=way,
            device=device,
        )

    return draw


def _left(case: _Case, drawn: Blueprint) -> int:
    """Bytes for a micro-batch, once weights, adapter and AdamW's two averages are there."""
    weights = drawn.weight_bytes
    if case.sharded:
        weights = weights // case.processes + drawn.gathered_bytes
    return case.room - weights - 3 * drawn.trained_bytes


def _needed(case: _Case, drawn: Blueprint, micro: MicroBatchBounds) -> int:
    batches = survey_micro_batches(case.plan, case.store, micro, case.processes)
    return trace(drawn, batches.heaviest, has_gradients=batches.several).peak


def _way_for(case: _Case, ways: tuple[Checkpointing, ...], micro: MicroBatchBounds) -> Checkpointing:
    for way in ways[:-1]:
        drawn = _drawn(case, way)
        if drawn is not None and _needed(case, drawn, micro) <= _left(case, drawn):
            return way
    return ways[-1]


def _tokens_for(
    case: _Case, ways: tuple[Checkpointing, ...], step: StepSettings, earlier_tokens: int | None
) -> tuple[Checkpointing, int]:
    longest, whole = int(case.plan.lengths.max()), _heaviest_step(case)
    enough = min(whole, max(longest, ENOUGH_TOKENS))
    tokens, way = longest, ways[-1]
    for way in ways:
        drawn = _drawn(case, way)
        if drawn is None:
            continue
        left = _left(case, drawn)
        for tokens in [earlier_tokens] if earlier_tokens else budgets(min(whole, case.most_tokens), longest):
            micro = MicroBatchBounds(step.batch_size, tokens, step.share_prefix)
            if _needed(case, drawn, micro) <= left:
                if earlier_tokens or tokens >= min(enough, case.most_tokens):
                    return way, tokens
                break
    # the last way, with what it has room for; where that is nothing, the trial will tell
    return way, earlier_tokens or tokens


def _drawn(case: _Case, way: Checkpointing) -> Blueprint | None:
    """None for a model that keeps all activations, whatever it is told."""
    try:
        return case.draw(way)
    except ValueError:
        return None


def _heaviest_step(case: _Case) -> int:
    """Tokens of the longest rows that one step of one process may have."""
    count = -(-case.plan.batch_size // case.processes)
    return int(np.sort(case.plan.lengths)[::-1][:count].sum())


def budgets(most: int, least: int) -> Iterator[int]:
    """Tokens at once, from `most` down to `least`, the longest row alone: each about 3/4 of the one before."""
    tokens, thirds = max(most, least), False
    while tokens > least:
        yield tokens
        tokens, thirds = (tokens * 2 // 3 if thirds else tokens * 3 // 4), not thirds
    yield least


def _agreed(group: Processes, way: Checkpointing, tokens: int) -> tuple[Checkpointing, int]:
    own = torch.tensor([WAYS.index(way), tokens]).view(torch.uint8)
    of_ranks = [gathered.view(torch.int64).tolist() for gathered in gather_bytes(group, own)]
    return WAYS[max(index for index, _ in of_ranks)], min(most_tokens for _, most_tokens in of_ranks)


def _summary(way: Checkpointing, tokens: int, free: int) -> str:
    words = {False: "kept", "selective": "recomputed in every other layer", True: "recomputed"}[way]
    at_once = f"at most {tokens:,} tokens at once; " if tokens else ""
    return f"{free / 1e9:.1f} GB free: {at_once}activations are {words}"


def try_heaviest(state: TrainState, plan: Plan, store: TokenStore) -> None:
    """One forward and backward of the run's heaviest micro-batch, and of smaller ones where it has no room. No weight
    changes; random numbers are drawn.

    Raises UserError where not even the longest row has room.
    """
    trained = sum(weight.nbytes for weight in state.parameters.values())
    device = state.model.device
    undo = state.optimizer.zero_grad

    def compute() -> None:
        to_come = torch.empty(2 * trained, dtype=torch.uint8, device=device)  # AdamW's averages
        forest = survey_micro_batches(plan, store, state.limit.bounds, state.group.count).heaviest
        trained_logprobs(state.model, forest, state.support.head, state.support.capability).sum().backward()
        del to_come

    state.model.train()
    state.limit.fit(compute, Batch.from_store(store, plan.positions), undo=undo)
    undo()


def free_memory(device: torch.device) -> int | None:
    """Bytes that this process may still take on a device; None where the system does not say."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    try:
        lines = Path("/proc/meminfo").read_text("utf-8").splitlines()
        (available,) = (int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, ValueError):
        return None
    return min([available, *_left_of_the_group()])


def _left_of_the_group(folder: Path = Path("/sys/fs/cgroup")) -> list[int]:
    """What a container's bound leaves, where there is one (cgroup v2)."""
    try:
        most, used = (int((folder / name).read_text()) for name in ("memory.max", "memory.current"))
    except (OSError, ValueError):  # none, or "max"
        return []
    return [most - used]
