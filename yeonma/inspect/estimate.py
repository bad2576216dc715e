"""Estimates a run before weights are loaded: parameters, memory by part, and floating point operations.

Memory is traced: the heaviest micro-batch of the run goes through the model on the meta device (see `trace`), and
`yeonma.train.memory_parts` adds the parts that follow from the settings.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import numpy as np
import torch

from yeonma.batch.forest import Forest, lay_out
from yeonma.batch.micro_batches import MicroBatchSurvey, survey_micro_batches
from yeonma.config.settings import LoraSettings, RunConfig
from yeonma.errors import UserError
from yeonma.inspect.forecast import Alternative, Forecast
from yeonma.messages import tr
from yeonma.model import load
from yeonma.model.attention.backend import MIN_CAPABILITY
from yeonma.model.kernels.linear import Dense, frozen_linear
from yeonma.model.memory_trace import trace
from yeonma.model.targets import coverage
from yeonma.run_folder.progress import peak_memory_bytes, status_bytes
from yeonma.train.memory_budget import checkpointing, micro_batching
from yeonma.train.memory_parts import MemorySetup, memory_of, memory_setup
from yeonma.train.prepare import Prepared, lora_shape
from yeonma.train.target_device import TargetDevice, target_device

SHORTEST_CUTOFF = 128
"""No shorter `cutoff_len` is proposed."""
NOT_SHARDED = ("optimizer",)
"""Settings whose changes do not go with sharded weights."""
MORE_PROCESSES = (2, 4, 8)
"""Numbers of processes that are proposed for sharded weights."""


def estimate(
    config: RunConfig,
    source: load.BaseSource,
    prepared: Prepared,
    *,
    target: TargetDevice | None = None,
    processes: int = 1,
    with_alternatives: bool = True,
) -> Forecast:
    """The forecast of a run with `processes` processes, without time: `timed_by_rate` or `timed_by_probe` add it.

    Call it before anything large is in memory: the memory that this process uses now is a part of the forecast.
    Assumes that the base supports forests; the run checks it when it loads the base. `target`: the device of the run,
    by default the one of the settings.
    Raises UserError for target modules that the model does not have, and for a model that cannot be traced.
    """
    target = target or target_device(config.model.device)
    setup = _setup(config, source, prepared, target, processes)
    model_blueprint = setup.blueprint()
    process = _process_bytes(target.device.type)
    plan = prepared.plan
    batches = survey_micro_batches(plan, prepared.dataset.train.store, setup.micro, processes)
    traced = trace(model_blueprint, batches.heaviest, has_gradients=batches.several)
    memory = memory_of(setup, model_blueprint, batches, traced, process=process, steps=plan.total_steps)
    tokens = _tokens(prepared)
    forecast = Forecast(
        device=str(target.device),
        dtype=str(setup.dtype).removeprefix("torch."),
        parameters_trained=model_blueprint.trained,
        parameters_frozen=model_blueprint.frozen,
        steps=plan.total_steps,
        epochs=plan.epoch_at(plan.total_steps),
        processes=processes,
        tokens=tokens,
        tokens_per_epoch=int(plan.lengths.sum()),
        operations=tokens * batches.forest_tokens * traced.flops / traced.tokens / processes,
        operator_calls=traced.operators * _micro_batches(batches, plan.total_steps, processes),
        weight_bytes_read=_passes(setup)
        * memory.weights
        * _micro_batches(batches, plan.total_steps, processes),
        heaviest_units=batches.heaviest_units,
        heaviest_tokens=traced.tokens,
        memory=memory,
        alternatives=(),
        combinations=(),
        adapter=coverage(model_blueprint.model) if setup.lora is not None else None,
        time=None,
        price=None,
        published=_in_words(setup),
    )
    if not with_alternatives:
        return forecast
    trial = _Trial(setup, prepared, process)
    singles = (trial.alternative([change]) for change in _changes(trial) if change.is_offered)
    return replace(forecast, alternatives=tuple(one for one in singles if one is not None))


def combinations(
    config: RunConfig,
    source: load.BaseSource,
    prepared: Prepared,
    target: TargetDevice,
    processes: int,
    process_bytes: int,
) -> tuple[Alternative, ...]:
    """Settings that need less memory together: those of the least harm to results first, one more each time; and
    sharded weights on more GPUs. `process_bytes`: as in the forecast.

    Raises UserError for target modules that the model does not have, and for a model that cannot be traced.
    """
    trial = _Trial(_setup(config, source, prepared, target, processes), prepared, process_bytes)
    best: dict[str, _Change] = {}  # the strongest change of each setting
    for change in _changes(trial):
        best.pop(change.setting, None)
        best[change.setting] = change
    whole = [change for change in best.values() if change.setting != "shard"]
    chains = [whole]
    if "shard" in best:
        left_out = (*NOT_SHARDED, "quantization") if _uses_dora(trial.setup) else NOT_SHARDED
        chains.insert(0, [change for change in best.values() if change.setting not in left_out])
    together = [changes for chain in chains for changes in accumulate([change] for change in chain)]
    harmless = [change for change in whole if change.same_result]
    sharded = _sharded(trial)
    on_more = [*([change] for change in sharded), *([*harmless, change] for change in sharded[-1:])]
    found = map(trial.alternative, [*(changes for changes in together if len(changes) > 1), *on_more])
    return tuple(one for one in found if one is not None)


def _setup(
    config: RunConfig, source: load.BaseSource, prepared: Prepared, target: TargetDevice, processes: int
) -> MemorySetup:
    level, micro = checkpointing(config.model), micro_batching(config.step)
    return memory_setup(config, source, prepared, target, processes, level, micro)


def _passes(setup: MemorySetup) -> int:
    """How often a micro-batch reads the weights: forward, backward and, with checkpointing, forward again."""
    return 3 if setup.gradient_checkpointing else 2


def _micro_batches(batches: MicroBatchSurvey, steps: int, processes: int) -> float:
    """Of one process in the whole run."""
    return batches.count / batches.steps * steps / processes


def _in_words(setup: MemorySetup) -> str:
    """How the base's files are quantised and how its weights are held; empty if they are not."""
    if setup.published is None:
        return ""
    held = setup.published.held(setup.quantization, str(setup.dtype).removeprefix("torch."))
    return tr("published as {published}: {held}", published=setup.published, held=held)


def _process_bytes(device_type: str) -> int:
    """Resident bytes of this process with the code of a training step; 0 for a GPU, where only tensors count."""
    if device_type == "cuda":
        return 0
    weight, trained = torch.zeros(64, 64), torch.zeros(64, 64, requires_grad=True)
    hidden = frozen_linear(trained, Dense(weight), None)
    heads = hidden.view(1, 4, 64, 16)
    attended = torch.nn.functional.scaled_dot_product_attention(heads, heads, heads, is_causal=True)
    attended.log_softmax(-1).sum().backward()
    torch.optim.AdamW([trained], fused=True).step()
    resident = status_bytes("VmRSS")
    return peak_memory_bytes(device_type) if resident is None else resident


@dataclass(frozen=True)
class _Change:
    """A setting that may need less memory."""

    setting: str
    value: str
    note: str
    changed: dict[str, Any]
    """Fields of MemorySetup."""
    same_result: bool = False
    cutoff: int | None = None
    """The most tokens of a row."""
    is_offered: bool = True
    """Whether it is an alternative by itself."""

    def __str__(self) -> str:
        return f"{self.setting} {self.value}"


@dataclass(frozen=True)
class _Trial:
    """Forecasts of the same run with other settings."""

    setup: MemorySetup
    prepared: Prepared
    process: int

    def alternative(self, changes: Sequence[_Change]) -> Alternative | None:
        """The run with these changes; None if the model does not support them."""
        setup = self.setup
        for change in changes:
            setup = replace(setup, **change.changed)
        cutoffs = [change.cutoff for change in changes if change.cutoff is not None]
        plan, store = self.prepared.plan, self.prepared.dataset.train.store
        try:
            model_blueprint = setup.blueprint()
            batches = survey_micro_batches(plan, store, setup.micro, setup.processes)
            if cutoffs:
                batches = replace(batches, heaviest=_last_tokens(batches.heaviest, min(cutoffs)))
            traced = trace(model_blueprint, batches.heaviest, has_gradients=batches.several)
        except UserError:  # the model does not support checkpointing or that precision
            return None
        memory = memory_of(
            setup, model_blueprint, batches, traced, process=self.process, steps=plan.total_steps
        )
        is_same = all(change.same_result for change in changes)
        notes = [change.note for change in changes if change.note]
        return Alternative(
            name=", ".join(map(str, changes)),
            peak_bytes=memory.peak,
            note=", ".join(dict.fromkeys([*([tr("the same result")] if is_same else []), *notes])),
            same_result=is_same,
        )


def _last_tokens(forest: Forest, count: int) -> Forest:
    """The last tokens of a forest of one segment, as after shortening its prompt."""
    trained = np.zeros(len(forest.token_ids_T), dtype=np.bool_)
    trained[forest.source_U + 1] = True
    trained = trained[-count:].copy()
    trained[0] = False
    return lay_out([forest.token_ids_T[-count:]], [trained])


def _changes(trial: _Trial) -> list[_Change]:
    """Settings that may need less memory, from the least harm to results to the most, weaker ones first."""
    setup = trial.setup
    changes: list[_Change] = []

    def add(setting: str, value: object, note: str, *, same_result: bool = False, **changed: Any) -> None:
        changes.append(_Change(setting, str(value), note, changed, same_result))

    one_by_one = replace(setup.micro, most_examples=1)
    if setup.gradient_checkpointing is not True:
        add(
            "gradient_checkpointing",
            "true",
            tr("about a third more time"),
            same_result=True,
            gradient_checkpointing=True,
        )
    if setup.processes > 1 and _may_shard(setup):
        add(
            "shard",
            "true",
            tr("slower: layers are gathered when used"),
            same_result=True,
            sharded=True,
        )
    current = setup.micro.most_examples
    for size in sorted({current // 2, 1} - {0, current}, reverse=True):
        micro = replace(setup.micro, most_examples=size)
        add("micro_batch_size", size, "", same_result=True, micro=micro)
    if (
        setup.lora is None
        and setup.device.type == "cuda"
        and setup.optimizer == "adamw"
        and not setup.sharded
    ):
        note = tr("AdamW's averages in 8 bits, needs bitsandbytes")
        add("optimizer", "adamw_8bit", note, optimizer="adamw_8bit")
    if setup.dtype == torch.float32 and (setup.planned is None or setup.planned >= MIN_CAPABILITY):
        is_cpu = setup.device.type == "cpu"
        slow = tr("lower precision, slow on most CPUs") if is_cpu else tr("lower precision")
        add("dtype", "bfloat16", slow, dtype=torch.bfloat16)
    is_packed = setup.published is not None and setup.published.stays_packed
    is_shared_dora = setup.sharded and _uses_dora(setup)
    if setup.lora is not None and setup.quantization == "none" and not is_shared_dora and not is_packed:
        if setup.has_fp8 and not _uses_dora(setup):
            add("quantization", "fp8", tr("changes the result"), quantization="fp8")
        add("quantization", "int8", tr("changes the result, needs bitsandbytes"), quantization="int8")
        add("quantization", "nf4", tr("changes the result, needs bitsandbytes"), quantization="nf4")
    changes += _cutoffs(trial, one_by_one)
    if setup.lora is None:
        lora = lora_shape(LoraSettings())
        add("train", "lora", tr("trains an adapter, not the weights"), lora=lora)
    return changes


def _cutoffs(trial: _Trial, one_by_one: Any) -> list[_Change]:
    """Half and a quarter of the longest row's tokens, for data whose rows are one segment each."""
    prepared = trial.prepared
    store = prepared.dataset.train.store
    longest = int(prepared.plan.lengths.max())
    alone = survey_micro_batches(prepared.plan, store, one_by_one, trial.setup.processes).heaviest
    if len(alone.segments) != 1:  # pairs
        return []
    changes = []
    for length in (longest // 2 // 64 * 64, longest // 4 // 64 * 64):
        if length >= SHORTEST_CUTOFF:
            rows = int((prepared.plan.lengths > length).sum())
            note = tr("shortens {rows:,} of {count:,} rows", rows=rows, count=len(prepared.plan.lengths))
            changed = {"micro": one_by_one}
            changes.append(_Change("cutoff_len", str(length), note, changed, cutoff=length, is_offered=False))
    return changes


def _may_shard(setup: MemorySetup) -> bool:
    """Whether the run could be sharded and is not."""
    is_packed = setup.published is not None and setup.published.stays_packed
    is_refused = setup.lora is None and (setup.measures_reference or setup.optimizer != "adamw")
    is_refused |= _uses_dora(setup) and (is_packed or setup.quantization != "none")
    return not (setup.sharded or is_refused)


def _uses_dora(setup: MemorySetup) -> bool:
    return isinstance(setup.lora, load.LoraShape) and setup.lora.use_dora


def _sharded(trial: _Trial) -> list[_Change]:
    """Sharded weights on more GPUs than the run has."""
    setup = trial.setup
    if setup.device.type != "cuda" or not (setup.sharded or _may_shard(setup)):
        return []
    return [
        _Change(
            "nproc", f"{count}, shard true", tr("on {count} GPUs", count=count), changed, same_result=True
        )
        for count in MORE_PROCESSES
        if count > setup.processes
        for changed in ({"processes": count, "sharded": True},)
    ]


def _tokens(prepared: Prepared) -> int:
    """Tokens of all steps. The prompt of a pair counts once."""
    plan, lengths = prepared.plan, prepared.dataset.train.store.unit_lengths
    epochs, remaining_steps = divmod(plan.total_steps, plan.steps_per_epoch)
    tokens = epochs * int(plan.lengths.sum())
    if not remaining_steps:
        return tokens
    return tokens + sum(int(lengths[units].sum()) for units in plan.steps(epochs * plan.steps_per_epoch))
