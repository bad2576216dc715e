"""What is likely a mistake in a run that could go on: a learning rate that never rises, too few rows, one and the same
answer. Said by `inspect` and at the start of a run. Warnings about single rows are those of the data set."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch

from yeonma.batch.plan import Plan
from yeonma.config.settings import StepSettings
from yeonma.data.task import ANSWERS
from yeonma.messages import counted, tr
from yeonma.run_folder.units import counted_units
from yeonma.tokenization.dataset import Dataset, DatasetPart
from yeonma.train.preflight import METRIC_SCHEDULES
from yeonma.train.prepare import make_schedule, warmup_steps

FEW_UNITS = 20
LOW_PEAK = 0.5
"""A learning rate that stays below so much of the setting in every step is worth a warning."""
SAMPLED_STEPS = 2000


def run_warnings(step: StepSettings, dataset: Dataset, plan: Plan) -> list[str]:
    """One line for each; none for a run in which nothing is suspicious."""
    found = [_learning_rate(step, plan.total_steps), *_sizes(dataset, plan), *_answers(dataset)]
    return [line for line in found if line]


def _learning_rate(step: StepSettings, total_steps: int) -> str:
    if step.lr_scheduler in ("constant", *METRIC_SCHEDULES):
        return ""
    warmup = warmup_steps(step, total_steps)
    if step.lr_scheduler in ("linear", "cosine") and not step.lr_scheduler_kwargs and warmup < total_steps:
        return ""  # the step after the warm-up has the whole learning rate
    peak = highest_rate(step, total_steps)
    if peak >= LOW_PEAK * step.learning_rate and warmup < total_steps:
        return ""
    reason = tr("no step of the {lr_scheduler} schedule has more", lr_scheduler=step.lr_scheduler)
    cure = tr("see lr_scheduler_kwargs")
    if warmup >= total_steps:
        reason = tr(
            "the warm-up takes {warmup}, and the run has {steps}",
            warmup=counted(warmup, "step"),
            steps=counted(total_steps, "step"),
        )
        cure = tr("lower warmup_steps or warmup_ratio")
    if peak <= 0:
        return tr(
            "the learning rate is 0 in every step, so nothing is trained: {reason}; {cure}",
            reason=reason,
            cure=cure,
        )
    return tr(
        "the learning rate reaches {peak:.2g} instead of {learning_rate:g}: {reason}; {cure}",
        peak=peak,
        learning_rate=step.learning_rate,
        reason=reason,
        cure=cure,
    )


def highest_rate(step: StepSettings, total_steps: int) -> float:
    """The highest learning rate of the run's steps; of a long run, of so many of them, evenly spread."""
    optimizer = torch.optim.AdamW([torch.zeros(1, requires_grad=True)], lr=step.learning_rate)
    factor = make_schedule(step, optimizer, total_steps).lr_lambdas[0]
    ends = {0, total_steps - 1, min(warmup_steps(step, total_steps), total_steps - 1)}
    sampled = {*range(0, total_steps, math.ceil(total_steps / SAMPLED_STEPS)), *ends}
    return step.learning_rate * max(float(factor(number)) for number in sampled)


def _sizes(dataset: Dataset, plan: Plan) -> list[str]:
    units, count = tr(dataset.task.units), len(dataset.train.units)
    lines = []
    if plan.shares is None and len(plan.positions) < plan.batch_size:
        lines.append(
            tr(
                "a step takes {batch_size:,} {units}, and an epoch has {positions:,}: every step is a "
                "whole epoch; lower batch_size",
                batch_size=plan.batch_size,
                units=units,
                positions=len(plan.positions),
            )
        )
    if plan.shares is not None:
        total = sum(plan.shares.weights)
        for one, weight in zip(dataset.sets, plan.shares.weights, strict=True):
            share = math.ceil(plan.batch_size * weight / total)
            if len(one.train.units) < share:
                lines.append(
                    tr(
                        "{one}: a step takes {share:,} {units} of it, and there are {units2:,}: each comes "
                        "several times in one step; lower batch_size or its weight",
                        one=one.name,
                        share=share,
                        units=units,
                        units2=len(one.train.units),
                    )
                )
    if count < FEW_UNITS:
        lines.append(
            tr(
                "only {units} to train on: from fewer than {few_units} a model learns them by heart",
                units=counted_units(count, dataset.task.units),
                few_units=FEW_UNITS,
            )
        )
    return lines


def _answers(dataset: Dataset) -> list[str]:
    if dataset.task != ANSWERS:
        return []
    several = len(dataset.sets) > 1
    return [
        (f"{one.name}: " if several else "")
        + tr(
            "all {units:,} answers are the same, so the model learns to give this one to anything",
            units=len(one.train.units),
        )
        for one in dataset.sets
        if len(one.train.units) > 1 and all_alike(one.train)
    ]


def all_alike(part: DatasetPart) -> bool:
    """Whether all examples are trained on the same tokens. Reads no further than to the first that differs."""
    store = part.store
    positions: Sequence[int] = part.positions.tolist()
    counts = store.trained_counts[part.positions]
    if not len(counts) or (counts != counts[0]).any():
        return False
    first: np.ndarray | None = None
    for position in positions:
        example = store[position]
        trained = example.token_ids[example.trained]
        if first is None:
            first = trained
        elif not np.array_equal(first, trained):
            return False
    return True
