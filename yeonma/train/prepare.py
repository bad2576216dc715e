"""Prepares a run up to the loading of weights: config, tokenizer, data and plan, with all checks of the settings."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch

from yeonma.adapter import adapter_folder as adapters
from yeonma.adapter.base_check import check_continued_config, check_continued_content
from yeonma.batch.plan import Plan, Shares, make_plan
from yeonma.bounded.user_functions import content_of_file
from yeonma.config.data_sets import of_data_set
from yeonma.config.metric_names import best_metric, keeps_best
from yeonma.config.reward_settings import RewardSettings
from yeonma.config.settings import (
    DataSettings,
    EvaluationSettings,
    LoraSettings,
    PreferenceSettings,
    RunConfig,
    StepSettings,
    TokenLoss,
    TokenSettings,
)
from yeonma.data.rows import naming_skip
from yeonma.errors import Log, Problem, UserError
from yeonma.messages import counted, tr
from yeonma.model import load
from yeonma.model.adapter_config import WEIGHTS_FILE
from yeonma.model.adapter_weights import added_rows, check_fits
from yeonma.model.base_content import BaseContent
from yeonma.model.packed_experts import pack_experts_on_meta
from yeonma.model.position_limits import model_positions
from yeonma.model.published import check_not_packed, published_in
from yeonma.model.quantization import check_optimizer_device, check_sharded_dora
from yeonma.model.quantized import check_layers, quantised_layers
from yeonma.model.target_choice import chosen_layers
from yeonma.model.targets import Coverage, adapted, coverage
from yeonma.model.whole_modules import check_not_quantised, whole_modules
from yeonma.rewards.rewards import contents, names_of
from yeonma.run_folder.output_folder import CONTENT_OF_BASE, CONTENT_OF_METRICS, CONTENT_OF_REWARDS
from yeonma.tokenization.cache import tokenizer_identity
from yeonma.tokenization.dataset import Dataset, PreparedSet, prepare_dataset
from yeonma.tokenization.new_tokens import add_new_tokens
from yeonma.train.answer_rows import AnswerPlan, answer_plan
from yeonma.train.continued_lora import CURE, adapter_lora
from yeonma.train.full_settings import check_full_base
from yeonma.train.pair_losses import PreferenceOptions
from yeonma.train.preference_losses import preference_loss
from yeonma.train.preflight import (
    METRIC_SCHEDULES,
    check_metrics,
    check_no_need_of_validation,
    preference_problems,
    task_of,
)
from yeonma.train.target_device import TargetDevice, target_device

TRIAL_STEPS = 40
MOST_STEPS = 10**9
ONLY_FOR_THE_CARD = ("card_rows", "general_questions")
SAFE_SCHEDULES = ("linear", "cosine", "constant")
"""Schedules that cannot fail without arguments."""


@dataclass(frozen=True)
class Prepared:
    """Everything that a run needs except the weights."""

    config: Any
    """The base model's config."""
    tokenizer: Any
    dataset: Dataset
    plan: Plan
    adapter: str | None
    """The folder of the adapter to continue."""
    identity: dict[str, Any]
    """What the result of the run depends on; run.json records it."""
    trained_parameters: int | None = None
    """None if the number is unknown until the weights are loaded."""
    new_token_ids: tuple[int, ...] = ()
    """Of the tokens that the run, or that of the adapter to continue, added to the tokenizer."""
    answers: AnswerPlan | None = None
    """What the run measures on answers at every evaluation."""
    base_content: BaseContent | None = None
    """Part of `identity`; None if the base has not been read."""

    def with_base(self, content: BaseContent, source: load.BaseSource) -> Prepared:
        """The same with the content of its base. Raises UserError if the adapter to continue was trained on another."""
        if self.adapter is not None:
            check_continued_content(self.adapter, source, content)
        identity = {**self.identity, CONTENT_OF_BASE: content.record()}
        return replace(self, base_content=content, identity=identity)


def prepare(
    config: RunConfig,
    source: load.BaseSource,
    continued: str | None,
    log: Log,
    *,
    target: TargetDevice | None = None,
    try_adapter: bool = True,
) -> Prepared:
    """Loads the tokenizer, tokenises the data and makes the plan. `continued`: the folder of the adapter to continue.
    `target`: the device of the run, by default the one of the settings.

    Raises UserError for every mistake in settings or data that can be found before weights are loaded. `try_adapter`
    false skips `check_adapter`, which takes seconds.
    """
    model, step = config.model, config.step
    target = target or target_device(model.device)
    target.dtype(model)
    check_metrics(config)
    check_optimizer_device(step.optimizer, target.device.type)
    model_config, tokenizer = load.load_config(source), load.load_tokenizer(source)
    published = load.published_weights(model_config, source)
    check_full_base(model, model_config, published)
    check_not_packed(published, model.quantization, source.name)
    if model.quantization != "none" or (published is not None and published.stays_packed):
        check_sharded_dora(source.name, shard=model.shard, use_dora=config.lora.use_dora)
    load.check_vocabulary(tokenizer, model_config.get_text_config().vocab_size, source.name)
    new_token_ids = add_new_tokens(tokenizer, config.lora.new_tokens or ())
    trained = None
    if try_adapter:
        trained = check_adapter(config, model_config, source, continued, new_token_ids)[0]
    elif continued is not None:
        adapters.check_continued(continued, None)
    _check_schedule(step, log)
    preference = config.preference
    if preference is not None:
        _check_preference(preference, config.tokens, step.token_loss)
        if step.batch_size == 1 and preference_loss(preference.loss).measures:
            log(
                tr(
                    "{loss} compares the rows of a step; with --batch_size 1 it has none to compare with",
                    loss=preference.loss,
                )
            )

    def log_rows(rows: int) -> None:
        log(tr("tokenised {rows}", rows=counted(rows, "row")))

    data, tokens = config.data, config.tokens
    with naming_skip(data.bad_rows):
        dataset = prepare_dataset(
            data, tokens, tokenizer, step.seed, log, log_rows, task_of(config), continued
        )
    if not dataset.validation:
        check_no_need_of_validation(config)
    plan = plan_of(dataset, step)
    _check_positions(model_config, dataset)
    answers = answer_plan(config.evaluation, dataset, source, model_config, tokenizer, step.seed)
    identity = _identity(config, source, tokenizer, dataset, plan, continued)
    identity |= _identity_of_evaluation(config.evaluation, answers)
    return Prepared(
        model_config, tokenizer, dataset, plan, continued, identity, trained, new_token_ids, answers
    )


def plan_of(dataset: Dataset, step: StepSettings) -> Plan:
    """The steps of a run. An epoch has every training unit once, or as often as its data set's repeats say; with
    weights, as many units, of which each data set has its share. Data sets with a `share` have it of every step, and
    make the epoch of the others longer by that.

    Raises UserError for settings that do not go with weights, and for more steps than a run can have.
    """
    of_sets = dataset.units_of_sets()
    weights = mixture_weights(dataset)
    shares, epoch_units = None, None
    if weights is not None:
        if step.group_by_length:
            problem = tr("steps of similar lengths cannot keep the shares of the data sets' weights")
            cure = tr("leave it out, or give repeats instead of weights")
            raise UserError(problem, place="group_by_length", cure=cure)
        denominator = math.lcm(*(weight.denominator for weight in weights))
        ends = np.cumsum([len(units) for units in of_sets])
        ranges = [np.arange(end - len(units), end) for units, end in zip(of_sets, ends, strict=True)]
        shares = Shares(tuple(ranges), tuple(int(weight * denominator) for weight in weights))
        if left := sum(one.settings.share or 0 for one in dataset.sets):
            epoch_units = math.ceil(_own_units(dataset) / (1 - left))
    else:
        repeats = [one.settings.repeats for one in dataset.sets]
        of_sets = [np.tile(units, times) for units, times in zip(of_sets, repeats, strict=True)]
    units = np.concatenate(of_sets)
    steps = step.num_epochs * math.ceil((epoch_units or len(units)) / step.batch_size)
    if step.max_steps is None and steps > MOST_STEPS:
        problem = tr(
            "the run would have {steps:.3g} steps, and {most_steps:,} are the most",
            steps=steps,
            most_steps=MOST_STEPS,
        )
        raise UserError(problem, place="num_epochs", cure=tr("lower it, or give max_steps"))
    return make_plan(
        units,
        dataset.train.store.unit_lengths[units],
        batch_size=step.batch_size,
        seed=step.seed,
        num_epochs=step.num_epochs,
        max_steps=step.max_steps,
        group_by_length=step.group_by_length,
        shares=shares,
        epoch_units=epoch_units,
    )


def mixture_weights(dataset: Dataset) -> list[Fraction] | None:
    """The weight of each data set in every step; None where an epoch has every row as often as its data set says.
    Beside a data set with a `share`, the others keep their weights among themselves or, without any, their numbers of
    units."""
    settings = [one.settings for one in dataset.sets]
    shares = [one.share for one in settings if one.share is not None]
    if not shares:
        weights = [one.weight for one in settings if one.weight is not None]
        return weights if 1 < len(settings) == len(weights) else None
    own = [
        Fraction(0)
        if one.settings.share is not None
        else one.settings.weight or Fraction(len(one.train.units) * one.settings.repeats)
        for one in dataset.sets
    ]
    scale = (1 - sum(shares, Fraction(0))) / sum(own, Fraction(0))
    return [
        weight * scale if one.share is None else one.share for weight, one in zip(own, settings, strict=True)
    ]


def _own_units(dataset: Dataset) -> int:
    """The units in an epoch of the data sets without a share."""
    return sum(
        len(one.train.units) * one.settings.repeats for one in dataset.sets if one.settings.share is None
    )


def mixture_lines(dataset: Dataset, plan: Plan) -> list[str]:
    """What a run takes of each data set, one line each; none for a single data set without repeats."""
    if len(dataset.sets) == 1 and dataset.sets[0].settings.repeats == 1:
        return []
    parts = zip(dataset.sets, mixture_parts(dataset, plan), strict=True)
    return [f"{one.name}: {part}" for one, part in parts]


def mixture_parts(dataset: Dataset, plan: Plan) -> list[str]:
    """The part of each data set in a run, in words."""
    units = dataset.task.units
    if plan.shares is not None:
        total = sum(plan.shares.weights)
        return [
            tr(
                "{weight:.1%} of each step's {units}, {passes:,.2f} passes in the whole run",
                weight=weight / total,
                units=tr(units),
                passes=passes,
            )
            for weight, passes in zip(plan.shares.weights, plan.passes(), strict=True)
        ]
    repeats = [one.settings.repeats for one in dataset.sets]
    counts = [len(one.train.units) * times for one, times in zip(dataset.sets, repeats, strict=True)]
    return [
        tr(
            "{share:.1%} of the {units}, {times} an epoch",
            share=count / sum(counts),
            units=tr(units),
            times=counted(times, "time"),
        )
        for count, times in zip(counts, repeats, strict=True)
    ]


def preference_options(preference: PreferenceSettings) -> PreferenceOptions:
    return PreferenceOptions(
        beta=preference.beta,
        label_smoothing=preference.label_smoothing,
        sft_weight=preference.sft_weight,
        simpo_gamma=preference.simpo_gamma,
        discopop_tau=preference.discopop_tau,
        f_divergence=preference.f_divergence,
        f_alpha=preference.f_alpha,
        wpo_weights=preference.wpo_weights,
        kto_desirable_weight=preference.kto_desirable_weight,
        kto_undesirable_weight=preference.kto_undesirable_weight,
    )


def _check_preference(preference: PreferenceSettings, tokens: TokenSettings, token_loss: TokenLoss) -> None:
    """Raises UserError for settings that have no effect in preference training, or none on the chosen loss."""
    options, defaults = asdict(preference_options(preference)), asdict(PreferenceOptions())
    loss = preference_loss(preference.loss)
    problems = [
        Problem(
            tr("{loss} does not read it", loss=loss.name),
            name,
            tr("leave it out, or choose another --loss than {loss}", loss=loss.name),
        )
        for name, value in options.items()
        if value != defaults[name] and name not in loss.options
    ]
    problems += [
        Problem(
            tr("{loss} needs a value above 0", loss=loss.name),
            name,
            tr("give --{name} {value}, as in the paper", name=name, value=value),
        )
        for name, value in loss.above_zero.items()
        if not options[name]
    ]
    problems += preference_problems(preference, tokens, token_loss)
    if problems:
        raise UserError(problems)


def lora_shape(lora: LoraSettings, new_token_ids: Sequence[int] = ()) -> load.LoraShape:
    """The shape of a new adapter. `new_token_ids`: those of the setting's new tokens."""
    return load.LoraShape(
        lora.lora_r,
        lora.lora_alpha,
        lora.lora_dropout,
        lora.lora_target_modules,
        lora.use_rslora,
        lora.use_dora,
        lora.lora_experts,
        lora.lora_layers,
        lora.exclude_modules,
        tuple(new_token_ids),
        lora.modules_to_save,
    )


def check_adapter(
    config: RunConfig,
    model_config: Any,
    source: load.BaseSource,
    continued: str | None,
    new_token_ids: Sequence[int],
) -> tuple[int | None, Coverage | None]:
    """Puts the adapter on the model without weights. Returns the number of trained parameters and what has an adapter,
    or None for each if the model cannot be built without its weights.

    Raises UserError for target layers that the model does not have, for an adapter of another base or with other
    targets than those given, and for a model without layers to quantise.
    """
    model = load.outline(model_config, source)
    if config.model.train == "full":
        return model and sum(parameter.numel() for parameter in model.parameters()), None
    quantization = config.model.quantization
    if model is not None:
        check_layers(model, quantization, source.name)
    if continued is not None:
        check_continued_config(continued, source, model_config)
        adapters.check_continued(continued, model and adapters.base_identity(model, source))
    if model is None:
        return (None if continued is None else adapters.stored_parameters(Path(continued))), None
    published = published_in(model_config.to_dict(), source.name)
    if published is not None and published.packs_experts(quantization):
        pack_experts_on_meta(model)
    if continued is None:
        if quantization != "none" or (published is not None and published.stays_packed):
            layers = quantised_layers(model, "int8" if quantization == "none" else quantization)
            check_not_quantised(model, whole_modules(model, config.lora.modules_to_save, ()), layers)
        peft_model = load.add_lora(model, lora_shape(config.lora, new_token_ids), seed=0)
        trained = sum(parameter.numel() for parameter in peft_model.parameters() if parameter.requires_grad)
        return trained, coverage(model)
    choice, own = lora_shape(config.lora).choice, lora_shape(adapter_lora(continued).settings).choice
    asked = None
    if choice != own:  # other words, which may still mean the same
        asked = {layer.adapted for layer in chosen_layers(model, choice)}
    added = added_rows(model, continued)
    if added > 0 and not new_token_ids:
        what = tr("it has {tokens} of its own, which a run cannot continue", tokens=counted(added, "token"))
        raise UserError(
            what, place=continued, cure=tr("merge it with `yeonma merge`, and train on the result")
        )
    check_fits(model, continued, config.lora.lora_dropout)
    reached = coverage(model)
    if asked is not None and asked != adapted(model):
        what = tr(
            "it reaches other layers than the adapter in {continued} has ({reached})",
            continued=continued,
            reached=reached,
        )
        place = next(name for name, value in asdict(choice).items() if value != getattr(own, name))
        raise UserError(what, place=place, cure=CURE)
    return adapters.stored_parameters(Path(continued)), reached


def _check_positions(config: Any, dataset: Dataset) -> None:
    """Raises UserError if an example is longer than the model's context."""
    limit = model_positions(config)
    parts = [dataset.train, *dataset.validation.values()]
    longest = max(int(part.store.lengths.max()) for part in parts)
    if limit is not None and longest > limit:
        what = tr(
            "the longest example has {longest} tokens, but the model only {limit} positions",
            longest=longest,
            limit=limit,
        )
        raise UserError(what, place="cutoff_len", cure=tr("use --cutoff_len {limit}", limit=limit))


def _check_schedule(step: StepSettings, log: Log) -> None:
    """Runs the schedule on a dummy optimizer. Raises UserError for arguments that it does not accept, and logs settings
    that have no effect on it."""
    if (step.warmup_steps or step.warmup_ratio) and step.lr_scheduler in ("constant", *METRIC_SCHEDULES):
        log(
            tr(
                "{lr_scheduler} has no warm-up: warmup_steps and warmup_ratio have no effect",
                lr_scheduler=step.lr_scheduler,
            )
        )
    if step.lr_scheduler_kwargs and step.lr_scheduler in ("constant", "constant_with_warmup"):
        raise UserError(
            tr("{lr_scheduler} takes no arguments", lr_scheduler=step.lr_scheduler),
            place="lr_scheduler_kwargs",
        )
    if step.lr_scheduler in SAFE_SCHEDULES and not step.lr_scheduler_kwargs:
        return
    optimizer = torch.optim.AdamW([torch.zeros(1, requires_grad=True)], lr=step.learning_rate)
    short_warmup = replace(step, warmup_steps=min(step.warmup_steps, 2), warmup_ratio=0.0)
    try:
        schedule = make_schedule(short_warmup, optimizer, TRIAL_STEPS)
        for number in range(TRIAL_STEPS):  # some arguments are read late, or only while the loss rises
            optimizer.step()
            schedule.step(*([float(number)] if step.lr_scheduler in METRIC_SCHEDULES else []))
            if not all(math.isfinite(rate) for rate in schedule.get_last_lr()):
                raise ValueError(tr("the learning rate would be infinite"))
    except (TypeError, ValueError, LookupError, ArithmeticError) as error:
        raise UserError(
            tr("{lr_scheduler} does not accept them ({error})", lr_scheduler=step.lr_scheduler, error=error),
            place="lr_scheduler_kwargs",
        ) from error


def make_schedule(step: StepSettings, optimizer: torch.optim.Optimizer, total_steps: int) -> Any:
    from transformers import get_scheduler  # imports PEFT and more, which takes seconds

    warmup = warmup_steps(step, total_steps)
    return get_scheduler(step.lr_scheduler, optimizer, warmup, total_steps, step.lr_scheduler_kwargs)


def warmup_steps(step: StepSettings, total_steps: int) -> int:
    return step.warmup_steps or math.ceil(step.warmup_ratio * total_steps)


def _identity(
    config: RunConfig,
    source: load.BaseSource,
    tokenizer: Any,
    dataset: Dataset,
    plan: Plan,
    continued: str | None,
) -> dict[str, Any]:
    """What the result depends on: rows, tokens, base, and all settings except those for speed and output."""
    model, step = config.model, config.step
    tokens = config.tokens
    left_out = ("micro_batch_size", "micro_batch_tokens", "share_prefix", "num_epochs", "max_steps")
    weights = Path(continued) / WEIGHTS_FILE if continued else None
    preference = config.preference
    return {
        "objective": config.objective,
        "base_model": source.name,
        "model_revision": source.revision,
        "dtype": model.dtype,
        "quantization": model.quantization,
        **_identity_of_data(config.data, dataset),
        "content of the tokenizer": tokenizer_identity(tokenizer),
        "content of the adapter continued": hashlib.sha256(weights.read_bytes()).hexdigest()
        if weights
        else None,
        "steps": plan.total_steps,
        **{name: value for name, value in asdict(tokens).items() if name != "cache_dir"},
        "train": model.train,
        **(asdict(config.lora) if model.train == "lora" else {}),
        **(asdict(preference) if preference else {}),
        **(_identity_of_reward(config.reward) if config.reward else {}),
        **{name: value for name, value in asdict(step).items() if name not in left_out},
    }


def _identity_of_evaluation(evaluation: EvaluationSettings, answers: AnswerPlan | None) -> dict[str, Any]:
    """Settings of the evaluation, and those of answers only if the run measures some."""
    of_answers = ("answer_metrics", "answer_rows")
    identity = {
        name: value
        for name, value in asdict(evaluation).items()
        if name not in (*ONLY_FOR_THE_CARD, *of_answers)
    }
    identity["keep_best"] = best_metric(evaluation.keep_best) or keeps_best(evaluation.keep_best)
    if answers is None:
        return identity
    names = answers.names
    sums = {str(one): content_of_file(one.file, "answer_metrics") for one in names.functions}
    return {
        **identity,
        "answer_metrics": names.as_list(),
        "answer_rows": evaluation.answer_rows,
        **answers.identity(),
        **({CONTENT_OF_METRICS: sums} if sums else {}),
    }


def _identity_of_reward(reward: RewardSettings) -> dict[str, Any]:
    """The settings, with the content of the user's functions in place of their paths."""
    settings = {name: value for name, value in asdict(reward).items() if name != "rollout_batch_size"}
    sums = contents(reward)
    names = [name.label for name in names_of(reward)]
    return {**settings, "reward": names, **({CONTENT_OF_REWARDS: sums} if sums else {})}


def _identity_of_data(data: DataSettings, dataset: Dataset) -> dict[str, Any]:
    """Rows, templates, and what else decides which examples a run has. Of a list of data sets, also that of each."""
    identity = {**_identity_of_set(dataset.sets[0]), "content of data_path": dataset.train.rows.identity}
    identity |= {"max_rows": data.max_rows, "val_set_size": data.val_set_size}
    if isinstance(data.data_path, list) or len(dataset.sets) > 1:
        for number, one in enumerate(dataset.sets, 1):
            mixed = {
                "weight": one.settings.weight and str(one.settings.weight),
                "repeats": one.settings.repeats,
            }
            if one.settings.share is not None:
                mixed["share"] = str(one.settings.share)
            values = {**_identity_of_set(one), **mixed}
            identity |= {of_data_set(name, number): value for name, value in values.items()}
    return identity


def _identity_of_set(one: PreparedSet) -> dict[str, Any]:
    held_out = one.validation.rows.identity if one.validation is not None else None
    return {
        "content of data_path": one.train.rows.identity,
        "content of the validation rows": held_out,
        "content of the template": hashlib.sha256(one.template.text.encode()).hexdigest(),
        "columns": one.columns,
        "max_rows": one.settings.limit,
        "val_set_size": one.settings.val_set_size,
    }
