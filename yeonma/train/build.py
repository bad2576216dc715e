"""What a run is made of, once everything is prepared: the model with its adapter, the objective, the optimizer."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from yeonma.adapter import adapter_folder as adapters
from yeonma.batch.plan import Plan
from yeonma.config.settings import RunConfig
from yeonma.errors import Log
from yeonma.model import load
from yeonma.model.quantized import has_products
from yeonma.model.sharding import held_bytes, is_sharded
from yeonma.policy import Policy, build_policy
from yeonma.tokenization.dataset import cache_folder
from yeonma.tokenization.store import TokenStore
from yeonma.train.distributed import Processes
from yeonma.train.interrupt import Stop
from yeonma.train.losses import LOSSES, SFT, Objective, preference_objective
from yeonma.train.memory_budget import checkpointing, micro_batching
from yeonma.train.oom_retry import MicroBatchLimit
from yeonma.train.optimizers import make_optimizer
from yeonma.train.prepare import (
    BY_METRIC,
    Prepared,
    lora_shape,
    make_schedule,
    preference_options,
)
from yeonma.train.reference import reference_identity, reference_logprobs
from yeonma.train.step import TrainState

UNITS_WITHOUT_GRADIENT = 4
"""Pairs that the reference takes at once for each that training does: without gradients, memory holds one layer's."""


References = Mapping[str, tuple[TokenStore, np.ndarray]]
"""The units of each token store, by its key, that a reference is asked about."""


@dataclass(frozen=True)
class LoadedModel:
    """What a run trains, and yeonma.json's contents."""

    policy: Policy
    details: dict[str, Any]


def load_model(
    config: RunConfig,
    source: load.BaseSource,
    device: torch.device,
    prepared: Prepared,
    say: Log,
    group: Processes,
) -> LoadedModel:
    model_settings, lora = config.model, config.lora
    shard = model_settings.shard and group.count > 1
    if model_settings.shard and not shard:
        say("one process holds all weights: shard plays no part")
    quantization, dtype = model_settings.quantization, load.pick_dtype(model_settings.dtype, device)
    policy = build_policy(
        source,
        lora_shape(lora) if prepared.adapter is None else [prepared.adapter],
        device=device,
        dtype=dtype,
        quantization=quantization,
        trainable=True,
        seed=config.step.seed,
        dropout=lora.lora_dropout,
        checkpointing=checkpointing(model_settings),
        torch_compile=model_settings.torch_compile,
        shard=shard,
        log=say,
    )
    base = policy.transformers_model
    if policy.support.why_not:
        say(f"one sequence at a time, because {policy.support.why_not}")
    trained = sum(parameter.numel() for parameter in policy.model.parameters() if parameter.requires_grad)
    frozen = policy.base.parameters
    say(f"{source.name}: {trained:,} parameters trained, {frozen:,} frozen, {base.dtype} on {device}")
    say(f"kernels: {policy.kernels}")
    if quantization != "none":
        emulated = quantization == "fp8" and not has_products(device)
        slow = "; this device has no products of fp8, they are emulated: no faster" if emulated else ""
        say(f"dense layers in {quantization}: {held_bytes(base) / 1e6:,.1f} MB of frozen weights{slow}")
    if shard:
        say(f"weights shared out over {group.count} processes: {held_bytes(base) / 1e6:,.1f} MB in this one")
    dataset = prepared.dataset
    details = adapters.describe(
        policy.base,
        dataset.template,
        dataset.columns,
        dataset.rules,
        tokenizer=prepared.tokenizer,
        trust_remote_code=source.trust_remote_code,
        quantization=quantization,
        trained_on={
            "data": dataset.train.rows.name,
            "data_sha256": dataset.train.rows.identity,
            "examples": len(dataset.train.units),
            "trained_tokens": dataset.train.trained_tokens,
            "left_out": dataset.train.store.counts.left_out,
            "shortened": dataset.train.store.counts.shortened,
        },
    )
    return LoadedModel(policy, details)


def all_looked_at(prepared: Prepared) -> References:
    """All units that the run trains on or measures by."""
    dataset = prepared.dataset
    needed = {dataset.train.store.key: (dataset.train.store, prepared.plan.used())}
    if dataset.validation is not None:
        store, held_out = dataset.validation.store, dataset.validation.units
        _, others = needed.get(store.key, (store, held_out[:0]))
        needed[store.key] = store, np.union1d(others, held_out)
    return needed


def held_out(prepared: Prepared) -> tuple[TokenStore, np.ndarray] | None:
    held_out = prepared.dataset.validation
    return None if held_out is None else (held_out.store, held_out.units)


def make_objective(
    config: RunConfig,
    loaded: LoadedModel,
    prepared: Prepared,
    units_by_store: References,
    group: Processes,
    say: Log,
) -> Objective:
    """What is trained; for a loss that compares with a reference, with the reference's log-probabilities of some units.

    The adapter must be as it was at the start: the checkpoint of a resumed run is not read yet.
    """
    preference, step = config.preference, config.step
    if preference is None:
        return SFT
    loss = LOSSES[preference.loss]
    references: dict[str, np.ndarray] = {}
    if loss.needs_reference:
        base = loaded.policy.transformers_model
        identity = ""
        if group.first:
            identity = reference_identity(
                loaded.policy.source,
                loaded.policy.base,
                prepared.adapter,
                base.dtype,
                base.device,
                config.model.quantization,
            )
        most = UNITS_WITHOUT_GRADIENT * step.micro_batch_size
        micro = replace(micro_batching(step), most_examples=most)
        with loaded.policy.model.disable_adapter() if prepared.adapter is None else nullcontext():
            for key, (store, units) in units_by_store.items():
                references[key] = reference_logprobs(
                    base,
                    loaded.policy.support,
                    store,
                    units,
                    identity=identity,
                    cache_dir=cache_folder(config.tokens),
                    room=MicroBatchLimit(micro, base.device, not is_sharded(base)),
                    group=group,
                    say=say,
                )
    return preference_objective(loss, preference_options(preference), references)


def make_tuning(
    config: RunConfig,
    loaded: LoadedModel,
    plan: Plan,
    objective: Objective,
    group: Processes,
    stop: Stop | None = None,
    *,
    by_tokens: bool = False,
) -> TrainState:
    """`by_tokens`: for want of room it is the tokens at once that are halved."""
    step, base = config.step, loaded.policy.transformers_model
    sharded = is_sharded(base)
    parameters = {name: each for name, each in loaded.policy.model.named_parameters() if each.requires_grad}
    optimizer = make_optimizer(
        step.optimizer,
        list(parameters.values()),
        learning_rate=step.learning_rate,
        betas=(step.adam_beta1, step.adam_beta2),
        epsilon=step.adam_epsilon,
        weight_decay=step.weight_decay,
    )
    return TrainState(
        model=base,
        how=loaded.policy.support,
        parameters=parameters,
        optimizer=optimizer,
        scheduler=make_schedule(step, optimizer, plan.total_steps),
        by_metric=step.lr_scheduler in BY_METRIC,
        max_grad_norm=step.max_grad_norm,
        room=MicroBatchLimit(micro_batching(step), base.device, not sharded, by_tokens),
        objective=objective,
        group=group,
        stop=stop or Stop(),
        sharded=sharded,
    )
