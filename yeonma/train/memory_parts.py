"""The memory of a run by part: one formula for the forecast of `yeonma inspect` and for the budget of `auto`.

What depends on the data, activations and gradients, is traced (`yeonma.model.memory_trace`). The rest follows from the
settings and from the model without weights.

Fragmentation of the C library's heap on the CPU is not included. It was 0 to 15% of the measured peak in most runs, and
up to 40% with gradient checkpointing in a deep model with long micro-batches, where saved tensors are small compared to
temporary ones.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from math import ceil
from typing import TYPE_CHECKING, Any

import torch

from yeonma.batch.micro_batches import MicroBatchSurvey
from yeonma.batch.plan import MicroBatchBounds
from yeonma.config.settings import Checkpointing, Optimizer, Quantization, RunConfig
from yeonma.model import load
from yeonma.model.attention.backend import Capability
from yeonma.model.kernels.linear import CACHED_ROUTINES, has_onednn
from yeonma.model.published import Published, published_in
from yeonma.model.quantization import BLOCK, MIN_8_BIT_NUMEL
from yeonma.model.quantized import multiplies_fp8
from yeonma.train.preference_losses import preference_loss
from yeonma.train.prepare import Prepared, lora_shape
from yeonma.train.target_device import TargetDevice

if TYPE_CHECKING:
    from yeonma.model.memory_trace import Blueprint, Trace

ROUTINE_BYTES = 620_000  # of oneDNN's routine for a shape of a product; measured with oneDNN 3.12 on AVX-512
CHECK_SHAPES = 4  # distinct token counts in the forward passes of the check at loading


@dataclass(frozen=True)
class Memory:
    """Peak memory of a process in bytes, by part. On a GPU only tensors count."""

    process: int
    """Python, torch and the data, as measured in this process; 0 on a GPU."""
    weights: int
    """The base's weights. On the CPU, they are pages of the file if it has the run's dtype."""
    lora: int
    """The adapter."""
    gradients: int
    optimizer: int
    """AdamW's two moments of the trained parameters."""
    activations: int
    """Tensors that the heaviest micro-batch saves for the backward pass, including attention masks."""
    logits: int
    """A chunk of logits; all logits if the head does not run in chunks."""
    workspace: int
    """Temporary memory of operations."""
    routines: int
    """Routines that oneDNN caches, one per shape; 0 if it is not used."""
    loading: int
    """Peak while weights are loaded and converted. Not included in `training`."""
    copies: int = 0
    """Of weights that are all trained: float32 copies of those in bfloat16, and the weights of the start if every step
    measures the reference."""
    gathered: int = 0
    """Sharded weights that are gathered at a time: those of the running layer and the next one."""

    @property
    def training(self) -> int:
        """Sum of the parts."""
        return sum(value for name, value in asdict(self).items() if name != "loading")

    @property
    def peak(self) -> int:
        return max(self.training, self.loading)


@dataclass(frozen=True)
class MemorySetup:
    """Everything but the data on which memory depends."""

    config: Any
    lora: load.LoraShape | str | None
    """None if all weights are trained."""
    trust_remote_code: bool
    device: torch.device
    planned: Capability | None
    """The compute capability of a GPU that is not here."""
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

    def blueprint(self) -> Blueprint:
        """The model without weights. Raises UserError if it does not support these settings."""
        from yeonma.policy import blueprint  # imports PEFT

        return blueprint(
            self.config,
            self.dtype,
            self.lora,
            trust_remote_code=self.trust_remote_code,
            gradient_checkpointing=self.gradient_checkpointing,
            quantization=self.quantization,
            by_device=self.has_fp8,
            device=self.device,
            planned=self.planned,
        )


def memory_setup(
    config: RunConfig,
    source: load.BaseSource,
    prepared: Prepared,
    target: TargetDevice,
    processes: int,
    level: Checkpointing,
    micro: MicroBatchBounds,
) -> MemorySetup:
    """From settings whose `auto` is replaced by `level` and `micro`."""
    model = config.model
    new_adapter = lora_shape(config.lora, prepared.new_token_ids)
    return MemorySetup(
        config=prepared.config,
        lora=None if model.train == "full" else prepared.adapter or new_adapter,
        trust_remote_code=source.trust_remote_code,
        device=target.device,
        planned=target.planned,
        dtype=target.dtype(model),
        gradient_checkpointing=level,
        micro=micro,
        processes=processes,
        sharded=model.shard and processes > 1,
        quantization=model.quantization,
        has_fp8=multiplies_fp8(target.device, target.planned),
        optimizer=config.step.optimizer,
        measures_reference=_measures_reference(config),
    )


def _measures_reference(config: RunConfig) -> bool:
    preference = config.preference
    measures = () if preference is None else preference_loss(preference.loss).measures
    return any(measure.with_reference for measure in measures)


def memory_of(
    setup: MemorySetup,
    model_blueprint: Blueprint,
    batches: MicroBatchSurvey,
    traced: Trace,
    *,
    process: int,
    steps: int,
) -> Memory:
    """`batches` and `traced`: the survey of the run's micro-batches, and the trace of the heaviest one. `process`: what
    the process takes before. `steps`: of the whole run."""
    weights, gathered = model_blueprint.weight_bytes, 0
    adapter, copies = model_blueprint.trained_bytes, 0
    if setup.lora is None:
        own, copies = adapter, adapter if setup.dtype != torch.float32 else 0
        weights, adapter = weights + own - copies, 0
        copies += weights if setup.measures_reference else 0
    numbers = model_blueprint.frozen if setup.lora is not None else model_blueprint.trained
    stored = getattr(setup.config, "dtype", None) or setup.dtype
    published = setup.published
    on_cpu = setup.device.type == "cpu"
    loading = process + weights
    gradients, optimizer = traced.gradients, optimizer_bytes(setup.optimizer, _trained_sizes(model_blueprint))
    if setup.sharded:
        whole = weights
        weights = ceil(whole / setup.processes)
        gathered = min(model_blueprint.gathered_bytes, whole - weights)
        if setup.lora is None:  # gradients of what is gathered are whole, too, until they are summed
            copies, optimizer = (ceil(size / setup.processes) for size in (copies, optimizer))
            gradients = min(gradients, ceil(gradients / setup.processes) + gathered)
        if setup.quantization != "none":  # part by part, when the whole model has been read
            is_converted = published is not None or stored != setup.dtype
            loading = process + (numbers * setup.dtype.itemsize if is_converted else 0)
        # on the CPU also the pages of the file, until all shards are copied from them
        loading = loading + weights if on_cpu else weights + gathered
    # pages of the file and converted weights at the same time
    if on_cpu and published is not None:
        # transformers does not quantise to fp8 while it reads
        if setup.quantization == "fp8" and published.method != "mxfp4" and not setup.sharded:
            loading = process + max(weights, numbers * setup.dtype.itemsize)
        loading += numbers * published.bits // 8
    elif on_cpu and (stored != setup.dtype or setup.quantization != "none"):
        loading += numbers * stored.itemsize
    routines = 0
    if on_cpu and setup.dtype == torch.float32 and has_onednn():
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


def _trained_sizes(model_blueprint: Blueprint) -> list[int]:
    return [parameter.numel() for parameter in model_blueprint.model.parameters() if parameter.requires_grad]


def optimizer_bytes(optimizer: Optimizer, sizes: Iterable[int]) -> int:
    """Bytes of AdamW's two moments of trained weights with these numbers of elements. Paged state counts as if it were
    not paged out."""
    whole = torch.float32.itemsize
    if optimizer == "adamw":
        return sum(2 * whole * n for n in sizes)
    return sum(2 * (n + whole * ceil(n / BLOCK) if n >= MIN_8_BIT_NUMEL else whole * n) for n in sizes)
