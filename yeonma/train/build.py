"""Builds the parts of a run: the model with its adapter, the objective, the reference, the optimizer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from yeonma.adapter import adapter_folder as adapters
from yeonma.batch.batch import Extras
from yeonma.batch.plan import Plan
from yeonma.config.reward_settings import RewardSettings
from yeonma.config.settings import LoraSettings, RunConfig, StepSettings
from yeonma.errors import Log
from yeonma.language import speaking
from yeonma.messages import counted, tr
from yeonma.model import load
from yeonma.model.language_part import absent_parameters
from yeonma.model.quantized import multiplies_fp8
from yeonma.model.sharding import is_sharded, local_weight_bytes
from yeonma.model.targets import Coverage, coverage
from yeonma.policy import Policy, build_policy
from yeonma.tokenization.dataset import (
    Dataset,
    DatasetPart,
    PreparedSet,
    cache_folder,
    faults_of,
    numbered_rows,
)
from yeonma.tokenization.store import TokenStore
from yeonma.train.distributed import Processes
from yeonma.train.full_weights import Parameters, decay_groups, trained_weights
from yeonma.train.interrupt import Stop
from yeonma.train.losses import REFERENCE_LOGPROB, TOKEN_LOSSES, Objective
from yeonma.train.memory_budget import checkpointing, micro_batching
from yeonma.train.oom_retry import MicroBatchLimit
from yeonma.train.optimizers import make_loraplus_optimizer, make_optimizer
from yeonma.train.policy_losses import POLICY_LOSSES, Clip, policy_objective
from yeonma.train.preference_losses import preference_loss, preference_objective
from yeonma.train.preflight import METRIC_SCHEDULES
from yeonma.train.prepare import (
    Prepared,
    lora_shape,
    make_schedule,
    preference_options,
)
from yeonma.train.reference import reference_identity, reference_logprobs
from yeonma.train.step import TrainState
from yeonma.train.target_device import TargetDevice

REFERENCE_UNITS_FACTOR = 4
"""How many times more units a micro-batch of the reference holds than one of training. Without gradients, memory holds
only one layer's activations."""


StoreUnits = Mapping[str, tuple[TokenStore, np.ndarray]]
"""Key of a token store -> the store and some of its units."""
StoreExtras = Mapping[str, Extras]
"""Key of a token store -> extras for each of its examples."""


@dataclass(frozen=True)
class LoadedModel:
    """The model of a run."""

    policy: Policy
    details: dict[str, Any]
    """The contents of yeonma.json."""


def load_model(
    config: RunConfig,
    source: load.BaseSource,
    device: torch.device,
    prepared: Prepared,
    log: Log,
    group: Processes,
) -> LoadedModel:
    """Loads the base, puts a new adapter or the one to continue on it, and logs what was loaded."""
    model_settings, lora = config.model, config.lora
    is_full = model_settings.train == "full"
    shard = model_settings.shard and group.count > 1
    if model_settings.shard and not shard:
        log(tr("shard has no effect in a single process"))
    quantization, dtype = model_settings.quantization, TargetDevice(device).dtype(model_settings)
    policy = build_policy(
        source,
        ("full" if is_full else lora_shape(lora, prepared.new_token_ids))
        if prepared.adapter is None
        else [prepared.adapter],
        device=device,
        dtype=dtype,
        quantization=quantization,
        trainable=True,
        seed=config.step.seed,
        dropout=lora.lora_dropout,
        checkpointing=checkpointing(model_settings),
        torch_compile=model_settings.torch_compile,
        shard=shard,
        log=log,
    )
    base = policy.transformers_model
    if policy.support.why_not:
        log(tr("one sequence at a time, because {why_not}", why_not=policy.support.why_not))
    trained = sum(parameter.numel() for parameter in policy.model.parameters() if parameter.requires_grad)
    frozen = 0 if is_full else policy.base.parameters - absent_parameters(base)
    log(
        tr(
            "{source}: {trained:,} parameters trained, {frozen:,} frozen, {dtype} on {device}",
            source=source.name,
            trained=trained,
            frozen=frozen,
            dtype=base.dtype,
            device=device,
        )
    )
    reached = None if is_full else coverage(base)
    log(
        tr("all weights are trained, routers and embeddings included")
        if is_full
        else tr("adapter on {reached}", reached=reached)
    )
    if config.step.loraplus_ratio is not None:
        log(
            tr(
                "LoRA+: B learns at {loraplus_ratio:g} times the learning rate of A",
                loraplus_ratio=config.step.loraplus_ratio,
            )
        )
    log(tr("kernels: {kernels}", kernels=policy.kernels))
    if base.published is not None:
        log(
            tr(
                "weights published as {published}: {held}, {size:,.1f} MB of frozen weights",
                published=base.published,
                held=base.published.held(quantization, str(dtype)),
                size=local_weight_bytes(base) / 1e6,
            )
        )
    if quantization != "none":
        emulated = quantization == "fp8" and not multiplies_fp8(device)
        line = tr(
            "dense layers in {quantization}: {base:,.1f} MB of frozen weights",
            quantization=quantization,
            base=local_weight_bytes(base) / 1e6,
        )
        if emulated:
            line = tr(
                "{line}; this device has no fp8 products, so they are emulated and no faster", line=line
            )
        log(line)
    if shard:
        log(
            tr(
                "weights sharded over {processes}: {size:,.1f} MB in this process",
                processes=counted(group.count, "process", "processes"),
                size=local_weight_bytes(base) / 1e6,
            )
        )
    dataset = prepared.dataset
    details = adapters.describe(
        policy.base,
        dataset.template,
        dataset.columns,
        dataset.rules,
        tokenizer=prepared.tokenizer,
        trust_remote_code=source.trust_remote_code,
        quantization=quantization,
        published=base.published,
        trained_on=_trained_on(dataset),
        lora=None if reached is None else _shape_of(lora, policy.model.peft_config["default"], reached),
        full=is_full,
        content=prepared.base_content,
    )
    return LoadedModel(policy, details)


def _shape_of(lora: LoraSettings, config: Any, reached: Coverage) -> dict[str, Any]:
    """What yeonma.json says of the adapter: its own shape, the settings that led to it, and what it is on."""
    with speaking("en"):
        on = str(reached)
    return {
        "r": config.r,
        "alpha": config.lora_alpha,
        "use_rslora": config.use_rslora,
        "use_dora": config.use_dora,
        "dropout": lora.lora_dropout,
        "target_modules": lora.lora_target_modules,
        "experts": lora.lora_experts,
        "layers": lora.lora_layers,
        "exclude": lora.exclude_modules,
        "new_tokens": lora.new_tokens,
        "modules_to_save": lora.modules_to_save,
        "on": on,
    }


def _trained_on(dataset: Dataset) -> dict[str, Any]:
    """What yeonma.json says of the data."""
    parts = [
        {**_trained_on_part(one.train), **_reading(one), **_faults(one.train.store)} for one in dataset.sets
    ]
    if len(parts) == 1:
        return parts[0]
    sets = [
        {
            "name": one.name,
            **part,
            "template": {"name": one.template.name, "text": one.template.text},
            "columns": one.columns,
        }
        for one, part in zip(dataset.sets, parts, strict=True)
    ]
    return {**_trained_on_part(dataset.train), **_faults(dataset.train.store), "data_sets": sets}


def _trained_on_part(part: DatasetPart) -> dict[str, Any]:
    return {
        "data": part.rows.name,
        "data_sha256": part.rows.identity,
        "examples": len(part.units),
        "trained_tokens": part.trained_tokens,
        "left_out": part.store.counts.left_out,
        "shortened": part.store.counts.shortened,
    }


def _reading(one: PreparedSet) -> dict[str, Any]:
    """How the data set was read and mixed, where that is not as by default."""
    settings = one.settings
    reading = {
        "max_rows": settings.limit,
        "delimiter": settings.delimiter,
        "weight": None if settings.weight is None else float(settings.weight),
        "repeats": None if settings.repeats == 1 else settings.repeats,
        "share": None if settings.share is None else float(settings.share),
    }
    return {name: value for name, value in reading.items() if value is not None}


def _faults(store: TokenStore) -> dict[str, Any]:
    faults = {fault.what: fault.count for fault in faults_of(store.left_out if store.counts.left_out else [])}
    return {"bad_rows": faults} if faults else {}


def units_to_reference(prepared: Prepared) -> StoreUnits:
    """All units that the run trains on or evaluates, by their store."""
    train = prepared.dataset.train
    units = {train.store.key: (train.store, prepared.plan.used())}
    for part in prepared.dataset.validation.values():
        _, before = units.get(part.store.key, (part.store, part.units[:0]))
        units[part.store.key] = part.store, np.union1d(before, part.units)
    return units


def build_objective(config: RunConfig) -> Objective:
    preference, reward = config.preference, config.reward
    if reward is not None:
        return policy_objective(POLICY_LOSSES[reward.policy_loss], clip_of(reward))
    if preference is None:
        return TOKEN_LOSSES[config.step.token_loss]
    loss, options = preference_loss(preference.loss), preference_options(preference)
    return preference_objective(loss, options, config.tokens.cutoff_len)


def updates_of(reward: RewardSettings | None) -> int:
    """The optimizer's updates in a step."""
    return 1 if reward is None else reward.updates_per_rollout


def clip_of(reward: RewardSettings) -> Clip:
    """The bounds of a ratio: those of the settings, else those of the loss's paper."""
    own = POLICY_LOSSES[reward.policy_loss].clip
    low = own.low if reward.clip_low is None else reward.clip_low
    return Clip(low, own.high if reward.clip_high is None else reward.clip_high)


def reference_extras(
    config: RunConfig,
    loaded: LoadedModel,
    prepared: Prepared,
    units_by_store: StoreUnits,
    group: Processes,
    log: Log,
) -> StoreExtras:
    """The reference's log-probabilities of the units; empty if the loss needs no reference.

    Call it before a resumed run loads its checkpoint, because the reference is what training starts from.
    """
    preference, step = config.preference, config.step
    if preference is None or not preference_loss(preference.loss).needs_reference:
        return {}
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
            cache_folder(config.tokens),
        )
    bounds = micro_batching(step)
    bounds = replace(bounds, most_examples=REFERENCE_UNITS_FACTOR * step.micro_batch_size)
    extras: dict[str, Extras] = {}
    has_new_adapter = prepared.adapter is None and config.model.train == "lora"
    with loaded.policy.model.disable_adapter() if has_new_adapter else nullcontext():
        for key, (store, units) in units_by_store.items():
            logprobs = reference_logprobs(
                base,
                loaded.policy.support,
                store,
                units,
                identity=identity,
                cache_dir=cache_folder(config.tokens),
                limit=MicroBatchLimit(bounds, base.device, is_sharded(base)),
                group=group,
                log=log,
            )
            extras[key] = {REFERENCE_LOGPROB: logprobs}
    return extras


def _trained(model: Any, *, is_full: bool) -> tuple[Parameters, Parameters]:
    """As `trained_weights`; for an adapter, whose weights are in float32, its own."""
    if is_full:
        return trained_weights(model)
    return {name: weight for name, weight in model.named_parameters() if weight.requires_grad}, {}


def build_train_state(
    config: RunConfig,
    loaded: LoadedModel,
    plan: Plan,
    objective: Objective,
    group: Processes,
    stop: Stop | None = None,
    *,
    by_tokens: bool = False,
    continued: bool = False,
    name_rows: Callable[[Sequence[int]], str] = numbered_rows,
) -> TrainState:
    """The state of the first step. `by_tokens`: if memory runs out, halve the token budget instead of the units.
    `continued`: whether the adapter is not a new one. `name_rows` as in TrainState."""
    step, base = config.step, loaded.policy.transformers_model
    sharded = is_sharded(base)
    parameters, rounded = _trained(loaded.policy.model, is_full=config.model.train == "full")
    measures_reference = any(measure.with_reference for measure in objective.measures)
    start = (
        {name: weight.detach().clone() for name, weight in (rounded or parameters).items()}
        if measures_reference
        else {}
    )
    optimizer = _optimizer(step, loaded.policy.model, parameters, is_full=config.model.train == "full")
    return TrainState(
        model=base,
        support=loaded.policy.support,
        parameters=parameters,
        optimizer=optimizer,
        scheduler=make_schedule(step, optimizer, plan.total_steps * updates_of(config.reward)),
        by_metric=step.lr_scheduler in METRIC_SCHEDULES,
        max_grad_norm=step.max_grad_norm,
        limit=MicroBatchLimit(micro_batching(step), base.device, sharded, by_tokens),
        objective=objective,
        evaluated_by=None if config.reward is None else TOKEN_LOSSES["nll"],
        group=group,
        stop=stop or Stop(),
        sharded=sharded,
        name_rows=name_rows,
        start=start,
        rounded=rounded,
        starts_exactly=not continued or config.lora.lora_dropout == 0,
    )


def _optimizer(
    step: StepSettings, model: Any, parameters: Mapping[str, torch.nn.Parameter], *, is_full: bool
) -> torch.optim.Optimizer:
    options: dict[str, Any] = {
        "learning_rate": step.learning_rate,
        "betas": (step.adam_beta1, step.adam_beta2),
        "epsilon": step.adam_epsilon,
        "weight_decay": step.weight_decay,
    }
    if step.loraplus_ratio is not None:
        return make_loraplus_optimizer(step.optimizer, model, step.loraplus_ratio, **options)
    return make_optimizer(
        step.optimizer,
        decay_groups(parameters, step.weight_decay) if is_full else list(parameters.values()),
        **options,
    )
