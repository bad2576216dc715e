"""What a run continues from, put back: a checkpoint's weights, optimizer, schedule and random numbers.

Checksums show accidents. A checkpoint that was edited, or written by another program, may have sums that are right, so
everything is checked against the run before the run writes anything.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from yeonma.errors import brief
from yeonma.messages import tr
from yeonma.run_folder.checkpoint import OPTIMIZER, RANDOM, STATE, RunProgress, checkpoint_path
from yeonma.train.loop import restore_random
from yeonma.train.optimizers import restore_optimizer
from yeonma.train.saved_weights import SavedWeights, unfit
from yeonma.train.step import TrainState

AVERAGES = ("exp_avg", "exp_avg_sq")
"""What AdamW keeps of a parameter, in its shape, beside the number of its steps."""


def restore(state: TrainState, saved: SavedWeights, checkpoint: Path, progress: RunProgress) -> None:
    """Puts back what the checkpoint holds. Raises UserError that names the file which does not fit this run."""
    saved.load(checkpoint)
    if progress.best_step not in (None, progress.step):
        saved.check_best(checkpoint_path(checkpoint.parent, progress.best_step), checkpoint)
    restore_schedule(state, checkpoint, progress)
    if unknown := sorted(progress.carried.keys() - state.objective.start.keys()):
        raise unfit(
            checkpoint / STATE,
            tr("{objective} carries no {unknown}", objective=state.objective.name, unknown=brief(unknown[0])),
        )
    state.carried.update(progress.carried)
    optimizer = read_tensors(checkpoint / OPTIMIZER)
    names: dict[torch.Tensor, str] = {weight: name for name, weight in state.parameters.items()}
    try:
        if type(state.optimizer) is torch.optim.AdamW:
            _check_adamw(state.parameters, optimizer)
        restore_optimizer(state.optimizer, names, optimizer)
    except (KeyError, ValueError, TypeError, RuntimeError) as error:
        raise unfit(checkpoint / OPTIMIZER, str(error)) from error
    random = read_tensors(checkpoint / RANDOM)
    try:
        restore_random(random, state.group, state.model.device)
    except (TypeError, RuntimeError) as error:
        raise unfit(checkpoint / RANDOM, str(error)) from error


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint's file. Raises UserError if it holds none."""
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise unfit(path, str(error)) from error


def restore_schedule(state: TrainState, checkpoint: Path, progress: RunProgress) -> None:
    """Puts the schedule back. Entries that this version's schedule does not have are left out."""
    current = state.scheduler.state_dict()
    recorded = {name: value for name, value in progress.schedule.items() if name in current}
    for name, value in recorded.items():
        if not _is_like(value, current[name]):
            raise unfit(
                checkpoint / STATE,
                tr("the schedule's {name} is {value}", name=name, value=brief(repr(value))),
            )
    if lacking := sorted({"last_epoch", "_last_lr"} & current.keys() - recorded.keys()):
        raise unfit(checkpoint / STATE, tr("the schedule has no {lacking}", lacking=", ".join(lacking)))
    rates = recorded["_last_lr"]
    if None in rates or recorded["last_epoch"] is None:
        raise unfit(checkpoint / STATE, tr("the schedule has no learning rate"))
    if not state.by_metric and recorded["last_epoch"] != progress.step:
        what = tr(
            "the schedule is at step {last_epoch}, and the run at step {step}",
            last_epoch=recorded["last_epoch"],
            step=progress.step,
        )
        raise unfit(checkpoint / STATE, what)
    state.scheduler.load_state_dict({**current, **recorded})
    for group, rate in zip(state.optimizer.param_groups, state.scheduler.get_last_lr(), strict=True):
        group["lr"] = rate


def _is_like(value: Any, current: Any) -> bool:
    """Whether it could stand in the place of `current`: of its kind, lists as long, numbers finite unless they are as
    now. What is None now may be a number later, and the other way round, in schedules that follow the loss."""
    if isinstance(current, list):
        return isinstance(value, list) and len(value) == len(current) and all(map(_is_like, value, current))
    if isinstance(current, bool | str):
        return isinstance(value, type(current))
    if current is None or isinstance(current, int | float):
        is_number = type(value) in (int, float) and abs(value) < 2**63
        return value is None or value == current or is_number
    return isinstance(value, type(current))


def _check_adamw(parameters: Mapping[str, torch.Tensor], tensors: Mapping[str, torch.Tensor]) -> None:
    """Raises ValueError for anything but AdamW's averages of these parameters. A parameter that no step has reached has
    none."""
    for name, tensor in tensors.items():
        parameter, _, entry = name.rpartition("/")
        if parameter not in parameters or entry not in ("step", *AVERAGES):
            raise ValueError(tr("it has {name}, which this run's optimizer does not", name=brief(name)))
        shape = torch.Size() if entry == "step" else parameters[parameter].shape
        if tensor.shape != shape or not tensor.is_floating_point():
            what = tr(
                "{name} has the shape {found} of {dtype}, and this run's {expected}",
                name=name,
                found=tuple(tensor.shape),
                dtype=tensor.dtype,
                expected=tuple(shape),
            )
            raise ValueError(what)
        is_infinite = entry != "exp_avg_sq" and bool(tensor.isinf().any())  # squares may overflow
        if is_infinite or bool(tensor.isnan().any()) or (entry != "exp_avg" and bool((tensor < 0).any())):
            raise ValueError(tr("{name} has numbers that it cannot have", name=name))
        if lacking := [other for other in ("step", *AVERAGES) if f"{parameter}/{other}" not in tensors]:
            raise ValueError(tr("it has no {name}", name=f"{parameter}/{lacking[0]}"))
    if parameters and not tensors:
        raise ValueError(tr("it is empty"))
