"""The table of preference losses: what each needs, sums of several, and the objective that the step trains with.

A new preference loss is a function in `pair_losses.py` or `label_losses.py`, its record in LOSSES and its name in
config/loss_sum.py (docs/extending.md).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import reduce

import torch
from torch import Tensor

from yeonma.batch.batch import Batch
from yeonma.config.loss_sum import weighted_losses
from yeonma.data.task import LABELLED, PAIRS, Task
from yeonma.errors import UserError
from yeonma.messages import tr
from yeonma.model.transfer import to_device
from yeonma.tokenization.example import AnswerRole
from yeonma.train.label_losses import (
    BCO_START,
    KTO_MEASURE,
    LABEL_METRICS,
    LabelledLogprobs,
    apo_zero_unpaired_loss,
    bco_carry,
    bco_loss,
    bco_point,
    kto_loss,
    kto_point,
    label_metric_sums,
    no_point,
    report_by_label,
)
from yeonma.train.losses import (
    LOG_SQUARE,
    Carried,
    Objective,
    StepMeasure,
    Sums,
    answer_logprobs,
    at,
    like,
    reference_logprobs_of,
)
from yeonma.train.pair_losses import (
    AOT_MEASURE,
    AOT_UNPAIRED_MEASURE,
    PAIR_METRICS,
    PairLogprobs,
    PreferenceOptions,
    ReferenceLogprobs,
    aot_loss,
    aot_unpaired_loss,
    apo_down_loss,
    apo_zero_loss,
    bco_pair_loss,
    chosen_sft_loss,
    cpo_loss,
    discopop_loss,
    exo_pair_loss,
    hinge_loss,
    ipo_loss,
    nca_pair_loss,
    orpo_loss,
    pair_metric_sums,
    pairs_of,
    robust_loss,
    sft_term,
    sigmoid_loss,
    sigmoid_norm_loss,
    simpo_loss,
    sppo_hard_loss,
    wpo_weights,
)


@dataclass(frozen=True)
class PreferenceLoss:
    """A preference loss: its function, and what it needs."""

    name: str
    """The value of `--loss`."""
    function: Callable[..., Tensor]
    """Pairs: (PairLogprobs, ReferenceLogprobs | None, PreferenceOptions) -> loss_P, without the supervised term.
    Labelled answers: (LabelledLogprobs, PreferenceOptions) -> loss_R."""
    options: frozenset[str]
    """The fields of PreferenceOptions that the loss reads. Setting any other is an error."""
    needs_reference: bool = True
    sft_weight: float = 0.0
    """Default weight of `sft_term`, from the paper."""
    per_token_reward: bool = False
    """For losses without a reference: whether rewards are means over the answer's tokens instead of sums, as in the
    loss."""
    task: Task = PAIRS
    """The kind of data that it trains on."""
    above_zero: Mapping[str, str] = field(default_factory=dict)
    """Options that must be above 0, and the value that the paper uses."""
    measures: tuple[StepMeasure, ...] = ()
    """What the loss must know of the whole step."""
    point: Callable[[LabelledLogprobs, PreferenceOptions], Tensor] = no_point
    """Labelled answers: the log-ratio at which an answer counts as neither good nor bad, for the metrics."""
    start: Carried = field(default_factory=dict)
    """Numbers that go from step to step, as they are before the first."""
    carry: Callable[[Carried, Mapping[str, float], int], Carried] | None = None
    """See `Objective`."""

    @property
    def measured(self) -> list[str]:
        """The names of the extras that follow from the whole step."""
        return [name for measure in self.measures for name in measure.names]


_PAIR_OPTIONS = frozenset({"beta", "sft_weight", "wpo_weights"})
"""Options of every pair loss. Its function reads only beta: `pair_losses` adds the supervised term, and the weights."""
_SMOOTHED = _PAIR_OPTIONS | {"label_smoothing"}
_DIVERGENCE = frozenset({"f_divergence", "f_alpha"})
_UNWEIGHTED = frozenset({"wpo_weights"})
_LABEL_OPTIONS = frozenset({"beta", "kto_desirable_weight", "kto_undesirable_weight"})

LOSSES: Mapping[str, PreferenceLoss] = {
    loss.name: loss
    for loss in (
        PreferenceLoss("sigmoid", sigmoid_loss, _SMOOTHED | _DIVERGENCE),
        PreferenceLoss("sigmoid_norm", sigmoid_norm_loss, _SMOOTHED | _DIVERGENCE),
        PreferenceLoss("hinge", hinge_loss, _PAIR_OPTIONS | _DIVERGENCE),
        PreferenceLoss("ipo", ipo_loss, _PAIR_OPTIONS | _DIVERGENCE),
        PreferenceLoss("robust", robust_loss, _SMOOTHED | _DIVERGENCE),
        PreferenceLoss(
            "exo_pair", exo_pair_loss, _SMOOTHED | _DIVERGENCE, above_zero={"label_smoothing": "0.001"}
        ),
        PreferenceLoss("nca_pair", nca_pair_loss, _PAIR_OPTIONS),
        PreferenceLoss("bco_pair", bco_pair_loss, _PAIR_OPTIONS),
        PreferenceLoss("sppo_hard", sppo_hard_loss, _PAIR_OPTIONS),
        PreferenceLoss("aot", aot_loss, _SMOOTHED - _UNWEIGHTED, measures=(AOT_MEASURE,)),
        PreferenceLoss(
            "aot_unpaired",
            aot_unpaired_loss,
            _SMOOTHED - _UNWEIGHTED,
            measures=(AOT_UNPAIRED_MEASURE,),
        ),
        PreferenceLoss("discopop", discopop_loss, _PAIR_OPTIONS | _DIVERGENCE | {"discopop_tau"}),
        PreferenceLoss("apo_zero", apo_zero_loss, _PAIR_OPTIONS),
        PreferenceLoss("apo_down", apo_down_loss, _PAIR_OPTIONS),
        PreferenceLoss(
            "simpo",
            simpo_loss,
            _SMOOTHED | {"simpo_gamma"},
            needs_reference=False,
            per_token_reward=True,
        ),
        PreferenceLoss("cpo", cpo_loss, _SMOOTHED, needs_reference=False, sft_weight=1.0),
        PreferenceLoss(
            "orpo", orpo_loss, _PAIR_OPTIONS, needs_reference=False, sft_weight=1.0, per_token_reward=True
        ),
        PreferenceLoss(
            "sft",
            chosen_sft_loss,
            _PAIR_OPTIONS - {"beta"},
            needs_reference=False,
            per_token_reward=True,
        ),
        PreferenceLoss(
            "kto", kto_loss, _LABEL_OPTIONS, task=LABELLED, measures=(KTO_MEASURE,), point=kto_point
        ),
        PreferenceLoss("apo_zero_unpaired", apo_zero_unpaired_loss, _LABEL_OPTIONS, task=LABELLED),
        PreferenceLoss(
            "bco",
            bco_loss,
            _LABEL_OPTIONS,
            task=LABELLED,
            point=bco_point,
            start=BCO_START,
            carry=bco_carry,
        ),
    )
}
"""All preference losses, by name."""


def preference_loss(name: str) -> PreferenceLoss:
    """The record of a loss, or of the weighted sum of several (`sigmoid:1,sft:0.5`). Raises UserError if one has
    none."""
    parts = weighted_losses(name)
    for part, _ in parts:
        if part not in LOSSES:
            cure = tr("add a PreferenceLoss to LOSSES in yeonma/train/preference_losses.py")
            raise UserError(tr("this loss has no record"), place=f"loss {part}", cure=cure)
    return _weighted_sum(name, [(LOSSES[part], weight) for part, weight in parts])


def _weighted_sum(name: str, parts: Sequence[tuple[PreferenceLoss, float]]) -> PreferenceLoss:
    """The sum as a loss of its own, with what all parts need; the metrics are those of the first part. The supervised
    term has the weights of the parts' papers, times those of the parts."""
    (first, weight), losses = parts[0], [loss for loss, _ in parts]
    if len(parts) == 1 and weight == 1:
        return first

    def function(*arguments: object) -> Tensor:
        return sum((weight * loss.function(*arguments) for loss, weight in parts), torch.zeros(()))

    options = frozenset[str]().union(*(loss.options for loss in losses))
    if not all("wpo_weights" in loss.options for loss in losses):
        options -= _UNWEIGHTED
    carrying = [loss for loss in losses if loss.carry is not None]
    return replace(
        first,
        name=name,
        function=function,
        options=options,
        needs_reference=any(loss.needs_reference for loss in losses),
        sft_weight=sum(weight * loss.sft_weight for loss, weight in parts),
        above_zero=reduce(lambda all_of, loss: {**all_of, **loss.above_zero}, losses, {}),
        measures=tuple(measure for loss in losses for measure in loss.measures),
        start=carrying[0].start if carrying else {},
        carry=carrying[0].carry if carrying else None,
    )


def pair_losses(
    loss: PreferenceLoss,
    policy: PairLogprobs,
    reference: ReferenceLogprobs | None,
    options: PreferenceOptions,
) -> Tensor:
    """loss_P, times WPO's weights if wanted, plus the supervised term. `reference` may be None for a loss that needs
    none."""
    loss_P = loss.function(policy, reference, options)
    if options.wpo_weights and policy.weight_P is not None:
        loss_P = loss_P * policy.weight_P
    weight = loss.sft_weight if options.sft_weight is None else options.sft_weight
    return loss_P + weight * sft_term(policy) if weight else loss_P


def preference_objective(loss: PreferenceLoss, options: PreferenceOptions, cutoff_len: int) -> Objective:
    """The objective of a preference loss. If it needs a reference, batches must have the extra REFERENCE_LOGPROB.
    Answers that are only measured are cut to `cutoff_len` tokens."""
    objective = _OBJECTIVES[loss.task.name](loss, options)
    return replace(objective, measures=loss.measures, cutoff_len=cutoff_len)


def _pair_objective(loss: PreferenceLoss, options: PreferenceOptions) -> Objective:
    def sums(logprob_N: Tensor, batch: Batch) -> Sums:
        chosen, rejected = pairs_of(batch)
        logprob_E = answer_logprobs(logprob_N, batch.trained_counts_E)
        weight_P = None
        if options.wpo_weights:
            square_N = like(logprob_E, batch.token_extras[LOG_SQUARE])
            aligned_E = logprob_E.detach() - answer_logprobs(square_N, batch.trained_counts_E)
            weight_P = wpo_weights(aligned_E / like(logprob_E, batch.trained_counts_E), chosen, rejected)
        policy = PairLogprobs(
            chosen_P=at(logprob_E, chosen),
            rejected_P=at(logprob_E, rejected),
            chosen_tokens_P=like(logprob_E, batch.trained_counts_E[chosen]),
            rejected_tokens_P=like(logprob_E, batch.trained_counts_E[rejected]),
            weight_P=weight_P,
            step={name: like(logprob_E, batch.example_extras[name][chosen]) for name in loss.measured},
        )
        reference = None
        if loss.needs_reference:
            reference_E = reference_logprobs_of(logprob_E, batch)
            reference = ReferenceLogprobs(at(reference_E, chosen), at(reference_E, rejected))
        loss_P = pair_losses(loss, policy, reference, options)
        metrics = pair_metric_sums(policy, reference, options, per_token=loss.per_token_reward)
        return loss_P.sum(), metrics

    return Objective(
        "dpo", per_token=False, sums=sums, metrics=PAIR_METRICS, reads_squares=options.wpo_weights
    )


def _label_objective(loss: PreferenceLoss, options: PreferenceOptions) -> Objective:
    names = [*loss.start, *loss.measured]

    def sums(logprob_N: Tensor, batch: Batch) -> Sums:
        logprob_R = answer_logprobs(logprob_N, batch.trained_counts_E)
        answers = LabelledLogprobs(
            logprob_R=logprob_R,
            reference_R=reference_logprobs_of(logprob_R, batch),
            tokens_R=like(logprob_R, batch.trained_counts_E),
            desirable_R=to_device(batch.roles_E == AnswerRole.DESIRABLE, logprob_R.device),
            step={name: like(logprob_R, batch.example_extras[name][:1]).squeeze(0) for name in names},
        )
        metrics = label_metric_sums(answers, loss.point(answers, options), options)
        return loss.function(answers, options).sum(), metrics

    return Objective(
        "dpo",
        per_token=False,
        sums=sums,
        metrics=LABEL_METRICS,
        report=report_by_label,
        start=loss.start,
        carry=loss.carry,
    )


_OBJECTIVES = {PAIRS.name: _pair_objective, LABELLED.name: _label_objective}
