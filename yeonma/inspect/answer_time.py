"""The time of the answers at evaluations, as part of a forecast's time."""

from __future__ import annotations

from yeonma.config.settings import RunConfig
from yeonma.inspect.forecast import Forecast, with_answers
from yeonma.train.card_time import answer_work
from yeonma.train.prepare import Prepared
from yeonma.train.target_device import TargetDevice


def with_run_answers(
    forecast: Forecast, config: RunConfig, prepared: Prepared, target: TargetDevice, share: float = 1.0
) -> Forecast:
    """The forecast with the answers of a run's evaluations: before the first step, every `eval_steps` and after the
    last. `share`: the part of the run that is left."""
    total = prepared.plan.total_steps
    every = config.evaluation.eval_steps or prepared.plan.steps_per_epoch
    evaluations = 1 + total // every + (total % every > 0)
    work = answer_work(prepared.answers, prepared.dataset, prepared.config, target.device.type)
    return with_answers(forecast, work, share * evaluations)
