"""Estimates a run before weights are loaded: parameters, memory by part, and floating point operations.

Memory is traced: the heaviest micro-batch of the run goes through the model on the meta device (see `trace`).

Fragmentation of the C library's heap on the CPU is not included. It was 0 to 15% of the measured peak in most runs, and
up to 40% with gradient checkpointing in a deep model with long micro-batches, where saved tensors are small compared to
temporary ones.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import ceil
from typing import Any

import torch

from yeonma.batch.micro_batches import MicroBatchSurvey, survey_micro_batches
from yeonma.batch.plan import MicroBatchBounds
from yeonma.config.settings import (
    Checkpointing,
    LoraSettings,
    Optimizer,
    Quantization,
    RunConfig,
)
from yeonma.errors import UserError
from yeonma.inspect.forecast import Alternative, Forecast, Memory
from yeonma.model import load
from yeonma.model.kernels.linear import CACHED_ROUTINES, Dense, frozen_linear, has_onednn
from yeonma.model.memory_trace import Blueprint, Trace, trace
from yeonma.model.published import Published, published_in
from yeonma.model.quantization import BLOCK, MIN_8_BIT_NUMEL
from yeonma.model.quantized import multiplies_fp8
from yeonma.model.targets import coverage
from yeonma.policy import blueprint
from yeonma.run_folder.progress import peak_memory_bytes, status_bytes
from yeonma.train.memory_budget import checkpointing, micro_batching
from yeonma.train.preference_losses import preference_loss
from yeonma.train.prepare import Prepared, lora_shape, train_dtype

ROUTINE_BYTES = 620_000  # of oneDNN's routine for a shape of a product; measured with oneDNN 3.12 on AVX-512
CHECK_SHAPES = 4  # distinct token counts in the forward passes of the check at loading


def estimate(
    config: RunConfig,
    source: load.BaseSource,
    prepared: Prepared,
    *,
    processes: int = 1,
    with_alternatives: bool = True,
) -> Forecast:
    """The forecast of a run with `processes` processes, without time: `timed_by_rate` or `timed_by_probe` add it.

    Call it before anything large is in memory: the memory that this process uses now is a part of the forecast.
    Assumes that the base supports forests; the run checks it when it loads the base.
    Raises UserError for target modules that the model does not have, and for a model that cannot be traced.
    """
    model, step = config.model, config.step
    device = load.pick_device(model.device)
    dtype = train_dtype(model, device)
    setup = _Setup(
        config=prepared.config,
        lora=None
        if model.train == "full"
        else prepared.adapter or lora_shape(config.lora, prepared.new_token_ids),
        trust_remote_code=source.trust_remote_code,
        device=device.type,
        dtype=dtype,
        gradient_checkpointing=checkpointing(model),
        micro=micro_batching(step),
        processes=processes,
        sharded=model.shard and processes > 1,
        quantization=model.quantization,
        has_fp8=multiplies_fp8(device),
        optimizer=step.optimizer,
        measures_reference=_measures_reference(config),
    )
    model_blueprint = _blueprint(setup)
    process = _process_bytes(device.type)
    batches = survey_micro_batches(prepared.plan, prepared.dataset.train.store, setup.micro, processes)
    traced = trace(model_blueprint, batches.heaviest, has_gradients=batches.several)
    memory = _memory(setup, model_blueprint, batches, traced, process, prepared.plan.total_steps)
    tokens = _tokens(prepared)
    return Forecast(
        device=str(device),
        dtype=str(dtype).removeprefix("torch."),
        parameters_trained=model_blueprint.trained,
        parameters_frozen=model_blueprint.frozen,
        steps=prepared.plan.total_steps,
        epochs=prepared.plan.epoch_at(prepared.plan.total_steps),
        processes=processes,
        tokens=tokens,
        tokens_per_epoch=int(prepared.plan.lengths.sum()),
        operations=tokens * batches.forest_tokens * traced.flops / traced.tokens / processes,
        heaviest_units=batches.heaviest_units,
        heaviest_tokens=traced.tokens,
        memory=memory,
        alternatives=_alternatives(setup, prepared, batches, process) if with_alternatives else (),
        adapter=coverage(model_blueprint.model) if setup.lora is not None else None,
        time=None,
        price=None,
        published=_in_words(setup),
    )


def _measures_reference(config: RunConfig) -> bool:
    preference = config.preference
    measures = () if preference is None else preference_loss(preference.loss).measures
    return any(measure.with_reference for measure in measures)


def _in_words(setup: _Setup) -> str:
    """How the base's files are quantised and how its weights are held; empty if they are not."""
    if setup.published is None:
        return ""
    held = setup.published.held(setup.quantization, str(setup.dtype).removeprefix("torch."))
    return f"published as {setup.published}: {held}"


@dataclass(frozen=True)
class _Setup:
    """Everything but the data on which memory depends."""

    config: Any
    lora: load.LoraShape | str | None
    """None if all weights are trained."""
    trust_remote_code: bool
    device: str
    dtype: torch.dtype
    gradient_checkpointing: Checkpointing
    micro: MicroBatchBounds
    processes: int
    sharded: bool
    quantization: Quantization
    has_fp8: bool
    """Whether the device can multiply in fp8."""
    optimizer: Optimizer
    measures_reference: bool
    """Whether every step needs the trained weights as they were at the start, too."""

    @property
    def published(self) -> Published | None:
        """How the base's files are quantised."""
        return published_in(self.config.to_dict(), "base_model")


def _blueprint(setup: _Setup) -> Blueprint:
    return blueprint(
        setup.config,
        setup.dtype,
        setup.lora,
        trust_remote_code=setup.trust_remote_code,
        gradient_checkpointing=setup.gradient_checkpointing,
        quantization=setup.quantization,
        by_device=setup.has_fp8,
        device=torch.device(setup.device),
    )


def _memory(
    setup: _Setup,
    model_blueprint: Blueprint,
    batches: MicroBatchSurvey,
    traced: Trace,
    process: int,
    steps: int,
) -> Memory:
    weights, gathered = model_blueprint.weight_bytes, 0
    adapter, copies = model_blueprint.trained_bytes, 0
    if setup.lora is None:
        own, copies = adapter, adapter if setup.dtype != torch.float32 else 0
        weights, adapter = weights + own - copies, 0
        copies += weights if setup.measures_reference else 0
    numbers = model_blueprint.frozen if setup.lora is not None else model_blueprint.trained
    loading = process + weights
    gradients, optimizer = traced.gradients, _optimizer_bytes(setup.optimizer, model_blueprint)
    if setup.sharded:
        whole = weights
        weights = ceil(whole / setup.processes)
        gathered = min(model_blueprint.gathered_bytes, whole - weights)
        if setup.lora is None:  # gradients of what is gathered are whole, too, until they are summed
            copies, optimizer = (ceil(size / setup.processes) for size in (copies, optimizer))
            gradients = min(gradients, ceil(gradients / setup.processes) + gathered)
        # on the CPU also the pages of the file, until all shards are copied from them
        loading = weights + gathered if setup.device == "cuda" else loading + weights
    stored = getattr(setup.config, "dtype", None) or setup.dtype
    # pages of the file and converted weights at the same time
    published = setup.published
    if setup.device == "cpu" and published is not None:
        # transformers does not quantise to fp8 while it reads
        if setup.quantization == "fp8" and published.method != "mxfp4":
            loading = process + max(weights, numbers * setup.dtype.itemsize)
        loading += numbers * published.bits // 8
    elif setup.device == "cpu" and (stored != setup.dtype or setup.quantization != "none"):
        loading += numbers * stored.itemsize
    routines = 0
    if setup.device == "cpu" and setup.dtype == torch.float32 and has_onednn():
        shapes = batches.distinct * traced.shapes + CHECK_SHAPES * traced.forward_shapes
        routines = min(CACHED_ROUTINES, shapes) * ROUTINE_BYTES
    return Memory(
        process=process,
        weights=weights,
        lora=adapter,
        copies=copies,
        gradients=gradients,
        # allocated after the peak of the first step
        optimizer=optimizer if steps > 1 else 0,
        activations=traced.activations,
        logits=traced.logits,
        workspace=traced.workspace,
        routines=routines,
        loading=loading,
        gathered=gathered,
    )


def _optimizer_bytes(optimizer: Optimizer, model_blueprint: Blueprint) -> int:
    """Bytes of AdamW's two moments of the trained parameters. Paged state counts as if it were not paged out."""
    if optimizer == "adamw":
        return 2 * model_blueprint.trained_bytes
    sizes = [parameter.numel() for parameter in model_blueprint.model.parameters() if parameter.requires_grad]
    return sum(2 * (n + 4 * ceil(n / BLOCK) if n >= MIN_8_BIT_NUMEL else 4 * n) for n in sizes)


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


def _alternatives(
    setup: _Setup, prepared: Prepared, unchanged: MicroBatchSurvey, process: int
) -> tuple[Alternative, ...]:
    """Settings that need less memory, changed one at a time. `unchanged`: the micro-batches of the run itself."""
    plan = prepared.plan
    alternatives: list[Alternative] = []

    def add(name: str, note: str, **changed: Any) -> None:
        other = replace(setup, **changed)
        try:
            other_blueprint = _blueprint(other)
            store = prepared.dataset.train.store
            batches = (
                unchanged
                if other.micro == setup.micro
                else survey_micro_batches(plan, store, other.micro, other.processes)
            )
            traced = trace(other_blueprint, batches.heaviest, has_gradients=batches.several)
        except UserError:  # the model does not support checkpointing or that precision
            return
        steps = prepared.plan.total_steps
        other_memory = _memory(other, other_blueprint, batches, traced, process, steps)
        alternatives.append(Alternative(name, other_memory.peak, True, note))

    if not setup.gradient_checkpointing:
        add("gradient_checkpointing true", "about a third more time", gradient_checkpointing=True)
    if setup.processes > 1 and not setup.sharded:
        add("shard true", "slower: layers are gathered when used", sharded=True)
    current = setup.micro.most_examples
    for size in sorted({current // 2, 1} - {0, current}, reverse=True):
        add(f"micro_batch_size {size}", "the same result", micro=replace(setup.micro, most_examples=size))
    if setup.dtype == torch.float32:
        slow = ", slow on most CPUs" if setup.device == "cpu" else ""
        add("dtype bfloat16", f"lower precision{slow}", dtype=torch.bfloat16)
    is_packed = setup.published is not None and setup.published.stays_packed
    if setup.lora is None:
        shape = lora_shape(LoraSettings())
        add("train lora", "trains an adapter, not the weights", lora=shape)
    elif setup.quantization == "none" and not setup.sharded and not is_packed:
        add("quantization int8", "changes the result; needs bitsandbytes", quantization="int8")
        add("quantization nf4", "changes the result; needs bitsandbytes", quantization="nf4")
        if setup.has_fp8:
            add("quantization fp8", "changes the result", quantization="fp8")
    return tuple(alternatives)


def _tokens(prepared: Prepared) -> int:
    """Tokens of all steps. The prompt of a pair counts once."""
    plan, lengths = prepared.plan, prepared.dataset.train.store.unit_lengths
    epochs, remaining_steps = divmod(plan.total_steps, plan.steps_per_epoch)
    tokens = epochs * int(plan.lengths.sum())
    if not remaining_steps:
        return tokens
    return tokens + sum(int(lengths[units].sum()) for units in plan.steps(epochs * plan.steps_per_epoch))
